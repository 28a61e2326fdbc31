//! Sessions with the host, one after the other, over one byte stream (see `proto::resync`).
//!
//! ```text
//!  wait for a marker ─▶ answer it ─▶ HTTP/2 ─┬─ the port reads as ended: the host has left ─▶ wait for a marker
//!                                           └─ a new marker ────────────────────────────▶ answer it
//! ```
//! The end of a session ends its calls, and nothing else: commands go on, and the next session attaches to them again.
//!
//! # Telling a new marker from data
//!
//! Users send any bytes, also a copy of our own program with the marker in it. So [`Scanner`] follows the frames of HTTP/2. Between two frames the first
//! byte of a marker cannot begin a frame's length, so there it is one. Inside a frame it is one only if nothing follows: a host that has begun a new
//! session waits for the answer, while data go on until their frame is whole.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use proto::{
    agent::agent_server::AgentServer,
    resync::{self, MARKER_LEN},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::{Instant, Sleep},
};

use crate::{agent::Agent, log, port::Port};

/// While no host is connected the port reads as ended, at once; look again after this.
const ABSENT_POLL: Duration = Duration::from_millis(10);
/// The host reads at once when it has sent a marker.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// With nothing behind a marker for this long, the host waits for an answer. Less than the host's pause between two markers.
const SILENCE: Duration = Duration::from_millis(100);
/// As on the host's side: what one stream, and all of them, may have under way.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES_MAX: u32 = 64 << 10;
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// Calls at a time.
const STREAMS_MAX: u32 = 4096;
/// Calls the host gives up before we have answered; more than all calls cannot be meant badly, as the host may do anything to us anyway.
const RESETS_MAX: usize = 1 << 16;

type Nonce = [u8; 16];

/// Serves the host for ever.
pub(crate) async fn serve(port: Arc<OwnedFd>, agent: Arc<Agent>) -> io::Result<()> {
    let mut next = Next::default();
    loop {
        let mut stream = Port::new(Arc::clone(&port), std::mem::take(&mut next.early))?;
        let nonce = match next.nonce.take() {
            Some(nonce) => nonce,
            None => match resync::guest_accept(&mut stream).await {
                Ok(nonce) => nonce,
                Err(_the_host_is_away) => {
                    drop(stream);
                    tokio::time::sleep(ABSENT_POLL).await;
                    continue;
                }
            },
        };
        let mut stream = stream.renewed()?;
        let answer = async {
            stream.write_all(&resync::guest_marker(nonce)).await?;
            stream.flush().await
        };
        match tokio::time::timeout(ANSWER_LIMIT, answer).await {
            Ok(Ok(())) => next = session(stream, &agent).await,
            Ok(Err(error)) => log!("cannot answer the host: {error}"),
            Err(_elapsed) => {}
        }
    }
}

/// How the next session begins.
#[derive(Debug, Default)]
struct Next {
    /// Its marker has been read already.
    nonce: Option<Nonce>,
    /// What came behind the marker.
    early: Bytes,
}

/// Serves one session until it ends.
async fn session<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(stream: S, agent: &Arc<Agent>) -> Next {
    let ended = Arc::new(Mutex::new(None));
    let stream = Watched { stream, scanner: Scanner::default(), silence: None, ended: Arc::clone(&ended) };
    let service = TowerToHyperService::new(AgentServer::from_arc(Arc::clone(agent)));
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(RESETS_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let connected = agent.host_connected();
    // Whatever ended it, the next session begins alike.
    drop(connection.await);
    drop(connected);
    let next = ended.lock().unwrap_or_else(PoisonError::into_inner).take();
    next.unwrap_or_default()
}

/// The stream of one session. It fails for good when a new marker is met.
struct Watched<S> {
    stream: S,
    scanner: Scanner,
    /// Runs while the last bytes look like a marker.
    silence: Option<Pin<Box<Sleep>>>,
    ended: Arc<Mutex<Option<Next>>>,
}

impl<S> Watched<S> {
    fn end(&self, next: Next) -> io::Error {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(next);
        io::Error::new(io::ErrorKind::ConnectionReset, "the host has begun a new session")
    }

    fn has_ended(&self) -> bool {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.has_ended() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Ready(Ok(())) => {
                let read = &buffer.filled()[before..];
                match self.scanner.feed(read) {
                    Ok(None) => {
                        self.silence = self
                            .scanner
                            .suspect()
                            .then(|| Box::pin(tokio::time::sleep_until(Instant::now() + SILENCE)));
                        if let Some(silence) = &mut self.silence {
                            // Registers the waker: data may not be read again before it has to ring.
                            let _rings_later: Poll<()> = silence.as_mut().poll(context);
                        }
                        Poll::Ready(Ok(()))
                    }
                    Ok(Some((nonce, used))) => {
                        let early = Bytes::copy_from_slice(&read[used..]);
                        buffer.set_filled(before);
                        Poll::Ready(Err(self.end(Next { nonce: Some(nonce), early })))
                    }
                    Err(error) => Poll::Ready(Err(error)),
                }
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => match &mut self.silence {
                Some(silence) => match silence.as_mut().poll(context) {
                    Poll::Ready(()) => {
                        let nonce = self.scanner.tail_nonce();
                        Poll::Ready(Err(self.end(Next { nonce: Some(nonce), early: Bytes::new() })))
                    }
                    Poll::Pending => Poll::Pending,
                },
                None => Poll::Pending,
            },
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.has_ended() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.has_ended() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
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

/// Length of HTTP/2's client preface, and of a frame's header.
const PREFACE_LEN: usize = 24;
const HEADER_LEN: usize = 9;
const MAGIC_LEN: usize = MARKER_LEN - size_of::<Nonce>();

/// Where in the stream the next byte belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Preface {
        left: usize,
    },
    Header {
        have: usize,
        length: usize,
    },
    Payload {
        left: usize,
    },
    /// Between two frames a marker has begun.
    Marker {
        have: usize,
    },
}

/// Follows the frames of HTTP/2 and finds markers. See the module's header.
#[derive(Debug)]
struct Scanner {
    at: At,
    /// The last bytes, whatever they belong to.
    tail: [u8; MARKER_LEN],
}

impl Default for Scanner {
    fn default() -> Self {
        Self { at: At::Preface { left: PREFACE_LEN }, tail: [0; MARKER_LEN] }
    }
}

impl Scanner {
    /// Takes what was read. Returns the nonce of a marker between frames and how many of the bytes it ends at.
    ///
    /// # Errors
    ///
    /// What stands between two frames is neither a frame nor a marker.
    fn feed(&mut self, bytes: &[u8]) -> io::Result<Option<(Nonce, usize)>> {
        let first = magic()[0];
        let mut used = 0;
        while used < bytes.len() {
            let byte = bytes[used];
            let mut step = 1;
            self.at = match self.at {
                At::Preface { left: PREFACE_LEN } | At::Header { have: 0, .. } if byte == first => {
                    At::Marker { have: 1 }
                }
                At::Preface { left } => {
                    step = left.min(bytes.len() - used);
                    if left == step { At::Header { have: 0, length: 0 } } else { At::Preface { left: left - step } }
                }
                At::Header { have, length } => {
                    let length = if have < 3 { length << 8 | usize::from(byte) } else { length };
                    match (have + 1, length) {
                        (HEADER_LEN, 0) => At::Header { have: 0, length: 0 },
                        (HEADER_LEN, left) => At::Payload { left },
                        (have, length) => At::Header { have, length },
                    }
                }
                At::Payload { left } => {
                    step = left.min(bytes.len() - used);
                    if left == step { At::Header { have: 0, length: 0 } } else { At::Payload { left: left - step } }
                }
                At::Marker { have } if have < MAGIC_LEN && byte != magic()[have] => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "neither a frame nor a marker"));
                }
                At::Marker { have } => At::Marker { have: have + 1 },
            };
            self.remember(&bytes[used..used + step]);
            used += step;
            if self.at == (At::Marker { have: MARKER_LEN }) {
                return Ok(Some((self.tail_nonce(), used)));
            }
        }
        Ok(None)
    }

    fn remember(&mut self, bytes: &[u8]) {
        let new = bytes.len().min(MARKER_LEN);
        self.tail.copy_within(new.., 0);
        self.tail[MARKER_LEN - new..].copy_from_slice(&bytes[bytes.len() - new..]);
    }

    /// Whether the last bytes are a marker, and inside a frame that is not whole.
    fn suspect(&self) -> bool {
        self.tail[..MAGIC_LEN] == magic() && self.at != (At::Header { have: 0, length: 0 })
    }

    fn tail_nonce(&self) -> Nonce {
        let mut nonce = [0; size_of::<Nonce>()];
        nonce.copy_from_slice(&self.tail[MAGIC_LEN..]);
        nonce
    }
}

/// What a host's marker begins with.
fn magic() -> [u8; MAGIC_LEN] {
    let mut magic = [0; MAGIC_LEN];
    magic.copy_from_slice(&resync::host_marker([0; size_of::<Nonce>()])[..MAGIC_LEN]);
    magic
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    const PREFACE: &[u8; PREFACE_LEN] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[0, 0, 0, 0, 0, 1], payload].concat()
    }

    fn marker(n: u8) -> Vec<u8> {
        resync::host_marker([n; 16]).to_vec()
    }

    /// Feeds in pieces of every size; returns the nonce found and whether the end is suspect.
    fn scan(stream: &[u8]) -> (Option<u8>, bool) {
        let whole = scan_in_pieces(stream, stream.len());
        for piece in [1, 2, 3, 7, 31, 32, 33] {
            assert_eq!(scan_in_pieces(stream, piece), whole, "in pieces of {piece}");
        }
        whole
    }

    fn scan_in_pieces(stream: &[u8], piece: usize) -> (Option<u8>, bool) {
        let mut scanner = Scanner::default();
        let mut taken = 0;
        for piece in stream.chunks(piece) {
            if let Some((nonce, used)) = scanner.feed(piece).unwrap() {
                assert_eq!(taken + used, stream.len(), "all streams here end with their marker");
                return (Some(nonce[0]), false);
            }
            taken += piece.len();
        }
        (None, scanner.suspect())
    }

    #[test]
    fn a_marker_between_frames_is_one() {
        assert_eq!(scan(&marker(1)), (Some(1), false));
        assert_eq!(scan(&[PREFACE.to_vec(), marker(2)].concat()), (Some(2), false));
        assert_eq!(scan(&[PREFACE.to_vec(), frame(b"abc"), frame(b""), marker(3)].concat()), (Some(3), false));
    }

    #[test]
    fn a_marker_in_data_is_data() {
        let file = [b"ELF".to_vec(), marker(7), b"rest".to_vec()].concat();
        assert_eq!(scan(&[PREFACE.to_vec(), frame(&file)].concat()), (None, false));
        assert_eq!(scan(&[PREFACE.to_vec(), frame(&marker(7))].concat()), (None, false));
        assert_eq!(scan(&[PREFACE.to_vec(), frame(&file), marker(8)].concat()), (Some(8), false));
    }

    #[test]
    fn a_marker_that_cuts_a_frame_is_suspect() {
        let cut = &frame(&[9; 100])[..50];
        assert_eq!(scan(&[PREFACE, cut, &marker(1)].concat()), (None, true));
        let in_header = &frame(&[9; 100])[..5];
        assert_eq!(scan(&[PREFACE, in_header, &marker(1)].concat()), (None, true));
        assert_eq!(scan(&[&PREFACE[..10], &marker(1)].concat()), (None, true));
    }

    #[test]
    fn nonsense_between_frames_is_an_error() {
        assert!(Scanner::default().feed(b"\xf5spam").is_err());
    }

    fn watched(stream: tokio::io::DuplexStream) -> (Watched<tokio::io::DuplexStream>, Arc<Mutex<Option<Next>>>) {
        let ended = Arc::new(Mutex::new(None));
        (Watched { stream, scanner: Scanner::default(), silence: None, ended: Arc::clone(&ended) }, ended)
    }

    #[tokio::test]
    async fn silence_behind_a_marker_in_a_frame_ends_the_session() {
        let (mut host, guest) = tokio::io::duplex(4096);
        let (mut stream, ended) = watched(guest);
        host.write_all(&[PREFACE, &frame(&[9; 100])[..50], &marker(5)].concat()).await.unwrap();
        let mut read = Vec::new();
        let error = stream.read_to_end(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(stream.write_all(b"late").await.is_err(), "nothing of the old session may follow");
        assert_eq!(ended.lock().unwrap().take().unwrap().nonce, Some([5; 16]));
    }

    #[tokio::test]
    async fn data_behind_a_marker_in_a_frame_go_on() {
        let (mut host, guest) = tokio::io::duplex(4096);
        let (mut stream, ended) = watched(guest);
        let sent = [PREFACE.to_vec(), frame(&[marker(5), vec![1; 10]].concat())].concat();
        host.write_all(&sent[..sent.len() - 10]).await.unwrap();
        let mut read = vec![0; sent.len() - 10];
        stream.read_exact(&mut read).await.unwrap();
        host.write_all(&sent[sent.len() - 10..]).await.unwrap();
        drop(host);
        stream.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, sent);
        assert!(ended.lock().unwrap().is_none());
    }

    #[tokio::test]
    async fn what_follows_a_marker_belongs_to_the_next_session() {
        let (mut host, guest) = tokio::io::duplex(4096);
        let (mut stream, ended) = watched(guest);
        host.write_all(&[PREFACE.to_vec(), marker(1), marker(2)].concat()).await.unwrap();
        stream.read(&mut [0; 4096]).await.unwrap_err();
        let next = ended.lock().unwrap().take().unwrap();
        assert_eq!((next.nonce, next.early.as_ref()), (Some([1; 16]), marker(2).as_slice()));
    }
}
