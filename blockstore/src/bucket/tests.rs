//! The bucket's promises on the directory store.

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Counter {
    count: u64,
}

async fn dir_bucket() -> (tempfile::TempDir, Bucket) {
    let dir = tempfile::tempdir().unwrap();
    let bucket = Bucket::open(&format!("dir:{}", dir.path().display())).await.unwrap();
    (dir, bucket)
}

#[tokio::test]
async fn objects_come_back_whole_and_in_parts() {
    let (_dir, bucket) = dir_bucket().await;
    assert!(bucket.get("v1/a/b").await.unwrap().is_none());
    bucket.put("v1/a/b", Bytes::from_static(b"hello world")).await.unwrap();
    bucket.put("v1/a.c", Bytes::new()).await.unwrap();
    assert_eq!(bucket.get("v1/a/b").await.unwrap().unwrap().bytes, "hello world");
    assert_eq!(bucket.get_range("v1/a/b", 6..11).await.unwrap(), "world");
    assert!(matches!(bucket.get_range("v1/a/b", 6..12).await, Err(BucketError::Truncated { .. })));
    assert!(matches!(bucket.get_range("v1/none", 0..1).await, Err(BucketError::Missing { .. })));
    let keys = |entries: Vec<Entry>| entries.into_iter().map(|entry| entry.key).collect::<Vec<_>>();
    assert_eq!(keys(bucket.list("").await.unwrap()), ["v1/a.c", "v1/a/b"]);
    assert_eq!(keys(bucket.list("v1/a/").await.unwrap()), ["v1/a/b"]);
    bucket.delete("v1/a/b").await.unwrap();
    bucket.delete("v1/a/b").await.unwrap();
    assert_eq!(keys(bucket.list("").await.unwrap()), ["v1/a.c"]);
}

#[tokio::test]
async fn of_two_that_change_a_record_one_wins() {
    let (_dir, bucket) = dir_bucket().await;
    let first = bucket.create_record("v1/r", Counter { count: 0 }).await.unwrap();
    assert!(matches!(bucket.create_record("v1/r", Counter { count: 9 }).await, Err(RecordError::Conflict { .. })));
    bucket.update_record(&first, Counter { count: 1 }).await.unwrap();
    assert!(matches!(bucket.update_record(&first, Counter { count: 2 }).await, Err(RecordError::Conflict { .. })));
    assert_eq!(bucket.read_record::<Counter>("v1/r").await.unwrap().unwrap().value, Counter { count: 1 });
    bucket.delete("v1/r").await.unwrap();
    assert!(matches!(bucket.update_record(&first, Counter { count: 2 }).await, Err(RecordError::Gone { .. })));
}
