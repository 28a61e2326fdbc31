//! The server under two clients of others: `object_store`, and curl with its own signatures.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

use std::{path::Path, process::Command, time::Duration};

use bytes::Bytes;
use dev_s3::{Config, Faults, Rate, Server};
use futures_util::{StreamExt, TryStreamExt, future::join_all};
use object_store::{
    Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, RetryConfig, UpdateVersion,
    aws::{AmazonS3, AmazonS3Builder},
    path::Path as Key,
};

fn client(server: &Server) -> AmazonS3 {
    AmazonS3Builder::new()
        .with_endpoint(server.endpoint())
        .with_allow_http(true)
        .with_bucket_name("test")
        .with_access_key_id("test")
        .with_secret_access_key("testtest")
        .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() })
        .build()
        .unwrap()
}

async fn serve(faults: Faults) -> (Server, AmazonS3) {
    let server = dev_s3::serve(Config { faults, ..Config::default() }).await.unwrap();
    let client = client(&server);
    (server, client)
}

async fn on_disk(root: &Path) -> (Server, AmazonS3) {
    let server = dev_s3::serve(Config { root: Some(root.to_owned()), ..Config::default() }).await.unwrap();
    let client = client(&server);
    (server, client)
}

fn mode(mode: PutMode) -> PutOptions {
    PutOptions { mode, ..PutOptions::default() }
}

fn version(e_tag: Option<String>) -> PutOptions {
    mode(PutMode::Update(UpdateVersion { e_tag, version: None }))
}

#[tokio::test(flavor = "multi_thread")]
async fn conditional_writes_hold_in_sequence_and_in_races() {
    let dir = tempfile::tempdir().unwrap();
    for (_server, s3) in [serve(Faults::default()).await, on_disk(dir.path()).await] {
        let key = Key::from("a/b");
        let first = s3.put_opts(&key, "1".into(), mode(PutMode::Create)).await.unwrap();
        let again = s3.put_opts(&key, "2".into(), mode(PutMode::Create)).await;
        assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
        s3.put_opts(&key, "3".into(), version(first.e_tag.clone())).await.unwrap();
        let stale = s3.put_opts(&key, "4".into(), version(first.e_tag.clone())).await;
        assert!(matches!(stale, Err(Error::Precondition { .. })), "{stale:?}");
        let missing = s3.put_opts(&Key::from("none"), "5".into(), version(first.e_tag)).await;
        assert!(missing.is_err());
        for round in 0..10 {
            let key = Key::from(format!("race/{round}"));
            let create = |n: usize| s3.put_opts(&key, format!("create {n}").into(), mode(PutMode::Create));
            let results = join_all((0..20).map(create)).await;
            let winners: Vec<_> = results.into_iter().filter_map(Result::ok).collect();
            assert_eq!(winners.len(), 1);
            let update = |n: usize| s3.put_opts(&key, format!("update {n}").into(), version(winners[0].e_tag.clone()));
            assert_eq!(join_all((0..20).map(update)).await.iter().filter(|result| result.is_ok()).count(), 1);
        }
    }
}

/// A reader that gets a new ETag with an old body loses updates, although each race has one winner.
#[tokio::test(flavor = "multi_thread")]
async fn a_counter_that_many_increment_ends_right() {
    let dir = tempfile::tempdir().unwrap();
    for (server, s3) in [serve(Faults::default()).await, on_disk(dir.path()).await] {
        let key = Key::from("counter");
        s3.put(&key, "0".into()).await.unwrap();
        let worker = || {
            let (s3, key) = (client(&server), key.clone());
            tokio::spawn(async move {
                let mut left = 5;
                while left > 0 {
                    let got = s3.get(&key).await.unwrap();
                    let tag = got.meta.e_tag.clone();
                    let count: u32 = std::str::from_utf8(&got.bytes().await.unwrap()).unwrap().parse().unwrap();
                    left -= i32::from(s3.put_opts(&key, (count + 1).to_string().into(), version(tag)).await.is_ok());
                }
            })
        };
        for task in (0..20).map(|_| worker()).collect::<Vec<_>>() {
            task.await.unwrap();
        }
        assert_eq!(s3.get(&key).await.unwrap().bytes().await.unwrap(), "100");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_polling_listing_with_folders_and_bulk_delete() {
    let (_server, s3) = serve(Faults::default()).await;
    let key = Key::from("digits");
    let put = s3.put(&key, "0123456789".into()).await.unwrap();
    for (range, expected) in [
        (GetRange::Bounded(2..5), "234"),
        (GetRange::Offset(7), "789"),
        (GetRange::Suffix(2), "89"),
        (GetRange::Bounded(8..50), "89"),
    ] {
        let options = GetOptions { range: Some(range), ..GetOptions::default() };
        assert_eq!(s3.get_opts(&key, options).await.unwrap().bytes().await.unwrap(), expected);
    }
    let poll = GetOptions { if_none_match: put.e_tag, ..GetOptions::default() };
    assert!(matches!(s3.get_opts(&key, poll).await, Err(Error::NotModified { .. })));
    assert_eq!(s3.head(&key).await.unwrap().size, 10);

    futures_util::stream::iter(0..2_300)
        .map(|n| {
            let s3 = &s3;
            async move { s3.put(&Key::from(format!("many/{:04}/{}", n / 2, n % 2)), Bytes::new().into()).await }
        })
        .buffer_unordered(32)
        .try_collect::<Vec<_>>()
        .await
        .unwrap();
    let prefix = Key::from("many");
    let listed = s3.list_with_delimiter(Some(&prefix)).await.unwrap();
    let folders: Vec<_> = listed.common_prefixes.iter().map(ToString::to_string).collect();
    assert_eq!(folders, (0..1_150).map(|n| format!("many/{n:04}")).collect::<Vec<_>>());
    let keys: Vec<_> = s3.list(Some(&prefix)).map_ok(|meta| meta.location).try_collect().await.unwrap();
    assert_eq!(keys.len(), 2_300);
    let after: Vec<_> = s3.list_with_offset(Some(&prefix), &Key::from("many/1148/1")).try_collect().await.unwrap();
    assert_eq!(after.len(), 2);
    s3.delete_stream(futures_util::stream::iter(keys).map(Ok).boxed()).try_collect::<Vec<_>>().await.unwrap();
    assert!(s3.list(Some(&prefix)).next().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_survive_the_server_and_half_written_ones_do_not_appear() {
    let dir = tempfile::tempdir().unwrap();
    let key = Key::from("v1/sprites/x/head");
    let tag = {
        let (_server, s3) = on_disk(dir.path()).await;
        s3.put(&key, "old".into()).await.unwrap();
        s3.put(&key, "new".into()).await.unwrap().e_tag
    };
    std::fs::write(dir.path().join("test/.tmp-7"), "half").unwrap();
    let (_server, s3) = on_disk(dir.path()).await;
    let got = s3.get(&key).await.unwrap();
    assert_eq!(got.meta.e_tag, tag);
    assert_eq!(got.bytes().await.unwrap(), "new");
    assert_eq!(s3.list(None).try_collect::<Vec<_>>().await.unwrap().len(), 1);
    assert!(!dir.path().join("test/.tmp-7").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_does_what_its_name_says() {
    let (server, s3) = serve(Faults::default()).await;
    let key = Key::from("k");
    let with = |faults: Faults| server.set_faults(faults);
    let stored = async || match s3.get(&key).await {
        Ok(got) => Some(got.bytes().await.unwrap()),
        Err(Error::NotFound { .. }) => None,
        Err(error) => panic!("{error}"),
    };

    with(Faults { fail: Rate::ALWAYS, ..Faults::default() });
    assert!(s3.put(&key, "1".into()).await.is_err());
    with(Faults { read_only: true, ..Faults::default() });
    assert!(matches!(s3.put(&key, "2".into()).await, Err(Error::PermissionDenied { .. })));
    with(Faults { conflict: Rate::ALWAYS, ..Faults::default() });
    assert!(s3.put_opts(&key, "3".into(), mode(PutMode::Create)).await.is_err());
    assert_eq!(stored().await, None, "a refused write was applied");

    with(Faults { fail_after_apply: Rate::ALWAYS, ..Faults::default() });
    assert!(s3.put(&key, "4".into()).await.is_err());
    assert_eq!(stored().await.unwrap(), "4");
    with(Faults { drop_reply: Rate::ALWAYS, ..Faults::default() });
    assert!(s3.put(&key, "5".into()).await.is_err());
    with(Faults::default());
    assert_eq!(stored().await.unwrap(), "5");
    with(Faults { ignore_conditions: true, ..Faults::default() });
    s3.put_opts(&key, "6".into(), mode(PutMode::Create)).await.unwrap();

    s3.put(&key, Bytes::from(vec![b'x'; 100_000]).into()).await.unwrap();
    with(Faults { truncate: Rate::ALWAYS, ..Faults::default() });
    let cut = match s3.get(&key).await {
        Ok(got) => got.bytes().await.map(|bytes| bytes.len()),
        Err(error) => Err(error),
    };
    assert!(cut.is_err(), "{cut:?}");
    with(Faults { latency: Duration::from_millis(200), ..Faults::default() });
    let start = std::time::Instant::now();
    s3.head(&key).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(200));
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_with_its_own_signature_is_served_and_a_wrong_key_is_not() {
    let (server, _s3) = serve(Faults::default()).await;
    let url = format!("{}/test/from-curl", server.endpoint());
    let curl = async |user: &str, more: &[&str]| {
        let mut command = Command::new("curl");
        command.args([
            "-sS",
            "--max-time",
            "20",
            "--aws-sigv4",
            "aws:amz:us-east-1:s3",
            "--user",
            user,
            "-w",
            " %{http_code}",
        ]);
        command.args(more).arg(&url);
        let output =
            tokio::task::spawn_blocking(move || command.output()).await.unwrap().expect("apt-get install curl");
        String::from_utf8(output.stdout).unwrap()
    };
    let put =
        curl("test:testtest", &["-X", "PUT", "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", "--data-binary", "hi"])
            .await;
    assert!(put.ends_with(" 200"), "{put}");
    assert_eq!(curl("test:testtest", &["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]).await, "hi 200");
    let wrong = curl("test:wrong", &["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]).await;
    assert!(wrong.contains("SignatureDoesNotMatch") && wrong.ends_with(" 403"), "{wrong}");
}
