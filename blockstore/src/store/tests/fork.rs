//! Volumes that begin as checkpoints of others.

use super::{super::head::Head, faults::Fault, *};

const SIZE: u64 = 4 << 20;

async fn packs_of(site: &Site, id: SpriteId) -> usize {
    site.bucket().list(&format!("v1/vol/{id}")).await.unwrap().len()
}

async fn head(site: &Site, id: SpriteId) -> Head {
    site.store().head(id).await.unwrap().unwrap()
}

/// A volume with a checkpoint of `content`, and its disk changed since.
async fn parent(site: &Site, content: &[u8]) -> (Volume, String) {
    let volume = site.volume(SIZE).await;
    write(&volume, 0, content).await;
    let checkpoint = volume.seal_checkpoint(meta("fork me")).await.unwrap().id;
    write(&volume, 0, &vec![9; content.len()]).await;
    (volume, checkpoint)
}

async fn fork(site: &Site, of: SpriteId, checkpoint: &str) -> Volume {
    site.store().fork(SpriteId::generate(), of, checkpoint, None).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_begins_as_the_checkpoint_and_goes_its_own_way() {
    let site = Site::new(small_limits()).await;
    let content = noise(1, 1 << 20);
    let (of, v1) = parent(&site, &content).await;
    // The checkpoint is not in the bucket yet.
    let child = fork(&site, of.id(), &v1).await;
    assert_eq!(packs_of(&site, child.id()).await, 0, "a fork copies nothing");
    let len = content.len() as u64;
    assert!(read(&child, 0, len).await == content);
    write(&child, 4096, &[1; 4096]).await;
    child.push().await.unwrap();
    assert!(read(&of, 0, len).await == vec![9; content.len()]);
    let other = fork(&site, of.id(), &v1).await;
    assert!(read(&other, 0, len).await == content, "one fork sees what another has written");
    assert_eq!(child.checkpoints().await, []);
    assert_eq!(child.seal_checkpoint(meta("")).await.unwrap().id, "v1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_outlives_its_parent_and_everything_is_freed_in_the_end() {
    let mut site = Site::new(small_limits()).await;
    let content = noise(2, 1 << 20);
    let (of, v1) = parent(&site, &content).await;
    of.push().await.unwrap();
    let of = of.id();
    let child = fork(&site, of, &v1).await;
    write(&child, 0, &[7; 65536]).await;
    let v1 = child.seal_checkpoint(meta("")).await.unwrap().id;
    let grandchild = fork(&site, child.id(), &v1).await;
    let (child_id, grandchild_id) = (child.id(), grandchild.id());
    let before = packs_of(&site, of).await;
    site.store().destroy(of).await.unwrap();
    let left = packs_of(&site, of).await;
    assert!(
        0 < left && left < before,
        "{left} of {before}: what only the parent had is gone, what the fork names is not"
    );
    site.store().destroy(child_id).await.unwrap();
    drop((child, grandchild.release().await.unwrap()));
    // On a host that has nothing of them in its cache.
    site.wipe();
    site.open().await;
    let grandchild = site.store().acquire(grandchild_id).await.unwrap();
    let mut expected = content.clone();
    expected[..65536].fill(7);
    assert!(read(&grandchild, 0, content.len() as u64).await == expected);
    site.store().destroy(grandchild_id).await.unwrap();
    for id in [of, child_id, grandchild_id] {
        assert_eq!(packs_of(&site, id).await, 0);
        let head = head(&site, id).await;
        assert!(head.is_deleted() && head.forks.is_empty() && head.parent.is_none(), "{head:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_and_deleted_checkpoints_leave_what_forks_name() {
    let mut site = Site::new(small_limits()).await;
    let content = noise(3, 1 << 20);
    let (of, v1) = parent(&site, &content).await;
    let child = fork(&site, of.id(), &v1).await.id();
    of.seal_checkpoint(meta("newer, so that the first can go")).await.unwrap();
    of.push().await.unwrap();
    of.delete_checkpoint(&v1).await.unwrap();
    for round in 0..40_u64 {
        write(&of, 0, &noise(100 + round, 1 << 20)).await;
        of.push().await.unwrap();
    }
    let volume = site.store().volume(child).unwrap();
    volume.release().await.unwrap();
    drop(of);
    site.wipe();
    site.open().await;
    let child = site.store().acquire(child).await.unwrap();
    assert!(read(&child, 0, content.len() as u64).await == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_parent_is_forked_by_its_head() {
    let site = Site::new(small_limits()).await;
    let content = noise(4, 1 << 20);
    let (of, v1) = parent(&site, &content).await;
    let id = of.id();
    of.release().await.unwrap();
    let child = fork(&site, id, &v1).await;
    assert!(read(&child, 0, content.len() as u64).await == content);
    assert!(!head(&site, id).await.is_owned_by("a"), "forking has woken it");
    assert_eq!(head(&site, id).await.forks.len(), 1);
    site.store().destroy(child.id()).await.unwrap();
    assert_eq!(head(&site, id).await.forks, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_forked_is_refused_and_leaves_no_pin() {
    let site = Site::new(small_limits()).await;
    let (of, v1) = parent(&site, &noise(5, 4096)).await;
    let fork = async |of, checkpoint: &str, size| {
        let forked = site.store().fork(SpriteId::generate(), of, checkpoint, size).await;
        forked
            .map(|volume| volume.size_bytes())
            .map_err(|error| format!("{error}: {:?}", std::error::Error::source(&error)))
    };
    assert!(fork(of.id(), "v9", None).await.unwrap_err().contains("v9"));
    assert!(fork(of.id(), "first", None).await.unwrap_err().contains("first"));
    assert!(fork(SpriteId::generate(), &v1, None).await.unwrap_err().contains("Unknown"));
    assert!(fork(of.id(), &v1, Some(4096)).await.unwrap_err().contains("fewer"));
    assert_eq!(head(&site, of.id()).await.forks, []);
    assert_eq!(fork(of.id(), &v1, Some(SIZE * 2)).await, Ok(SIZE * 2));
    let id = of.id();
    site.store().destroy(id).await.unwrap();
    assert!(fork(id, &v1, None).await.unwrap_err().contains("Destroyed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_whose_fork_was_never_made_goes_when_the_parent_is_written_to() {
    let site = Site::new(small_limits()).await;
    let (of, v1) = parent(&site, &noise(6, 1 << 20)).await;
    let child = fork(&site, of.id(), &v1).await.id();
    // As a host leaves it that dies between the two heads, two hours ago.
    let never = SpriteId::generate();
    of.pin(1, never).await.unwrap();
    let device = Arc::clone(of.device_for_tests());
    let id = of.id();
    of.release().await.unwrap();
    drop(device);
    let long_ago = super::super::core::now_unix_ms() - 7_200_000;
    let aged = site.store().change_head(id, |head: &mut Head| {
        head.forks.iter_mut().for_each(|fork| fork.since_unix_ms = long_ago);
        Ok::<(), StoreError>(())
    });
    aged.await.unwrap();
    let of = site.store().acquire(id).await.unwrap();
    eventually("the pin is gone", async || {
        write(&of, 0, &noise(7, 4096)).await;
        of.push().await.unwrap();
        head(&site, id).await.forks.iter().map(|fork| fork.child).eq([child])
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_with_a_damaged_page_is_destroyed_all_the_same_and_freed_with_its_last_fork() {
    let mut site = Site::new(small_limits()).await;
    let (of, v1) = parent(&site, &noise(8, 1 << 20)).await;
    let of_id = of.id();
    let child = fork(&site, of_id, &v1).await.id();
    of.release().await.unwrap();
    let bucket = site.bucket();
    for entry in bucket.list(&format!("v1/vol/{of_id}")).await.unwrap() {
        let size = usize::try_from(entry.size_bytes).unwrap();
        bucket.put(&entry.key, vec![0; size].into()).await.unwrap();
    }
    site.store().volume(child).unwrap().release().await.unwrap();
    site.wipe();
    site.open().await;
    site.store().destroy(of_id).await.unwrap();
    assert!(head(&site, of_id).await.is_deleted());
    assert!(packs_of(&site, of_id).await > 0, "deleted although nobody knows what the fork needs");
    site.store().destroy(child).await.unwrap();
    assert_eq!(packs_of(&site, of_id).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroy_that_the_bucket_cuts_short_frees_the_ancestors_when_it_is_repeated() {
    let site = Site::new(small_limits()).await;
    let (of, v1) = parent(&site, &noise(9, 1 << 20)).await;
    let of_id = of.id();
    of.push().await.unwrap();
    let child = fork(&site, of_id, &v1).await.id();
    site.store().destroy(of_id).await.unwrap();
    assert!(packs_of(&site, of_id).await > 0);
    let mut tries = 0;
    for after in 0.. {
        site.faults.set(Some(Fault::AwayAfter(after)));
        let destroyed = site.store().destroy(child).await;
        site.faults.set(None);
        tries += 1;
        if destroyed.is_ok() {
            break;
        }
        assert!(tries < 100, "it never ends");
    }
    assert!(tries > 3, "the bucket was hardly asked for anything");
    assert_eq!(packs_of(&site, of_id).await, 0, "nobody comes back for them");
}
