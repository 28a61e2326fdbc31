//! `sprited node`: the node agent alone.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use node_agent::{
    Shutdown,
    kvm::{self, Probe},
};

use crate::{
    config::Settings,
    parts,
    shutdown::{StopRequest, StopSignals},
};

const STOP_DEADLINE: Duration = Duration::from_secs(300);
const LEAVE_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Args)]
pub(crate) struct NodeArguments {
    #[command(flatten)]
    settings: Settings,
    /// Run sprites although hardware virtualisation does not work. TCG is not a boundary between tenants.
    #[arg(long)]
    allow_tcg: bool,
}

pub(crate) async fn run(arguments: NodeArguments) -> anyhow::Result<()> {
    let config = arguments.settings.check()?;
    if let Probe::Unusable(reason) = kvm::probe()
        && !arguments.allow_tcg
    {
        anyhow::bail!("{reason}. Without KVM nothing separates tenants; pass --allow-tcg to run sprites anyway");
    }
    let mut signals = StopSignals::catch().context("cannot catch signals")?;
    let _lock = config.data.lock("node")?;
    let mut node = parts::start_node(&config).await?;
    for notice in &node.notices {
        tracing::warn!("{notice}");
    }
    let asked = tokio::select! {
        request = signals.next() => Ok(request),
        error = node.part.failed() => Err(error),
    };
    match asked {
        Ok(StopRequest::SleepAll) => node.stop(Shutdown::Suspend, STOP_DEADLINE).await,
        Ok(StopRequest::Leave) | Err(_) => node.stop(Shutdown::LeaveRunning, LEAVE_DEADLINE).await,
    }
    asked.map(drop)
}
