//! Starts each part. The one place that knows every part's configuration; `dev` and the single-part commands only put them in order.

use std::{os::unix::fs::PermissionsExt, path::Path, time::Duration};

use anyhow::Context;
use tokio::{net::UnixListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::config::Config;

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

/// What the node agent reported at its start, and how to end it.
pub(crate) struct NodePart {
    pub(crate) acceleration: String,
    pub(crate) notices: Vec<String>,
    pub(crate) part: Part,
}

pub(crate) async fn start_node(_config: &Config) -> anyhow::Result<NodePart> {
    anyhow::bail!("seam")
}
pub(crate) async fn start_coordinator(_config: &Config) -> anyhow::Result<Part> {
    anyhow::bail!("seam")
}
pub(crate) async fn start_router(_config: &Config) -> anyhow::Result<Part> {
    anyhow::bail!("seam")
}
pub(crate) async fn ensure_token(_config: &Config) -> anyhow::Result<()> {
    anyhow::bail!("seam")
}
pub(crate) async fn mint_token(_config: &Config) -> anyhow::Result<String> {
    anyhow::bail!("seam")
}
