//! The engine on a real S3 server that fails, forgets to answer and cuts bodies short.

use dev_s3::{Config, Faults, Rate};

use super::*;
use crate::bucket::Credentials;

const SIZE: usize = 2 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_on_a_bad_s3() {
    let server = dev_s3::serve(Config::default()).await.unwrap();
    let credentials =
        Credentials { access_key_id: "test".to_owned(), secret_access_key: "testtest".to_owned(), session_token: None };
    let url = format!("s3://test?endpoint={}&region=eu", server.endpoint());
    let bucket = Bucket::open_with(&url, credentials).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { push_age: Duration::from_millis(5), order: Duration::from_secs(60), ..small_limits() };
    let open = async |name: &str| {
        let (bucket, limits) = (bucket.clone(), limits.clone());
        Store::open(StoreConfig { bucket, dir: dir.path().join(name), node: "a".to_owned(), limits }).await.unwrap()
    };
    let store = open("first").await;
    fs::write(dir.path().join("image"), noise(1, SIZE)).unwrap();
    let base = store.ensure_base(&dir.path().join("image"), "image", |_, _| {}).await.unwrap();
    let mut volume = store.create(SpriteId::generate(), &base, SIZE as u64).await.unwrap();
    let id = volume.id();
    let rate = |share| Rate::new(share).unwrap();
    server.set_faults(Faults {
        fail: rate(0.05),
        fail_after_apply: rate(0.1),
        conflict: rate(0.05),
        drop_reply: rate(0.1),
        truncate: rate(0.05),
        ..Faults::default()
    });
    let mut expected = noise(1, SIZE);
    let mut sealed = Vec::new();
    for round in 0..24u64 {
        let at = usize::try_from(round * 77_777).unwrap() % (SIZE - 50_000);
        let bytes = noise(round + 10, 50_000);
        expected[at..at + bytes.len()].copy_from_slice(&bytes);
        write(&volume, at as u64, &bytes).await;
        if round % 6 == 0 {
            sealed.push((volume.seal_checkpoint(meta("")).await.unwrap().id, expected.clone()));
        }
        if round % 8 == 7 {
            volume.close().await;
            volume = acquire(&store, id).await;
        }
    }
    assert!(read_all(&volume).await == expected);
    for (id, content) in sealed {
        volume.wait_durable(&id).await.unwrap();
        volume.restore(&id).await.unwrap();
        assert!(read_all(&volume).await == content, "checkpoint {id}");
        expected = content;
    }
    volume.release().await.unwrap();
    let elsewhere = open("second").await;
    let volume = acquire(&elsewhere, id).await;
    assert!(read_all(&volume).await == expected);
}

/// Opening may fail on such a server; it says so, and changes nothing that a second call would trip over.
async fn acquire(store: &Store, id: SpriteId) -> Volume {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match store.acquire(id).await {
            Ok(volume) => return volume,
            Err(error @ StoreError::Head { .. }) => assert!(Instant::now() < deadline, "{error}"),
            Err(error) => panic!("{error}"),
        }
    }
}
