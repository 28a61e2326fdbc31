//! The same promises on every kind of bucket, also while its server fails, refuses, forgets to answer and cuts bodies short.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

use std::{
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use blockstore::bucket::{
    Bucket, BucketError, Cause, Credentials, Finding, OpenError, ProbeError, RecordError, Retry, TagDialect,
};
use bytes::Bytes;
use dev_s3::{Config, Faults, Rate, Server};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Counter {
    count: u64,
}

async fn s3_server(faults: Faults) -> Server {
    dev_s3::serve(Config { faults, ..Config::default() }).await.unwrap()
}

async fn open_s3(server: &Server) -> Result<Bucket, OpenError> {
    let credentials =
        Credentials { access_key_id: "test".to_owned(), secret_access_key: "testtest".to_owned(), session_token: None };
    Bucket::open_with(&format!("s3://test/some/prefix?endpoint={}&region=eu", server.endpoint()), credentials).await
}

/// A bucket of each kind, with what keeps it alive.
async fn each_kind() -> (tempfile::TempDir, Server, [Bucket; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let server = s3_server(Faults::default()).await;
    let in_dir = Bucket::open(&format!("dir:{}/bucket", dir.path().display())).await.unwrap();
    let on_s3 = open_s3(&server).await.unwrap();
    (dir, server, [in_dir, on_s3])
}

fn rate(share: f64) -> Rate {
    Rate::new(share).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_come_back_whole_in_parts_and_in_order() {
    let (_dir, _server, buckets) = each_kind().await;
    for bucket in buckets {
        assert_eq!(bucket.list("").await.unwrap(), [], "the probe left something behind in {bucket:?}");
        bucket.put("v1/a/one", Bytes::from_static(b"hello world")).await.unwrap();
        bucket.put("v1/a.b", Bytes::new()).await.unwrap();
        bucket.put("v1/a/one", Bytes::from_static(b"HELLO world")).await.unwrap();
        assert_eq!(bucket.get("v1/a/one").await.unwrap().unwrap().bytes, "HELLO world");
        assert_eq!(bucket.get_range("v1/a/one", 6..11).await.unwrap(), "world");
        let past_end = bucket.get_range("v1/a/one", 6..12).await;
        assert!(matches!(past_end, Err(BucketError::Truncated { .. })), "{past_end:?}");
        assert!(matches!(bucket.get_range("v1/none", 0..1).await, Err(BucketError::Missing { .. })));
        assert!(bucket.get("v1/a").await.unwrap().is_none());
        let keys: Vec<_> = bucket.list("v1").await.unwrap().into_iter().map(|e| (e.key, e.size_bytes)).collect();
        assert_eq!(keys, [("v1/a.b".to_owned(), 0), ("v1/a/one".to_owned(), 11)]);
        assert_eq!(bucket.list("v1/a").await.unwrap().len(), 1);
        bucket.delete("v1/a/one").await.unwrap();
        bucket.delete("v1/a/one").await.unwrap();
        assert!(bucket.get("v1/a/one").await.unwrap().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_mean_different_things_to_different_stores_are_refused() {
    let (_dir, _server, buckets) = each_kind().await;
    let long = "x".repeat(201);
    for bucket in buckets {
        for key in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".fscas/x", "a b", "ä", "a%2fb", "a\0b", &long] {
            let answer = bucket.put(key, Bytes::new()).await;
            assert!(matches!(answer, Err(BucketError::InvalidKey { .. })), "{key:?}: {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_race_for_a_record_one_wins() {
    let (_dir, _server, buckets) = each_kind().await;
    for bucket in buckets {
        for round in 0..10 {
            let key = format!("v1/race/{round}");
            let create = |n: u64| {
                let (bucket, key) = (bucket.clone(), key.clone());
                tokio::spawn(async move { bucket.create_record(&key, Counter { count: n }).await })
            };
            let first = only_winner((0..16).map(create).collect()).await;
            let update = |n: u64| {
                let (bucket, first) = (bucket.clone(), first.clone());
                tokio::spawn(async move { bucket.update_record(&first, Counter { count: 100 + n }).await })
            };
            let second = only_winner((0..16).map(update).collect()).await;
            let stored = bucket.read_record::<Counter>(&key).await.unwrap().unwrap();
            assert_eq!((stored.value, stored.tag), (second.value, second.tag));
        }
    }
}

type Attempt = tokio::task::JoinHandle<Result<blockstore::bucket::Record<Counter>, RecordError>>;

async fn only_winner(attempts: Vec<Attempt>) -> blockstore::bucket::Record<Counter> {
    let mut winners = Vec::new();
    for attempt in attempts {
        match attempt.await.unwrap() {
            Ok(record) => winners.push(record),
            Err(RecordError::Conflict { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!(winners.len(), 1, "{winners:?}");
    winners.pop().unwrap()
}

/// How the increments of all workers ended.
#[derive(Default, Debug)]
struct Tally {
    applied: u64,
    unknown: u64,
}

async fn count_up(bucket: &Bucket, workers: u64, each: u64) -> Tally {
    create_counter(bucket).await;
    let mut tasks = Vec::new();
    for _ in 0..workers {
        let bucket = bucket.clone();
        tasks.push(tokio::spawn(async move {
            let mut tally = Tally::default();
            while tally.applied < each {
                let Ok(Some(old)) = bucket.read_record::<Counter>("v1/counter").await else { continue };
                match bucket.update_record(&old, Counter { count: old.value.count + 1 }).await {
                    Ok(_) | Err(RecordError::Superseded { .. }) => tally.applied += 1,
                    Err(RecordError::Unknown { .. }) => tally.unknown += 1,
                    Err(RecordError::Conflict { .. } | RecordError::Bucket(_)) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
            tally
        }));
    }
    let mut sum = Tally::default();
    for task in tasks {
        let tally = task.await.unwrap();
        sum.applied += tally.applied;
        sum.unknown += tally.unknown;
    }
    sum
}

async fn create_counter(bucket: &Bucket) {
    loop {
        match bucket.create_record("v1/counter", Counter { count: 0 }).await {
            Ok(_) | Err(RecordError::Conflict { .. }) => return,
            Err(RecordError::Unknown { .. } | RecordError::Bucket(_)) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_increment_of_a_counter_is_lost_or_doubled() {
    let (_dir, _server, buckets) = each_kind().await;
    for bucket in buckets {
        let tally = count_up(&bucket, 8, 10).await;
        let count = bucket.read_record::<Counter>("v1/counter").await.unwrap().unwrap().value.count;
        // A worker that slept while many others won cannot know how its write ended. Nobody's answer was lost, so it did not happen.
        assert_eq!((count, tally.applied), (80, 80), "in {bucket:?}, {tally:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_increment_is_lost_or_doubled_while_the_server_fails_and_forgets_to_answer() {
    let server = s3_server(Faults::default()).await;
    let bucket = open_s3(&server).await.unwrap();
    server.set_faults(Faults {
        fail: rate(0.05),
        fail_after_apply: rate(0.2),
        conflict: rate(0.1),
        drop_reply: rate(0.1),
        truncate: rate(0.05),
        ..Faults::default()
    });
    let tally = count_up(&bucket, 6, 10).await;
    server.set_faults(Faults::default());
    let count = bucket.read_record::<Counter>("v1/counter").await.unwrap().unwrap().value.count;
    assert!(count >= tally.applied && count <= tally.applied + tally.unknown, "counter {count}, {tally:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_whose_answer_is_always_lost_still_learns_that_it_won() {
    let server = s3_server(Faults::default()).await;
    let bucket = open_s3(&server).await.unwrap();
    server.set_faults(Faults { fail_after_apply: Rate::ALWAYS, ..Faults::default() });
    let first = bucket.create_record("v1/r", Counter { count: 1 }).await.unwrap();
    let second = bucket.update_record(&first, Counter { count: 2 }).await.unwrap();
    let late = bucket.update_record(&first, Counter { count: 3 }).await;
    assert!(matches!(late, Err(RecordError::Conflict { .. })), "{late:?}");
    assert_eq!(bucket.read_record::<Counter>("v1/r").await.unwrap().unwrap().tag, second.tag);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_with_409_is_tried_again_and_not_taken_for_a_conflict() {
    let server = s3_server(Faults::default()).await;
    let bucket = open_s3(&server).await.unwrap();
    server.set_faults(Faults { conflict: Rate::ALWAYS, ..Faults::default() });
    let never = bucket.create_record("v1/r", Counter { count: 1 }).await;
    assert!(matches!(never, Err(RecordError::Unknown { .. })), "{never:?}");
    server.set_faults(Faults { conflict: rate(0.5), ..Faults::default() });
    let mut written = 0;
    for n in 0..10 {
        match bucket.create_record(&format!("v1/r{n}"), Counter { count: 1 }).await {
            Ok(_) => written += 1,
            Err(RecordError::Unknown { .. }) => {}
            Err(error) => panic!("nobody else is here: {error:?}"),
        }
    }
    assert!(written > 5, "{written} of 10");
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_bodies_are_read_again_and_never_returned() {
    let server = s3_server(Faults::default()).await;
    let bucket = open_s3(&server).await.unwrap();
    let body = Bytes::from((0..200_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    bucket.put("v1/pack", body.clone()).await.unwrap();
    server.set_faults(Faults { truncate: rate(0.5), ..Faults::default() });
    for start in (0..800_000_usize).step_by(100_000) {
        match bucket.get_range("v1/pack", start as u64..start as u64 + 100_000).await {
            Ok(bytes) => assert_eq!(bytes, body[start..][..100_000]),
            Err(error) => assert_eq!(error.retry(), Retry::Soon, "{error:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_ignores_conditions_is_refused_with_advice() {
    let server = s3_server(Faults { ignore_conditions: true, ..Faults::default() }).await;
    match open_s3(&server).await {
        Err(OpenError::Probe(error @ ProbeError::Broken { finding: Finding::CreateOverwrites, .. })) => {
            assert!(error.to_string().contains("Use a store with atomic conditional writes"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_wants_bare_etags_gets_them() {
    let server = s3_server(Faults { refuse_quoted_etag: true, ..Faults::default() }).await;
    let bucket = open_s3(&server).await.unwrap();
    assert_eq!(bucket.dialect(), TagDialect::Unquoted);
    let first = bucket.create_record("v1/r", Counter { count: 1 }).await.unwrap();
    bucket.update_record(&first, Counter { count: 2 }).await.unwrap();
    assert!(bucket.update_record(&first, Counter { count: 3 }).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_store_a_wrong_key_and_an_absent_server_each_say_what_to_do() {
    let server = s3_server(Faults::default()).await;
    let bucket = open_s3(&server).await.unwrap();
    server.set_faults(Faults { read_only: true, ..Faults::default() });
    match bucket.put("v1/x", Bytes::new()).await {
        Err(error @ BucketError::Store { cause: Cause::Denied, .. }) => {
            assert_eq!(error.retry(), Retry::AfterOperator);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(bucket.create_record("v1/r", Counter { count: 1 }).await, Err(RecordError::Bucket(_))));
    let error = open_s3(&server).await.expect_err("a read-only bucket opened");
    assert!(error.to_string().contains("credentials"), "{error}");

    let url = format!("s3://test?endpoint={}", server.endpoint());
    let wrong = Credentials { access_key_id: "test".into(), secret_access_key: "wrong".into(), session_token: None };
    let error = Bucket::open_with(&url, wrong.clone()).await.expect_err("a wrong key opened the bucket");
    assert!(!format!("{error:?}").contains("wrong"), "the secret is in the error: {error:?}");
    drop(server);
    let start = Instant::now();
    let error = Bucket::open_with(&url, wrong).await.expect_err("nobody is there");
    assert!(error.to_string().contains("check endpoint"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_longer_than_a_page_are_complete() {
    let (_dir, _server, buckets) = each_kind().await;
    for bucket in buckets {
        let bucket = Arc::new(bucket);
        let mut puts = tokio::task::JoinSet::new();
        for n in 0..1_100 {
            let bucket = Arc::clone(&bucket);
            puts.spawn(async move { bucket.put(&format!("v1/many/{n:05}"), Bytes::from_static(b"x")).await });
            if puts.len() > 32 {
                puts.join_next().await.unwrap().unwrap().unwrap();
            }
        }
        while let Some(done) = puts.join_next().await {
            done.unwrap().unwrap();
        }
        let keys: Vec<_> = bucket.list("v1/many").await.unwrap().into_iter().map(|entry| entry.key).collect();
        assert_eq!(keys, (0..1_100).map(|n| format!("v1/many/{n:05}")).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_none_or_too_new_is_an_error_and_no_panic() {
    let (_dir, _server, [bucket, _]) = each_kind().await;
    for body in [
        "",
        "[]",
        "{}",
        r#"{"fmt":2,"nonce":"n","count":1}"#,
        r#"{"fmt":1,"count":1}"#,
        "\u{0}",
        r#"{"fmt":1,"nonce":"n"}"#,
    ] {
        bucket.put("v1/r", Bytes::copy_from_slice(body.as_bytes())).await.unwrap();
        let answer = bucket.read_record::<Counter>("v1/r").await;
        assert!(matches!(answer, Err(RecordError::Malformed { .. })), "{body:?}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_whose_file_was_cut_or_replaced_says_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = Bucket::open(&format!("dir:{}", dir.path().display())).await.unwrap();
    bucket.put("v1/x", Bytes::from_static(b"0123456789")).await.unwrap();
    let path = dir.path().join("v1/x");
    let whole = std::fs::read(&path).unwrap();
    for damaged in [
        &whole[..whole.len() - 1],
        &whole[..10],
        b"",
        b"something else entirely, and long enough to hold a header of ours",
    ] {
        std::fs::write(&path, damaged).unwrap();
        match bucket.get("v1/x").await {
            Err(BucketError::Store { cause: Cause::Damaged, .. }) => {}
            other => panic!("{} bytes: {other:?}", damaged.len()),
        }
    }
}

const CHILD_DIR: &str = "BUCKET_TEST_CHILD_DIR";

/// Not a test: the process that `a_killed_writer_leaves_whole_objects_and_no_litter` kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by another test"]
async fn writer_child() {
    let Ok(dir) = std::env::var(CHILD_DIR) else { return };
    let bucket = Bucket::open(&format!("dir:{dir}")).await.unwrap();
    for n in 0_u64.. {
        let body = Bytes::from(vec![n.to_le_bytes()[0]; 3_000_000]);
        bucket.put("v1/big", body).await.unwrap();
        bucket.put(&format!("v1/count/{n}"), Bytes::new()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_writer_leaves_whole_objects_and_no_litter() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("dir:{}", dir.path().display());
    let mut swept = 0;
    for round in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_child", "--ignored"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // The n-th round kills it after its n-th object, so at various points of a write.
        let deadline = Instant::now() + Duration::from_secs(60);
        let progress = || std::fs::read_dir(dir.path().join("v1/count")).map_or(0, Iterator::count);
        let before = progress();
        while progress() < before.max(1) + round && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        swept += std::fs::read_dir(dir.path().join(".fscas/tmp")).unwrap().count();
        let bucket = Bucket::open(&url).await.unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join(".fscas/tmp")).unwrap().count(), 0, "litter stays");
        let big = bucket.get("v1/big").await.unwrap().unwrap().bytes;
        assert!(big.len() == 3_000_000 && big.iter().all(|byte| *byte == big[0]), "a torn object");
        assert!(bucket.list("").await.unwrap().iter().all(|entry| entry.key.starts_with("v1/")));
    }
    println!("killed 5 times, {swept} half-written files swept");
}

#[tokio::test(flavor = "multi_thread")]
async fn opening_a_directory_spares_the_files_of_a_living_writer() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("dir:{}", dir.path().display());
    let bucket = Bucket::open(&url).await.unwrap();
    let writer = tokio::spawn(async move {
        for _ in 0..20 {
            bucket.put("v1/big", Bytes::from(vec![7; 2_000_000])).await.unwrap();
        }
    });
    while !writer.is_finished() {
        Bucket::open(&url).await.unwrap();
    }
    writer.await.unwrap();
}
