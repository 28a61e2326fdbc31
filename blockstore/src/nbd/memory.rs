//! A thin disk in memory: forgets everything with its process. For benchmarks of the server itself, and for tests of its clients.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use super::export::{DeviceError, Extent, ExtentKind};

const CHUNK_BYTES: u64 = 64 << 10;

type Chunk = RwLock<Option<Box<[u8]>>>;

/// See the module's header. Clones share the disk.
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    size_bytes: u64,
    chunks: Vec<Chunk>,
    flushes: AtomicU64,
    /// Answer of every operation while set.
    failure: Mutex<Option<DeviceError>>,
    /// Changes wait while true.
    held: watch::Sender<bool>,
}

/// The part of one request that lies in one chunk.
struct Piece {
    chunk: usize,
    within: Range<usize>,
}

impl MemoryDisk {
    pub fn new(size_bytes: u64) -> Self {
        let chunks = (0..size_bytes.div_ceil(CHUNK_BYTES)).map(|_| RwLock::new(None)).collect();
        let held = watch::Sender::new(false);
        let (flushes, failure) = (AtomicU64::new(0), Mutex::new(None));
        Self { inner: Arc::new(Inner { size_bytes, chunks, flushes, failure, held }) }
    }

    pub fn size_bytes(&self) -> u64 {
        self.inner.size_bytes
    }

    /// How many chunks of 64 KiB hold data.
    pub fn written_chunks(&self) -> usize {
        let written = |chunk: &&Chunk| chunk.read().unwrap_or_else(PoisonError::into_inner).is_some();
        self.inner.chunks.iter().filter(written).count()
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> u64 {
        self.inner.flushes.load(Ordering::Relaxed)
    }

    /// Makes every following operation fail; `None` ends it.
    pub fn fail_with(&self, failure: Option<DeviceError>) {
        *self.inner.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// Lets changes wait, as a device does whose journal is full, until called with `false`.
    pub fn hold(&self, held: bool) {
        self.inner.held.send_replace(held);
    }

    pub(super) async fn read(&self, offset: u64, len_bytes: u32) -> Result<Bytes, DeviceError> {
        self.check()?;
        let mut out = BytesMut::with_capacity(len_bytes as usize);
        for piece in pieces(offset, u64::from(len_bytes)) {
            let chunk = self.inner.chunks[piece.chunk].read().unwrap_or_else(PoisonError::into_inner);
            match &*chunk {
                Some(bytes) => out.extend_from_slice(&bytes[piece.within]),
                None => out.resize(out.len() + piece.within.len(), 0),
            }
        }
        Ok(out.freeze())
    }

    pub(super) async fn write(&self, offset: u64, mut bytes: Bytes) -> Result<(), DeviceError> {
        self.ready_to_change().await?;
        for piece in pieces(offset, bytes.len() as u64) {
            let part = bytes.split_to(piece.within.len());
            let mut chunk = self.inner.chunks[piece.chunk].write().unwrap_or_else(PoisonError::into_inner);
            chunk.get_or_insert_with(empty_chunk)[piece.within].copy_from_slice(&part);
        }
        Ok(())
    }

    pub(super) async fn zero(&self, offset: u64, len_bytes: u32, trim: bool) -> Result<(), DeviceError> {
        self.ready_to_change().await?;
        for piece in pieces(offset, u64::from(len_bytes)) {
            let mut chunk = self.inner.chunks[piece.chunk].write().unwrap_or_else(PoisonError::into_inner);
            match &mut *chunk {
                Some(_) if trim && piece.within.len() as u64 == CHUNK_BYTES => *chunk = None,
                Some(bytes) => bytes[piece.within].fill(0),
                None => {}
            }
        }
        Ok(())
    }

    pub(super) async fn flush(&self) -> Result<(), DeviceError> {
        self.check()?;
        self.inner.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(super) async fn extents(&self, offset: u64, len_bytes: u32) -> Result<Vec<Extent>, DeviceError> {
        self.check()?;
        let extent = |piece: Piece| {
            let chunk = self.inner.chunks[piece.chunk].read().unwrap_or_else(PoisonError::into_inner);
            let kind = if chunk.is_some() { ExtentKind::Data } else { ExtentKind::Hole };
            Extent { len_bytes: piece.within.len() as u64, kind }
        };
        Ok(pieces(offset, u64::from(len_bytes)).map(extent).collect())
    }

    fn check(&self) -> Result<(), DeviceError> {
        match *self.inner.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    async fn ready_to_change(&self) -> Result<(), DeviceError> {
        if *self.inner.held.borrow() {
            let released = self.inner.held.subscribe().wait_for(|held| !held).await.map(drop);
            released.expect("the sender lives in self");
        }
        self.check()
    }
}

fn empty_chunk() -> Box<[u8]> {
    let len = usize::try_from(CHUNK_BYTES).expect("64 KiB fit");
    vec![0; len].into()
}

/// The caller has checked that the range lies on the disk.
fn pieces(offset: u64, len_bytes: u64) -> impl Iterator<Item = Piece> {
    let end = offset + len_bytes;
    let index = |value: u64| usize::try_from(value).expect("a disk in memory fits into memory");
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (chunk, from) = (at / CHUNK_BYTES, at % CHUNK_BYTES);
        let to = CHUNK_BYTES.min(from + (end - at));
        at += to - from;
        Some(Piece { chunk: index(chunk), within: index(from)..index(to) })
    })
}
