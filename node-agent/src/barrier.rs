//! `sprite sync`: waits until what a sprite has written is in the bucket, where it outlives the host.
//!
//! ```text
//!  runs?  ── yes ──▶ the guest writes its page cache to the disk ──┐
//!     └───── no ─────────── it has done that before it slept ──────┴──▶ push everything ──▶ watermark, generation
//! ```
//! A guest that could not write all within the 2 s it gets before it sleeps (logged then) keeps the rest in its memory, which a barrier does not cover.

use std::time::Duration;

use blockstore::store::{StoreError, Volume, VolumeError};
use proto::id::SpriteId;
use tokio::time::timeout;

use crate::{
    agent::{AgentClient, CallError},
    host::{Host, WakeError},
    vm::change::chain,
};

/// What a guest may have dirty is bounded by its memory.
const GUEST_LIMIT: Duration = Duration::from_secs(60);

/// Where the bucket is after a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reached {
    /// Everything written before it is in the bucket.
    pub(crate) watermark_unix_ms: u64,
    /// Another one than at the last barrier: what that one promised may have been rolled back since, by a restore or a loss.
    pub(crate) generation: u64,
}

/// Why it is not known that everything is in the bucket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BarrierError {
    #[error("sprite {0} is not on this host")]
    NotHere(SpriteId),
    #[error("the guest, which holds unwritten data in memory, cannot be asked")]
    Wake(#[source] WakeError),
    #[error("the guest cannot write what it holds in memory to its disk")]
    Guest(#[source] CallError),
    #[error("the guest has not written what it holds in memory to its disk within {GUEST_LIMIT:?}")]
    Silent,
    #[error(
        "not everything is in the bucket yet; it is on the host's disk, and is pushed as soon as the bucket takes it"
    )]
    Push(#[source] VolumeError),
    #[error("cannot see what of the disk is in the bucket")]
    Head(#[source] StoreError),
}

/// A barrier for a sprite of this host. Does not wake it.
///
/// # Cancel safety
///
/// Dropped, the push goes on as it would without.
pub(crate) async fn barrier(host: &Host, id: SpriteId) -> Result<Reached, BarrierError> {
    let status = host.status(id).ok_or(BarrierError::NotHere(id))?;
    let store = &host.resources().store;
    if status.state == "running" {
        let running = host.running(id).await.map_err(BarrierError::Wake)?;
        let volume = store.volume(id).ok_or(BarrierError::NotHere(id))?;
        return of_running(&running.agent, &volume).await;
    }
    match store.volume(id) {
        Some(volume) => push(&volume).await,
        None => {
            let head = store.head(id).await.map_err(BarrierError::Head)?.ok_or(BarrierError::NotHere(id))?;
            Ok(Reached { watermark_unix_ms: head.cut_unix_ms, generation: head.generation.0 })
        }
    }
}

pub(crate) async fn of_running(agent: &AgentClient, volume: &Volume) -> Result<Reached, BarrierError> {
    match timeout(GUEST_LIMIT, agent.sync()).await {
        Ok(synced) => synced.map_err(BarrierError::Guest)?,
        Err(_elapsed) => return Err(BarrierError::Silent),
    }
    push(volume).await
}

async fn push(volume: &Volume) -> Result<Reached, BarrierError> {
    volume.push().await.map_err(BarrierError::Push)?;
    let status = volume.status();
    tracing::debug!(sprite = %volume.id(), lsn = %status.pushed_lsn, "a barrier was reached");
    Ok(Reached { watermark_unix_ms: status.watermark_unix_ms, generation: status.generation.0 })
}

impl From<BarrierError> for tonic::Status {
    fn from(error: BarrierError) -> Self {
        let text = chain(&error);
        match error {
            BarrierError::NotHere(id) => proto::not_here(id),
            BarrierError::Silent => Self::deadline_exceeded(text),
            BarrierError::Wake(_) | BarrierError::Guest(_) | BarrierError::Push(_) | BarrierError::Head(_) => {
                Self::unavailable(text)
            }
        }
    }
}
