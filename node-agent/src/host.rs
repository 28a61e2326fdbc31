//! The host: every sprite this node agent runs or can wake.

use std::sync::Arc;

use proto::id::SpriteId;

use crate::{agent::AgentClient, net::SpriteNet};

/// Handle to the node agent's sprites. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Host {}

/// A sprite that answers, held awake for as long as this value lives.
#[derive(Debug)]
pub struct Running {
    pub agent: AgentClient,
    pub net: Arc<SpriteNet>,
    /// How it was found: `none` (was running), `paused`, `memory`, `disk`.
    pub was: &'static str,
}

/// Why a sprite cannot serve a request.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    #[error("sprite {0} is not on this host")]
    NotHere(SpriteId),
    #[error("this host has no room to wake sprite {0}; retry, or free memory")]
    NoCapacity(SpriteId),
    #[error("sprite {sprite} cannot start: {reason}")]
    Failed { sprite: SpriteId, reason: String },
    #[error("sprite {0} did not come up in time")]
    Timeout(SpriteId),
}

impl Host {
    /// Wakes the sprite if it sleeps and holds it awake. The request waits; concurrent calls share one wake.
    pub async fn running(&self, id: SpriteId) -> Result<Running, WakeError> {
        Err(WakeError::NotHere(id))
    }
}
