//! A durable volume under the tools of others, over NBD, with a bucket in a directory.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use blockstore::{
    bucket::Bucket,
    nbd::{Export, ExportTable, NbdServer},
    store::{CheckpointMeta, Consistency, Limits, Store, StoreConfig, Volume},
};
use proto::id::SpriteId;

const SIZE_BYTES: u64 = 1 << 30;

struct Site {
    dir: tempfile::TempDir,
    bucket: Bucket,
    store: Arc<Store>,
}

impl Site {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bucket = Bucket::open(&format!("dir:{}", dir.path().join("bucket").display())).await.unwrap();
        let store = Self::open(&bucket, &dir.path().join("store")).await;
        Self { dir, bucket, store }
    }

    async fn open(bucket: &Bucket, dir: &Path) -> Arc<Store> {
        let limits = Limits { segment_bytes: 4 << 20, push_age: Duration::from_millis(50), ..Limits::default() };
        let config = StoreConfig { bucket: bucket.clone(), dir: dir.to_owned(), node: "test".to_owned(), limits };
        Store::open(config).await.unwrap()
    }

    async fn volume(&self) -> Volume {
        let image = self.path("zeros");
        std::fs::write(&image, [0; 4096]).unwrap();
        let base = self.store.ensure_base(&image, "zeros", |_, _| {}).await.unwrap();
        self.store.create(SpriteId::generate(), &base, SIZE_BYTES).await.unwrap()
    }

    fn serve(&self, volume: &Volume) -> NbdServer {
        let exports = ExportTable::new();
        exports.insert("disk", Export::Volume(volume.clone()));
        NbdServer::bind(&self.path("nbd.sock"), exports).unwrap()
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path("nbd.sock").display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

async fn run(program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap_or_else(|error| {
        panic!("{program}: {error}. Install what these tests need: apt-get install libnbd-bin qemu-utils fio e2fsprogs")
    });
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, complained) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{said}\n{complained}", output.status);
    said
}

async fn within<T>(seconds: u64, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), work).await.expect("the volume or its client hangs")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_copied_in_comes_back_from_the_bucket_alone() {
    let mut site = Site::new().await;
    let volume = site.volume().await;
    let id = volume.id();
    let (image, back) = (site.path("image"), site.path("back"));
    std::fs::File::create(&image).unwrap().set_len(SIZE_BYTES).unwrap();
    let image_text = image.display().to_string();
    within(60, run("/sbin/mkfs.ext4", &["-q", "-d", concat!(env!("CARGO_MANIFEST_DIR"), "/src"), &image_text])).await;
    let server = site.serve(&volume);
    within(120, run("nbdcopy", &["--flush", &image_text, &site.uri()])).await;
    let sealed = volume.seal_checkpoint(CheckpointMeta {
        comment: String::new(),
        consistency: Consistency::Crash,
        is_auto: false,
    });
    assert_eq!(sealed.await.unwrap().id, "v1");
    within(
        60,
        run(
            "qemu-io",
            &["-f", "raw", "-c", "write -P 7 0 100M", "-c", "discard 100M 800M", "-c", "flush", &site.uri()],
        ),
    )
    .await;
    let map = within(60, run("qemu-img", &["map", "-f", "raw", "--output=json", &site.uri()])).await;
    assert!(map.contains(r#""start": 0, "length": 104857600"#) && map.contains(r#""zero": true"#), "{map}");
    within(60, volume.restore("v1")).await.unwrap();
    drop(server);
    within(60, volume.release()).await.unwrap();
    site.store = Site::open(&site.bucket, &site.path("store of another host")).await;
    let volume = site.store.acquire(id).await.unwrap();
    let _server = site.serve(&volume);
    within(120, run("nbdcopy", &[&site.uri(), &back.display().to_string()])).await;
    within(60, run("cmp", &[&image_text, &back.display().to_string()])).await;
    within(60, run("/sbin/e2fsck", &["-fn", &back.display().to_string()])).await;
    assert!(volume.status().used_bytes < 100 << 20, "holes stay holes: {:?}", volume.status());
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_finds_every_block_it_wrote_while_pushes_go_on() {
    let site = Site::new().await;
    let volume = site.volume().await;
    let _server = site.serve(&volume);
    let uri = format!("--uri={}", site.uri());
    let common = [
        "--name=v",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bssplit=4k/80:512/10:64k/10",
        "--size=64m",
        "--iodepth=16",
        "--verify=crc32c",
        "--fsync=64",
        "--verify_fatal=1",
        "--randrepeat=1",
        "--norandommap=0",
    ];
    within(300, run("fio", &common)).await;
    within(60, volume.push()).await.unwrap();
    let status = volume.status();
    assert_eq!((status.unpushed_bytes, status.lsn), (0, status.pushed_lsn));
    assert!(status.journal_bytes <= 8 << 20, "the journal is reclaimed: {status:?}");
    within(300, run("fio", &[&common[..], &["--verify_only"]].concat())).await;
}
