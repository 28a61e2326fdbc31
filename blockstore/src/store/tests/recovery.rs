//! What comes back after the process, the power or the host went.

use std::os::unix::fs::FileExt;

use super::{faults::Fault, *};

fn segments(site: &Site, id: SpriteId) -> Vec<PathBuf> {
    let folder = site.store_dir().join("vol").join(id.to_string()).join("journal");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_before_a_flushed_write_is_an_error_never_a_shorter_disk() {
    let mut site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    for at in 0..8u64 {
        write(&volume, at * 4096, &noise(at, 4096)).await;
        volume.flush().await.unwrap();
    }
    site.crash(volume, None).await;
    let [segment] = segments(&site, id).try_into().unwrap();
    let file = fs::File::options().read(true).write(true).open(&segment).unwrap();
    // In the payload of the third write.
    let at = 4096 + 2 * (64 + 4096) + 1000;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    let error = site.store().acquire(id).await.unwrap_err();
    assert!(matches!(&error, StoreError::Damaged { reason, .. } if reason.contains("write 3 ")), "{error}");
    // Nothing changed: with the bit back, everything is there.
    file.write_all_at(&byte, at).unwrap();
    let volume = site.store().acquire(id).await.unwrap();
    for at in 0..8u64 {
        assert_eq!(read(&volume, at * 4096, 4096).await, noise(at, 4096));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recycled_segment_does_not_bring_old_writes_back() {
    let mut site = Site::new(small_limits()).await;
    let (first, second) = (site.volume(1 << 20).await, site.volume(1 << 20).await);
    let id = second.id();
    for at in 0..8u64 {
        write(&first, at * 4096, &noise(at, 4096)).await;
    }
    first.release().await.unwrap();
    write(&second, 0, &noise(100, 4096)).await;
    second.flush().await.unwrap();
    site.crash(second, None).await;
    let second = site.store().acquire(id).await.unwrap();
    assert_eq!(second.status().lsn, Lsn(1));
    assert_eq!(read(&second, 0, 4096).await, noise(100, 4096));
    assert_eq!(read(&second, 4096, 65536).await, vec![0; 65536]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_checkpoints_survive_the_process_and_their_numbers_are_not_used_again() {
    let mut site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    site.faults.set(Some(Fault::Away));
    for number in 1..=3u8 {
        write(&volume, 0, &[number; 4096]).await;
        let sealed = volume.seal_checkpoint(meta("local")).await.unwrap();
        assert_eq!((sealed.id.as_str(), sealed.durable), (format!("v{number}").as_str(), false));
    }
    write(&volume, 0, &[9; 4096]).await;
    site.crash(volume, None).await;
    site.faults.set(Some(Fault::HeadsRefused));
    assert!(site.store().acquire(id).await.is_err());
    site.faults.set(None);
    let volume = site.store().acquire(id).await.unwrap();
    let listed = volume.checkpoints().await;
    assert_eq!(listed.iter().map(|c| c.id.as_str()).collect::<Vec<_>>(), ["v1", "v2", "v3"]);
    assert!(listed[2].is_current_base && listed[2].comment == "local");
    assert_eq!(read(&volume, 0, 4096).await, [9; 4096]);
    for (id, number) in [("v2", 2), ("v1", 1), ("v3", 3)] {
        volume.restore(id).await.unwrap();
        assert_eq!(read(&volume, 0, 4096).await, [number; 4096]);
    }
    assert_eq!(volume.seal_checkpoint(meta("")).await.unwrap().id, "v4");
    assert_eq!(volume.status().generation, Generation(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_whose_host_is_lost_before_its_push_is_listed_as_lost() {
    let mut site = Site::new(Limits { push_age: Duration::from_secs(3600), ..small_limits() }).await;
    let volume = site.volume(16 << 20).await;
    let id = volume.id();
    for at in 0..5u64 {
        write(&volume, at << 20, &noise(at, 1 << 20)).await;
    }
    // Large enough to be announced. The announcement passes, then heads are refused.
    volume.seal_checkpoint(meta("big")).await.unwrap();
    eventually("announced", async || {
        let head = site.store().head(id).await.unwrap().unwrap();
        if head.checkpoints.is_empty() {
            return false;
        }
        site.faults.set(Some(Fault::HeadsRefused));
        true
    })
    .await;
    let durable = site.store().head(id).await.unwrap().unwrap().checkpoints[0].kept.is_some();
    site.crash(volume, None).await;
    drop(site.store.take());
    site.wipe();
    site.faults.set(None);
    site.open().await;
    let volume = site.store().acquire(id).await.unwrap();
    let [listed] = volume.checkpoints().await.try_into().unwrap();
    assert_eq!((listed.durable, listed.lost), (durable, !durable));
    if !durable {
        assert!(matches!(volume.restore("v1").await, Err(CheckpointError::Lost { .. })));
        assert!(matches!(volume.wait_durable("v1").await, Err(CheckpointError::Lost { .. })));
        assert_eq!(volume.status().generation, Generation(2));
    }
    assert_eq!(volume.seal_checkpoint(meta("")).await.unwrap().id, "v2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_drops_what_was_written_since_also_after_a_crash() {
    let mut site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    write(&volume, 0, &[1; 65536]).await;
    volume.seal_checkpoint(meta("")).await.unwrap();
    write(&volume, 0, &[2; 65536]).await;
    volume.flush().await.unwrap();
    volume.restore("v1").await.unwrap();
    site.crash(volume, None).await;
    let volume = site.store().acquire(id).await.unwrap();
    assert_eq!(read(&volume, 0, 65536).await, [1; 65536]);
    write(&volume, 0, &[3; 512]).await;
    volume.flush().await.unwrap();
    site.crash(volume, Some(0.0)).await;
    let volume = site.store().acquire(id).await.unwrap();
    assert_eq!(read(&volume, 0, 1024).await, [[3; 512], [1; 512]].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_grows_and_only_grows() {
    let mut site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    volume.resize(3 << 20).await.unwrap();
    write(&volume, (3 << 20) - 512, &[7; 512]).await;
    for wrong in [1 << 20, (3 << 20) + 1, 1 << 50] {
        assert!(matches!(volume.resize(wrong).await, Err(VolumeError::BadSize { .. })));
    }
    site.crash(volume, None).await;
    let volume = site.store().acquire(id).await.unwrap();
    assert_eq!(volume.size_bytes(), 3 << 20);
    assert_eq!(read(&volume, (3 << 20) - 512, 512).await, [7; 512]);
    assert!(volume.write(3 << 20, Bytes::from_static(b"x")).await.is_err());
}
