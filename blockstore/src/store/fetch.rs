//! Frames and pages by hash: RAM, then the local disk, then the bucket. One request for a run of missing ones, one requester for each run.
//!
//! Transient trouble stalls the caller with patient retries (ruling 17); only what is proven missing or damaged is an error.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{Mutex as AsyncMutex, Semaphore};

use super::{
    cache::{DiskCache, Lru},
    frame::{self, FrameHash, FrameKind, frame_hash},
    head::{PackId, Place},
    page::{Leaf, Page},
    types::{Limits, VolumeError},
};
use crate::bucket::{Bucket, BucketError, Retry};

/// Requests for data to the bucket, of all volumes together.
const REQUESTS_MAX: usize = 32;
/// Bytes fetched by one request, read-ahead included.
const RUN_BYTES_MAX: u32 = 1 << 20;
/// Unwanted bytes between two wanted frames that are cheaper than another request.
const GAP_BYTES_MAX: u32 = 128 << 10;
/// One requester at a time for so large a part of a pack.
const REGION_BYTES: u32 = RUN_BYTES_MAX;
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Reads of damaged or missing data until it is called lost.
const PROOFS: u32 = 3;
/// Answers cut short until the object itself is taken to be.
const SHORT_ANSWERS_MAX: u32 = 20;

/// Shared by all volumes of a store.
pub(super) struct Fetcher {
    pub(super) bucket: Bucket,
    cache: Arc<DiskCache>,
    chunks: Mutex<Lru<(PackId, u32), Bytes>>,
    pages: Mutex<Lru<[u8; 32], Arc<Page>>>,
    flights: Mutex<Flights>,
    requests: Semaphore,
}

/// Requests under way, by part of a pack.
type Flights = HashMap<(PackId, u32), Weak<AsyncMutex<()>>>;

/// Stored bytes to get, and how to know them.
#[derive(Clone, Copy)]
struct Wanted {
    place: Place,
    hash: Known,
}

#[derive(Clone, Copy)]
enum Known {
    Frame(FrameHash),
    Page([u8; 32]),
}

impl Known {
    fn holds(self, bytes: &[u8]) -> bool {
        match self {
            Self::Frame(hash) => frame_hash(bytes) == hash,
            Self::Page(hash) => *blake3::hash(bytes).as_bytes() == hash,
        }
    }
}

/// The pause before retry number `attempt`, with jitter.
pub(super) fn backoff(attempt: u32) -> Duration {
    let full = BACKOFF_FIRST.saturating_mul(1 << attempt.min(10)).min(BACKOFF_MAX);
    full.mul_f64(rand::Rng::random_range(&mut rand::rng(), 0.5..1.0))
}

impl Fetcher {
    pub(super) fn new(bucket: Bucket, cache: DiskCache, limits: &Limits) -> Self {
        Self {
            bucket,
            cache: Arc::new(cache),
            chunks: Mutex::new(Lru::new(limits.chunks_in_ram)),
            pages: Mutex::new(Lru::new(limits.pages_in_ram)),
            flights: Mutex::default(),
            requests: Semaphore::new(REQUESTS_MAX),
        }
    }

    /// A chunk that is in RAM.
    pub(super) fn chunk_in_ram(&self, leaf: &Leaf) -> Option<Bytes> {
        match leaf.kind {
            FrameKind::Zero => Some(frame::zero_chunk()),
            FrameKind::Raw | FrameKind::Zstd => lock(&self.chunks).get(&(leaf.place.pack, leaf.place.offset)),
        }
    }

    /// The chunk of `leaves[index]`. Its successors are fetched with it when they are cheap.
    pub(super) async fn chunk(&self, leaves: &[Leaf], index: usize) -> Result<Bytes, VolumeError> {
        let leaf = &leaves[index];
        if let Some(chunk) = self.chunk_in_ram(leaf) {
            return Ok(chunk);
        }
        let wanted = Wanted { place: leaf.place, hash: Known::Frame(leaf.hash) };
        let stored = self.stored(wanted, || run_after(leaves, index)).await?;
        let kind = leaf.kind;
        let opened = blocking(move || frame::open(kind, stored)).await?;
        let Some(chunk) = opened else { return Err(damaged(leaf.place, "it does not decompress to a chunk")) };
        lock(&self.chunks).insert((leaf.place.pack, leaf.place.offset), chunk.clone());
        Ok(chunk)
    }

    /// The frame of `leaf` as it is stored, for another place.
    pub(super) async fn frame(&self, leaf: &Leaf) -> Result<Bytes, VolumeError> {
        self.stored(Wanted { place: leaf.place, hash: Known::Frame(leaf.hash) }, Vec::new).await
    }

    pub(super) fn page_in_ram(&self, hash: &[u8; 32]) -> Option<Arc<Page>> {
        lock(&self.pages).get(hash)
    }

    pub(super) async fn page(&self, place: Place, hash: [u8; 32]) -> Result<Arc<Page>, VolumeError> {
        if let Some(page) = self.page_in_ram(&hash) {
            return Ok(page);
        }
        let stored = self.stored(Wanted { place, hash: Known::Page(hash) }, Vec::new).await?;
        let Some(page) = Page::decode(&stored) else { return Err(damaged(place, "it is no page of format 1")) };
        Ok(self.keep_page(hash, page))
    }

    pub(super) fn keep_page(&self, hash: [u8; 32], page: Page) -> Arc<Page> {
        let page = Arc::new(page);
        lock(&self.pages).insert(hash, Arc::clone(&page));
        page
    }

    /// Our own pack, just uploaded: no need to fetch it back.
    pub(super) async fn keep_pack(&self, id: PackId, bytes: Bytes) {
        let cache = Arc::clone(&self.cache);
        if let Err(error) = blocking(move || cache.write(id, 0, &bytes)).await {
            tracing::debug!(?id, %error, "cannot keep a pack");
        }
    }

    /// Gives up local copies for a disk that is full. Blocking.
    pub(super) fn make_room(&self) {
        self.cache.make_room();
    }

    /// Forgets the local copy of a pack that is no longer in the bucket.
    pub(super) async fn forget(&self, id: PackId) -> Result<(), VolumeError> {
        let cache = Arc::clone(&self.cache);
        blocking(move || cache.forget(id)).await
    }

    async fn stored(&self, wanted: Wanted, ahead: impl FnOnce() -> Vec<Wanted>) -> Result<Bytes, VolumeError> {
        if let Some(bytes) = self.on_disk(wanted).await? {
            return Ok(bytes);
        }
        let flight = self.flight(wanted.place);
        let _landed = flight.lock().await;
        if let Some(bytes) = self.on_disk(wanted).await? {
            return Ok(bytes);
        }
        self.request(wanted, ahead()).await
    }

    async fn on_disk(&self, wanted: Wanted) -> Result<Option<Bytes>, VolumeError> {
        let cache = Arc::clone(&self.cache);
        let read = blocking(move || cache.read(wanted.place).filter(|bytes| wanted.hash.holds(bytes)));
        Ok(read.await?.map(Bytes::from))
    }

    fn flight(&self, place: Place) -> Arc<AsyncMutex<()>> {
        let mut flights = lock(&self.flights);
        flights.retain(|_, flight| flight.strong_count() > 0);
        let key = (place.pack, place.offset / REGION_BYTES);
        if let Some(flight) = flights.get(&key).and_then(Weak::upgrade) {
            return flight;
        }
        let flight = Arc::default();
        flights.insert(key, Arc::downgrade(&flight));
        flight
    }

    async fn request(&self, wanted: Wanted, mut ahead: Vec<Wanted>) -> Result<Bytes, VolumeError> {
        let Place { pack, offset, len } = wanted.place;
        let key = pack.key();
        let (mut failures, mut short, mut proofs) = (0, 0, 0);
        loop {
            let end = ahead.last().map_or(offset + len, |last| last.place.offset + last.place.len);
            let read = {
                // Never closed.
                let _permit = self.requests.acquire().await;
                self.bucket.get_range(&key, u64::from(offset)..u64::from(end)).await
            };
            let why = match read {
                Ok(bytes) if wanted.hash.holds(&bytes[..len as usize]) => {
                    self.keep(offset, bytes.clone(), wanted, ahead).await?;
                    return Ok(bytes.slice(..len as usize));
                }
                Ok(_) => "its hash is wrong".to_owned(),
                Err(error) if error.retry() == Retry::Never => error.to_string(),
                // A connection that was cut, or an object that is too short: only time tells.
                Err(error @ BucketError::Truncated { .. }) if short >= SHORT_ANSWERS_MAX => error.to_string(),
                Err(error) => {
                    short += u32::from(matches!(error, BucketError::Truncated { .. }));
                    failures += 1;
                    ahead.clear();
                    tracing::warn!(key, %error, failures, "waiting for the bucket");
                    tokio::time::sleep(backoff(failures)).await;
                    continue;
                }
            };
            proofs += 1;
            ahead.clear();
            if proofs >= PROOFS {
                tracing::error!(key, offset, len, why, "data in the bucket is lost");
                return Err(damaged(wanted.place, &why));
            }
            tokio::time::sleep(backoff(proofs)).await;
        }
    }

    /// Writes what was fetched to the local disk, without what is damaged.
    async fn keep(&self, from: u32, bytes: Bytes, first: Wanted, ahead: Vec<Wanted>) -> Result<(), VolumeError> {
        let cache = Arc::clone(&self.cache);
        blocking(move || {
            for wanted in std::iter::once(first).chain(ahead) {
                let start = (wanted.place.offset - from) as usize;
                let stored = &bytes[start..start + wanted.place.len as usize];
                if wanted.hash.holds(stored) {
                    cache.write(wanted.place.pack, u64::from(wanted.place.offset), stored);
                }
            }
        })
        .await
    }
}

/// What follows `leaves[index]` closely in the same pack, so that one request brings it all.
fn run_after(leaves: &[Leaf], index: usize) -> Vec<Wanted> {
    let first = leaves[index].place;
    let mut run: Vec<Wanted> = Vec::new();
    let mut end = first.offset + first.len;
    for leaf in &leaves[index + 1..] {
        let place = leaf.place;
        if leaf.kind == FrameKind::Zero {
            continue;
        }
        let near = place.pack == first.pack && place.offset >= end && place.offset - end <= GAP_BYTES_MAX;
        if !near || place.offset + place.len - first.offset > RUN_BYTES_MAX {
            break;
        }
        end = place.offset + place.len;
        run.push(Wanted { place, hash: Known::Frame(leaf.hash) });
    }
    run
}

fn damaged(place: Place, why: &str) -> VolumeError {
    VolumeError::Integrity(format!("{} at {}: {why}", place.pack.key(), place.offset))
}

pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, VolumeError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| VolumeError::Local(std::io::Error::other(error)))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
