//! `sprited router`: the router alone.

use std::time::Duration;

use anyhow::Context;

use crate::{config::Config, parts, shutdown::StopSignals};

const STOP_DEADLINE: Duration = Duration::from_secs(5);

pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let mut signals = StopSignals::catch().context("cannot catch signals")?;
    let _lock = config.data.lock("router")?;
    let mut part = parts::start_router(&config).await?;
    let outcome = tokio::select! {
        _ = signals.next() => Ok(()),
        error = part.failed() => Err(error),
    };
    part.stop(STOP_DEADLINE).await;
    outcome
}
