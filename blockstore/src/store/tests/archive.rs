//! What tools see of a bucket.

use std::{
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    sync::atomic::{AtomicU64, Ordering},
};

use super::*;

fn archive(site: &Site, name: &str) -> Archive {
    Archive::open(site.bucket(), &site.dir.path().join(name), &small_limits()).unwrap()
}

async fn exported(archive: &Archive, id: SpriteId, checkpoint: Option<&str>) -> (Vec<u8>, u64) {
    let disk = archive.disk(id, checkpoint).await.unwrap();
    let mut file = tempfile::tempfile().unwrap();
    let done = AtomicU64::new(0);
    archive
        .export(disk, &file, |bytes| done.store(bytes.max(done.load(Ordering::Relaxed)), Ordering::Relaxed))
        .await
        .unwrap();
    assert_eq!(done.into_inner(), disk.used_bytes());
    let mut content = Vec::new();
    file.read_to_end(&mut content).unwrap();
    (content, file.metadata().unwrap().blocks() * 512)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_the_disk_at_its_newest_push_or_at_a_checkpoint() {
    let site = Site::new(small_limits()).await;
    let size = (64 << 20) + 4096;
    let volume = site.volume(size).await;
    let (then, now) = (noise(1, 300_000), noise(2, 4096));
    write(&volume, 65_000, &then).await;
    let v1 = volume.seal_checkpoint(meta("")).await.unwrap().id;
    write(&volume, size - 4096, &now).await;
    volume.push().await.unwrap();
    let archive = archive(&site, "scratch");
    let mut expected = vec![0; usize::try_from(size).unwrap()];
    expected[65_000..365_000].copy_from_slice(&then);
    let (at_v1, _) = exported(&archive, volume.id(), Some(&v1)).await;
    assert!(at_v1 == expected);
    expected[64 << 20..].copy_from_slice(&now);
    let (newest, blocks) = exported(&archive, volume.id(), None).await;
    assert!(newest == expected);
    assert!(blocks < 2 << 20, "{blocks} bytes on the disk for 300 KB of content: it is not sparse");
    let summary = archive.summary(volume.id()).await.unwrap();
    assert_eq!((summary.size_bytes, summary.checkpoints.len(), summary.parent), (size, 1, None));
    assert!(summary.packs > 0 && summary.pack_bytes > 300_000 && summary.checkpoints[0].durable);
    let missing = archive.disk(volume.id(), Some("v7")).await.unwrap_err();
    assert!(matches!(missing, ArchiveError::NoCheckpoint { .. }), "{missing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_finds_every_flipped_bit_and_lost_pack_and_nothing_in_a_whole_volume() {
    let site = Site::new(small_limits()).await;
    let volume = site.volume(8 << 20).await;
    write(&volume, 0, &noise(3, 1 << 20)).await;
    volume.seal_checkpoint(meta("")).await.unwrap();
    write(&volume, 0, &noise(4, 1 << 20)).await;
    volume.push().await.unwrap();
    let id = volume.id();
    let whole = archive(&site, "whole").verify(id, |_| {}).await.unwrap();
    assert!(whole.is_whole() && whole.trees == 2 && whole.chunks >= 32, "{whole:?}");
    let bucket = site.bucket();
    let packs = bucket.list(&format!("v1/vol/{id}/p")).await.unwrap();
    // Proof of damage takes patience: not of each pack.
    for (number, entry) in packs.iter().enumerate().step_by(packs.len() / 3) {
        let bytes = bucket.get_range(&entry.key, 0..entry.size_bytes).await.unwrap();
        let mut broken = bytes.to_vec();
        // Of the first frame or page, behind the header.
        broken[70] ^= 1;
        bucket.put(&entry.key, broken.into()).await.unwrap();
        let found = archive(&site, &format!("flip{number}")).verify(id, |_| {}).await.unwrap();
        assert!(!found.is_whole(), "a flipped bit in {} is not seen", entry.key);
        assert!(found.damaged.iter().any(|what| what.contains(&entry.key)), "{found:?}");
        bucket.delete(&entry.key).await.unwrap();
        let found = archive(&site, &format!("lost{number}")).verify(id, |_| {}).await.unwrap();
        assert!(found.damaged.iter().any(|what| what.contains(&entry.key)), "{found:?}");
        bucket.put(&entry.key, bytes).await.unwrap();
    }
    assert!(archive(&site, "again").verify(id, |_| {}).await.unwrap().is_whole());
}
