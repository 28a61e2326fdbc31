//! Seals that a read asks for.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_read_of_the_right_length_seals_before_it_is_answered() {
    let mut site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    write(&volume, 0, &[1; 65536]).await;
    let bell = volume.seal_on_read(meta("bell")).await.unwrap();
    let len = u64::from(bell.read_bytes());
    for (offset, len) in [(512, len), (0, len + 512), (0, 65536 + len)] {
        read(&volume, offset, len).await;
    }
    write(&volume, 0, &[2; 4096]).await;
    assert_eq!(volume.checkpoints().await, [], "nothing has rung it");
    assert_eq!(read(&volume, 0, len).await[0], 2);
    write(&volume, 0, &[3; 4096]).await;
    read(&volume, 0, len).await;
    let sealed = bell.finish().await.unwrap().unwrap();
    assert_eq!((sealed.id.as_str(), sealed.comment.as_str()), ("v1", "bell"));
    read(&volume, 0, len).await;
    site.crash(volume, Some(0.0)).await;
    let volume = site.store().acquire(id).await.unwrap();
    assert_eq!(volume.checkpoints().await.len(), 1, "once");
    volume.restore("v1").await.unwrap();
    assert_eq!(read(&volume, 0, 65536).await, [[2; 4096].as_slice(), &[1; 61440]].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bell_that_is_given_up_seals_nothing_and_the_next_has_its_turn() {
    let site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let bell = volume.seal_on_read(meta("")).await.unwrap();
    let len = u64::from(bell.read_bytes());
    let next = {
        let volume = volume.clone();
        tokio::spawn(async move { volume.seal_on_read(meta("next")).await })
    };
    assert!(bell.finish().await.is_none());
    let next = next.await.unwrap().unwrap();
    let next_len = u64::from(next.read_bytes());
    if next_len != len {
        read(&volume, 0, len).await;
        assert_eq!(volume.checkpoints().await, []);
    }
    drop(next);
    read(&volume, 0, next_len).await;
    assert_eq!(volume.checkpoints().await, []);
    let long = CheckpointMeta { comment: "x".repeat(1000), ..meta("") };
    assert!(matches!(volume.seal_on_read(long).await, Err(CheckpointError::CommentTooLong { .. })));
}
