//! Ending a session: politely, then for certain.

use std::time::Duration;

use nix::sys::signal::Signal;
use proto::agent::KillEvent;
use tokio::{sync::mpsc, time::Instant};
use tonic::Status;

use super::session::Session;
use crate::{log, reaper::Exit};

/// From the polite signal to SIGKILL, for a command whose time without a client is over.
const END_GRACE: Duration = Duration::from_secs(2);
/// A killed command's exit is waited for this long; longer means that the kernel holds it.
const KILLED_LIMIT: Duration = Duration::from_secs(5);

/// The end of a session that had no client for too long.
pub(super) async fn end(session: &Session) {
    // A shell lets its terminal's hang-up through to its jobs.
    let polite = if session.about.tty { Signal::SIGHUP } else { Signal::SIGTERM };
    for signal in [polite, Signal::SIGKILL] {
        if let Err(error) = session.signal_all(signal) {
            log!("cannot end session {}: {error}", session.about.id);
        }
        if tokio::time::timeout(END_GRACE, session.child.ended()).await.is_ok() {
            return;
        }
    }
}

pub(super) type KillEvents = mpsc::Sender<Result<KillEvent, Status>>;

pub(super) async fn kill(session: &Session, signal: Signal, timeout: Duration, events: &KillEvents) {
    // A client that does not listen does not stop the killing.
    let tell = |event: KillEvent| {
        let sent = events.send(Ok(event));
        async move { drop(sent.await) }
    };
    let pid = session.about.pid;
    let event = |kind: &str, message: String| KillEvent { r#type: kind.into(), message, pid, ..KillEvent::default() };
    if let Err(error) = session.signal_all(signal) {
        tell(event("error", format!("cannot send {signal}: {error}"))).await;
        tell(event("complete", String::new())).await;
        return;
    }
    tell(KillEvent { signal: signal.to_string(), ..event("signal", format!("Sent {signal} to process {pid}")) }).await;
    if timeout.is_zero() {
        tell(event("complete", String::new())).await;
        return;
    }
    let begun = Instant::now();
    let mut ended = tokio::time::timeout(timeout, session.child.ended()).await.ok();
    if ended.is_some() {
        tell(event("exited", format!("Process {pid} exited after {} ms", begun.elapsed().as_millis()))).await;
    } else {
        tell(event("timeout", format!("Process {pid} still runs after {} ms", timeout.as_millis()))).await;
        let sent = session.signal_all(Signal::SIGKILL);
        ended = tokio::time::timeout(KILLED_LIMIT, session.child.ended()).await.ok();
        match (sent, ended) {
            (Ok(()), Some(_)) => {
                tell(KillEvent { signal: "SIGKILL".into(), ..event("killed", format!("Killed process {pid}")) }).await
            }
            (Err(error), _) => tell(event("error", format!("cannot send SIGKILL: {error}"))).await,
            (Ok(()), None) => {
                tell(event("error", format!("process {pid} does not end: the kernel waits for something"))).await
            }
        }
    }
    tell(KillEvent { exit_code: ended.map(Exit::code), ..event("complete", String::new()) }).await;
}
