//! One command and its clients.
//!
//! ```text
//!  stdout, stderr or terminal ─▶ pump ─▶ ring ─┬▶ client queue ─▶ gRPC stream
//!                                             └▶ client queue …
//!  clients ─▶ stdin queue ─▶ writer ─▶ stdin or terminal
//! ```
//!
//! # Invariants
//!
//! 1. A client sees all output from its attach on, in order, behind what the ring had: both change under one lock.
//! 2. `exit` is the last message, and comes after everything the command itself wrote.
//! 3. Without a client a session goes on, and its output goes to the ring only.
//! 4. The pace of a single client is the command's pace. Of several, one that does not read is dropped, so that it stops neither the others nor the command.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::future::join_all;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::agent::{ExecOutput, Session as Listed, SessionInfo, TerminalSize, exec_output::Output};
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::{
    pump::{Ends, Stdin, Streams, Unstarted},
    rate::Rate,
    ring::{Ring, Stream},
    terminal::Terminal,
};
use crate::{log, reaper::Child};

/// What an attaching client is shown of the past.
const SCROLLBACK_BYTES: usize = 64 << 10;
/// Messages of output on their way to one client; the command waits when they are not read.
const CLIENT_QUEUE: usize = 8;
/// Messages of stdin on their way to the command; the client waits when it does not read.
const STDIN_QUEUE: usize = 16;

pub(super) type Message = Result<ExecOutput, Status>;

/// What a session is.
#[derive(Clone, Debug)]
pub(super) struct About {
    pub id: String,
    pub command: String,
    pub workdir: String,
    pub tty: bool,
    /// In the environment's namespace.
    pub pid: u32,
    /// It is ended when it had no client for this long. `None`: never.
    pub max_run: Option<Duration>,
    /// With several clients, one whose queue stays full for this long is dropped.
    pub stalled_max: Duration,
    pub size: TerminalSize,
}

#[derive(Debug)]
pub(super) struct Session {
    pub about: About,
    pub child: Child,
    created_unix_ms: u64,
    terminal: Option<Arc<Terminal>>,
    stdin: mpsc::Sender<Stdin>,
    state: Mutex<State>,
    /// How many clients there are.
    attached: watch::Sender<usize>,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    clients: Vec<Client>,
    next_client: u64,
    /// Who says how large the terminal is.
    owner: Option<u64>,
    size: TerminalSize,
    rate: Rate,
    last_activity_unix_ms: u64,
    over: bool,
}

#[derive(Debug)]
struct Client {
    number: u64,
    queue: mpsc::Sender<Message>,
    /// The last message has its place from the beginning: a client that does not read holds up nobody's exit code.
    last: mpsc::OwnedPermit<Message>,
}

/// What a client is given.
#[derive(Debug)]
pub(super) struct Attached {
    pub attachment: Attachment,
    /// Comes first: what the session is, and what it printed last.
    pub backlog: Vec<Output>,
    pub messages: mpsc::Receiver<Message>,
}

/// A client's place in a session. Dropping it is the disconnect.
#[derive(Debug)]
pub(super) struct Attachment {
    session: Arc<Session>,
    number: u64,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        drop(self.session.detach(self.number));
    }
}

impl Attachment {
    pub(super) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Resizes the terminal, if this client may.
    pub(super) fn resize(&self, size: TerminalSize) {
        let mut state = self.session.state();
        if state.owner == Some(self.number) {
            self.session.set_size(&mut state, size);
        }
    }
}

impl Session {
    /// Registers a command that runs already. Its output waits in the kernel until [`Unstarted::run`].
    pub(super) fn over(about: About, child: Child, streams: Streams) -> io::Result<Unstarted> {
        let (queue, stdin) = mpsc::channel(STDIN_QUEUE);
        let ends = Ends::of(streams)?;
        let state = State {
            ring: Ring::new(SCROLLBACK_BYTES),
            clients: Vec::new(),
            next_client: 0,
            owner: None,
            size: about.size,
            rate: Rate::default(),
            last_activity_unix_ms: 0,
            over: false,
        };
        let session = Arc::new(Self {
            about,
            child,
            created_unix_ms: unix_ms(),
            terminal: ends.terminal(),
            stdin: queue,
            state: Mutex::new(state),
            attached: watch::Sender::new(0),
        });
        Ok(Unstarted { session, ends, stdin })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new client. `None`: the session is over.
    pub(super) fn attach(self: &Arc<Self>, size: Option<TerminalSize>) -> Option<Attached> {
        let mut state = self.state();
        if state.over {
            return None;
        }
        let (queue, messages) = mpsc::channel(CLIENT_QUEUE + 1);
        // It always succeeds: nobody else has the queue.
        let last = queue.clone().try_reserve_owned().ok()?;
        let number = state.next_client;
        state.next_client += 1;
        let is_owner = state.owner.is_none();
        if is_owner {
            state.owner = Some(number);
            if let Some(size) = size {
                self.set_size(&mut state, size);
            }
        }
        let info = SessionInfo {
            session_id: self.about.id.clone(),
            command: self.about.command.clone(),
            created_unix_ms: self.created_unix_ms,
            rows: state.size.rows,
            cols: state.size.cols,
            is_owner,
            tty: self.about.tty,
        };
        let replay = state.ring.replay().into_iter().map(|(stream, data)| output(stream, data));
        let backlog = std::iter::once(Output::Info(info)).chain(replay).collect();
        state.clients.push(Client { number, queue, last });
        self.attached.send_replace(state.clients.len());
        Some(Attached { attachment: Attachment { session: Arc::clone(self), number }, backlog, messages })
    }

    fn detach(&self, number: u64) -> Option<Client> {
        let mut state = self.state();
        let at = state.clients.iter().position(|client| client.number == number)?;
        let client = state.clients.remove(at);
        if state.owner == Some(number) {
            state.owner = state.clients.first().map(|client| client.number);
        }
        self.attached.send_replace(state.clients.len());
        Some(client)
    }

    /// Follows the number of clients.
    pub(super) fn attached(&self) -> watch::Receiver<usize> {
        self.attached.subscribe()
    }

    fn set_size(&self, state: &mut State, size: TerminalSize) {
        let Some(terminal) = &self.terminal else { return };
        if terminal.resize(size).is_ok() {
            state.size = size;
        }
    }

    /// Input for the command. Waits while it does not read; what comes after it closed its stdin is dropped.
    pub(super) async fn write(&self, input: Stdin) {
        drop(self.stdin.send(input).await);
    }

    /// To the foreground process group of the terminal, else to the command's group.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.foreground() {
            // It may have ended meanwhile: then the shell gets the signal.
            Some(other) if kill(Pid::from_raw(-other.as_raw()), signal).is_ok() => Ok(()),
            Some(_) | None => self.child.signal_group(signal),
        }
    }

    /// To everything that belongs to the command as far as its terminal and group tell; to each group once, because a second SIGINT or SIGTERM means "at
    /// once, without cleaning up" to many programs.
    pub(super) fn signal_all(&self, signal: Signal) -> io::Result<()> {
        if let Some(other) = self.foreground() {
            // It may have ended meanwhile.
            let _it_may_have_ended = kill(Pid::from_raw(-other.as_raw()), signal);
        }
        self.child.signal_group(signal)
    }

    /// The terminal's foreground process group, if that is not the command's own.
    fn foreground(&self) -> Option<Pid> {
        self.terminal.as_ref()?.foreground().filter(|group| group.as_raw() != self.child.pid)
    }

    pub(super) fn listed(&self) -> Listed {
        let mut state = self.state();
        let bytes_per_second = state.rate.per_second(Instant::now());
        Listed {
            id: self.about.id.clone(),
            command: self.about.command.clone(),
            workdir: self.about.workdir.clone(),
            created_unix_ms: self.created_unix_ms,
            bytes_per_second,
            is_active: !state.clients.is_empty() || bytes_per_second > 0.0,
            last_activity_unix_ms: state.last_activity_unix_ms,
            tty: self.about.tty,
            clients: u32::try_from(state.clients.len()).unwrap_or(u32::MAX),
            pid: self.about.pid,
        }
    }

    /// Gives output to the ring and all clients, and waits until it is on its way to each. Returns how many bytes nobody but the ring saw.
    pub(super) async fn print(&self, stream: Stream, data: Bytes) -> usize {
        let len = data.len();
        let clients = {
            let mut state = self.state();
            state.ring.push(stream, &data);
            state.rate.add(Instant::now(), len);
            state.last_activity_unix_ms = unix_ms();
            state.clients.iter().map(|client| (client.number, client.queue.clone())).collect::<Vec<_>>()
        };
        let gifts = clients.iter().map(|(number, queue)| self.give(*number, queue, output(stream, data.clone())));
        join_all(gifts).await;
        if clients.is_empty() { len } else { 0 }
    }

    async fn give(&self, number: u64, queue: &mpsc::Sender<Message>, output: Output) {
        tokio::select! {
            biased;
            // A client that has left is taken out by its attachment.
            place = queue.reserve() => drop(place.map(|place| place.send(Ok(ExecOutput { output: Some(output) })))),
            () = self.others_waited() => {
                if let Some(client) = self.detach(number) {
                    log!("session {}: a client does not read; it is dropped for the others", self.about.id);
                    client.last.send(Err(Status::aborted(
                        "this client did not read what the command printed while others waited for it; attach again",
                    )));
                }
            }
        }
    }

    /// Ends when the session has had several clients for `stalled_max` without a break. One alone may take its time: its pace is the command's.
    async fn others_waited(&self) {
        let mut attached = self.attached.subscribe();
        loop {
            // The sender is ours.
            drop(attached.wait_for(|clients| *clients > 1).await);
            if tokio::time::timeout(self.about.stalled_max, attached.wait_for(|clients| *clients < 2)).await.is_err() {
                return;
            }
        }
    }

    /// The last message for every client.
    pub(super) fn finish(&self, code: i32) {
        let clients = {
            let mut state = self.state();
            state.over = true;
            std::mem::take(&mut state.clients)
        };
        for client in clients {
            client.last.send(Ok(ExecOutput { output: Some(Output::Exit(code)) }));
        }
        self.attached.send_replace(0);
    }
}

fn output(stream: Stream, data: Bytes) -> Output {
    match stream {
        Stream::Stdout => Output::Stdout(data),
        Stream::Stderr => Output::Stderr(data),
    }
}

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
