//! One host's node agent: runs sprites as microVMs.
//!
//! ```text
//!  coordinator ──gRPC Node──▶ grpc ─┐                        ┌─▶ process ─▶ jail ─▶ QEMU ─▶ guest (PID 1)
//!  edge ──HTTP, WebSocket──▶ data ──┼─▶ host ─▶ vm::task ────┼─▶ blockstore volume ◀─NBD─┘      ▲
//!                                   │     (one owner each)   └─▶ net (namespace, tap, DNS)      │
//!                                   └───────────────── agent: gRPC over virtio-serial ──────────┘
//! ```
//!
//! Long-lived tasks: one owner per sprite (`vm::task`; commands in, status `watch` out), one filler of the `pool`, one reader of guest events per living
//! VM (`inside`), one DNS relay per network (`net::dns`), one NBD server per VM (blockstore). Everything else is a call.
//!
//! What is absent: nothing here decides who owns a sprite (the head in the bucket does), and nothing reads a guest's file system.

pub mod agent;
mod barrier;
pub mod checkpoint;
pub mod config;
pub mod data;
mod digest;
mod files;
pub mod golden;
pub mod grpc;
pub mod host;
mod inside;
pub mod jail;
pub mod kvm;
mod laps;
pub mod net;
mod pid;
mod pool;
mod preserve;
pub mod process;
pub mod qemu;
pub mod qmp;
mod recover;
mod resize;
pub mod resources;
mod seed;
pub mod tsc;
pub mod vm;

use std::{io, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use blockstore::store::{Store, StoreConfig};
use futures_util::{StreamExt as _, stream};
use proto::{id::SpriteId, node::node_server::NodeServer, record::SizeClass};
use tokio::net::UnixListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use config::{Config, ImageFiles};
use grpc::NodeService;
use host::Host;
use net::Network;
use pool::Pool;
use resources::Resources;
use vm::{
    Depth,
    change::chain,
    task::{OrderError, SleepReport},
};

/// The QEMU binary, found in `PATH`.
const QEMU: &str = "qemu-system-x86_64";
/// Sprites put to sleep side by side at a shutdown.
const SHUTDOWN_PARALLEL: usize = 4;
/// A stuck sprite must not hold the whole shutdown.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(120);
/// What is being made ahead of need stops at its next step, at most the start of a VM; `./dev up` gives a restart 30 s.
const BACKGROUND_LIMIT: Duration = Duration::from_secs(20);

/// Why a node agent does not start. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("cannot run {QEMU}; install QEMU 9 or newer (`./dev up` does)")]
    Qemu(#[source] io::Error),
    #[error("cannot read {what}; build the guest's image again (`./dev up` does)")]
    Image { what: PathBuf, source: io::Error },
    #[error("cannot open the block store")]
    Store(#[source] blockstore::store::StoreError),
    #[error("cannot import the base image")]
    Base(#[source] blockstore::store::BaseError),
    #[error("cannot set up the host's network")]
    Network(#[source] net::NetError),
    #[error("cannot make the golden snapshot")]
    Golden(#[source] golden::GoldenError),
    #[error("cannot take up the sprites of this host")]
    Recover(#[source] recover::RecoverError),
}

/// What happens to the VMs when the node agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Everything is suspended and pushed to the bucket.
    Suspend,
    /// VMs go on; the next start takes them up.
    LeaveRunning,
}

/// A running node agent.
#[derive(Debug)]
pub struct NodeAgent {
    host: Host,
}

impl NodeAgent {
    /// Opens the store, imports the base image, makes the golden snapshot if there is none, and takes up the sprites of this host.
    ///
    /// `progress` is told what takes long, in words, and with `notice: ` in front what was lost since the last time.
    pub async fn start(config: Config, progress: impl Fn(&str) + Send + Sync) -> Result<Self, NodeError> {
        let qemu_version = qemu_version().await.map_err(NodeError::Qemu)?;
        let kernel_digest = resources::kernel_digest(&config)
            .map_err(|source| NodeError::Image { what: config.image.kernel.clone(), source })?;
        let store = Store::open(StoreConfig {
            bucket: config.bucket.clone(),
            dir: config.data.join("store"),
            node: config.node.clone(),
            limits: blockstore::store::Limits::default(),
        })
        .await
        .map_err(NodeError::Store)?;
        progress("importing the base image into the bucket");
        let base = store
            .ensure_base(&config.image.rootfs, &config.image.rootfs_digest, |done, total| {
                tracing::debug!(done, total, "importing the base image");
            })
            .await
            .map_err(NodeError::Base)?;
        let network = Network::start(config.network()).await.map_err(NodeError::Network)?;
        let pool_size = config.pool_size;
        let resources = Arc::new(Resources {
            config,
            store,
            base,
            network,
            slots: resources::Slots::default(),
            qemu: find_in_path(QEMU),
            qemu_version,
            kernel_digest,
            goldens: Default::default(),
            seeds: Default::default(),
            starts: resources::start_turns(),
            background: TaskTracker::new(),
            closing: CancellationToken::new(),
        });
        // Before any VM is started: the living ones keep their slots.
        let noted = recover::read_notes(&resources).map_err(NodeError::Recover)?;
        if let Err(error) = golden::sweep(&resources).await {
            tracing::warn!(error = vm::change::chain(&error), "cannot remove golden snapshots of earlier versions");
        }
        progress("making the golden snapshot");
        resources.golden(SizeClass::default()).await.map_err(NodeError::Golden)?;
        let (pool, filling) = Pool::new(Arc::clone(&resources), pool_size);
        let host = Host::new(Arc::clone(&resources), pool);
        progress("taking up sprites");
        recover::recover(&resources, &host, noted, &progress).await.map_err(NodeError::Recover)?;
        resources.background.spawn(filling);
        Ok(Self { host })
    }

    /// Serves control and data plane on one socket until `shutdown`.
    pub async fn serve(
        &self,
        listener: UnixListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let control = tonic::service::Routes::new(NodeServer::new(NodeService { host: self.host.clone() }));
        let host = self.host.clone();
        let data = data::router(move |id| {
            let host = host.clone();
            async move { host.running(id).await }
        });
        let app = data::in_front_of(control.into_axum_router(), data);
        axum::serve(listener, app).with_graceful_shutdown(shutdown).await
    }

    /// A request that was under way may wake a sprite once more.
    async fn sleep_for_good(&self, id: SpriteId) -> Result<SleepReport, OrderError> {
        loop {
            let report = self.host.sleep(id, Depth::Suspended).await?;
            if !report.woken {
                return Ok(report);
            }
        }
    }

    /// Ends the node agent. `progress` is told about each sprite.
    pub async fn shutdown(&self, mode: Shutdown, progress: impl Fn(&str) + Send + Sync) {
        tokio::join!(self.end_anonymous(), self.end_sprites(mode, progress));
    }

    /// Ends the VMs that were made ahead of need.
    async fn end_anonymous(&self) {
        let resources = self.host.resources();
        resources.closing.cancel();
        resources.background.close();
        if tokio::time::timeout(BACKGROUND_LIMIT, resources.background.wait()).await.is_err() {
            tracing::warn!("a VM that was being made ahead of need is left behind; the next node agent ends it");
        }
        for prepared in self.host.pool().drain().await {
            pool::free(resources, prepared.parts).await;
        }
    }

    async fn end_sprites(&self, mode: Shutdown, progress: impl Fn(&str) + Send + Sync) {
        let ids = self.host.ids();
        if mode == Shutdown::Suspend {
            let asleep = ids.iter().map(|id| async {
                let name = self.host.status(*id).map(|status| status.name).unwrap_or_default();
                match tokio::time::timeout(SHUTDOWN_LIMIT, self.sleep_for_good(*id)).await {
                    Ok(Ok(report)) => match report.not_preserved {
                        None => progress(&format!("{name} is suspended")),
                        Some(reason) => progress(&format!("{name} is suspended on this host only: {reason}")),
                    },
                    Ok(Err(error)) => progress(&format!("{name} is not suspended: {}", chain(&error))),
                    Err(_elapsed) => progress(&format!("{name} is not suspended within {SHUTDOWN_LIMIT:?}")),
                }
            });
            stream::iter(asleep).buffer_unordered(SHUTDOWN_PARALLEL).collect::<()>().await;
        }
        for id in ids {
            self.host.leave(id).await;
        }
    }
}

async fn qemu_version() -> io::Result<String> {
    let output = tokio::process::Command::new(QEMU).arg("--version").stdin(Stdio::null()).output().await?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// The jail has its own root, so the program's path has to be absolute.
fn find_in_path(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.exists())
        .unwrap_or_else(|| program.into())
}
