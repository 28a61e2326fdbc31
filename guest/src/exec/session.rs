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
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::agent::{ExecOutput, Session as Listed, SessionInfo, TerminalSize, exec_output::Output};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
    sync::{mpsc, watch},
};
use tonic::Status;

use super::{
    rate::Rate,
    ring::{Ring, Stream},
    terminal::Terminal,
};
use crate::{log, reaper::Child};

/// Largest message of output.
const PIECE_BYTES: usize = 64 << 10;
/// What an attaching client is shown of the past. One message.
const SCROLLBACK_BYTES: usize = 64 << 10;
/// Messages of output on their way to one client; the command waits when they are not read.
const CLIENT_QUEUE: usize = 8;
/// Messages of stdin on their way to the command; the client waits when it does not read.
const STDIN_QUEUE: usize = 16;
/// A command has ended, but something in the background still holds its output: the session is over when nothing came for this long.
const QUIET: Duration = Duration::from_millis(100);
/// It is also over after this much output: more than the command itself can have left in the pipe.
const LEFTOVER_BYTES_MAX: usize = 1 << 20;

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
    async fn print(&self, stream: Stream, data: Bytes) -> usize {
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
    fn finish(&self, code: i32) {
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

impl Unstarted {
    /// Moves bytes until the command has ended and everything it wrote has been passed on. `detached` gets the number of bytes that no client saw.
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
        session.finish(code);
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

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reaper::Reaper;

    const STALLED_MAX: Duration = Duration::from_millis(100);
    const LIMIT: Duration = Duration::from_secs(20);

    /// A session whose process does not exist: no signal reaches anybody, and it never ends.
    fn session() -> Arc<Session> {
        let child = Reaper::default().fork(|| Ok(i32::MAX)).unwrap();
        let ((stdout, _), (stderr, _)) = (nix::unistd::pipe().unwrap(), nix::unistd::pipe().unwrap());
        let about = About {
            id: "test".into(),
            command: "true".into(),
            workdir: "/".into(),
            tty: false,
            pid: 1,
            max_run: None,
            stalled_max: STALLED_MAX,
            size: TerminalSize::default(),
        };
        Session::over(about, child, Streams::Pipes { stdin: None, stdout, stderr }).unwrap().session
    }

    async fn print(session: &Session, messages: usize) {
        for _ in 0..messages {
            session.print(Stream::Stdout, "text".into()).await;
        }
    }

    fn is_full(session: &Session) -> bool {
        session.state().clients[0].queue.capacity() == 0
    }

    /// All messages that are left: how much was printed, and the last one.
    async fn rest(mut messages: mpsc::Receiver<Message>) -> (usize, Option<Message>) {
        let (mut count, mut last) = (0, None);
        while let Some(message) = messages.recv().await {
            match message {
                Ok(ExecOutput { output: Some(Output::Stdout(_)) }) => count += 1,
                other => last = Some(other),
            }
        }
        (count, last)
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_dropped_for_the_others() {
        let session = session();
        let (stalled, mut reader) = (session.attach(None).unwrap(), session.attach(None).unwrap());
        let printing = tokio::time::timeout(LIMIT, print(&session, CLIENT_QUEUE * 4));
        let reading = async {
            for _ in 0..CLIENT_QUEUE * 4 {
                reader.messages.recv().await.unwrap().unwrap();
            }
        };
        let (printed, ()) = tokio::join!(printing, reading);
        printed.expect("a client that does not read stops the command");
        assert_eq!(*session.attached().borrow(), 1, "it counts as a client no more");
        let (got, last) = rest(stalled.messages).await;
        assert_eq!(got, CLIENT_QUEUE);
        let refusal = last.unwrap().unwrap_err();
        assert!(refusal.message().contains("attach again"), "{refusal}");
    }

    #[tokio::test]
    async fn the_pace_of_a_single_client_is_the_commands() {
        let session = session();
        let mut only = session.attach(None).unwrap();
        let printing = tokio::time::timeout(STALLED_MAX * 3, print(&session, CLIENT_QUEUE + 1)).await;
        assert!(printing.is_err() && is_full(&session), "the command has to wait for its reader");
        let reading = async { while only.messages.recv().await.is_some() {} };
        let printing = async {
            print(&session, CLIENT_QUEUE * 4).await;
            session.finish(0);
        };
        tokio::join!(reading, printing);
    }

    #[tokio::test]
    async fn a_client_that_stalled_alone_is_dropped_once_another_comes() {
        let session = session();
        let stalled = session.attach(None).unwrap();
        let printing = tokio::spawn({
            let session = Arc::clone(&session);
            async move { print(&session, CLIENT_QUEUE + 1).await }
        });
        while !is_full(&session) {
            tokio::task::yield_now().await;
        }
        let second = session.attach(None).unwrap();
        tokio::time::timeout(LIMIT, printing).await.expect("still waits for the first client").unwrap();
        session.finish(7);
        assert_eq!(rest(stalled.messages).await.0, CLIENT_QUEUE);
        // What was printed before it came is in its backlog.
        assert_eq!(second.backlog.len(), 2);
        assert!(matches!(rest(second.messages).await, (0, Some(Ok(ExecOutput { output: Some(Output::Exit(7)) })))));
    }

    /// A signal to all goes to this group and the command's own: twice to one would be "at once" for many programs.
    #[tokio::test]
    async fn a_command_without_a_terminal_has_no_other_group_to_signal() {
        let session = session();
        assert_eq!(session.foreground(), None);
        session.signal_all(Signal::SIGTERM).unwrap();
    }

    #[tokio::test]
    async fn an_exit_code_waits_for_nobody() {
        let session = session();
        let (stalled, second) = (session.attach(None).unwrap(), session.attach(None).unwrap());
        print(&session, CLIENT_QUEUE).await;
        session.finish(3);
        for client in [stalled, second] {
            let (got, last) = rest(client.messages).await;
            assert!(matches!(last, Some(Ok(ExecOutput { output: Some(Output::Exit(3)) }))) && got == CLIENT_QUEUE);
        }
    }
}
