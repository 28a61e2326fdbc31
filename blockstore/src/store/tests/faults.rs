//! A bucket in memory that fails on demand, and what the engine makes of it.

use std::sync::Mutex;

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, memory::InMemory, path::Path as StorePath,
};

use super::*;
use crate::nbd::DeviceError;

#[derive(Debug, Default)]
pub(super) struct FaultyStore {
    inner: InMemory,
    fault: Mutex<Option<Fault>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// No answer to anything.
    Away,
    /// The same, after so many requests.
    AwayAfter(u32),
    /// Everything can be read, nothing written.
    ReadOnly,
    /// Packs are written, heads are not.
    HeadsRefused,
    /// The next write of a head takes effect, and its answer is lost.
    HeadAnswerLost,
}

impl FaultyStore {
    pub(super) fn set(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap() = fault;
    }

    /// Requests until [`Fault::AwayAfter`] begins.
    pub(super) fn left(&self) -> u32 {
        match *self.fault.lock().unwrap() {
            Some(Fault::AwayAfter(left)) => left,
            _ => 0,
        }
    }

    fn check(&self, location: &StorePath, write: bool) -> object_store::Result<bool> {
        let mut fault = self.fault.lock().unwrap();
        let head = location.as_ref().ends_with("/head");
        let broken = || Err(object_store::Error::Generic { store: "faulty", source: "on demand".into() });
        match *fault {
            Some(Fault::Away | Fault::AwayAfter(0)) => broken(),
            Some(Fault::AwayAfter(left)) => {
                *fault = Some(Fault::AwayAfter(left - 1));
                Ok(false)
            }
            Some(Fault::ReadOnly) if write => {
                let source = std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem);
                Err(object_store::Error::Generic { store: "faulty", source: source.into() })
            }
            Some(Fault::HeadsRefused) if head && write => broken(),
            Some(Fault::HeadAnswerLost) if head && write => {
                *fault = None;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

impl std::fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a bucket in memory")
    }
}

#[async_trait::async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(
        &self,
        location: &StorePath,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let lose = self.check(location, true)?;
        let done = self.inner.put_opts(location, payload, options).await?;
        if lose {
            return Err(object_store::Error::Generic { store: "faulty", source: "answer lost".into() });
        }
        Ok(done)
    }

    async fn put_multipart_opts(
        &self,
        location: &StorePath,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &StorePath, options: GetOptions) -> object_store::Result<GetResult> {
        self.check(location, false)?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<StorePath>>,
    ) -> BoxStream<'static, object_store::Result<StorePath>> {
        match self.check(&StorePath::default(), true) {
            Ok(_) => self.inner.delete_stream(locations),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&StorePath>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        match self.check(&StorePath::default(), false) {
            Ok(_) => self.inner.list(prefix),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&StorePath>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &StorePath, to: &StorePath, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_packs_and_head_leaves_orphans_only() {
    let mut site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    write(&volume, 0, &[1; 4096]).await;
    volume.push().await.unwrap();
    write(&volume, 4096, &noise(1, 8192)).await;
    site.faults.set(Some(Fault::HeadsRefused));
    site.limits.order = Duration::from_millis(300);
    let pushed = tokio::time::timeout(Duration::from_millis(700), volume.push()).await;
    assert!(!matches!(pushed, Ok(Ok(()))), "the head was not written");
    let id = volume.id();
    let packs = site.bucket().list(&format!("v1/vol/{id}")).await.unwrap().len();
    assert!(packs >= 2, "the second push got as far as its pack");
    site.crash(volume, None).await;
    site.faults.set(None);
    let volume = site.store().acquire(id).await.unwrap();
    let expected = [vec![1; 4096], noise(1, 8192)].concat();
    assert_eq!(read(&volume, 0, 12288).await, expected);
    volume.push().await.unwrap();
    volume.release().await.unwrap();
    site.wipe();
    site.open().await;
    let volume = site.store().acquire(id).await.unwrap();
    assert_eq!(read(&volume, 0, 12288).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_of_the_head_is_no_fence() {
    let site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    for round in 1..4u8 {
        write(&volume, 0, &[round; 4096]).await;
        site.faults.set(Some(Fault::HeadAnswerLost));
        volume.push().await.unwrap();
        let status = volume.status();
        assert_eq!((status.lsn, status.pushed_lsn), (Lsn(round.into()), Lsn(round.into())));
    }
    assert_eq!(site.store().head(volume.id()).await.unwrap().unwrap().lsn, Lsn(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_owner_fences_this_one_for_ever() {
    let site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    write(&volume, 0, &[1; 4096]).await;
    volume.push().await.unwrap();
    write(&volume, 0, &[2; 4096]).await;
    let other = site.other("b", &site.dir.path().join("other")).await;
    assert!(matches!(other.acquire(id).await, Err(StoreError::OwnedElsewhere { node, .. }) if node == "a"));
    // Someone decided that host a is lost.
    let key = super::super::head::head_key(id);
    let record = site.bucket().read_record::<Head>(&key).await.unwrap().unwrap();
    let head =
        Head { state: HeadState::Cold, node: None, epoch: Epoch(record.value.epoch.0 + 1), ..record.value.clone() };
    site.bucket().update_record(&record, head).await.unwrap();
    let taken = other.acquire(id).await.unwrap();
    assert_eq!(read(&taken, 0, 4096).await, [1; 4096]);
    assert!(matches!(volume.push().await, Err(VolumeError::Fenced)));
    assert_eq!(volume.write(0, Bytes::from_static(&[3; 512])).await, Err(DeviceError::Fenced));
    assert_eq!(volume.flush().await, Err(DeviceError::Fenced));
    write(&taken, 4096, &[4; 4096]).await;
    taken.push().await.unwrap();
    let lost: Vec<_> = fs::read_dir(site.store_dir().join("lost")).unwrap().collect();
    assert_eq!(lost.len(), 1, "the journal is kept for salvage");
    assert!(matches!(site.store().acquire(id).await, Err(StoreError::OwnedElsewhere { node, .. }) if node == "b"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_on_without_the_bucket_until_its_journal_is_full() {
    let limits = Limits { journal_bytes: 2 << 20, push_bytes: 64 << 10, ..small_limits() };
    let site = Site::new(limits).await;
    let volume = site.volume(8 << 20).await;
    site.faults.set(Some(Fault::Away));
    let mut written = 0;
    let refused = loop {
        assert!(written < 64, "no quota");
        match volume.write(written * (64 << 10), noise(written, 64 << 10).into()).await {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, DeviceError::NoSpace);
    assert!(written >= 16, "only {written} writes");
    volume.flush().await.unwrap();
    assert!(volume.status().bucket_away && volume.status().unpushed_bytes > 1 << 20);
    site.faults.set(None);
    eventually("pushed", async || volume.status().unpushed_bytes == 0).await;
    write(&volume, written * (64 << 10), &noise(written, 64 << 10)).await;
    for at in 0..=written {
        assert_eq!(read(&volume, at * (64 << 10), 64 << 10).await, noise(at, 64 << 10), "chunk {at}");
    }
    eventually("journal reclaimed", async || volume.status().journal_bytes <= 2 * (256 << 10)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_pack_is_an_error_and_no_zeros() {
    let mut site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    write(&volume, 0, &noise(1, 65536)).await;
    write(&volume, 65536 * 3, &noise(2, 65536)).await;
    volume.release().await.unwrap();
    site.wipe();
    let bucket = site.bucket();
    let first = format!("v1/vol/{id}/p/1-0.pack");
    let mut bytes = bucket.get(&first).await.unwrap().unwrap().bytes.to_vec();
    bytes[1000] ^= 1;
    bucket.put(&first, bytes.into()).await.unwrap();
    site.open().await;
    let volume = site.store().acquire(id).await.unwrap();
    assert_eq!(volume.read(0, 4096).await, Err(DeviceError::Integrity));
    assert_eq!(read(&volume, 65536 * 3, 65536).await, noise(2, 65536));
    for entry in bucket.list(&format!("v1/vol/{id}")).await.unwrap() {
        bucket.delete(&entry.key).await.unwrap();
    }
    assert_eq!(volume.read(0, 4096).await, Err(DeviceError::Integrity));
}

#[tokio::test(flavor = "multi_thread")]
async fn releasing_without_a_bucket_fails_in_time_and_the_volume_stays() {
    let site = Site::new(Limits { order: Duration::from_millis(300), ..small_limits() }).await;
    let volume = site.volume(1 << 20).await;
    write(&volume, 0, &[1; 512]).await;
    site.faults.set(Some(Fault::Away));
    let error = volume.clone().release().await.unwrap_err();
    assert!(matches!(error, VolumeError::Bucket(_) | VolumeError::Slow(_) | VolumeError::Head(_)), "{error}");
    write(&volume, 512, &[2; 512]).await;
    site.faults.set(None);
    volume.release().await.unwrap();
    let head = site.store().checkpoints(SpriteId::generate()).await;
    assert!(matches!(head, Err(CheckpointError::Store(error)) if matches!(*error, StoreError::Unknown { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_bucket_says_so_and_gets_everything_later() {
    let mut site = Site::new(Limits { order: Duration::from_millis(500), ..small_limits() }).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    write(&volume, 0, &noise(1, 65536)).await;
    volume.push().await.unwrap();
    site.faults.set(Some(Fault::ReadOnly));
    write(&volume, 4096, &noise(2, 65536)).await;
    let sealed = volume.seal_checkpoint(meta("")).await.unwrap();
    assert!(!sealed.durable);
    let advice = |error: VolumeError| {
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(text.contains("read-only; make it writable"), "{text}");
    };
    advice(volume.push().await.unwrap_err());
    advice(volume.clone().release().await.unwrap_err());
    assert!(matches!(volume.wait_durable(&sealed.id).await, Err(CheckpointError::Volume(VolumeError::Slow(_)))));
    // The guest goes on, also over a crash of the host.
    write(&volume, 200_000, &noise(3, 4096)).await;
    volume.flush().await.unwrap();
    let expected = read_all(&volume).await;
    assert!(expected[4096..69_632] == noise(2, 65536));
    site.crash(volume, None).await;
    site.faults.set(None);
    site.limits.order = small_limits().order;
    site.open().await;
    let volume = site.store().acquire(id).await.unwrap();
    volume.release().await.unwrap();
    site.wipe();
    site.open().await;
    let volume = site.store().acquire(id).await.unwrap();
    assert!(read_all(&volume).await == expected);
    assert!(volume.checkpoints().await[0].durable);
}

/// A small file system of its own, as root.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, bytes: u64) -> Option<Self> {
        fs::create_dir_all(&at).unwrap();
        let options = format!("size={bytes}");
        let flags = nix::mount::MsFlags::empty();
        match nix::mount::mount(Some("small"), &at, Some("tmpfs"), flags, Some(options.as_str())) {
            Ok(()) => Some(Self(at)),
            Err(error) => {
                eprintln!("SKIPPED: cannot mount a small disk: {error}; run as root");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_and_loses_none() {
    let mut site = Site::new(Limits { push_bytes: 64 << 10, ..small_limits() }).await;
    drop(site.store.take());
    site.wipe();
    let Some(_disk) = SmallDisk::mount(site.store_dir(), 8 << 20) else { return };
    site.open().await;
    let volume = site.volume(64 << 20).await;
    site.faults.set(Some(Fault::Away));
    let mut written = 0;
    let refused = loop {
        assert!(written < 200, "the disk does not fill");
        match volume.write(written << 16, noise(written, 65536).into()).await {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, DeviceError::NoSpace);
    assert!(written > 32, "only {written} writes");
    // What was accepted is there, also for the next process; a seal says what is the matter, or is really there.
    volume.flush().await.unwrap();
    let sealed = volume.seal_checkpoint(meta("")).await;
    assert!(matches!(sealed, Ok(_) | Err(CheckpointError::Volume(VolumeError::NoSpace))), "{sealed:?}");
    let id = volume.id();
    site.crash(volume, None).await;
    site.faults.set(None);
    let volume = site.store().acquire(id).await.unwrap();
    for at in 0..written {
        assert!(read(&volume, at << 16, 65536).await == noise(at, 65536), "write {at}");
    }
    assert_eq!(volume.checkpoints().await.len(), usize::from(sealed.is_ok()));
    // Space comes back with the bucket.
    eventually("pushed", async || volume.status().unpushed_bytes == 0).await;
    eventually("written again", async || volume.write(written << 16, noise(written, 65536).into()).await.is_ok()).await;
    assert!(read(&volume, written << 16, 65536).await == noise(written, 65536));
}
