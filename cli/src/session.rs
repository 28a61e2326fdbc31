//! A session with a command in a sprite: local streams on one side, the exec WebSocket on the other.
//!
//! ```text
//!   stdin ──thread──▶ INPUTS_MAX pieces ──▶ writer ──▶ socket ──▶ command       Ctrl-C, resize, ping ──▶ writer (before input)
//!   stdout, stderr ◀───────────────────────────────── reader ◀── socket
//! ```
//!
//! # Invariants
//!
//! 1. Bounded memory whatever flows: a command that does not read stops our reading of stdin, a reader of ours that does not read stops the command.
//! 2. Reading never waits for writing, so that `cat` of any size cannot block itself.
//! 3. Everything the command printed is written before its exit code is ours.
//! 4. No hang: a server that says nothing for [`SILENCE_MAX`] is dead.

use std::{
    io::{self, Read as _},
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use http::Method;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::Instant,
};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    api::{Api, Call, LONG_LIMIT},
    failure::{BROKEN_PIPE, Failure, chain},
    frames::{self, Info, Said},
    output,
    sprite::about,
    target::Target,
    terminal::{self, RawMode, ScreenWatch},
    websocket::{PING_EVERY, SILENCE_MAX, Socket, goodbye},
};

/// Pieces of stdin that were read and are not sent yet.
const INPUTS_MAX: usize = 4;
const PIECE_BYTES: usize = 64 << 10;
/// Signals and resizes on their way.
const CONTROLS_MAX: usize = 16;
/// What a guest's pipe takes without anybody reading: up to here, a signal in the stream cannot be stuck behind input.
const UNREAD_BYTES_MAX: u64 = 32 << 10;
/// A second Ctrl-C within it means the client itself.
const TWICE: Duration = Duration::from_secs(2);
/// For our last frame.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// An open session.
pub(crate) struct Session<'a> {
    api: &'a Api,
    sprite: &'a str,
    socket: Socket,
    info: Info,
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("sprite", &self.sprite).field("info", &self.info).finish_non_exhaustive()
    }
}

/// How it ended for us.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Exit(u8),
    /// The user left; the command goes on.
    Detached,
    /// Our own end, by a signal.
    Killed(u8),
    /// Nobody reads what the command prints.
    OutputGone,
    /// The connection ended before the command.
    Lost(String),
    Failed(Failure),
}

impl<'a> Session<'a> {
    /// Starts a command or attaches (`target` says which), waking the sprite.
    pub(crate) async fn open(api: &'a Api, sprite: &'a str, target: &Target) -> Result<Self, Failure> {
        output::with_spinner(format!("waking {sprite}"), async {
            let mut socket = api.websocket(target).await.map_err(about(sprite))?;
            let info = tokio::time::timeout(SILENCE_MAX, first_frame(&mut socket)).await;
            let info = info
                .unwrap_or_else(|_elapsed| Err(Failure::new(format!("{sprite} does not say which session this is"))))?;
            Ok(Self { api, sprite, socket, info })
        })
        .await
    }

    /// Connects the process's own streams until one side ends. Returns the exit code for this process.
    pub(crate) async fn run(self) -> Result<u8, Failure> {
        let Self { api, sprite, socket, info } = self;
        let raw = if info.tty {
            RawMode::enter().map_err(|error| Failure::new(format!("the terminal cannot be set: {error}")))?
        } else {
            None
        };
        // Before anything is printed: whoever sees output may send a signal.
        let taken = Signals::take().map_err(|error| Failure::new(format!("signals cannot be received: {error}")))?;
        let (mut sink, mut stream) = socket.split();
        let (controls, controls_queue) = mpsc::channel(CONTROLS_MAX);
        let sent = AtomicU64::new(0);
        let ended = {
            let keys = raw.is_some();
            let mut writer = pin!(write(&mut sink, read_stdin(info.tty), controls_queue, &sent, keys));
            let mut reader = pin!(read(&mut stream, info.tty));
            let remote = Remote { api, sprite, info: &info, controls, sent: &sent };
            let mut signals = pin!(forward_signals(taken, remote, raw.as_ref()));
            // The reader first: what has arrived is printed, whatever else happened at the same time.
            tokio::select! {
                biased;
                ended = &mut reader => ended,
                ended = &mut signals => ended,
                // A socket that takes no more may still have the exit code in it.
                ended = &mut writer => match ended { Some(ended) => ended, None => reader.await },
            }
        };
        if ended == Ended::OutputGone {
            drop(tokio::time::timeout(CLOSE_LIMIT, sink.send(frames::signal("SIGPIPE"))).await);
        }
        drop(tokio::time::timeout(CLOSE_LIMIT, sink.send(goodbye())).await);
        drop(raw);
        conclude(ended, sprite, &info)
    }
}

fn conclude(ended: Ended, sprite: &str, info: &Info) -> Result<u8, Failure> {
    let again = format!("sprite attach {} -s {sprite}", info.session_id);
    match ended {
        Ended::Exit(code) => Ok(code),
        Ended::Detached => {
            output::note(format!("\nDetached; the session goes on in {sprite}. Back to it: {again}"));
            Ok(0)
        }
        Ended::Killed(code) => {
            if info.tty {
                output::note(format!("\nThe session goes on in {sprite}. Back to it: {again}"));
            }
            Ok(code)
        }
        Ended::OutputGone => Ok(BROKEN_PIPE),
        Ended::Lost(why) => {
            let advice = if info.tty {
                format!("the session may still be there: {again}")
            } else {
                "how far the command got is unknown; without a terminal it is ended 10 s after its client".to_owned()
            };
            Err(Failure::new(format!("the connection to {sprite} ended before the command: {why}")).advise(advice))
        }
        Ended::Failed(failure) => Err(failure),
    }
}

/// `session_info` comes before anything else.
async fn first_frame(socket: &mut Socket) -> Result<Info, Failure> {
    loop {
        let message = match socket.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => {
                return Err(Failure::new(format!(
                    "the connection broke before the command started: {}",
                    chain(&error)
                )));
            }
            None => return Err(Failure::new("the connection ended before the command started")),
        };
        match frames::said(message, false) {
            Said::Info(info) => return Ok(info),
            Said::Closed(reason) => {
                return Err(Failure::new(format!(
                    "the command did not start: {}",
                    reason.unwrap_or_else(|| "the server closed the connection".into())
                )));
            }
            Said::Stdout(_) | Said::Stderr(_) | Said::Exit(_) | Said::Nothing => {}
        }
    }
}

/// From the socket to stdout and stderr.
async fn read(stream: &mut SplitStream<Socket>, tty: bool) -> Ended {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut screen = tty.then(ScreenWatch::default);
    loop {
        let message = match tokio::time::timeout(SILENCE_MAX, stream.next()).await {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(error))) => return Ended::Lost(chain(&error)),
            Ok(None) => return Ended::Lost("the server closed the connection".into()),
            Err(_elapsed) => return Ended::Lost(format!("the server was silent for {} s", SILENCE_MAX.as_secs())),
        };
        let written = match frames::said(message, tty) {
            Said::Stdout(data) => {
                if let Some(screen) = &mut screen {
                    screen.see(&data);
                }
                write_out(&mut stdout, &data).await
            }
            Said::Stderr(data) => write_out(&mut stderr, &data).await,
            Said::Exit(code) => return Ended::Exit(code),
            Said::Closed(reason) => {
                return Ended::Lost(reason.unwrap_or_else(|| "the server closed the connection".into()));
            }
            Said::Info(_) | Said::Nothing => Ok(()),
        };
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ended::OutputGone,
            Err(error) => return Ended::Failed(Failure::of_output(&error)),
        }
    }
}

/// At once: somebody may be reading along, and the order of the two streams is kept.
async fn write_out(stream: &mut (impl AsyncWrite + Unpin), data: &[u8]) -> io::Result<()> {
    stream.write_all(data).await?;
    stream.flush().await
}

/// A thread, as reading stdin cannot be interrupted; it ends with the process. An error of stdin is its end.
fn read_stdin(tty: bool) -> mpsc::Receiver<(usize, Message)> {
    let (sender, receiver) = mpsc::channel(INPUTS_MAX);
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE_BYTES];
        let mut stdin = io::stdin().lock();
        loop {
            match stdin.read(&mut piece) {
                Ok(0) => return,
                Ok(len) => {
                    if sender.blocking_send((len, frames::stdin(&piece[..len], tty))).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_unreadable) => return,
            }
        }
    });
    receiver
}

/// To the socket: controls first, then input. With `keys`, a person types: Ctrl-\ detaches, and an end of input is the end of the terminal.
///
/// Ends with `None` when the socket takes no more: its reading half says why.
async fn write(
    sink: &mut SplitSink<Socket, Message>,
    mut stdin: mpsc::Receiver<(usize, Message)>,
    mut controls: mpsc::Receiver<Message>,
    sent: &AtomicU64,
    keys: bool,
) -> Option<Ended> {
    let mut ping = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    let mut stdin_open = true;
    loop {
        let message = tokio::select! {
            biased;
            Some(control) = controls.recv() => control,
            _ = ping.tick() => Message::Ping(bytes::Bytes::new()),
            piece = stdin.recv(), if stdin_open => match piece {
                Some((_, Message::Binary(typed))) if keys && terminal::detach_key(&typed).is_some() => {
                    let before = typed.slice(..terminal::detach_key(&typed).unwrap_or(0));
                    if !before.is_empty() {
                        drop(sink.send(Message::Binary(before)).await);
                    }
                    return Some(Ended::Detached);
                }
                Some((len, message)) => {
                    sent.fetch_add(u64::try_from(len).unwrap_or(u64::MAX), Ordering::Relaxed);
                    message
                }
                // The terminal is gone, and its user with it.
                None if keys => return Some(Ended::Killed(128 + 1)),
                None => {
                    stdin_open = false;
                    frames::stdin_eof()
                }
            },
        };
        if sink.send(message).await.is_err() {
            return None;
        }
    }
}

/// Where signals go.
struct Remote<'a> {
    api: &'a Api,
    sprite: &'a str,
    info: &'a Info,
    controls: mpsc::Sender<Message>,
    sent: &'a AtomicU64,
}

impl Remote<'_> {
    /// In the stream if nothing can be stuck before it, else by a call of its own.
    async fn signal(&self, name: &str) {
        if self.sent.load(Ordering::Relaxed) > UNREAD_BYTES_MAX {
            let target = Target::sprite(self.sprite).then("exec").then(&self.info.session_id).then("kill");
            let call = Call::new(Method::POST, target.with("signal", name).with("timeout", "0s")).within(LONG_LIMIT);
            if self.api.ask(&call).await.is_ok() {
                return;
            }
        }
        // The writer lives as long as this does.
        drop(self.controls.send(frames::signal(name)).await);
    }

    async fn resize(&self) {
        if let (true, Some((rows, cols))) = (self.info.tty, terminal::size()) {
            drop(self.controls.send(frames::resize(rows, cols)).await);
        }
    }
}

/// What this process gets goes to the command, which decides. With a terminal, its keys do that, and a signal is for this process.
async fn forward_signals(mut signals: Signals, remote: Remote<'_>, raw: Option<&RawMode>) -> Ended {
    let mut last_interrupt: Option<Instant> = None;
    // The terminal's size may have changed since the command was started with it.
    remote.resize().await;
    loop {
        let (name, number) = tokio::select! {
            _ = signals.resized.recv() => {
                remote.resize().await;
                continue;
            }
            _ = signals.resumed.recv() => {
                // If the terminal is gone, reading it says so.
                drop(raw.map(RawMode::again));
                remote.resize().await;
                continue;
            }
            _ = signals.interrupt.recv() => ("SIGINT", 2),
            _ = signals.terminate.recv() => ("SIGTERM", 15),
            _ = signals.hangup.recv() => ("SIGHUP", 1),
            _ = signals.quit.recv() => ("SIGQUIT", 3),
        };
        if raw.is_some() || last_interrupt.is_some_and(|last| number == 2 && last.elapsed() < TWICE) {
            return Ended::Killed(128 + number);
        }
        if number == 2 {
            last_interrupt = Some(Instant::now());
        }
        // Not awaited alone: the second Ctrl-C counts even if the first does not get through.
        tokio::select! {
            () = remote.signal(name) => {}
            _ = signals.interrupt.recv(), if number == 2 => return Ended::Killed(128 + 2),
        }
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
    resized: Signal,
    resumed: Signal,
}

impl Signals {
    fn take() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            resized: signal(SignalKind::window_change())?,
            resumed: signal(SignalKind::from_raw(libc::SIGCONT))?,
        })
    }
}

/// A target for a command in a terminal like the user's own, where `variables` do not say otherwise.
pub(crate) fn with_terminal(mut target: Target, variables: &[(String, String)]) -> Target {
    target = target.with("tty", "true");
    if let Some((rows, cols)) = terminal::size() {
        target = target.with("rows", &rows.to_string()).with("cols", &cols.to_string());
    }
    for name in ["TERM", "COLORTERM", "LANG", "LC_ALL"] {
        let given = variables.iter().any(|(known, _)| known == name);
        if let (false, Ok(value)) = (given, std::env::var(name)) {
            target = target.with("env", &format!("{name}={value}"));
        }
    }
    target
}
