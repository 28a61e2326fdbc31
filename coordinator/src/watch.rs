//! Following the sprites of an organisation: first what is, then what changes. Behind `GET /v1/sprites` as NDJSON and `WatchSprites`.

use std::{collections::HashMap, time::Duration};

use proto::id::SpriteId;
use serde_json::Value;
use tokio::time::Instant;

use crate::{
    refusal::Refusal,
    service::Service,
    view::{View, org_json},
};

/// Changes made by other coordinators are seen after this.
const LOOK_PERIOD: Duration = Duration::from_secs(5);

/// What a watcher was told of a sprite, and would be told again if it changes.
#[derive(PartialEq, Eq)]
struct Told {
    status: &'static str,
    state: String,
    reason: String,
    updated_at: jiff::Timestamp,
}

/// One change in what a watcher can see.
pub(crate) enum Seen {
    Sprite(Box<View>),
    Gone(String),
}

/// Follows the sprites of one organisation.
pub(crate) struct Watch {
    service: Service,
    org: String,
    prefix: String,
    told: HashMap<SpriteId, (String, Told)>,
    changed: tokio::sync::watch::Receiver<u64>,
    stop: tokio::sync::watch::Receiver<bool>,
    is_begun: bool,
}

impl Watch {
    /// # Errors
    ///
    /// When the first state of things cannot be had.
    pub(crate) async fn begin(service: &Service, org: &str, prefix: &str) -> Result<Self, Refusal> {
        service.index().refresh(Duration::ZERO).await?;
        Ok(Self {
            service: service.clone(),
            org: org.to_owned(),
            prefix: prefix.to_owned(),
            told: HashMap::new(),
            changed: service.index().watch(),
            stop: service.stop(),
            is_begun: false,
        })
    }

    /// What changed since the last call, at the latest after `limit`. `None` when the coordinator ends.
    pub(crate) async fn next(&mut self, limit: Duration) -> Option<Vec<Seen>> {
        if !self.is_begun {
            self.is_begun = true;
            self.changed.mark_unchanged();
            return Some(self.look());
        }
        let end = Instant::now() + limit;
        loop {
            let look_at = end.min(Instant::now() + LOOK_PERIOD);
            tokio::select! {
                changed = self.changed.changed() => changed.ok()?,
                () = tokio::time::sleep_until(look_at) => {
                    if let Err(error) = self.service.index().refresh(LOOK_PERIOD).await {
                        tracing::debug!("a watcher sees no news: {error}");
                    }
                }
                () = crate::stopped(&mut self.stop) => return None,
            }
            self.changed.mark_unchanged();
            let seen = self.look();
            if !seen.is_empty() || Instant::now() >= end {
                return Some(seen);
            }
        }
    }

    fn look(&mut self) -> Vec<Seen> {
        let mut seen = Vec::new();
        let mut now = HashMap::new();
        for view in self.service.all(&self.org, &self.prefix) {
            let status = view.status.clone().unwrap_or_default();
            let told = Told {
                status: view.word(),
                state: status.state,
                reason: status.reason,
                updated_at: view.record.updated_at,
            };
            let id = view.record.id;
            let is_news = self.told.remove(&id).is_none_or(|(_, before)| before != told);
            now.insert(id, (view.record.name.to_string(), told));
            if is_news {
                seen.push(Seen::Sprite(Box::new(view)));
            }
        }
        seen.extend(self.told.drain().map(|(_, (name, _))| Seen::Gone(name)));
        self.told = now;
        seen
    }

    /// The organisation's counters.
    pub(crate) fn org_json(&self) -> Value {
        org_json(&self.org, self.service.index().counts(&self.org))
    }
}
