//! Sleep, wake, restart, resize, and checkpoints: the node does them, the registry says which sprite.

use std::pin::Pin;

use futures_util::{Stream, StreamExt as _};
use proto::{
    node::{SleepReply, SpriteStatus, SyncReply, WakeReply},
    paths::CURRENT_CHECKPOINT,
    public::{Checkpoint, CheckpointEvent},
    record::{CHECKPOINT_COMMENT_BYTES_MAX, SpriteRecord},
};

use super::Service;
use crate::{refusal::Refusal, view::View};

/// What a checkpoint or restore says while it goes on; an error is the last item.
pub(crate) type CheckpointEvents = Pin<Box<dyn Stream<Item = Result<CheckpointEvent, Refusal>> + Send>>;

impl Service {
    pub(crate) async fn sleep(&self, org: &str, name: &str, to: &str) -> Result<(View, SleepReply), Refusal> {
        if !matches!(to, "" | "paused" | "suspended" | "cold") {
            return Err(Refusal::Invalid(format!("cannot sleep {to:?}: use paused, suspended or cold")));
        }
        let (service, to) = (self.clone(), to.to_owned());
        let record = self.record(org, name).await?.value;
        Self::detached(async move {
            let reply = service.node().sleep(record.id, &to).await?;
            Ok((service.seen(record, reply.status.as_ref()), reply))
        })
        .await
    }

    pub(crate) async fn wake(&self, org: &str, name: &str) -> Result<(View, WakeReply), Refusal> {
        let record = self.record(org, name).await?.value;
        let reply = self.node().wake(record.id).await?;
        Ok((self.seen(record, reply.status.as_ref()), reply))
    }

    fn seen(&self, record: SpriteRecord, status: Option<&SpriteStatus>) -> View {
        if let Some(status) = status {
            self.index().learn(record.id, status);
        }
        View { record: record.into(), status: status.cloned() }
    }

    pub(crate) async fn restart(&self, org: &str, name: &str) -> Result<SpriteRecord, Refusal> {
        let record = self.record(org, name).await?.value;
        let service = self.clone();
        Self::detached(async move { Ok(service.node().restart(record.id).await.map(|()| record)?) }).await
    }

    /// Grows the disk; wakes the sprite for it.
    pub(crate) async fn resize(&self, org: &str, name: &str, disk_bytes: u64) -> Result<View, Refusal> {
        let id = self.record(org, name).await?.value.id;
        let (service, org, name) = (self.clone(), org.to_owned(), name.to_owned());
        Self::detached(async move {
            let disk_bytes = service.node().resize(id, disk_bytes).await?;
            let change = move |record: &mut SpriteRecord| record.disk_bytes = disk_bytes;
            let record = service.change(&org, &name, change).await?;
            Ok(service.view(record).await)
        })
        .await
    }

    /// Returns when everything the sprite wrote before is in the bucket. Does not wake it.
    pub(crate) async fn sync(&self, org: &str, name: &str) -> Result<SyncReply, Refusal> {
        let record = self.record(org, name).await?.value;
        Ok(self.node().sync(record.id).await?)
    }

    pub(crate) async fn create_checkpoint(
        &self,
        org: &str,
        name: &str,
        comment: String,
        durable: bool,
    ) -> Result<CheckpointEvents, Refusal> {
        // Before anything is frozen for it.
        if comment.len() > CHECKPOINT_COMMENT_BYTES_MAX {
            return Err(Refusal::Invalid(format!(
                "the comment has {} bytes; a checkpoint's comment has at most {CHECKPOINT_COMMENT_BYTES_MAX}",
                comment.len()
            )));
        }
        let record = self.record(org, name).await?.value;
        let events = self.node().create_checkpoint(record.id, comment, durable).await?;
        Ok(Box::pin(events.map(|event| event.map_err(Refusal::from))))
    }

    pub(crate) async fn restore(&self, org: &str, name: &str, checkpoint: &str) -> Result<CheckpointEvents, Refusal> {
        let record = self.record(org, name).await?.value;
        let events = self.node().restore_checkpoint(record.id, checkpoint).await?;
        Ok(Box::pin(events.map(|event| event.map_err(Refusal::from))))
    }

    /// Newest first.
    pub(crate) async fn checkpoints(&self, org: &str, name: &str) -> Result<Vec<Checkpoint>, Refusal> {
        let record = self.record(org, name).await?.value;
        let mut checkpoints = self.node().checkpoints(record.id).await?;
        checkpoints.sort_by_key(|checkpoint| (std::cmp::Reverse(checkpoint.create_unix_ms), number(&checkpoint.id)));
        Ok(checkpoints)
    }

    pub(crate) async fn delete_checkpoint(&self, org: &str, name: &str, checkpoint: &str) -> Result<(), Refusal> {
        let record = self.record(org, name).await?.value;
        if checkpoint == CURRENT_CHECKPOINT {
            return Err(Refusal::Conflict("the live state is not a checkpoint and cannot be deleted".to_owned()));
        }
        let (service, checkpoint) = (self.clone(), checkpoint.to_owned());
        Self::detached(async move { service.node().delete_checkpoint(record.id, &checkpoint).await }).await
    }
}

/// Higher numbers first among those of one moment.
fn number(id: &str) -> std::cmp::Reverse<u64> {
    std::cmp::Reverse(id.trim_start_matches('v').parse().unwrap_or_default())
}
