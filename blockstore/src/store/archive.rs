//! What the bucket alone says of volumes: for operators' tools. Reads only; needs neither a host's folder nor ownership.
//!
//! A volume that is open somewhere goes on meanwhile: what is seen is its newest push, or a checkpoint. Its owner may delete packs that no tree of a newer
//! head names; a [`verify`](Archive::verify) that misses something looks at the head again before it calls that damage.

use std::{
    collections::HashSet,
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use proto::id::SpriteId;
use serde::Serialize;

use super::{
    cache::DiskCache,
    fetch::{Fetcher, blocking},
    frame::CHUNK_BYTES,
    head::{Head, HeadState, Origin, Place, Root, checkpoint_id, head_key},
    page::Page,
    tree,
    types::{Limits, StoreError, VolumeError},
    volume::number_of,
};
use crate::bucket::Bucket;

/// Leaf pages that are read at a time; each brings up to 128 chunks, one after the other.
const LEAVES_AT_A_TIME: usize = 8;
/// Looks at a head that changes under the verification.
const VERIFY_ATTEMPTS: u32 = 3;
/// Damaged places that are listed; the rest is counted.
const DAMAGE_LISTED_MAX: usize = 100;

/// The volumes in a bucket.
pub struct Archive {
    fetcher: Fetcher,
}

/// Why a volume cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("cannot use {path} for what is fetched")]
    Scratch { path: std::path::PathBuf, source: io::Error },
    #[error("volume {0} does not exist in the bucket")]
    Unknown(SpriteId),
    #[error("volume {0} was destroyed")]
    Destroyed(SpriteId),
    #[error("volume {id} has no checkpoint {checkpoint:?} in the bucket; `inspect` shows those it has")]
    NoCheckpoint { id: SpriteId, checkpoint: String },
    #[error("cannot read the bucket")]
    Read(#[from] VolumeError),
    #[error("cannot read the head")]
    Head(#[source] StoreError),
    #[error("cannot list the packs")]
    List(#[source] crate::bucket::BucketError),
    #[error("cannot write the image")]
    Write(#[source] io::Error),
}

/// One volume, as its head and its packs say. Bytes are of the disk unless they are of the bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub id: SpriteId,
    pub state: HeadState,
    pub node: Option<String>,
    pub epoch: u64,
    pub generation: u64,
    pub lsn: u64,
    /// Everything written before it is here.
    pub cut_unix_ms: u64,
    pub size_bytes: u64,
    /// In whole chunks, shared ones included.
    pub used_bytes: u64,
    pub checkpoints: Vec<CheckpointSummary>,
    /// Bytes of the guest's memory, if an image of it belongs to this disk.
    pub memory_bytes: Option<u64>,
    /// What this one began as.
    pub parent: Option<SpriteId>,
    pub forks: Vec<SpriteId>,
    /// Its own packs in the bucket.
    pub packs: u64,
    pub pack_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckpointSummary {
    pub id: String,
    pub created_unix_ms: u64,
    pub comment: String,
    pub durable: bool,
    pub lost: bool,
    pub used_bytes: u64,
}

/// A disk that can be read: a volume at its newest push, or at a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    root: Option<Root>,
    pub size_bytes: u64,
}

impl Disk {
    /// Bytes in chunks that hold data.
    pub fn used_bytes(&self) -> u64 {
        self.root.map_or(0, |root| root.chunks * CHUNK_BYTES)
    }
}

/// What a verification read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Disks and memory images, checkpoints included.
    pub trees: u64,
    pub pages: u64,
    pub chunks: u64,
    /// Places that are missing or not what their parent says; the first hundred.
    pub damaged: Vec<String>,
    pub damaged_count: u64,
}

impl Archive {
    /// `scratch`: an empty folder of the caller's, for what is fetched; at most [`Limits::cache_bytes`].
    pub fn open(bucket: Bucket, scratch: &Path, limits: &Limits) -> Result<Self, ArchiveError> {
        let cache = DiskCache::open(scratch, limits.cache_bytes);
        let cache = cache.map_err(|source| ArchiveError::Scratch { path: scratch.to_owned(), source })?;
        Ok(Self { fetcher: Fetcher::new(bucket, cache, limits) })
    }

    async fn head(&self, id: SpriteId) -> Result<Head, ArchiveError> {
        let read = self.fetcher.bucket.read_record::<Head>(&head_key(id)).await;
        let head = read.map_err(|source| ArchiveError::Head(StoreError::Head { id, source }))?;
        Ok(head.ok_or(ArchiveError::Unknown(id))?.value)
    }

    pub async fn summary(&self, id: SpriteId) -> Result<Summary, ArchiveError> {
        let head = self.head(id).await?;
        let listed = self.fetcher.bucket.list(&Origin::of_volume(id).packs()).await.map_err(ArchiveError::List)?;
        let used = |root: Option<Root>| root.map_or(0, |root| root.chunks * CHUNK_BYTES);
        Ok(Summary {
            id,
            state: head.state,
            epoch: head.epoch.0,
            generation: head.generation.0,
            lsn: head.lsn.0,
            cut_unix_ms: head.cut_unix_ms,
            size_bytes: head.size_bytes,
            used_bytes: used(head.root),
            checkpoints: head
                .checkpoints
                .iter()
                .map(|kept| CheckpointSummary {
                    id: checkpoint_id(kept.number),
                    created_unix_ms: kept.created_unix_ms,
                    comment: kept.comment.clone(),
                    durable: kept.kept.is_some(),
                    lost: kept.lost,
                    used_bytes: used(kept.kept.as_ref().and_then(|kept| kept.root)),
                })
                .collect(),
            memory_bytes: head.memory.as_ref().filter(|_| head.has_memory()).map(|memory| memory.memory_bytes),
            parent: head.parent,
            forks: head.forks.iter().map(|fork| fork.child).collect(),
            packs: listed.len() as u64,
            pack_bytes: listed.iter().map(|entry| entry.size_bytes).sum(),
            node: head.node,
        })
    }

    /// The disk at `checkpoint`, or at the newest push.
    pub async fn disk(&self, id: SpriteId, checkpoint: Option<&str>) -> Result<Disk, ArchiveError> {
        let head = self.head(id).await?;
        if head.is_deleted() {
            return Err(ArchiveError::Destroyed(id));
        }
        let Some(checkpoint) = checkpoint else { return Ok(Disk { root: head.root, size_bytes: head.size_bytes }) };
        let kept = number_of(checkpoint).ok().and_then(|number| head.checkpoint(number)?.kept.clone());
        let kept = kept.ok_or_else(|| ArchiveError::NoCheckpoint { id, checkpoint: checkpoint.to_owned() })?;
        Ok(Disk { root: kept.root, size_bytes: kept.size_bytes })
    }

    /// Writes the disk into an empty file, sparse where it holds nothing. `progress` gets bytes done, of [`Disk::used_bytes`].
    pub async fn export(&self, disk: Disk, file: &File, progress: impl Fn(u64)) -> Result<(), ArchiveError> {
        file.set_len(disk.size_bytes).map_err(ArchiveError::Write)?;
        let file = Arc::new(file.try_clone().map_err(ArchiveError::Write)?);
        let done = AtomicU64::new(0);
        let (done, progress) = (&done, &progress);
        self.leaves(disk.root)
            .map_err(ArchiveError::Read)
            .try_for_each_concurrent(LEAVES_AT_A_TIME, |(first, page)| {
                let file = Arc::clone(&file);
                async move {
                    let Page::Leaves(leaves) = &*page else { return Ok(()) };
                    for (index, leaf) in leaves.iter().enumerate() {
                        let chunk = self.fetcher.chunk(leaves, index).await?;
                        let offset = (first + u64::from(leaf.slot)) * CHUNK_BYTES;
                        let len = usize::try_from(disk.size_bytes.saturating_sub(offset).min(CHUNK_BYTES));
                        let chunk = chunk.slice(..len.unwrap_or(0));
                        let file = Arc::clone(&file);
                        let written = blocking(move || file.write_all_at(&chunk, offset)).await?;
                        written.map_err(ArchiveError::Write)?;
                        progress(done.fetch_add(CHUNK_BYTES, Ordering::Relaxed) + CHUNK_BYTES);
                    }
                    Ok(())
                }
            })
            .await
    }

    /// Reads everything that a volume names, checkpoints and memory included, and checks it against its hashes. `progress` gets bytes done.
    pub async fn verify(&self, id: SpriteId, progress: impl Fn(u64)) -> Result<Verified, ArchiveError> {
        let mut attempt = 0;
        loop {
            let head = self.head(id).await?;
            if head.is_deleted() {
                return Err(ArchiveError::Destroyed(id));
            }
            let verified = self.verify_head(&head, &progress).await?;
            attempt += 1;
            // A pack that the owner has compacted away since is no damage.
            let moved_on = verified.damaged_count > 0 && self.head(id).await? != head;
            if !moved_on || attempt >= VERIFY_ATTEMPTS {
                return Ok(verified);
            }
        }
    }

    async fn verify_head(&self, head: &Head, progress: &impl Fn(u64)) -> Result<Verified, ArchiveError> {
        let kept = head.checkpoints.iter().filter_map(|checkpoint| checkpoint.kept.as_ref()?.root);
        let memory = head.memory.iter().flat_map(|memory| [memory.root, memory.state_root]).flatten();
        let roots: Vec<Root> = head.root.into_iter().chain(kept).chain(memory).collect();
        let mut verified = Verified { trees: roots.len() as u64, ..Verified::default() };
        let mut seen = HashSet::new();
        let mut left: Vec<_> = roots.into_iter().map(|root| (root.place, root.hash, 0)).collect();
        while !left.is_empty() {
            let next = left.split_off(left.len().saturating_sub(LEAVES_AT_A_TIME));
            let new: Vec<_> = next.into_iter().filter(|(place, ..)| seen.insert(*place)).collect();
            let reads: Vec<_> =
                new.into_iter().map(|(place, hash, first)| self.checked_page(place, hash, first)).collect();
            let read: Vec<_> = stream::iter(reads).buffered(LEAVES_AT_A_TIME).collect().await;
            for read in read {
                match read {
                    Ok(CheckedPage { first, page, damaged }) => {
                        verified.pages += 1;
                        if matches!(*page, Page::Leaves(_)) {
                            verified.chunks += page.chunks();
                        }
                        damaged.into_iter().for_each(|what| verified.note(what));
                        left.extend(tree::below(&page, first));
                    }
                    Err(VolumeError::Integrity(what)) => verified.note(what),
                    Err(error) => return Err(error.into()),
                }
            }
            progress(verified.chunks * CHUNK_BYTES);
        }
        Ok(verified)
    }

    async fn checked_page(&self, place: Place, hash: [u8; 32], first: u64) -> Result<CheckedPage, VolumeError> {
        let page = self.fetcher.page(place, hash).await?;
        let mut damaged = Vec::new();
        if let Page::Leaves(leaves) = &*page {
            for index in 0..leaves.len() {
                match self.fetcher.chunk(leaves, index).await {
                    Ok(_) => {}
                    Err(VolumeError::Integrity(what)) => damaged.push(what),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(CheckedPage { first, page, damaged })
    }

    /// The leaf pages under `root`, with the first chunk of each.
    fn leaves(&self, root: Option<Root>) -> impl stream::Stream<Item = Result<(u64, Arc<Page>), VolumeError>> {
        let stack: Vec<_> = root.into_iter().map(|root| (root.place, root.hash, 0)).collect();
        stream::try_unfold(stack, move |mut stack| async move {
            while let Some((place, hash, first)) = stack.pop() {
                let page = self.fetcher.page(place, hash).await?;
                if matches!(*page, Page::Leaves(_)) {
                    return Ok(Some(((first, page), stack)));
                }
                let from = stack.len();
                stack.extend(tree::below(&page, first));
                stack[from..].reverse();
            }
            Ok(None)
        })
    }
}

/// A page that is what its parent says, and which of the chunks it names are not.
struct CheckedPage {
    first: u64,
    page: Arc<Page>,
    damaged: Vec<String>,
}

impl Verified {
    pub fn is_whole(&self) -> bool {
        self.damaged_count == 0
    }

    fn note(&mut self, what: String) {
        self.damaged_count += 1;
        if self.damaged.len() < DAMAGE_LISTED_MAX {
            self.damaged.push(what);
        }
    }
}
