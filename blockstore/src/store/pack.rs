//! A pack: many frames and pages in one immutable object.
//!
//! ```text
//!  header (64)   magic, format, flags, origin, epoch, seq
//!  frames …      in the order of their place on the disk; then pages, children before parents
//!  directory     one entry (16) each: what, where, length
//!  footer (64)   length of the directory, its CRC32C, blake3 of all before
//! ```
//! Readers go by the manifest and need no directory: it is for salvage and for compaction.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::task::JoinSet;

use super::{
    fetch::Fetcher,
    head::{Origin, PackId, Place},
    types::VolumeError,
};
use crate::bucket::BucketError;

const MAGIC: &[u8; 8] = b"SPRPACK1";
const HEADER_BYTES: usize = 64;
/// Packs of one writer that are under way to the bucket; each is in memory meanwhile.
const UPLOADS_MAX: usize = 4;
/// Tries of one pack before the writer hears of it; the client below has its own.
const ATTEMPTS: u32 = 3;

/// What an entry of the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A chunk, by its number.
    Chunk(u64),
    /// A page of the manifest, by its level.
    Page(u8),
}

struct Builder {
    id: PackId,
    bytes: BytesMut,
    directory: BytesMut,
}

impl Builder {
    fn new(id: PackId, capacity: usize) -> Self {
        let mut bytes = BytesMut::with_capacity(capacity);
        let (kind, origin) = id.origin.code();
        bytes.put_slice(MAGIC);
        bytes.put_u32_le(1);
        bytes.put_u32_le(0);
        bytes.put_u8(kind);
        bytes.put_slice(&origin);
        bytes.put_u64_le(id.epoch);
        bytes.put_u32_le(id.seq);
        bytes.resize(HEADER_BYTES, 0);
        Self { id, bytes, directory: BytesMut::new() }
    }

    fn add(&mut self, item: Item, stored: &[u8]) -> Place {
        let offset = u32::try_from(self.bytes.len()).expect("a pack is below 80 MiB");
        let len = u32::try_from(stored.len()).expect("a frame or page is below 80 MiB");
        let what = match item {
            Item::Chunk(number) => number,
            Item::Page(level) => u64::from(level) | 1 << 63,
        };
        self.directory.put_u64_le(what);
        self.directory.put_u32_le(offset);
        self.directory.put_u32_le(len);
        self.bytes.put_slice(stored);
        Place { pack: self.id, offset, len }
    }

    fn finish(self) -> Bytes {
        let Self { mut bytes, directory, .. } = self;
        bytes.put_slice(&directory);
        let hash = blake3::hash(&bytes);
        bytes.put_slice(MAGIC);
        bytes.put_u64_le(directory.len() as u64);
        bytes.put_u32_le(crc32c::crc32c(&directory));
        bytes.put_bytes(0, 12);
        bytes.put_slice(hash.as_bytes());
        bytes.freeze()
    }
}

/// Names for new packs: numbers of one owner's epoch, used once.
#[derive(Clone, Debug)]
pub(super) struct PackNames {
    pub(super) origin: Origin,
    pub(super) epoch: u64,
    next: Arc<AtomicU32>,
}

impl PackNames {
    pub(super) fn new(origin: Origin, epoch: u64) -> Self {
        Self { origin, epoch, next: Arc::default() }
    }

    /// Packs named from now on have this number or a higher one.
    pub(super) fn mark(&self) -> u32 {
        self.next.load(Ordering::Relaxed)
    }

    fn next(&self) -> PackId {
        PackId { origin: self.origin, epoch: self.epoch, seq: self.next.fetch_add(1, Ordering::Relaxed) }
    }
}

/// Fills packs and uploads them side by side. Dropped, it leaves orphans at most.
pub(super) struct PackWriter {
    fetcher: Arc<Fetcher>,
    names: PackNames,
    pack_bytes: usize,
    builder: Option<Builder>,
    uploads: JoinSet<Result<(), BucketError>>,
}

impl PackWriter {
    pub(super) fn new(fetcher: Arc<Fetcher>, names: PackNames, pack_bytes: usize) -> Self {
        Self { fetcher, names, pack_bytes, builder: None, uploads: JoinSet::new() }
    }

    pub(super) async fn add_frame(&mut self, chunk: u64, stored: &[u8]) -> Result<Place, VolumeError> {
        self.add(Item::Chunk(chunk), stored).await
    }

    pub(super) async fn add_page(&mut self, level: u8, bytes: &[u8]) -> Result<Place, VolumeError> {
        self.add(Item::Page(level), bytes).await
    }

    async fn add(&mut self, item: Item, stored: &[u8]) -> Result<Place, VolumeError> {
        let full = self.builder.as_ref().is_some_and(|builder| builder.bytes.len() + stored.len() > self.pack_bytes);
        if full {
            self.upload().await?;
        }
        let (names, capacity) = (&self.names, stored.len() + HEADER_BYTES);
        Ok(self.builder.get_or_insert_with(|| Builder::new(names.next(), capacity)).add(item, stored))
    }

    async fn upload(&mut self) -> Result<(), VolumeError> {
        let Some(builder) = self.builder.take() else { return Ok(()) };
        while self.uploads.len() >= UPLOADS_MAX {
            self.join_one().await?;
        }
        let fetcher = Arc::clone(&self.fetcher);
        self.uploads.spawn(async move {
            let id = builder.id;
            let bytes = builder.finish();
            let key = id.key();
            let mut attempt = 1;
            loop {
                match fetcher.bucket.put(&key, bytes.clone()).await {
                    Ok(()) => break,
                    Err(error) if attempt == ATTEMPTS || error.retry() != crate::bucket::Retry::Soon => {
                        return Err(error);
                    }
                    Err(error) => tracing::debug!(key, %error, attempt, "a pack is not written yet"),
                }
                attempt += 1;
            }
            fetcher.keep_pack(id, bytes).await;
            Ok(())
        });
        Ok(())
    }

    async fn join_one(&mut self) -> Result<(), VolumeError> {
        match self.uploads.join_next().await {
            Some(Ok(Ok(()))) | None => Ok(()),
            Some(Ok(Err(error))) => Err(VolumeError::Bucket(error)),
            Some(Err(panicked)) => Err(VolumeError::Local(std::io::Error::other(panicked))),
        }
    }

    /// Returns when everything added is in the bucket.
    pub(super) async fn finish(mut self) -> Result<(), VolumeError> {
        self.upload().await?;
        while !self.uploads.is_empty() {
            self.join_one().await?;
        }
        Ok(())
    }
}
