//! Ending a sprite.
//!
//! ```text
//!  record: deleted ─▶ node frees VM and disk ─▶ name free ─▶ record removed
//! ```
//!
//! From the first step on it is gone for everybody. Each step is idempotent; after a crash the next create of the name, the next destroy, or the
//! sweep goes on where it stopped. The head stays for ever as a tombstone (ruling 1).

use std::time::Duration;

use blockstore::bucket::RecordError;
use jiff::Timestamp;
use proto::{id::SpriteName, record::SpriteRecord};

use super::{RACES_MAX, Service};
use crate::{
    index::{AGE_MAX, record_key},
    names::{NameEntry, PENDING_MAX, now},
    refusal::{Refusal, chain},
};

/// The sweep leaves what changed more recently: whoever is at it may still be.
const SWEEP_AGE_MIN: Duration = Duration::from_secs(2 * PENDING_MAX.as_secs());
/// Sprites freed in one sweep.
const SWEEP_MAX: usize = 16;

impl Service {
    /// Destroys the sprite. Returns when its name is free.
    pub(crate) async fn destroy(&self, org: &str, name: &str) -> Result<(), Refusal> {
        let (service, org, name) = (self.clone(), org.to_owned(), name.to_owned());
        Self::detached(async move { service.destroy_here(&org, &name).await }).await
    }

    async fn destroy_here(&self, org: &str, name: &str) -> Result<(), Refusal> {
        let record = self.mark_deleted(org, name).await?;
        self.index().put(record.clone());
        self.finish_destroy(&record).await?;
        tracing::info!(sprite = %record.id, name, org, "destroyed");
        Ok(())
    }

    /// The record with its flag set, also if it was set before: a destroy that failed can be repeated.
    async fn mark_deleted(&self, org: &str, name: &str) -> Result<SpriteRecord, Refusal> {
        let not_found = || Refusal::NotFound { name: name.to_owned() };
        let parsed = name.parse::<SpriteName>().map_err(|_no_sprite_has_it| not_found())?;
        for _ in 0..RACES_MAX {
            let id = self.id(org, &parsed).await?.ok_or_else(not_found)?;
            let old = self.0.bucket.read_record::<SpriteRecord>(&record_key(id)).await?.ok_or_else(not_found)?;
            if old.value.deleted {
                return Ok(old.value);
            }
            let new = SpriteRecord { deleted: true, updated_at: now(), ..old.value.clone() };
            match self.0.bucket.update_record(&old, new).await {
                Ok(record) => return Ok(record.value),
                Err(RecordError::Conflict { .. } | RecordError::Superseded { .. }) => {}
                Err(RecordError::Gone { .. }) => return Err(not_found()),
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::Conflict(format!("{name} is being changed by many at once; try again")))
    }

    /// The steps after the flag.
    pub(super) async fn finish_destroy(&self, record: &SpriteRecord) -> Result<(), Refusal> {
        match self.node().destroy(record.id).await {
            Ok(()) => {}
            Err(status) if status.code() == tonic::Code::NotFound => {}
            Err(status) => return Err(status.into()),
        }
        self.0.names.free(&record.org, &record.name, record.id, record.created_at).await?;
        self.0.bucket.delete(&record_key(record.id)).await?;
        self.index().remove(record.id);
        Ok(())
    }

    /// Frees what unfinished destroys and lost creates left behind.
    pub(super) async fn sweep(&self) -> Result<(), Refusal> {
        self.index().refresh(AGE_MAX).await?;
        let now = Timestamp::now();
        let is_old = |record: &SpriteRecord| now.duration_since(record.updated_at).unsigned_abs() > SWEEP_AGE_MIN;
        let dead = self.index().dead();
        for record in dead.iter().filter(|record| is_old(record)).take(SWEEP_MAX) {
            if !record.deleted && !self.is_nobodys(record).await? {
                continue;
            }
            tracing::info!(sprite = %record.id, name = %record.name, "freeing what was left of it");
            if let Err(error) = self.finish_destroy(record).await {
                tracing::warn!(sprite = %record.id, "cannot be freed yet: {}", chain(&error));
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) async fn sweep_now(&self) {
        self.index().refresh(Duration::ZERO).await.unwrap();
        self.sweep().await.unwrap();
    }

    /// Looks again, at this moment: nobody's claim can come to mean this record any more.
    async fn is_nobodys(&self, record: &SpriteRecord) -> Result<bool, Refusal> {
        let name = self.0.names.read(&record.org, &record.name).await?;
        Ok(match name.map(|name| name.value) {
            Some(NameEntry::Claimed { id, .. }) => id != record.id,
            Some(NameEntry::Pending { since, .. }) => since != record.created_at,
            Some(NameEntry::Free { .. }) => true,
            // A name object is never deleted: this bucket is not whole, so nothing is destroyed.
            None => false,
        })
    }
}
