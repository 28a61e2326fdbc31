//! The engine against models and faults. Each volume is small; the bucket is in memory, behind a wrapper that fails on demand.

mod archive;
mod bad_s3;
mod compaction;
mod faults;
mod fork;
mod model;
mod recovery;
mod seal;
mod sharing;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use proto::id::SpriteId;

use self::faults::FaultyStore;
use super::*;
use crate::bucket::Bucket;

/// A host's store and its bucket.
struct Site {
    dir: tempfile::TempDir,
    faults: Arc<FaultyStore>,
    limits: Limits,
    store: Option<Arc<Store>>,
}

/// Bounds that make everything happen within a small test.
fn small_limits() -> Limits {
    Limits {
        journal_bytes: 64 << 20,
        segment_bytes: 256 << 10,
        spare_segments: 2,
        push_bytes: 256 << 10,
        push_age: Duration::from_secs(3600),
        delay_age: Duration::from_secs(3600),
        pack_bytes: 128 << 10,
        survey_pushes: 3,
        cache_bytes: 8 << 20,
        chunks_in_ram: 4,
        pages_in_ram: 16,
        order: Duration::from_secs(20),
    }
}

impl Site {
    async fn new(limits: Limits) -> Self {
        let mut site =
            Self { dir: tempfile::tempdir().unwrap(), faults: Arc::new(FaultyStore::default()), limits, store: None };
        site.open().await;
        site
    }

    fn bucket(&self) -> Bucket {
        Bucket::from_store(Arc::clone(&self.faults) as _)
    }

    fn store_dir(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    /// Opens the store; an open one is dropped first, as a process that ends.
    async fn open(&mut self) {
        drop(self.store.take());
        self.store = Some(self.other("a", &self.store_dir()).await);
    }

    async fn other(&self, node: &str, dir: &Path) -> Arc<Store> {
        let (bucket, limits) = (self.bucket(), self.limits.clone());
        Store::open(StoreConfig { bucket, dir: dir.to_owned(), node: node.to_owned(), limits }).await.unwrap()
    }

    async fn empty_base(&self) -> BaseId {
        self.base(&[0; 4096], "empty").await
    }

    async fn base(&self, content: &[u8], digest: &str) -> BaseId {
        let image = self.dir.path().join(digest);
        fs::write(&image, content).unwrap();
        self.store().ensure_base(&image, digest, |_, _| {}).await.unwrap()
    }

    async fn volume(&self, size_bytes: u64) -> Volume {
        self.store().create(SpriteId::generate(), &self.empty_base().await, size_bytes).await.unwrap()
    }

    /// Deletes the local folder, also while files are still being prepared in it.
    fn wipe(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = fs::remove_dir_all(self.store_dir()) {
            let again = error.kind() == std::io::ErrorKind::DirectoryNotEmpty && Instant::now() < deadline;
            assert!(again, "{error}");
        }
    }

    /// Ends the process as `kill -9` does, and with `power` as a power failure that keeps as much of what was not synced.
    async fn crash(&mut self, volume: Volume, power: Option<f64>) {
        let id = volume.id();
        let device = Arc::clone(volume.device_for_tests());
        volume.stop();
        volume.ended().await;
        device.set_mode(super::core::Mode::Closed);
        drop(device.gate.write().await);
        if let Some(keep) = power {
            device.tear(keep);
        }
        drop((volume, device));
        self.open().await;
        assert!(self.store().volume(id).is_none());
    }
}

fn meta(comment: &str) -> CheckpointMeta {
    CheckpointMeta { comment: comment.to_owned(), consistency: Consistency::Filesystem, is_auto: false }
}

async fn read_all(volume: &Volume) -> Vec<u8> {
    read(volume, 0, volume.size_bytes()).await
}

async fn read(volume: &Volume, offset: u64, len: u64) -> Vec<u8> {
    let len = u32::try_from(len).unwrap();
    let bytes = volume.read(offset, len).await.unwrap();
    bytes.map_or_else(|| vec![0; len as usize], |bytes| bytes.to_vec())
}

async fn write(volume: &Volume, offset: u64, bytes: &[u8]) {
    volume.write(offset, Bytes::copy_from_slice(bytes)).await.unwrap();
}

/// Bytes that do not compress, the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
