//! One client's connection: the handshake, then requests and replies.
//!
//! ```text
//!  socket ─▶ input ─▶ Decoder ─▶ start: polled once here ── ready ──▶ output ─▶ socket, many replies per system call
//!                                  └── pending: its own task ─▶ done channel ─┘
//! ```
//!
//! One task does it all except operations that wait. What a device can answer at once (a write to its journal, a cached read) costs
//! neither a task nor a wake-up. While a budget is exceeded ([`IN_FLIGHT_MAX`] operations that wait, [`BYTES_MAX`] of payloads and unsent
//! replies) nothing is read, so the socket pushes back on the client; replies still go out, so nobody waits for the other for ever.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_util::sync::CancellationToken;

use super::{
    codec::{
        Agreed, Command, Decoded, Decoder, Errno, LostFraming, Reply, Request, Shape, StatusExtent, command_flag,
        encode_reply,
    },
    export::{Attached, DeviceError, Export, ExportTable, Extent, ExtentKind},
    options::{
        self, Ask, CLIENT_FLAGS_BYTES, ClientOption, ContextVerb, HandshakeError, OPTION_DATA_BYTES_MAX,
        OPTION_HEADER_BYTES, OptionHeader, Refusal,
    },
};

/// Operations of one connection that wait for a device at the same time.
const IN_FLIGHT_MAX: usize = 256;
/// Payloads in work and replies unsent, of one connection; exceeded by at most one request.
const BYTES_MAX: usize = 64 << 20;
/// Free space offered to each read from the socket.
const READ_BYTES: usize = 256 << 10;
/// Largest growth of the input at once: a client that announces 32 MiB and sends nothing costs this much.
const GROWTH_BYTES_MAX: usize = 4 << 20;
/// Data of a reply up to this size is copied next to its header: cheaper than one more slice to send.
const COPY_BYTES_MAX: usize = 1_024;
/// Slices given to one system call.
const SLICES_MAX: usize = 64;
/// A client that has not finished the handshake by then is cut off.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(30);
/// Options of one handshake; a client needs less than ten.
const OPTIONS_MAX: u32 = 256;
/// Extents in one BLOCK_STATUS reply. The client asks again from where the reply ends.
const EXTENTS_MAX: usize = 4_096;

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("the socket failed")]
    Socket(#[from] io::Error),
    #[error("the client does not speak NBD")]
    Handshake(#[from] HandshakeError),
    #[error("the client's stream cannot be understood any more")]
    Framing(#[from] LostFraming),
    #[error("the handshake took longer than {HANDSHAKE_TIME_MAX:?}")]
    Slow,
    #[error("the handshake took more than {OPTIONS_MAX} options")]
    Chatty,
    #[error("no export {name:?}, and the client's way of asking has no answer for that")]
    UnknownExport { name: String },
}

/// Serves one client until it leaves, its stream breaks or the table closes it.
pub(super) async fn serve(stream: UnixStream, table: &ExportTable) -> Result<(), ConnectionError> {
    let mut handshake = Handshake::new(&stream, table);
    let begun = match tokio::time::timeout(HANDSHAKE_TIME_MAX, handshake.run()).await {
        Ok(begun) => begun?,
        Err(_elapsed) => return Err(ConnectionError::Slow),
    };
    let Some((attached, agreed)) = begun else { return Ok(()) };
    let input = handshake.input;
    let attached = Arc::new(attached);
    let result = Transmission::new(&stream, Arc::clone(&attached), agreed, input).run().await;
    attached.close();
    result
}

struct Handshake<'a> {
    stream: &'a UnixStream,
    table: &'a ExportTable,
    input: BytesMut,
    agreed: Agreed,
    /// The export whose meta context was set. For another one it does not count.
    context_of: Option<String>,
    no_zeroes: bool,
}

/// What follows an option.
enum Next {
    Option,
    End,
    Begin(Attached),
}

impl<'a> Handshake<'a> {
    fn new(stream: &'a UnixStream, table: &'a ExportTable) -> Self {
        let (agreed, input) = (Agreed::default(), BytesMut::with_capacity(READ_BYTES));
        Self { stream, table, input, agreed, context_of: None, no_zeroes: false }
    }

    /// `None` if the client left without beginning.
    async fn run(&mut self) -> Result<Option<(Attached, Agreed)>, ConnectionError> {
        let mut out = BytesMut::new();
        options::encode_greeting(&mut out);
        self.send(&mut out).await?;
        let Some(flags) = self.take(CLIENT_FLAGS_BYTES).await? else { return Ok(None) };
        self.no_zeroes = options::parse_client_flags(fixed(&flags))?;
        for _ in 0..OPTIONS_MAX {
            let Some(header) = self.take(OPTION_HEADER_BYTES).await? else { return Ok(None) };
            let header = OptionHeader::parse(fixed(&header))?;
            let parsed = if header.data_len_bytes > OPTION_DATA_BYTES_MAX {
                self.skip(header.data_len_bytes).await?;
                Err(Refusal::TooBig)
            } else {
                let Some(data) = self.take(header.data_len_bytes as usize).await? else { return Ok(None) };
                ClientOption::parse(header.code, &data)
            };
            let next = match parsed {
                Ok(option) => self.answer(header.code, option, &mut out).await?,
                Err(refusal) => {
                    options::encode_refusal(header.code, refusal, &mut out);
                    Next::Option
                }
            };
            self.send(&mut out).await?;
            match next {
                Next::Option => {}
                Next::End => return Ok(None),
                Next::Begin(attached) => return Ok(Some((attached, self.agreed))),
            }
        }
        Err(ConnectionError::Chatty)
    }

    async fn answer(&mut self, code: u32, option: ClientOption, out: &mut BytesMut) -> Result<Next, ConnectionError> {
        match option {
            ClientOption::Abort => {
                options::encode_ack(code, out);
                return Ok(Next::End);
            }
            ClientOption::List => {
                for name in self.table.names() {
                    options::encode_listed(code, &name, out);
                }
                options::encode_ack(code, out);
            }
            ClientOption::StructuredReply => {
                self.agreed.structured_replies = true;
                options::encode_ack(code, out);
            }
            ClientOption::MetaContext { verb, name, allocation } => {
                self.meta_context(code, verb, name, allocation, out)
            }
            ClientOption::Describe { ask, name, wants_name } => {
                return self.describe(code, ask, &name, wants_name, out).await;
            }
            ClientOption::ExportName(name) => {
                self.settle_context(&name);
                let attached = self.table.attach(&name, self.stream.as_fd().try_clone_to_owned()?).await;
                let Some(attached) = attached else { return Err(ConnectionError::UnknownExport { name }) };
                options::encode_export_name(shape_of(&attached.export), self.agreed, self.no_zeroes, out);
                return Ok(Next::Begin(attached));
            }
        }
        Ok(Next::Option)
    }

    async fn describe(
        &mut self,
        code: u32,
        ask: Ask,
        name: &str,
        wants_name: bool,
        out: &mut BytesMut,
    ) -> Result<Next, ConnectionError> {
        let shown = wants_name.then_some(name);
        let next = match ask {
            Ask::Info => self.table.get(name).map(|export| (shape_of(&export), Next::Option)),
            Ask::Go => {
                let attached = self.table.attach(name, self.stream.as_fd().try_clone_to_owned()?).await;
                attached.map(|attached| (shape_of(&attached.export), Next::Begin(attached)))
            }
        };
        let Some((shape, next)) = next else {
            options::encode_refusal(code, Refusal::UnknownExport, out);
            return Ok(Next::Option);
        };
        if ask == Ask::Go {
            self.settle_context(name);
        }
        options::encode_description(code, shown, shape, self.agreed, out);
        options::encode_ack(code, out);
        Ok(next)
    }

    fn meta_context(&mut self, code: u32, verb: ContextVerb, name: String, allocation: bool, out: &mut BytesMut) {
        if !self.agreed.structured_replies {
            return options::encode_refusal(code, Refusal::Invalid, out);
        }
        if self.table.get(&name).is_none() {
            return options::encode_refusal(code, Refusal::UnknownExport, out);
        }
        if allocation {
            options::encode_allocation_context(code, verb, out);
        }
        if verb == ContextVerb::Set {
            self.agreed.allocation = allocation;
            self.context_of = Some(name);
        }
        options::encode_ack(code, out);
    }

    /// Contexts hold for the export they were set for only.
    fn settle_context(&mut self, name: &str) {
        if self.context_of.as_deref() != Some(name) {
            self.agreed.allocation = false;
        }
    }

    /// Waits for so many bytes of the client; `None` if it leaves before.
    async fn take(&mut self, len: usize) -> Result<Option<BytesMut>, ConnectionError> {
        while self.input.len() < len {
            self.input.reserve(READ_BYTES);
            if receive(self.stream, &mut self.input).await? == 0 {
                return Ok(None);
            }
        }
        Ok(Some(self.input.split_to(len)))
    }

    async fn skip(&mut self, len: u32) -> Result<(), ConnectionError> {
        let mut left = len as usize;
        loop {
            let here = left.min(self.input.len());
            self.input.advance(here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            self.input.reserve(READ_BYTES);
            if receive(self.stream, &mut self.input).await? == 0 {
                return Ok(());
            }
        }
    }

    async fn send(&self, out: &mut BytesMut) -> Result<(), ConnectionError> {
        while !out.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_write(out) {
                Ok(sent) => out.advance(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn fixed<const N: usize>(bytes: &BytesMut) -> [u8; N] {
    bytes[..].try_into().expect("so many bytes were taken")
}

fn shape_of(export: &Export) -> Shape {
    Shape { size_bytes: export.size_bytes(), read_only: export.read_only() }
}

/// Reads what is there; 0 at the end of the stream. Cancel safe.
async fn receive(stream: &UnixStream, input: &mut BytesMut) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read_buf(input) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

/// An operation that had to wait, finished.
struct Done {
    request: Request,
    reply: Reply,
    cost_bytes: usize,
}

struct Transmission<'a> {
    stream: &'a UnixStream,
    attached: Arc<Attached>,
    agreed: Agreed,
    shape: Shape,
    input: BytesMut,
    decoder: Decoder,
    output: Output,
    /// Operations in tasks of their own, and the payloads they hold or will return.
    in_flight: usize,
    in_flight_bytes: usize,
    done: (mpsc::Sender<Done>, mpsc::Receiver<Done>),
    /// Cancelled with the connection: ends the waiting operations that change nothing. Changes run to their end (`export`).
    gone: CancellationToken,
}

impl<'a> Transmission<'a> {
    fn new(stream: &'a UnixStream, attached: Arc<Attached>, agreed: Agreed, input: BytesMut) -> Self {
        Self {
            stream,
            shape: shape_of(&attached.export),
            attached,
            agreed,
            input,
            decoder: Decoder::default(),
            output: Output::default(),
            in_flight: 0,
            in_flight_bytes: 0,
            done: mpsc::channel(IN_FLIGHT_MAX),
            gone: CancellationToken::new(),
        }
    }

    async fn run(mut self) -> Result<(), ConnectionError> {
        let _gone = self.gone.clone().drop_guard();
        let attached = Arc::clone(&self.attached);
        let mut reading = true;
        loop {
            let mut need = 0;
            while reading && need == 0 && self.has_room() {
                match self.decoder.next(&mut self.input, |request| self.shape.check(request, self.agreed))? {
                    Decoded::Need(bytes) => need = bytes,
                    Decoded::Request(request, _) if request.command == Command::Disconnect => reading = false,
                    Decoded::Request(request, payload) => self.start(request, payload).await,
                    Decoded::Refused(request, errno) => self.reply(&request, Reply::Failed(errno)),
                }
            }
            if !reading && self.in_flight == 0 && self.output.is_empty() {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = attached.closed() => return Ok(()),
                Some(done) = self.done.1.recv(), if self.in_flight > 0 => {
                    self.finish(done);
                    while let Ok(done) = self.done.1.try_recv() {
                        self.finish(done);
                    }
                }
                sent = self.output.send(self.stream), if !self.output.is_empty() => sent?,
                received = {
                    self.input.reserve(if need > 0 { need.clamp(READ_BYTES, GROWTH_BYTES_MAX) } else { 0 });
                    receive(self.stream, &mut self.input)
                }, if need > 0 => reading = received? > 0,
            }
        }
    }

    fn has_room(&self) -> bool {
        self.in_flight < IN_FLIGHT_MAX && self.in_flight_bytes + self.output.len_bytes < BYTES_MAX
    }

    /// Begins an operation. What the device can answer at once is answered here, without a task.
    async fn start(&mut self, request: Request, payload: Bytes) {
        let cost_bytes = match request.command {
            Command::Read | Command::Write => request.len_bytes as usize,
            _ => 0,
        };
        let attached = Arc::clone(&self.attached);
        let mut operation = Box::pin(async move { perform(&attached.export, &request, payload).await });
        match futures_util::poll!(operation.as_mut()) {
            std::task::Poll::Ready(reply) => self.reply(&request, reply),
            std::task::Poll::Pending => {
                self.in_flight += 1;
                self.in_flight_bytes += cost_bytes;
                let (sender, gone) = (self.done.0.clone(), self.gone.clone());
                tokio::spawn(async move {
                    let reply = if request.command.changes() {
                        operation.await
                    } else {
                        let Some(reply) = gone.run_until_cancelled(operation).await else { return };
                        reply
                    };
                    // Fails only if the connection is gone, and with it who asked.
                    drop(sender.send(Done { request, reply, cost_bytes }).await);
                });
            }
        }
    }

    fn finish(&mut self, done: Done) {
        self.in_flight -= 1;
        self.in_flight_bytes -= done.cost_bytes;
        self.reply(&done.request, done.reply);
    }

    fn reply(&mut self, request: &Request, reply: Reply) {
        self.output.push(self.agreed, request, reply);
    }
}

/// Carries out a request that passed the check.
async fn perform(export: &Export, request: &Request, payload: Bytes) -> Reply {
    match try_perform(export, request, payload).await {
        Ok(reply) => reply,
        Err(error) => {
            let errno = errno_of(error);
            tracing::debug!(?request, %error, ?errno, "NBD request failed");
            Reply::Failed(errno)
        }
    }
}

async fn try_perform(export: &Export, request: &Request, payload: Bytes) -> Result<Reply, DeviceError> {
    let &Request { offset, len_bytes, .. } = request;
    let empty = len_bytes == 0;
    match request.command {
        Command::Read if empty => return Ok(Reply::Done),
        Command::Read => {
            return Ok(match export.read(offset, len_bytes).await? {
                Some(bytes) => Reply::Data { offset, bytes },
                None => Reply::Hole { offset, len_bytes },
            });
        }
        Command::BlockStatus => {
            let extents = export.extents(offset, len_bytes).await?;
            return Ok(Reply::Status(status(&extents, len_bytes, request.has(command_flag::REQ_ONE))));
        }
        Command::Flush => export.flush().await?,
        Command::Write if !empty => export.write(offset, payload).await?,
        Command::Trim if !empty => export.zero(offset, len_bytes, true).await?,
        Command::WriteZeroes if !empty => {
            export.zero(offset, len_bytes, !request.has(command_flag::NO_HOLE)).await?;
        }
        // A hint. The volume reads ahead by itself.
        Command::Cache | Command::Write | Command::Trim | Command::WriteZeroes => {}
        // Neither passes the check.
        Command::Disconnect | Command::Unknown(_) => return Ok(Reply::Failed(Errno::Invalid)),
    }
    if request.has(command_flag::FUA) && request.command.changes() {
        export.flush().await?;
    }
    Ok(Reply::Done)
}

/// Joins equal neighbours and keeps within the request and [`EXTENTS_MAX`].
fn status(extents: &[Extent], len_bytes: u32, only_one: bool) -> Vec<StatusExtent> {
    let most = if only_one { 1 } else { EXTENTS_MAX };
    let mut found: Vec<StatusExtent> = Vec::new();
    let mut left = len_bytes;
    for extent in extents {
        let len_bytes = u32::try_from(extent.len_bytes).unwrap_or(u32::MAX).min(left);
        let hole = extent.kind == ExtentKind::Hole;
        if len_bytes == 0 {
            continue;
        }
        let full = found.len() == most;
        match found.last_mut() {
            Some(last) if last.hole == hole => last.len_bytes += len_bytes,
            _ if full => break,
            _ => found.push(StatusExtent { len_bytes, hole }),
        }
        left -= len_bytes;
    }
    if found.is_empty() {
        // A reply must describe something; data is always a safe answer.
        found.push(StatusExtent { len_bytes, hole: false });
    }
    found
}

fn errno_of(error: DeviceError) -> Errno {
    match error {
        DeviceError::NoSpace => Errno::NoSpace,
        DeviceError::Fenced => Errno::ShutDown,
        DeviceError::Integrity | DeviceError::Io => Errno::Io,
        DeviceError::OutOfRange => Errno::Invalid,
        DeviceError::ReadOnly => Errno::Perm,
    }
}

/// Replies on their way out.
#[derive(Default)]
struct Output {
    segments: VecDeque<Bytes>,
    /// Headers and small data not yet in `segments`.
    tail: BytesMut,
    len_bytes: usize,
}

impl Output {
    fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    fn push(&mut self, agreed: Agreed, request: &Request, reply: Reply) {
        let before = self.tail.len();
        let data = encode_reply(agreed, request, reply, &mut self.tail);
        self.len_bytes += self.tail.len() - before + data.len();
        if data.len() <= COPY_BYTES_MAX {
            self.tail.extend_from_slice(&data);
        } else {
            self.segments.push_back(self.tail.split().freeze());
            self.segments.push_back(data);
        }
    }

    /// Sends what the socket takes at once, after waiting until it takes anything. Cancel safe.
    async fn send(&mut self, stream: &UnixStream) -> io::Result<()> {
        if !self.tail.is_empty() {
            self.segments.push_back(self.tail.split().freeze());
        }
        stream.writable().await?;
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let used = self.segments.iter().zip(&mut slices).map(|(bytes, slice)| *slice = IoSlice::new(bytes)).count();
        let sent = match stream.try_write_vectored(&slices[..used]) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        self.len_bytes -= sent;
        let mut left = sent;
        while let Some(first) = self.segments.front_mut() {
            if first.len() > left {
                first.advance(left);
                break;
            }
            left -= first.len();
            self.segments.pop_front();
        }
        Ok(())
    }
}
