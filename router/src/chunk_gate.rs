//! Lets an HTTP/1.1 answer through in whole chunks.
//!
//! In the Sprites dialect an exec over plain HTTP says with each chunk one message: a type and a payload, no length (sprites-api §5.8). hyper
//! hands on a chunk as it arrives, possibly in pieces, and a piece that became a chunk of its own would be read as another message. This
//! wrapper stands below hyper's client and gives it at most one whole unit (head, size line, chunk) per read, so that each chunk becomes one
//! frame of the body; our server side writes each frame as one chunk.
//!
//! ```text
//!  Head ──▶ Size ⇄ Chunk          Raw: not chunked, last chunk seen, or not understood: passed on as it comes
//!    └─────────┴──▶ Raw
//! ```

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A larger chunk is passed on in pieces. The node agent's frames are far smaller.
pub(crate) const CHUNK_BYTES_MAX: usize = 256 << 10;
/// Of a head or a size line; more is not ours.
const LINE_BYTES_MAX: usize = 64 << 10;
const READ_BYTES: usize = 16 << 10;

pub(crate) struct ChunkGate<S> {
    stream: S,
    /// Received and not yet handed on.
    held: BytesMut,
    /// Of `held`, how much belongs to the unit that may pass.
    open: usize,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Head,
    Size,
    /// So many bytes of data and line end are still to come.
    Chunk(usize),
    /// The rest of a chunk that is too large to be held.
    LargeChunk(usize),
    Raw,
}

impl<S> ChunkGate<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, held: BytesMut::new(), open: 0, phase: Phase::Head }
    }
}

impl Phase {
    /// The length of the next unit at the front of `bytes`, and the phase after it; `None`: not yet all here.
    fn next_unit(self, bytes: &[u8]) -> Option<(usize, Self)> {
        if bytes.is_empty() {
            return None;
        }
        let raw = Some((bytes.len(), Self::Raw));
        match self {
            Self::Head => match find(bytes, b"\r\n\r\n") {
                Some(end) => Some((end, after_head(&bytes[..end]))),
                None if bytes.len() > LINE_BYTES_MAX => raw,
                None => None,
            },
            Self::Size => match find(bytes, b"\r\n") {
                Some(end) => Some((end, after_size(&bytes[..end - 2]))),
                None if bytes.len() > LINE_BYTES_MAX => raw,
                None => None,
            },
            Self::Chunk(len) if len > CHUNK_BYTES_MAX + 2 => Self::LargeChunk(len).next_unit(bytes),
            Self::Chunk(len) => (bytes.len() >= len).then_some((len, Self::Size)),
            Self::LargeChunk(len) if bytes.len() >= len => Some((len, Self::Size)),
            Self::LargeChunk(len) => Some((bytes.len(), Self::LargeChunk(len - bytes.len()))),
            Self::Raw => raw,
        }
    }
}

fn after_head(head: &[u8]) -> Phase {
    // An interim answer is followed by another head.
    if head.starts_with(b"HTTP/1.1 1") && !head.starts_with(b"HTTP/1.1 101") {
        return Phase::Head;
    }
    let chunked = head.split(|&b| b == b'\n').any(|line| {
        let line = line.to_ascii_lowercase();
        line.starts_with(b"transfer-encoding:") && line.trim_ascii_end().ends_with(b"chunked")
    });
    if chunked { Phase::Size } else { Phase::Raw }
}

fn after_size(line: &[u8]) -> Phase {
    let digits = line.split(|&b| b == b';').next().unwrap_or_default().trim_ascii();
    let size = std::str::from_utf8(digits).ok().and_then(|digits| usize::from_str_radix(digits, 16).ok());
    match size.and_then(|size| size.checked_add(2)) {
        Some(2) | None => Phase::Raw,
        Some(len) => Phase::Chunk(len),
    }
}

/// The position behind `mark`.
fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark).map(|at| at + mark.len())
}

impl<S: AsyncRead + Unpin> AsyncRead for ChunkGate<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let gate = self.get_mut();
        loop {
            if gate.open > 0 {
                let len = gate.open.min(into.remaining());
                into.put_slice(&gate.held[..len]);
                gate.held.advance(len);
                gate.open -= len;
                return Poll::Ready(Ok(()));
            }
            if let Some((len, phase)) = gate.phase.next_unit(&gate.held) {
                gate.open = len;
                gate.phase = phase;
                continue;
            }
            gate.held.reserve(READ_BYTES);
            let received = ready!(tokio_util::io::poll_read_buf(Pin::new(&mut gate.stream), context, &mut gate.held))?;
            if received == 0 {
                // The end, perhaps in the middle of a unit: hyper says what it thinks of that.
                gate.phase = Phase::Raw;
                if gate.held.is_empty() {
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ChunkGate<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What each read returns, when the other side sends `pieces` one by one.
    async fn units(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
        let (mut theirs, ours) = tokio::io::duplex(1 << 20);
        let mut gate = ChunkGate::new(ours);
        let sender = async {
            for piece in pieces {
                theirs.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
            drop(theirs);
        };
        let receiver = async {
            let mut units = Vec::new();
            let mut buffer = vec![0; CHUNK_BYTES_MAX + 2];
            loop {
                let len = gate.read(&mut buffer).await.unwrap();
                if len == 0 {
                    return units;
                }
                units.push(buffer[..len].to_vec());
            }
        };
        tokio::join!(sender, receiver).1
    }

    #[tokio::test]
    async fn chunks_pass_whole_however_they_arrive() {
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice();
        let stream = [head, b"5\r\nhello\r\n3;x=y\r\nabc\r\n0\r\n\r\n"].concat();
        let expected: Vec<&[u8]> = vec![head, b"5\r\n", b"hello\r\n", b"3;x=y\r\n", b"abc\r\n", b"0\r\n"];
        let all_at_once = units(&[&stream]).await;
        assert_eq!(all_at_once[..6], expected);
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(units(&bytes).await[..6], expected);
        for cut in 1..stream.len() {
            assert_eq!(units(&[&stream[..cut], &stream[cut..]]).await[..6], expected, "cut at {cut}");
        }
    }

    #[tokio::test]
    async fn what_is_not_chunked_or_not_understood_passes_as_it_comes() {
        for stream in [
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello".as_slice(),
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\nhello",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n",
            b"garbage",
        ] {
            assert_eq!(units(&[stream]).await.concat(), stream);
        }
    }

    #[tokio::test]
    async fn a_chunk_beyond_the_limit_is_passed_in_pieces_and_the_next_is_whole_again() {
        let large = vec![b'x'; CHUNK_BYTES_MAX + 1];
        let size = format!("{:x}\r\n", large.len());
        let stream =
            [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", size.as_bytes(), &large, b"\r\n2\r\nab\r\n"]
                .concat();
        let units = units(&[&stream]).await;
        assert_eq!(units.concat(), stream);
        assert_eq!(units[units.len() - 2..], [b"2\r\n".to_vec(), b"ab\r\n".to_vec()]);
    }
}
