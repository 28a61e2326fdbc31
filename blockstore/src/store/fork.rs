//! Forks: a volume that begins as a checkpoint of another one. Costs two small objects, whatever the sizes.
//!
//! ```text
//!  fork      parent's head: pin (child, root) ─▶ child's head: root, parent
//!  destroy   child's head: tombstone ─▶ its packs, but for what its own forks name ─▶ has none? pin out of the parent's head
//!            ├── a parent that is a tombstone itself: what nobody names any more goes, and so on upwards
//!            └── on the way back: parent out of the tombstone
//! ```
//!
//! # Invariants
//!
//! 1. *A pin is there before the child is, and goes after it.* It is taken from a checkpoint of the same head in the same step, so that a survey of the
//!    parent which does not know the pin yet knows the checkpoint (`compact`).
//! 2. *A volume's pins outlive it*, and the pin on its own parent stays as long: what a grandchild names of the grandparent is held by the line between.
//! 3. Every step can be repeated. A crash leaves a pin too many, never one too few: destroying again takes it out, and a parent that is written to
//!    finds pins whose child is not there ([`gone`]).

use std::{collections::HashSet, time::Duration};

use futures_util::{StreamExt, stream};
use proto::id::SpriteId;

use super::{
    compact,
    core::now_unix_ms,
    head::{Fork, Head, KeptDisk, Origin, PackId, Root, checkpoint_id, head_key},
    open::{Start, Store},
    types::{CheckpointError, ForkError, StoreError, VolumeError},
    volume::{Volume, number_of},
};
use crate::bucket::Bucket;

/// Forks of one volume. Keeps the head far below the largest record.
const FORKS_MAX: usize = 1000;
/// Packs of a destroyed volume deleted side by side.
const DELETES_MAX: usize = 16;
/// The head of a fork is made right after its pin; one that is not there after so long never will be.
const BIRTH_LIMIT: Duration = Duration::from_secs(3600);
/// Looking at what the forks of a destroyed volume need.
const NAMED_LIMIT: Duration = Duration::from_secs(60);
/// Heads of forks read in one survey of the parent.
const CHECKS_MAX: usize = 64;

/// The disk of a checkpoint that is in the bucket.
pub(super) fn kept(head: &Head, number: u32) -> Result<KeptDisk, CheckpointError> {
    let id = checkpoint_id(number);
    let Some(known) = head.checkpoint(number) else { return Err(CheckpointError::Unknown { id }) };
    known.kept.clone().ok_or(CheckpointError::Lost { id })
}

pub(super) fn pin(head: &mut Head, child: SpriteId, root: Option<Root>, since_unix_ms: u64) {
    head.forks.retain(|fork| fork.child != child);
    head.forks.push(Fork { child, root, since_unix_ms });
}

/// Pins for which there is no volume: it was destroyed by a host that died at it, or never made. Looks at some of them, others at the next time.
pub(super) async fn gone(bucket: &Bucket, forks: &[Fork]) -> Vec<SpriteId> {
    let limit = u64::try_from(BIRTH_LIMIT.as_millis()).unwrap_or(u64::MAX);
    let old = |fork: &&Fork| now_unix_ms().saturating_sub(fork.since_unix_ms) > limit;
    let mut gone = Vec::new();
    let old: Vec<&Fork> = forks.iter().filter(old).collect();
    // From anywhere on: living ones at the begin must not hide dead ones behind them.
    let from = if old.is_empty() { 0 } else { rand::Rng::random_range(&mut rand::rng(), 0..old.len()) };
    for Fork { child, .. } in old.iter().cycle().skip(from).take(old.len().min(CHECKS_MAX)) {
        match bucket.read_record::<Head>(&head_key(*child)).await {
            Ok(None) => gone.push(*child),
            Ok(Some(head)) if head.value.is_deleted() && head.value.forks.is_empty() => gone.push(*child),
            Ok(Some(_)) => {}
            Err(error) => tracing::debug!(volume = %child, %error, "a fork's head cannot be read; its pin stays"),
        }
    }
    gone
}

impl Store {
    /// Creates a volume that begins as a checkpoint of another one, and opens it. The parent may be open here, or nobody's; it may be destroyed later.
    ///
    /// `disk_bytes`: at least so large; `None`: as large as the checkpoint's.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it may leave a volume, which [`destroy`](Self::destroy) frees, or only a pin, which the parent finds when it is next written to.
    pub async fn fork(
        &self,
        id: SpriteId,
        parent: SpriteId,
        checkpoint: &str,
        disk_bytes: Option<u64>,
    ) -> Result<Volume, ForkError> {
        let of_parent = |source| ForkError::Parent { parent, checkpoint: checkpoint.to_owned(), source };
        let number = number_of(checkpoint).map_err(of_parent)?;
        let head = self.live_head(parent).await.map_err(|error| of_parent(error.into()))?.value;
        if head.forks.len() >= FORKS_MAX {
            return Err(ForkError::TooMany { parent, max: FORKS_MAX });
        }
        let KeptDisk { root, size_bytes } = self.pin(parent, number, id).await.map_err(of_parent)?;
        if let Some(wanted_bytes) = disk_bytes.filter(|wanted| *wanted < size_bytes) {
            if let Err(error) = self.unpin(parent, id).await {
                tracing::warn!(volume = %parent, %error, "a pin for a fork that was not made stays for now");
            }
            let checkpoint = checkpoint.to_owned();
            return Err(ForkError::TooSmall { checkpoint, has_bytes: size_bytes, wanted_bytes });
        }
        let volume = match self.create_from(id, Start { root, size_bytes, parent: Some(parent) }).await {
            Ok(volume) => volume,
            // It is somebody's, with this pin.
            Err(error @ StoreError::Exists { .. }) => return Err(error.into()),
            Err(error) => {
                let cleared = async {
                    self.destroy(id).await?;
                    self.unpin(parent, id).await
                };
                if let Err(left) = cleared.await {
                    tracing::warn!(volume = %parent, error = %left, "half a fork, or its pin, stays for now");
                }
                return Err(error.into());
            }
        };
        if let Some(wanted) = disk_bytes.filter(|wanted| *wanted > size_bytes) {
            volume.resize(wanted).await.map_err(StoreError::from)?;
        }
        Ok(volume)
    }

    async fn pin(&self, parent: SpriteId, number: u32, child: SpriteId) -> Result<KeptDisk, CheckpointError> {
        if let Some(volume) = self.ours(parent).await? {
            return volume.pin(number, child).await;
        }
        let lock = self.shared.opening(parent);
        let _alone = lock.lock().await;
        let now = now_unix_ms();
        self.change_head(parent, |head| {
            if head.is_deleted() {
                return Err(StoreError::Destroyed { id: parent }.into());
            }
            let kept = kept(head, number)?;
            pin(head, child, kept.root, now);
            Ok(kept)
        })
        .await
    }

    async fn unpin(&self, parent: SpriteId, child: SpriteId) -> Result<(), StoreError> {
        if let Some(volume) = self.volume(parent) {
            match volume.unpin(child).await {
                // It was given up or destroyed meanwhile.
                Err(VolumeError::Fenced | VolumeError::Closed) => {}
                done => return Ok(done?),
            }
        }
        self.change_head(parent, |head| {
            head.forks.retain(|fork| fork.child != child);
            Ok(())
        })
        .await
    }

    /// The volume, if it is this host's: what its journal has may not be in the bucket yet.
    async fn ours(&self, id: SpriteId) -> Result<Option<Volume>, StoreError> {
        if let Some(volume) = self.volume(id).filter(Volume::is_open) {
            return Ok(Some(volume));
        }
        if self.live_head(id).await?.value.is_owned_by(&self.shared.node) {
            return self.acquire(id).await.map(Some);
        }
        Ok(None)
    }

    /// Frees what a tombstone has in the bucket, and what only it has held of the volumes it descends from.
    pub(super) async fn free(&self, id: SpriteId) -> Result<(), StoreError> {
        // From the child upwards; a parent is forgotten only when all above it is done, so that a repeat finds the way.
        let mut told = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next.take() {
            let head = self.read_head(id).await?.map(|record| record.value);
            if head.as_ref().is_some_and(|head| !head.is_deleted()) {
                break;
            }
            let forks = head.as_ref().map(|head| head.forks.as_slice()).unwrap_or_default();
            let gone = gone(self.bucket(), forks).await;
            let forks: Vec<Fork> = forks.iter().filter(|fork| !gone.contains(&fork.child)).cloned().collect();
            if !gone.is_empty() {
                let forgotten = self.change_head(id, |head| {
                    head.forks.retain(|fork| !gone.contains(&fork.child));
                    Ok::<(), StoreError>(())
                });
                forgotten.await?;
            }
            self.delete_packs(id, &forks).await?;
            let Some(parent) = head.as_ref().filter(|_| forks.is_empty()).and_then(|head| head.parent) else {
                break;
            };
            match self.unpin(parent, id).await {
                Ok(()) | Err(StoreError::Unknown { .. }) => {}
                // Its owner finds out by itself.
                Err(error @ StoreError::OwnedElsewhere { .. }) => {
                    tracing::info!(volume = %parent, %error, "a pin for a fork that is gone stays for now");
                }
                Err(error) => return Err(error),
            }
            told.push(id);
            next = Some(parent);
        }
        while let Some(id) = told.pop() {
            let forgotten = self.change_head(id, |head| {
                head.parent = None;
                Ok::<(), StoreError>(())
            });
            forgotten.await?;
        }
        Ok(())
    }

    /// Deletes the packs of a tombstone, but for those that its forks name.
    async fn delete_packs(&self, id: SpriteId, forks: &[Fork]) -> Result<(), StoreError> {
        let origin = Origin::of_volume(id);
        let roots = forks.iter().filter_map(|fork| fork.root);
        let named = tokio::time::timeout(NAMED_LIMIT, compact::named(&self.shared.fetcher, origin, roots)).await;
        let why = match named {
            Ok(Ok(named)) => return self.delete_unnamed(id, &named).await,
            Ok(Err(error)) => error.to_string(),
            Err(_elapsed) => format!("not seen within {NAMED_LIMIT:?}"),
        };
        // It is destroyed for everybody all the same; the destroy of its last fork frees them.
        tracing::warn!(volume = %id, why, "what its forks need cannot be told; all its packs stay for now");
        Ok(())
    }

    async fn delete_unnamed(&self, id: SpriteId, named: &HashSet<PackId>) -> Result<(), StoreError> {
        let (bucket, origin) = (self.bucket(), Origin::of_volume(id));
        let packs = bucket.list(&origin.prefix()).await.map_err(|source| StoreError::Bucket { id, source })?;
        let is_named = |key: &str| PackId::from_key(origin, key).is_some_and(|pack| named.contains(&pack));
        let unnamed: Vec<String> = packs.into_iter().map(|entry| entry.key).filter(|key| !is_named(key)).collect();
        let deleted = stream::iter(unnamed).map(|key| async move { bucket.delete(&key).await });
        let failed: Vec<_> = deleted.buffer_unordered(DELETES_MAX).filter_map(async |done| done.err()).collect().await;
        match failed.into_iter().next() {
            None => Ok(()),
            Some(source) => Err(StoreError::Bucket { id, source }),
        }
    }
}
