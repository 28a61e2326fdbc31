//! Wakes by the clock. The record says when, and which are done: one that no host was there for is made up for.

use std::time::Duration;

use blockstore::bucket::{Bucket, RecordError};
use proto::{id::SpriteId, record::SpriteRecord};
use tokio::time::Instant;

use super::{
    super::{Event, change::chain},
    Task,
};
use crate::host::record_key;

/// Lost races for the record until a wake is not written down; each means that somebody else got on.
const SAVE_RACES_MAX: u32 = 8;

impl Task {
    pub(super) fn timer(&mut self) {
        let now = jiff::Timestamp::now();
        if self.record.as_ref().and_then(SpriteRecord::next_wake).is_some_and(|at| at <= now) {
            self.step(Event::Used);
            self.step(Event::Released);
            self.finish_wakes(now);
        }
        self.plan_wake();
        self.step(Event::Tick);
    }

    fn finish_wakes(&mut self, now: jiff::Timestamp) {
        let Some(record) = &mut self.record else { return };
        record.finish_wakes(now);
        tokio::spawn(save_wakes(self.resources.config.bucket.clone(), record.id, now));
        if let Some(parts) = &mut self.parts {
            parts.record.clone_from(&self.record);
        }
    }

    /// Sets the clock for the next wake that the record asks for. One that was missed is due at once.
    pub(super) fn plan_wake(&mut self) {
        self.next_wake = self.record.as_ref().and_then(SpriteRecord::next_wake).map(|at| {
            let delay = at.duration_since(jiff::Timestamp::now());
            Instant::now() + Duration::try_from(delay).unwrap_or_default()
        });
    }
}

/// Writes down that timed wakes until `done` are done, so that the next start of a node agent does not repeat them.
async fn save_wakes(bucket: Bucket, id: SpriteId, done: jiff::Timestamp) {
    for _ in 0..SAVE_RACES_MAX {
        let saved = match bucket.read_record::<SpriteRecord>(&record_key(id)).await {
            Ok(Some(old)) => {
                let mut new = old.value.clone();
                new.finish_wakes(done);
                bucket.update_record(&old, new).await.map(drop)
            }
            // Destroyed meanwhile.
            Ok(None) => return,
            Err(error) => Err(error),
        };
        match saved {
            Ok(()) | Err(RecordError::Superseded { .. } | RecordError::Gone { .. }) => return,
            Err(RecordError::Conflict { .. }) => {}
            Err(error) => {
                tracing::warn!(sprite = %id, error = chain(&error), "a timed wake is not written down; a restart of the node agent may repeat it");
                return;
            }
        }
    }
    tracing::warn!(sprite = %id, "a timed wake is not written down: the record is changed by many at once");
}
