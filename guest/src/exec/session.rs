//! One command and its clients.
//!
//! ```text
//!  stdout, stderr or terminal ─▶ pump ─▶ ring ─┬▶ client queue ─▶ gRPC stream (its pace is the command's pace)
//!                                             └▶ client queue …
//!  clients ─▶ stdin queue ─▶ writer ─▶ stdin or terminal
//! ```
//!
//! # Invariants
//!
//! 1. A client sees all output from its attach on, in order, behind what the ring had: both change under one lock.
//! 2. `exit` is the last message, and comes after everything the command itself wrote.
//! 3. Without a client a session goes on, and its output goes to the ring only.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::{Bytes, BytesMut};
use nix::sys::signal::{Signal, kill};
use proto::agent::{ExecOutput, Session as Listed, SessionInfo, TerminalSize, exec_output::Output};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, unix::AsyncFd},
    net::unix::pipe,
    sync::{mpsc, watch},
};
use tonic::Status;

use super::ring::{Ring, Stream};
use crate::{reaper::Child, sys};

/// Largest message of output.
const PIECE_BYTES: usize = 64 << 10;
/// What an attaching client is shown of the past. One message.
const SCROLLBACK_BYTES: usize = 64 << 10;
/// Messages on their way to one client; the command waits when they are not read.
const CLIENT_QUEUE: usize = 8;
/// Messages of stdin on their way to the command; the client waits when it does not read.
const STDIN_QUEUE: usize = 16;
/// A command has ended, but something in the background still holds its output: it is over when nothing came for this long,
const QUIET: Duration = Duration::from_millis(100);
/// or when so much came that it cannot be what the command left in the pipe.
const LEFTOVER_BYTES_MAX: usize = 1 << 20;
/// Over which time bytes per second are counted, and for how long a session counts as active.
const RATE_WINDOW: Duration = Duration::from_secs(5);

pub(super) type Message = Result<ExecOutput, Status>;

/// Ends of a command's streams, from PID 1's side.
#[derive(Debug)]
pub(super) enum Streams {
    Pipes {
        stdin: Option<OwnedFd>,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// Both ends: ours of the programs' side keeps the terminal alive until the command has ended, should it close all of its own.
    Terminal {
        master: OwnedFd,
        slave: OwnedFd,
    },
}

#[derive(Debug)]
pub(super) enum Stdin {
    Data(Bytes),
    Eof,
}

/// What a session is.
#[derive(Clone, Debug)]
pub(super) struct About {
    pub id: String,
    pub command: String,
    pub workdir: String,
    pub tty: bool,
    /// In the environment's namespace.
    pub pid: u32,
    /// With no client for so long, it is ended. `None`: never.
    pub max_run: Option<Duration>,
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

#[derive(Clone, Debug)]
struct Client {
    number: u64,
    queue: mpsc::Sender<Message>,
}

/// A client's place in a session. Dropping it is the disconnect.
#[derive(Debug)]
pub(super) struct Attachment {
    session: Arc<Session>,
    number: u64,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.session.detach(self.number);
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

/// The session's part that the service does not see: what has to be run.
#[derive(Debug)]
pub(super) struct Unstarted {
    pub session: Arc<Session>,
    streams: Ends,
    stdin: mpsc::Receiver<Stdin>,
}

#[derive(Debug)]
enum Ends {
    Pipes { stdin: Option<pipe::Sender>, stdout: pipe::Receiver, stderr: pipe::Receiver },
    Terminal(Arc<Terminal>, OwnedFd),
}

impl Session {
    /// Registers a command that runs already. Its output waits in the kernel until [`Unstarted::run`].
    pub(super) fn over(about: About, child: Child, streams: Streams) -> io::Result<Unstarted> {
        let (queue, stdin) = mpsc::channel(STDIN_QUEUE);
        let (streams, terminal) = match streams {
            Streams::Pipes { stdin, stdout, stderr } => {
                let stdin = stdin.map(pipe::Sender::from_owned_fd).transpose()?;
                let (stdout, stderr) = (pipe::Receiver::from_owned_fd(stdout)?, pipe::Receiver::from_owned_fd(stderr)?);
                (Ends::Pipes { stdin, stdout, stderr }, None)
            }
            Streams::Terminal { master, slave } => {
                let terminal = Arc::new(Terminal::new(master)?);
                (Ends::Terminal(Arc::clone(&terminal), slave), Some(terminal))
            }
        };
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
            terminal,
            stdin: queue,
            state: Mutex::new(state),
            attached: watch::Sender::new(0),
        });
        Ok(Unstarted { session, streams, stdin })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new client: its queue begins with `info` and what the ring has. `None`: the session is over.
    pub(super) fn attach(
        self: &Arc<Self>,
        size: Option<TerminalSize>,
    ) -> Option<(Attachment, mpsc::Receiver<Message>)> {
        let mut state = self.state();
        if state.over {
            return None;
        }
        let replay = state.ring.replay();
        let (queue, messages) = mpsc::channel(CLIENT_QUEUE + replay.len() + 1);
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
        let replay = replay.into_iter().map(|(stream, data)| output(stream, data));
        for output in std::iter::once(Output::Info(info)).chain(replay) {
            // There is room: the queue was made for them.
            drop(queue.try_send(Ok(ExecOutput { output: Some(output) })));
        }
        state.clients.push(Client { number, queue });
        self.attached.send_replace(state.clients.len());
        Some((Attachment { session: Arc::clone(self), number }, messages))
    }

    fn detach(&self, number: u64) {
        let mut state = self.state();
        state.clients.retain(|client| client.number != number);
        if state.owner == Some(number) {
            state.owner = state.clients.first().map(|client| client.number);
        }
        self.attached.send_replace(state.clients.len());
    }

    /// Follows the number of clients.
    pub(super) fn attached(&self) -> watch::Receiver<usize> {
        self.attached.subscribe()
    }

    fn set_size(&self, state: &mut State, size: TerminalSize) {
        let Some(terminal) = &self.terminal else { return };
        let side = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX).max(1);
        if sys::set_terminal_size(terminal.fd.get_ref(), side(size.rows), side(size.cols)).is_ok() {
            state.size = size;
        }
    }

    /// Input for the command. Waits while it does not read; what comes after it closed its stdin is dropped.
    pub(super) async fn write(&self, input: Stdin) {
        drop(self.stdin.send(input).await);
    }

    /// To the foreground process group of the terminal, else to the command's group.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        if let Some(terminal) = &self.terminal
            && let Ok(foreground) = nix::unistd::tcgetpgrp(terminal.fd.get_ref())
            && foreground.as_raw() > 1
            && foreground.as_raw() != self.child.pid
        {
            // It may have ended meanwhile; the shell is told all the same when it cannot be.
            if kill(nix::unistd::Pid::from_raw(-foreground.as_raw()), signal).is_ok() {
                return Ok(());
            }
        }
        self.child.signal_group(signal)
    }

    /// To everything that belongs to the command as far as its terminal and group tell.
    pub(super) fn signal_all(&self, signal: Signal) -> io::Result<()> {
        self.signal(signal)?;
        self.child.signal_group(signal)
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

    /// Gives output to the ring and all clients. Returns how many bytes nobody but the ring saw.
    async fn print(&self, stream: Stream, data: Bytes) -> usize {
        let len = data.len();
        let clients = {
            let mut state = self.state();
            state.ring.push(stream, &data);
            state.rate.add(Instant::now(), len);
            state.last_activity_unix_ms = unix_ms();
            state.clients.clone()
        };
        for client in &clients {
            // A client that has left is taken out by its attachment.
            drop(client.queue.send(Ok(ExecOutput { output: Some(output(stream, data.clone())) })).await);
        }
        if clients.is_empty() { len } else { 0 }
    }

    /// The last message for every client.
    async fn finish(&self, code: i32) {
        let clients = {
            let mut state = self.state();
            state.over = true;
            std::mem::take(&mut state.clients)
        };
        for client in clients {
            drop(client.queue.send(Ok(ExecOutput { output: Some(Output::Exit(code)) })).await);
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

impl Unstarted {
    /// Moves bytes until the command has ended and everything it wrote has been passed on. `detached` is told of bytes that no client saw.
    ///
    /// `ended` is called before the last message: from then on nobody can attach.
    pub(super) async fn run(self, detached: impl Fn(usize) + Sync, ended: impl FnOnce()) {
        let Self { session, streams, stdin } = self;
        let (over, end) = watch::channel(false);
        let exit = async {
            let exit = session.child.ended().await;
            over.send_replace(true);
            exit.code()
        };
        let code = match streams {
            Ends::Pipes { stdin: sink, stdout, stderr } => {
                let writer = tokio::spawn(feed_pipe(stdin, sink));
                let (code, out, err) = tokio::join!(
                    exit,
                    pump(&session, Stream::Stdout, stdout, end.clone(), &detached),
                    pump(&session, Stream::Stderr, stderr, end, &detached),
                );
                writer.abort();
                for rest in [out, err].into_iter().flatten() {
                    tokio::spawn(discard(rest));
                }
                code
            }
            Ends::Terminal(terminal, slave) => {
                let writer = tokio::spawn(feed_terminal(stdin, Arc::clone(&terminal)));
                let exit = async {
                    let code = exit.await;
                    drop(slave);
                    code
                };
                let (code, _rest) = tokio::join!(exit, pump(&session, Stream::Stdout, &*terminal, end, &detached));
                writer.abort();
                code
            }
        };
        ended();
        session.finish(code).await;
    }
}

/// Something output is read from.
trait Source {
    /// Appends what is there; waits if there is nothing. 0: the end.
    async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize>;
}

impl Source for pipe::Receiver {
    async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        self.read_buf(buffer).await
    }
}

impl Source for &Terminal {
    async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        Terminal::read(self, buffer).await
    }
}

/// Passes output on until its end, or until the command has ended and its output is quiet. Returns a source that is still held by something.
async fn pump<S: Source>(
    session: &Session,
    stream: Stream,
    mut from: S,
    mut end: watch::Receiver<bool>,
    detached: impl Fn(usize),
) -> Option<S> {
    let mut leftover = 0;
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(PIECE_BYTES);
        let over = *end.borrow_and_update();
        let read = tokio::select! {
            biased;
            read = from.read(&mut buffer) => read,
            // Looks again with the limit of what has ended.
            _ = end.changed(), if !over => continue,
            () = tokio::time::sleep(QUIET), if over => return Some(from),
        };
        let Ok(1..) = read else { return None };
        while !buffer.is_empty() {
            let len = buffer.len().min(PIECE_BYTES);
            let unseen = session.print(stream, buffer.split_to(len).freeze()).await;
            if unseen > 0 {
                detached(unseen);
            }
            leftover += if over { len } else { 0 };
        }
        if leftover > LEFTOVER_BYTES_MAX {
            return Some(from);
        }
    }
}

/// Reads and drops what background processes go on writing, so that they do not die of a closed pipe.
async fn discard(mut from: pipe::Receiver) {
    let mut buffer = BytesMut::with_capacity(PIECE_BYTES / 16);
    while let Ok(1..) = from.read_buf(&mut buffer).await {
        buffer.clear();
    }
}

async fn feed_pipe(mut from: mpsc::Receiver<Stdin>, mut to: Option<pipe::Sender>) {
    while let Some(input) = from.recv().await {
        match (input, &mut to) {
            (Stdin::Data(data), Some(sink)) => {
                if sink.write_all(&data).await.is_err() {
                    // The command has closed its stdin; what comes is dropped, so that its client does not wait.
                    to = None;
                }
            }
            (Stdin::Eof, _) => to = None,
            (Stdin::Data(_), None) => {}
        }
    }
}

async fn feed_terminal(mut from: mpsc::Receiver<Stdin>, terminal: Arc<Terminal>) {
    while let Some(input) = from.recv().await {
        // In a terminal the end of input is a key.
        if let Stdin::Data(data) = input
            && terminal.write_all(&data).await.is_err()
        {
            return;
        }
    }
}

/// The master of a pseudo terminal.
#[derive(Debug)]
struct Terminal {
    fd: AsyncFd<Arc<OwnedFd>>,
}

impl Terminal {
    fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_RDWR;
        nix::fcntl::fcntl(&master, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        Ok(Self { fd: sys::watch_fd(Arc::new(master))? })
    }

    /// `EIO`, when the last program has closed the terminal, is the end.
    async fn read(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        let mut piece = vec![0; PIECE_BYTES / 4];
        let read = self.fd.async_io(tokio::io::Interest::READABLE, |fd| Ok(nix::unistd::read(fd, &mut piece)?)).await?;
        buffer.extend_from_slice(&piece[..read]);
        Ok(read)
    }

    async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let written =
                self.fd.async_io(tokio::io::Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, data)?)).await?;
            data = &data[written..];
        }
        Ok(())
    }
}

/// Bytes per second over the last window.
#[derive(Debug, Default)]
struct Rate {
    began: Option<Instant>,
    current: usize,
    last: usize,
}

impl Rate {
    fn roll(&mut self, now: Instant) -> Duration {
        let began = *self.began.get_or_insert(now);
        let age = now.duration_since(began);
        if age < RATE_WINDOW {
            return age;
        }
        self.last = if age < RATE_WINDOW * 2 { self.current } else { 0 };
        self.current = 0;
        self.began = Some(now);
        Duration::ZERO
    }

    fn add(&mut self, now: Instant, bytes: usize) {
        self.roll(now);
        self.current += bytes;
    }

    fn per_second(&mut self, now: Instant) -> f64 {
        let age = self.roll(now);
        let bytes = u32::try_from(self.last + self.current).unwrap_or(u32::MAX);
        f64::from(bytes) / (RATE_WINDOW + age).as_secs_f64()
    }
}

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_forgets() {
        let begun = Instant::now();
        let mut rate = Rate::default();
        rate.add(begun, 5000);
        assert!((rate.per_second(begun) - 1000.0).abs() < 1.0);
        assert!(rate.per_second(begun + RATE_WINDOW * 3) < f64::EPSILON);
    }
}
