//! How a person, `./dev` or an init system ends `sprited`.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopRequest {
    /// SIGTERM, SIGINT: every sprite sleeps and is pushed to the bucket first.
    SleepAll,
    /// SIGHUP: only this process ends; VMs go on and the next start adopts them. How a new build takes over.
    Leave,
}

/// The signals, caught from the moment this exists.
pub(crate) struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl StopSignals {
    pub(crate) fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next of them. Cancel safe: a signal is never lost, at most merged with one before it.
    pub(crate) async fn next(&mut self) -> StopRequest {
        tokio::select! {
            _ = self.terminate.recv() => StopRequest::SleepAll,
            _ = self.interrupt.recv() => StopRequest::SleepAll,
            _ = self.hangup.recv() => StopRequest::Leave,
        }
    }
}
