//! A node agent alone, for its own tests: `node CONFIG.json` serves, and it has the jail's subcommand as `sprited` has it.
//!
//! SIGTERM suspends everything and ends; SIGHUP ends and leaves the VMs running. `RUST_LOG=node_agent=debug` shows what it does.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use blockstore::bucket::Bucket;
use node_agent::{Config, ImageFiles, NodeAgent, Shutdown, qemu::Accel};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Deserialize)]
struct Settings {
    folder: PathBuf,
    image: PathBuf,
    instance: String,
    pool_size: usize,
}

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next().expect("usage: node CONFIG.json");
    if first == "jail" {
        node_agent::jail::main(Path::new(&arguments.next().expect("usage: node jail SPEC")));
    }
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let settings = std::fs::read(first).expect("the settings are readable");
    let settings: Settings = serde_json::from_slice(&settings).expect("the settings are JSON");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(serve(settings));
}

async fn serve(settings: Settings) {
    let say = |what: &str| {
        println!("{what}");
        std::io::stdout().flush().expect("somebody reads");
    };
    let Settings { folder, image, instance, pool_size } = settings;
    let bucket = folder.join("bucket");
    std::fs::create_dir_all(&bucket).expect("a folder for the bucket");
    let digest = std::fs::read_to_string(image.join("rootfs.digest")).expect("the image has a digest");
    let config = Config {
        node: format!("test-{instance}"),
        bucket: Bucket::open(&format!("dir:{}", bucket.display())).await.expect("the bucket opens"),
        data: folder.join("node"),
        memory: PathBuf::from(format!("/dev/shm/sprites-{instance}")),
        image: ImageFiles {
            kernel: image.join("vmlinux"),
            initrd: image.join("initrd"),
            rootfs: image.join("rootfs.ext4"),
            rootfs_digest: digest.trim().to_owned(),
        },
        accel: Accel::Tcg { tsc_khz: node_agent::tsc::steady_khz() },
        pool_size,
        sprited: "/proc/self/exe".into(),
        instance,
        denied_networks: Vec::new(),
        memory_reserve_bytes: 1 << 30,
    };
    let agent = NodeAgent::start(config, say).await.unwrap_or_else(|error| {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        panic!("{text}")
    });
    let socket = folder.join("node.sock");
    drop(std::fs::remove_file(&socket));
    let listener = tokio::net::UnixListener::bind(&socket).expect("a socket");
    say("ready");
    let mut terminate = signal(SignalKind::terminate()).expect("signals");
    let mut hang_up = signal(SignalKind::hangup()).expect("signals");
    let mode = tokio::select! {
        _ = terminate.recv() => Shutdown::Suspend,
        _ = hang_up.recv() => Shutdown::LeaveRunning,
        served = agent.serve(listener, std::future::pending()) => panic!("it ended: {served:?}"),
    };
    agent.shutdown(mode, say).await;
}
