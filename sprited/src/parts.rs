//! Starts each part. The one place that knows every part's configuration; `dev` and the single-part commands only put them in order.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context;
use blockstore::bucket::{Bucket, endpoint_of};
use coordinator::Tokens;
use node_agent::{
    ImageFiles, NodeAgent, Shutdown,
    kvm::{self, Probe},
    qemu::Accel,
    tsc,
};
use router::{
    NodeAddress, Router,
    ca::{Ca, ServerNames},
};
use tokio::{net::UnixListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{config::Config, data_dir::write_private};

/// Requests that are still open on a socket nobody else uses get this long.
const SOCKET_STOP_DEADLINE: Duration = Duration::from_secs(5);
/// What the node agent says at its start with this in front is for a person's eyes: what was lost.
const NOTICE: &str = "notice: ";

/// A part that runs until its token is cancelled.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) stop: CancellationToken,
    pub(crate) task: JoinHandle<anyhow::Result<()>>,
}

impl Part {
    /// Runs `work`, which ends soon after the token it is given is cancelled.
    pub(crate) fn spawn<F>(name: &'static str, work: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let task = tokio::spawn(work(stop.clone()));
        Self { name, stop, task }
    }

    /// Ends by itself only when it is broken.
    pub(crate) async fn failed(&mut self) -> anyhow::Error {
        let error = match (&mut self.task).await {
            Ok(Ok(())) => anyhow::anyhow!("it ended without being asked"),
            Ok(Err(error)) => error,
            Err(panic) => anyhow::Error::new(panic),
        };
        error.context(format!("the {} failed", self.name))
    }

    /// Asks it to end and waits; a part that does not end by `deadline` is cut off.
    pub(crate) async fn stop(mut self, deadline: Duration) {
        self.stop.cancel();
        match tokio::time::timeout(deadline, &mut self.task).await {
            Ok(Ok(Ok(()))) => tracing::info!(part = self.name, "stopped"),
            Ok(Ok(Err(error))) => tracing::warn!(part = self.name, "stopped with an error: {error:#}"),
            Ok(Err(panic)) => tracing::error!(part = self.name, "{panic}"),
            Err(_) => {
                tracing::warn!(part = self.name, "did not stop within {deadline:?}; cut off");
                self.task.abort();
            }
        }
    }
}

/// Binds a socket that only root may connect to, over a stale one if there is one. The caller holds the folder's lock, so nobody uses it.
pub(crate) fn bind_private(path: &Path) -> anyhow::Result<UnixListener> {
    let stale = std::fs::remove_file(path);
    if let Err(error) = stale
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("cannot remove the stale socket {}", path.display()));
    }
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot close {} to others", path.display()))?;
    Ok(listener)
}

/// The node agent, and what it said at its start.
pub(crate) struct NodePart {
    agent: Arc<NodeAgent>,
    pub(crate) acceleration: String,
    pub(crate) notices: Vec<String>,
    pub(crate) part: Part,
}

impl NodePart {
    /// Ends the VMs as `mode` says while the socket still answers (a suspend may need the coordinator's view), then the socket.
    pub(crate) async fn stop(self, mode: Shutdown, deadline: Duration) {
        let progress = |what: &str| tracing::info!("{what}");
        if tokio::time::timeout(deadline, self.agent.shutdown(mode, progress)).await.is_err() {
            tracing::warn!(
                "not every sprite was put away within {deadline:?}; the rest is in local files for the next start"
            );
        }
        self.part.stop(SOCKET_STOP_DEADLINE).await;
    }
}

/// Opens the bucket and starts the node agent on it. Slow the first time: imports the image and boots the golden VM.
pub(crate) async fn start_node(config: &Config) -> anyhow::Result<NodePart> {
    let (accel, acceleration) = acceleration(config).await?;
    let bucket = open_bucket(config).await?;
    let notices = Mutex::new(Vec::new());
    let progress = |what: &str| {
        tracing::info!("{what}");
        if let (Some(notice), Ok(mut notices)) = (what.strip_prefix(NOTICE), notices.lock()) {
            notices.push(notice.to_owned());
        }
    };
    let agent = Arc::new(NodeAgent::start(node_config(config, bucket, accel).await?, progress).await?);
    let listener = bind_private(&config.data.node_socket())?;
    let served = Arc::clone(&agent);
    let part = Part::spawn("node agent", |stop| async move {
        Ok(served.serve(listener, async move { stop.cancelled().await }).await?)
    });
    Ok(NodePart { agent, acceleration, notices: notices.into_inner().unwrap_or_default(), part })
}

/// KVM only if guest instructions really run in it.
async fn acceleration(config: &Config) -> anyhow::Result<(Accel, String)> {
    Ok(match tokio::task::spawn_blocking(kvm::probe).await? {
        Probe::Works { .. } => (Accel::Kvm { cpu_model: config.cpu_model.clone() }, "kvm".to_owned()),
        Probe::Unusable(reason) => {
            let kept = config.data.tsc_khz();
            let shown = kept.display().to_string();
            let tsc_khz = tokio::task::spawn_blocking(move || tsc::lasting_khz(&kept)).await?;
            let tsc_khz = tsc_khz.with_context(|| format!("cannot keep this host's clock rate in {shown}"))?;
            (Accel::Tcg { tsc_khz }, format!("tcg: {reason}"))
        }
    })
}

pub(crate) async fn open_bucket(config: &Config) -> anyhow::Result<Bucket> {
    if let Some(folder) = config.bucket_url.strip_prefix("dir:") {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the bucket's folder {folder}"))?;
    }
    Bucket::open(&config.bucket_url).await.with_context(|| format!("cannot use the bucket {}", config.bucket_url))
}

async fn node_config(config: &Config, bucket: Bucket, accel: Accel) -> anyhow::Result<node_agent::Config> {
    let folder =
        config.image.as_ref().context("no guest image; name its folder with --image (`./dev build` makes one)")?;
    let digest = folder.join("rootfs.digest");
    let rootfs_digest =
        std::fs::read_to_string(&digest).with_context(|| format!("cannot read {}", digest.display()))?;
    Ok(node_agent::Config {
        node: node_name(&config.instance)?,
        bucket,
        data: config.data.node(),
        memory: config.memory_dir.clone(),
        image: ImageFiles {
            kernel: folder.join("vmlinux"),
            initrd: folder.join("initrd"),
            rootfs: folder.join("rootfs.ext4"),
            rootfs_digest: rootfs_digest.trim().to_owned(),
        },
        accel,
        pool_size: config.pool_size,
        // Our own code even when the file was replaced by a newer build meanwhile.
        sprited: "/proc/self/exe".into(),
        instance: config.instance.clone(),
        denied_networks: denied_networks(config).await?,
        memory_reserve_bytes: config.memory_reserve_bytes,
    })
}

/// What guests may not reach besides this host and each other: what the operator says, and the bucket's server, as far as its URL names one.
async fn denied_networks(config: &Config) -> anyhow::Result<Vec<String>> {
    let mut denied = config.denied_networks.clone();
    if let Some((host, port)) = endpoint_of(&config.bucket_url)? {
        let found = tokio::net::lookup_host((host.as_str(), port)).await;
        let found = found.with_context(|| format!("cannot find the bucket's server {host}, to keep guests from it"))?;
        denied.extend(found.map(|address| address.ip().to_string()));
    }
    Ok(denied)
}

/// The same after the node's folder was lost, so that its sprites are known to be its own; different for every instance on a machine.
fn node_name(instance: &str) -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("this machine has no name")?;
    Ok(format!("{}-{instance}", name.to_string_lossy()))
}

/// Binds the API's socket and serves it. The node agent need not be there yet.
pub(crate) async fn start_coordinator(config: &Config) -> anyhow::Result<Part> {
    let settings = coordinator::Config {
        bucket: open_bucket(config).await?,
        node_socket: config.data.node_socket(),
        domain: config.domain.clone(),
        port: config.listen.port(),
    };
    let listener = bind_private(&config.data.coordinator_socket())?;
    Ok(Part::spawn("coordinator", |stop| async move {
        Ok(coordinator::serve(settings, listener, async move { stop.cancelled().await }).await?)
    }))
}

/// Makes the certificate authority the first time, and opens the edge's sockets. Does not wait for the other parts.
pub(crate) async fn start_router(config: &Config) -> anyhow::Result<Part> {
    let api_hosts = vec![config.api_host.clone()];
    let names = ServerNames::new([config.api_host.as_str()], &config.domain);
    let folder = config.data.ca();
    let identity = tokio::task::spawn_blocking(move || Ca::ensure(&folder)?.server(&names)).await??;
    let router = Router::bind(router::Config {
        listen: edge_addresses(config.listen),
        identity,
        api_hosts,
        sprite_domain: config.domain.clone(),
        coordinator: NodeAddress::Unix(config.data.coordinator_socket()),
    })?;
    Ok(Part::spawn("router", |stop| async move {
        router.run(stop).await;
        Ok(())
    }))
}

/// `*.localhost` is both loopback addresses, and a client may try either first.
fn edge_addresses(listen: SocketAddr) -> Vec<SocketAddr> {
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, listen.port()));
    let has_v6 = || std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    if listen.ip() == Ipv4Addr::LOCALHOST && has_v6() { vec![listen, v6] } else { vec![listen] }
}

/// Sees to it that the data folder holds a token that this cluster's bucket knows.
pub(crate) async fn ensure_token(config: &Config) -> anyhow::Result<()> {
    let path = config.data.token();
    let tokens = Tokens::new(open_bucket(config).await?);
    match std::fs::read_to_string(&path) {
        Ok(token) => {
            if tokens.is_valid(token.trim()).await? {
                return Ok(());
            }
            // Of another bucket, or revoked.
            tracing::warn!("the token in {} is not valid here; minting another", path.display());
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let token = tokens.mint(&config.org, "first token of the cluster").await?;
    Ok(write_private(&path, format!("{token}\n").as_bytes())?)
}

/// Another token of the cluster; its text is kept nowhere.
pub(crate) async fn mint_token(config: &Config) -> anyhow::Result<String> {
    let tokens = Tokens::new(open_bucket(config).await?);
    Ok(tokens.mint(&config.org, "minted on the command line").await?)
}
