//! Client of the guest's agent, PID 1 in the VM.
//!
//! ```text
//!  AgentClient ──HTTP/2──▶ unix socket ──QEMU chardev──▶ virtio-serial port ──▶ agent
//! ```
//!
//! The socket belongs to QEMU, so that it connects although the guest does not listen yet, and the port is a byte stream without connections.
//! Therefore every session begins with the marker of [`proto::resync`], sent again with a fresh nonce until the guest answers.
//!
//! # Invariants
//!
//! 1. One [`AgentClient`] is one session. When its stream ends it never connects again: calls fail and [`AgentClient::closed`] returns.
//! 2. No call has a time limit of its own; an exec may last for months. Callers set theirs.

use std::{
    io,
    net::Shutdown,
    os::unix::net::UnixStream as StdUnixStream,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::Stream;
use hyper_util::rt::TokioIo;
use proto::{
    agent::{
        AnswerRequest, ConfigureReply, ConfigureRequest, ExecInput, ExecOutput, ExecStart, FreezeReply, FreezeRequest,
        GrowFilesystemReply, GrowFilesystemRequest, GuestEvent, HelloReply, HelloRequest, KillEvent,
        KillSessionRequest, ListSessionsRequest, PortEvent, Session as GuestSession, StartEnvironmentReply,
        StartEnvironmentRequest, StopEnvironmentReply, StopEnvironmentRequest, SyncRequest, ThawReply, ThawRequest,
        TunnelInput, TunnelOutput, WatchPortsRequest, WatchRequest, agent_client::AgentClient as Rpc, exec_input,
        exec_output,
    },
    resync,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::watch,
    time::Instant,
};
use tonic::{
    Code, Request, Response, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::laps::Laps;

/// Nothing tells the host when the guest's driver has heard of a new size.
const GROW_POLL: Duration = Duration::from_millis(50);
/// The largest block of an ext4.
const FS_BLOCK_BYTES_MAX: u64 = 64 << 10;

/// QEMU creates the socket while it starts; look again after this.
const SOCKET_RETRY: Duration = Duration::from_millis(20);
/// First wait for the guest's marker. Each further wait is twice as long: a new marker ends the session before, so that a guest that always needs
/// longer than the wait would never be met.
const MARKER_WAIT_FIRST: Duration = Duration::from_millis(300);
const MARKER_WAIT_MAX: Duration = Duration::from_secs(5);
/// First wait for a guest that was met to say who it is; each further one is twice as long. A session that does not come about, for whatever reason, must
/// not cost the whole limit.
const SESSION_WAIT_FIRST: Duration = Duration::from_millis(500);
/// Unread output of one exec or tunnel in the guest stops at this; the reader's pace is the writer's pace.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// The same for all of a sprite's streams, so that one that nobody reads cannot stop the others before eight are stuck.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// [`AgentClient::disconnect`] waits this long for the connection's task to let go of the socket.
const DISCONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Why there is no session with a guest.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot connect to QEMU's agent socket {path}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("the guest did not answer on its control channel within {waited:?}")]
    Silent { waited: Duration },
    #[error("the control channel broke while the session began")]
    Handshake(#[source] io::Error),
    #[error("the guest answered, but no HTTP/2 session came up")]
    Http2(#[source] tonic::transport::Error),
    #[error("the guest refused to say who it is")]
    Hello(#[source] CallError),
}

/// A call that the guest refused or could not finish.
#[derive(Debug, thiserror::Error)]
#[error("the guest's agent did not do {call}: {} ({:?})", .source.message(), .source.code())]
pub struct CallError {
    /// Name of the rpc.
    pub call: &'static str,
    pub source: Box<Status>,
}

impl CallError {
    pub fn code(&self) -> Code {
        self.source.code()
    }

    /// The guest's words.
    pub fn message(&self) -> &str {
        self.source.message()
    }
}

/// One session with one guest. Cheap to clone; the session ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct AgentClient {
    rpc: Rpc<Channel>,
    session: Arc<Session>,
}

#[derive(Debug)]
struct Session {
    /// Tells it from every other of this process.
    number: u64,
    /// A second descriptor of the stream, to shut it from outside of its connection task; `None` if there never was one.
    socket: Option<StdUnixStream>,
    open: watch::Receiver<bool>,
    hello: HelloReply,
}

impl ConnectError {
    /// The guest, or what should be there of it, has said nothing for the whole time; any other error means that it is gone or speaks wrongly.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(self, Self::Silent { .. })
    }
}

impl AgentClient {
    /// Connects to QEMU's socket and meets the guest, which may still be booting.
    ///
    /// `limit` bounds the whole call.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, ConnectError> {
        let deadline = Instant::now() + limit;
        let mut wait = SESSION_WAIT_FIRST;
        loop {
            let mut laps = Laps::begin();
            let stream = meet(path, limit, deadline).await?;
            laps.lap("marker");
            let until = deadline.min(Instant::now() + wait);
            match tokio::time::timeout_at(until, Self::over(stream)).await {
                Ok(result) => {
                    laps.lap("session");
                    tracing::debug!(%laps, "the guest is met");
                    return result;
                }
                Err(_elapsed) if Instant::now() >= deadline => return Err(ConnectError::Silent { waited: limit }),
                Err(_elapsed) => {
                    tracing::debug!(path = %path.display(), "a guest that was met says nothing; meeting it again");
                    wait *= 2;
                }
            }
        }
    }

    /// A session over a stream on which the markers have been exchanged.
    async fn over(stream: UnixStream) -> Result<Self, ConnectError> {
        let stream = stream.into_std().map_err(ConnectError::Handshake)?;
        let socket = stream.try_clone().map_err(ConnectError::Handshake)?;
        let stream = UnixStream::from_std(stream).map_err(ConnectError::Handshake)?;
        let (closed, open) = watch::channel(true);
        let once = Mutex::new(Some(Watched { stream, closed }));
        let connector = tower::service_fn(move |_uri| {
            // A session is never resumed on another stream: the second attempt fails.
            let stream = once.lock().ok().and_then(|mut stream| stream.take());
            std::future::ready(stream.map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
        });
        let channel = Endpoint::from_static("http://guest")
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .connect_with_connector(connector)
            .await
            .map_err(ConnectError::Http2)?;
        let mut rpc = Rpc::new(channel);
        let request = HelloRequest { host_version: proto::VERSION.into() };
        let hello = reply("Hello", rpc.hello(request).await).map_err(ConnectError::Hello)?;
        Ok(Self { rpc, session: Arc::new(Session { number: next_number(), socket: Some(socket), open, hello }) })
    }

    /// A session that has ended before it began: for a guest whose vCPUs stand still and who has not been met since the node agent's start.
    pub fn absent() -> Self {
        let connector = tower::service_fn(|_uri| {
            let absent: io::Result<TokioIo<UnixStream>> = Err(io::ErrorKind::NotConnected.into());
            std::future::ready(absent)
        });
        let rpc = Rpc::new(Endpoint::from_static("http://guest").connect_with_connector_lazy(connector));
        let (_closed, open) = watch::channel(false);
        Self {
            rpc,
            session: Arc::new(Session { number: next_number(), socket: None, open, hello: HelloReply::default() }),
        }
    }

    /// Differs from that of every other session of this process.
    pub fn number(&self) -> u64 {
        self.session.number
    }

    /// What the guest said at the beginning of the session.
    pub fn hello(&self) -> &HelloReply {
        &self.session.hello
    }

    /// Returns when the session has ended, whoever ended it. Cancel safe.
    pub async fn closed(&self) {
        let mut open = self.session.open.clone();
        // An error means that the sender, which lives with the stream, is gone: closed as well.
        drop(open.wait_for(|open| !open).await);
    }

    pub fn is_closed(&self) -> bool {
        !*self.session.open.borrow() || self.session.open.has_changed().is_err()
    }

    /// Ends the session for all clones. The guest sees the end of the stream, so that no half conversation is in a snapshot taken afterwards.
    pub async fn disconnect(&self) {
        // Fails only when the other side was first.
        if let Some(socket) = &self.session.socket {
            drop(socket.shutdown(Shutdown::Both));
        }
        if tokio::time::timeout(DISCONNECT_LIMIT, self.closed()).await.is_err() {
            tracing::warn!("the guest's control channel is shut, but its task holds on");
        }
    }

    /// Gives the VM its identity and the right time.
    pub async fn configure(&self, request: ConfigureRequest) -> Result<ConfigureReply, CallError> {
        reply("Configure", self.rpc.clone().configure(request).await)
    }

    /// Mounts the volume and starts the user's environment; one that runs already is fine.
    pub async fn start_environment(&self) -> Result<StartEnvironmentReply, CallError> {
        reply("StartEnvironment", self.rpc.clone().start_environment(StartEnvironmentRequest {}).await)
    }

    /// Ends the user's environment and unmounts the volume. Look at `clean` before touching the device.
    pub async fn stop_environment(&self, grace_ms: u32) -> Result<StopEnvironmentReply, CallError> {
        reply("StopEnvironment", self.rpc.clone().stop_environment(StopEnvironmentRequest { grace_ms }).await)
    }

    /// Freezes the guest's file system for at most `max_frozen_ms`. A guest that knows of bells reads `bell_bytes` bytes of its disk meanwhile, and has
    /// thawed when it answers; then the answer says `rung`.
    pub async fn freeze(&self, limit_ms: u32, max_frozen_ms: u32, bell_bytes: u32) -> Result<FreezeReply, CallError> {
        reply("Freeze", self.rpc.clone().freeze(FreezeRequest { limit_ms, max_frozen_ms, bell_bytes }).await)
    }

    pub async fn thaw(&self) -> Result<ThawReply, CallError> {
        reply("Thaw", self.rpc.clone().thaw(ThawRequest {}).await)
    }

    /// Grows the file system to all of a disk of `disk_bytes`. The guest's driver hears of a disk's new size some time after QEMU does, so it is asked
    /// again until it has; the caller bounds that.
    pub async fn grow_filesystem(&self, disk_bytes: u64) -> Result<(), CallError> {
        loop {
            let request = GrowFilesystemRequest {};
            let GrowFilesystemReply { size_bytes } =
                reply("GrowFilesystem", self.rpc.clone().grow_filesystem(request).await)?;
            // In whole blocks.
            if size_bytes.saturating_add(FS_BLOCK_BYTES_MAX) > disk_bytes {
                return Ok(());
            }
            tokio::time::sleep(GROW_POLL).await;
        }
    }

    /// Flushes everything to the device.
    pub async fn sync(&self) -> Result<(), CallError> {
        reply("Sync", self.rpc.clone().sync(SyncRequest {}).await).map(|_nothing| ())
    }

    /// Starts a command or attaches to a session: the first input is `start` or `attach`.
    ///
    /// Dropping the answer or ending `input` is a disconnect, not an end of the command.
    pub async fn exec(
        &self,
        input: impl Stream<Item = ExecInput> + Send + 'static,
    ) -> Result<Streaming<ExecOutput>, CallError> {
        reply("Exec", self.rpc.clone().exec(input).await)
    }

    /// Runs a command without input, discards what it prints and returns its exit code.
    pub async fn run_once(&self, argv: Vec<String>) -> Result<i32, CallError> {
        let start = ExecStart { argv, ..ExecStart::default() };
        let start = ExecInput { input: Some(exec_input::Input::Start(start)) };
        // The input stays open until the end; its end would be a disconnect.
        let input =
            futures_util::StreamExt::chain(futures_util::stream::iter([start]), futures_util::stream::pending());
        let mut output = self.exec(input).await?;
        loop {
            match output.message().await.map_err(|source| CallError { call: "Exec", source: Box::new(source) })? {
                Some(ExecOutput { output: Some(exec_output::Output::Exit(code)) }) => return Ok(code),
                Some(_) => {}
                None => {
                    let status = Status::unavailable("the session ended before the command did");
                    return Err(CallError { call: "Exec", source: Box::new(status) });
                }
            }
        }
    }

    pub async fn list_sessions(&self) -> Result<Vec<GuestSession>, CallError> {
        reply("ListSessions", self.rpc.clone().list_sessions(ListSessionsRequest {}).await).map(|list| list.sessions)
    }

    pub async fn kill_session(&self, request: KillSessionRequest) -> Result<Streaming<KillEvent>, CallError> {
        reply("KillSession", self.rpc.clone().kill_session(request).await)
    }

    /// One TCP connection to an address inside the guest: the first input is `open`.
    pub async fn tunnel(
        &self,
        input: impl Stream<Item = TunnelInput> + Send + 'static,
    ) -> Result<Streaming<TunnelOutput>, CallError> {
        reply("Tunnel", self.rpc.clone().tunnel(input).await)
    }

    /// Listening TCP ports: first the present ones, then changes.
    pub async fn watch_ports(&self) -> Result<Streaming<PortEvent>, CallError> {
        reply("WatchPorts", self.rpc.clone().watch_ports(WatchPortsRequest {}).await)
    }

    /// Activity inside, and what programs inside ask of the host.
    pub async fn watch(&self) -> Result<Streaming<GuestEvent>, CallError> {
        reply("Watch", self.rpc.clone().watch(WatchRequest {}).await)
    }

    /// A piece of the answer to a `HostRequest` of [`Self::watch`].
    pub async fn answer(&self, answer: AnswerRequest) -> Result<(), CallError> {
        reply("Answer", self.rpc.clone().answer(Request::new(answer)).await).map(|_nothing| ())
    }
}

fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn reply<T>(call: &'static str, result: Result<Response<T>, Status>) -> Result<T, CallError> {
    result.map(Response::into_inner).map_err(|source| CallError { call, source: Box::new(source) })
}

/// Waits for QEMU to listen.
async fn open_socket(path: &Path, deadline: Instant) -> Result<UnixStream, ConnectError> {
    loop {
        let error = match tokio::time::timeout_at(deadline, UnixStream::connect(path)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error,
            Err(_elapsed) => io::ErrorKind::TimedOut.into(),
        };
        let starting = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        if !starting || Instant::now() + SOCKET_RETRY >= deadline {
            return Err(ConnectError::Socket { path: path.to_owned(), source: error });
        }
        tokio::time::sleep(SOCKET_RETRY).await;
    }
}

/// Exchanges markers until one of ours is answered.
///
/// Each attempt is a connection of its own: a guest that wrote at the moment the host before us died leaves QEMU's port throttled, with nothing that
/// would release it but the end of a connection (seen with QEMU 10.0, about once in ten kills under load).
async fn meet(path: &Path, limit: Duration, deadline: Instant) -> Result<UnixStream, ConnectError> {
    let mut wait = MARKER_WAIT_FIRST;
    loop {
        let mut stream = open_socket(path, deadline).await?;
        let until = deadline.min(Instant::now() + wait);
        match tokio::time::timeout_at(until, resync::host_handshake(&mut stream, rand::random())).await {
            Ok(Ok(())) => return Ok(stream),
            // QEMU ends the connection only when it ends itself.
            Ok(Err(source)) => return Err(ConnectError::Handshake(source)),
            Err(_elapsed) if Instant::now() >= deadline => return Err(ConnectError::Silent { waited: limit }),
            Err(_elapsed) => wait = (wait * 2).min(MARKER_WAIT_MAX),
        }
    }
}

/// The session's stream. Its end is noticed when the connection's task drops it, reads the end or fails.
#[derive(Debug)]
struct Watched {
    stream: UnixStream,
    closed: watch::Sender<bool>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.closed.send_replace(false);
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let ended = match &polled {
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            self.closed.send_replace(false);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
