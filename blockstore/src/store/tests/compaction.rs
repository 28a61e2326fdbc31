//! What compaction frees, what it must not touch, and that it may be killed anywhere.

use futures_util::{StreamExt, stream};

use super::{faults::Fault, *};
use crate::store::head::Origin;

const CHUNK: u64 = 64 << 10;

/// Limits under which all packs of these tests are small.
fn limits(survey_pushes: u32) -> Limits {
    Limits { pack_bytes: 2 << 20, survey_pushes, ..small_limits() }
}

impl Site {
    async fn packs(&self, id: SpriteId) -> Vec<(String, u64)> {
        let listed = self.bucket().list(&Origin::of_volume(id).packs()).await.unwrap();
        listed.into_iter().map(|entry| (entry.key, entry.size_bytes)).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_tiny_pushes_leave_few_packs_and_little_waste() {
    const SURVEY: u32 = 32;
    let mut site = Site::new(limits(SURVEY)).await;
    let volume = site.volume(64 << 20).await;
    let id = volume.id();
    let mut expected = vec![0; 64 << 20];
    let mut most = 0;
    for round in 0..2000u64 {
        // A log that grows, and a table that changes here and there.
        let (log, table) = (round * 512, (32 << 20) + blake3_index(round, 64) * CHUNK);
        for (at, len) in [(log, 512), (table, 4096)] {
            let bytes = noise(round, len);
            expected[usize::try_from(at).unwrap()..][..len].copy_from_slice(&bytes);
            write(&volume, at, &bytes).await;
        }
        volume.push().await.unwrap();
        if round % 50 == 49 {
            most = most.max(site.packs(id).await.len());
        }
    }
    let bytes: u64 = site.packs(id).await.iter().map(|(_, bytes)| bytes).sum();
    // Not compressible: a megabyte of log, 64 times 4 KiB of table; and a push is one chunk of log, one of table, and pages.
    let (live, of_push) = (2000 * 512 + 64 * 4096, 80 << 10);
    assert!(most <= 4 * SURVEY as usize, "{most} packs");
    assert!(bytes <= 2 * live + 2 * u64::from(SURVEY) * of_push, "{bytes} bytes for {live}");
    volume.release().await.unwrap();
    site.wipe();
    site.open().await;
    let volume = site.store().acquire(id).await.unwrap();
    for at in (0..64 << 20).step_by(1 << 20) {
        assert!(read(&volume, at, 1 << 20).await == expected[usize::try_from(at).unwrap()..][..1 << 20], "at {at}");
    }
}

/// A number below `below`, the same for the same seed.
fn blake3_index(seed: u64, below: u64) -> u64 {
    u64::from(noise(seed, 1)[0]) % below
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_shared_new_or_foreign_stays_and_orphans_go() {
    let site = Site::new(limits(3)).await;
    let base = site.base(&noise(1, 300_000), "image").await;
    let volume = site.store().create(SpriteId::generate(), &base, 1 << 20).await.unwrap();
    let id = volume.id();
    let bucket = site.bucket();
    let shared = bucket.list("v1/tmpl").await.unwrap();
    let orphan = format!("v1/vol/{id}/p/0-7.pack");
    let foreign = [format!("v1/vol/{id}/p/1-4000.pack"), format!("v1/vol/{id}/p/2-0.pack"), format!("v1/vol/{id}/p/x")];
    for key in foreign.iter().chain([&orphan]) {
        bucket.put(key, Bytes::from_static(b"pack")).await.unwrap();
    }
    let first = volume.seal_checkpoint(meta("")).await.unwrap().id;
    for round in 0..40u64 {
        write(&volume, round % 4 * CHUNK, &noise(round, 4096)).await;
        volume.push().await.unwrap();
    }
    eventually("the orphan is deleted", async || {
        write(&volume, 0, &noise(39, 4096)).await;
        volume.push().await.unwrap();
        bucket.get(&orphan).await.unwrap().is_none()
    })
    .await;
    for key in &foreign {
        assert!(bucket.get(key).await.unwrap().is_some(), "{key}");
    }
    assert_eq!(bucket.list("v1/tmpl").await.unwrap(), shared);
    volume.restore(&first).await.unwrap();
    assert!(read(&volume, 0, 300_000).await == noise(1, 300_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_deleted_under_a_reader_or_beside_an_upload() {
    let site = Site::new(limits(3)).await;
    let volume = site.volume(1 << 20).await;
    let (id, device) = (volume.id(), Arc::clone(volume.device_for_tests()));
    let overwrite = async |rounds: u64| {
        for round in 0..rounds {
            write(&volume, 0, &noise(round, 4096)).await;
            volume.push().await.unwrap();
        }
    };
    overwrite(1).await;
    let upload = device.core().uploads.token();
    overwrite(30).await;
    assert_eq!(site.packs(id).await.len(), 31, "an upload is under way: no survey");
    let (root, reader) = device.core().read_root();
    let held = root.unwrap().place.pack.key();
    drop(upload);
    let deleted = async || !site.packs(id).await.iter().any(|(key, _)| *key == held);
    overwrite(30).await;
    assert!(!deleted().await);
    drop(reader);
    eventually("nobody reads it: deleted", async || {
        overwrite(1).await;
        deleted().await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_open_for_one_push_at_a_time_has_its_turn() {
    let mut site = Site::new(limits(8)).await;
    let mut volume = site.volume(1 << 20).await;
    let id = volume.id();
    let mut most = 0;
    for round in 0..60u64 {
        write(&volume, 0, &noise(round, 4096)).await;
        volume.push().await.unwrap();
        // Long enough for a survey, as any session is.
        eventually("surveyed", async || !volume.device_for_tests().core().is_read()).await;
        site.crash(volume, None).await;
        volume = site.store().acquire(id).await.unwrap();
        most = most.max(site.packs(id).await.len());
    }
    assert_eq!(read(&volume, 0, 4096).await, noise(59, 4096));
    assert!(most < 60, "{most} packs");
}

/// What a run against a bucket that dies had done by then.
#[derive(Default)]
struct Done {
    /// Each is allowed; a restore that did not return has two outcomes.
    contents: Vec<Vec<u8>>,
    checkpoints: Vec<(String, Vec<u8>)>,
}

const SIZE: usize = 16 * 65536;

/// The result of an order; false if the bucket died and it does not end.
async fn is_done<E>(site: &Site, order: impl Future<Output = Result<(), E>>) -> bool {
    let dead = async {
        eventually("the end", async || site.faults.left() == 0).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
    };
    tokio::select! {
        result = order => result.is_ok(),
        () = dead => false,
    }
}

/// Writes, pushes, seals and restores until it is through, or the bucket does not answer.
async fn work(site: &Site, volume: &Volume, done: &mut Done) -> bool {
    done.contents = vec![vec![0; SIZE]];
    for round in 0..40u64 {
        let at = usize::try_from(blake3_index(round, 16)).unwrap() * 65536;
        let bytes = noise(round, 4096);
        write(volume, at as u64, &bytes).await;
        done.contents[0][at..at + 4096].copy_from_slice(&bytes);
        if round % 27 == 3 {
            let sealed = volume.seal_checkpoint(meta("")).await.unwrap().id;
            done.checkpoints.push((sealed, done.contents[0].clone()));
        }
        if !is_done(site, volume.push()).await {
            return false;
        }
        eventually("compacted", async || !volume.device_for_tests().core().is_read()).await;
        if round == 24 {
            let (id, content) = &done.checkpoints[0];
            let restored = is_done(site, volume.restore(id)).await;
            done.contents.insert(0, content.clone());
            if !restored {
                return false;
            }
            done.contents.truncate(1);
        }
    }
    true
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_request_nothing_is_lost() {
    let all = killed_at(u32::MAX).await;
    assert!(all > 110, "{all} requests: compaction was not in it");
    let mut runs = stream::iter((0..all).map(killed_at)).buffer_unordered(SITES);
    while runs.next().await.is_some() {}
}

/// Most of a run is waiting.
const SITES: usize = 8;

/// Lets the bucket die at a request, kills the process, and looks. Returns how many requests were made before.
async fn killed_at(request: u32) -> u32 {
    let mut site = Site::new(limits(3)).await;
    let volume = site.volume(SIZE as u64).await;
    let id = volume.id();
    site.faults.set(Some(Fault::AwayAfter(request)));
    let mut done = Done::default();
    let whole = work(&site, &volume, &mut done).await;
    site.crash(volume, None).await;
    let left = site.faults.left();
    assert!(whole || left == 0, "killed at request {request}: it ended before");
    site.faults.set(None);
    // From the bucket alone, but for the journal.
    drop(site.store.take());
    fs::remove_dir_all(site.store_dir().join("cache")).unwrap();
    site.open().await;
    let volume = site.store().acquire(id).await.unwrap();
    let found = read_all(&volume).await;
    assert!(done.contents.contains(&found), "killed at request {request}");
    // Compaction goes on from there.
    for round in 0..16u64 {
        write(&volume, 0, &noise(round, 4096)).await;
        volume.push().await.unwrap();
    }
    for (checkpoint, content) in done.checkpoints {
        volume.restore(&checkpoint).await.unwrap();
        assert!(read_all(&volume).await == content, "{checkpoint}, killed at request {request}");
    }
    request - left
}
