//! `sprited dev`: all parts in one process, in an order that both start and stop can rely on.
//!
//! ```text
//!  start: lock ▶ node agent ▶ coordinator ▶ first token ▶ router ▶ everything answers ▶ `ready`
//!  stop:  `ready` removed ▶ router (no new requests) ▶ node agent (suspends and pushes every sprite) ▶ coordinator
//! ```
//!
//! SIGTERM or SIGINT stops like this. SIGHUP, or a second signal, ends only this process: VMs go on without it, and the next start adopts
//! them, exactly as after `kill -9`.

use std::{fs, time::Duration};

use anyhow::Context;
use jiff::Timestamp;
use node_agent::Shutdown;

use crate::{
    config::Config,
    data_dir::write_private,
    parts::{self, NodePart, Part},
    ready::{self, Ready},
    shutdown::{StopRequest, StopSignals},
};

/// Open requests get this long to end by themselves once the edge takes no new ones.
const EDGE_STOP_DEADLINE: Duration = Duration::from_secs(5);
/// Suspending and pushing every sprite. Past it the rest stays in local files, which the next start finds.
const NODE_STOP_DEADLINE: Duration = Duration::from_secs(300);
/// Nothing has to be pushed: the next start reads the journal.
const LEAVE_DEADLINE: Duration = Duration::from_secs(10);

struct Running {
    node: NodePart,
    coordinator: Part,
    router: Part,
}

pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let mut signals = StopSignals::catch().context("cannot catch signals")?;
    let lock = config.data.lock("dev")?;
    remove_ready(&config)?;
    tracing::info!(?config, "starting");
    let mut running = tokio::select! {
        running = start(&config) => running?,
        request = signals.next() => anyhow::bail!("asked to stop ({request:?}) before everything was up"),
    };
    let asked = tokio::select! {
        request = signals.next() => Ok(request),
        error = running.router.failed() => Err(error),
        error = running.node.part.failed() => Err(error),
        error = running.coordinator.failed() => Err(error),
    };
    remove_ready(&config)?;
    match asked {
        Ok(StopRequest::Leave) => {
            tracing::info!("leaving; VMs go on and are adopted at the next start");
            running.node.stop(Shutdown::LeaveRunning, LEAVE_DEADLINE).await;
        }
        Ok(StopRequest::SleepAll) => {
            tracing::info!("stopping: every sprite sleeps first; a second signal leaves at once");
            stop_or_leave(running, &mut signals).await;
        }
        // One part is broken. Ending quickly is kinder than serving half: VMs go on, the next start adopts them.
        Err(ref error) => tracing::error!("{error:#}"),
    }
    drop(lock);
    asked.map(drop)
}

async fn start(config: &Config) -> anyhow::Result<Running> {
    let node = parts::start_node(config).await?;
    let coordinator = parts::start_coordinator(config).await?;
    parts::ensure_token(config).await?;
    let router = parts::start_router(config).await?;
    let (coordinator_socket, node_socket) = (config.data.coordinator_socket(), config.data.node_socket());
    ready::all_answer(&coordinator_socket, &node_socket, config.listen).await?;
    let ready = Ready {
        pid: std::process::id(),
        started_at: Timestamp::now(),
        api_url: config.api_url(),
        domain: config.domain.clone(),
        bucket: config.bucket_url.clone(),
        instance: config.instance.clone(),
        acceleration: node.acceleration.clone(),
        ca_file: config.data.ca_certificate(),
        token_file: config.data.token(),
        node_socket,
        coordinator_socket,
        notices: node.notices.clone(),
    };
    write_private(&config.data.ready(), &serde_json::to_vec_pretty(&ready)?)?;
    tracing::info!(api = ready.api_url, acceleration = ready.acceleration, "ready");
    Ok(Running { node, coordinator, router })
}

async fn stop_or_leave(running: Running, signals: &mut StopSignals) {
    let stop = async {
        running.router.stop(EDGE_STOP_DEADLINE).await;
        running.node.stop(Shutdown::Suspend, NODE_STOP_DEADLINE).await;
        running.coordinator.stop(EDGE_STOP_DEADLINE).await;
    };
    tokio::select! {
        () = stop => tracing::info!("stopped"),
        _ = signals.next() => tracing::warn!("asked again: leaving at once; VMs go on and are adopted at the next start"),
    }
}

/// A `ready` of a process that is gone must not be believed.
fn remove_ready(config: &Config) -> anyhow::Result<()> {
    match fs::remove_file(config.data.ready()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("cannot remove the `ready` file")
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
