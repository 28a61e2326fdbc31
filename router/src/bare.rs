//! Gives a body to what hyper refuses by itself.
//!
//! A head that is too large or malformed never becomes a request: hyper's HTTP/1 server writes a status with an empty body and closes. Clients of
//! the dialect want JSON in every error (sprites-api §3). Such an answer is recognised on its way out: it comes while no request is in flight,
//! in one write, and has exactly the shape below; every answer of ours carries `x-request-id`.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use proto::paths::SPRITE_ERROR_HEADER;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{activity::Activity, refuse::Refusal};

/// hyper's own answers are about 100 bytes long.
const BARE_LEN_MAX: usize = 512;

pub(crate) struct Explained<S> {
    stream: S,
    activity: Arc<Activity>,
    /// What is left to be written of our text; nothing else is written before it.
    pending: Bytes,
}

impl<S> Explained<S> {
    pub(crate) fn new(stream: S, activity: Arc<Activity>) -> Self {
        Self { stream, activity, pending: Bytes::new() }
    }
}

impl<S: AsyncWrite + Unpin> Explained<S> {
    fn poll_pending(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(context, &self.pending))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

/// The refusal that stands behind an answer of hyper's own.
fn recognise(bytes: &[u8]) -> Option<Refusal> {
    if bytes.len() > BARE_LEN_MAX || !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let text = std::str::from_utf8(bytes).ok()?;
    let refusal = match text.strip_prefix("HTTP/1.1 ")?.get(..4)? {
        "400 " => Refusal::Malformed,
        "414 " => Refusal::TargetTooLong,
        "431 " => Refusal::HeadersTooLarge,
        _ => return None,
    };
    let empty = text.contains("\r\ncontent-length: 0\r\n") && text.contains("\r\nconnection: close\r\n");
    (empty && !text.contains("x-request-id")).then_some(refusal)
}

fn explain(refusal: Refusal, bare: &[u8]) -> Bytes {
    let body = refusal.json();
    let bare = String::from_utf8_lossy(bare);
    let head = bare.trim_end().replace("content-length: 0", &format!("content-length: {}", body.len()));
    let code = refusal.code();
    format!("{head}\r\ncontent-type: application/json\r\n{SPRITE_ERROR_HEADER}: {code}\r\n\r\n{body}").into()
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Explained<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_pending(context))?;
        if !this.activity.is_busy()
            && let Some(refusal) = recognise(bytes)
        {
            // Taken over as a whole; it leaves with the flush that follows.
            this.pending = explain(refusal, bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut this.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let [only] = slices {
            return Pin::new(this).poll_write(context, only);
        }
        ready!(this.poll_pending(context))?;
        Pin::new(&mut this.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_pending(context))?;
        Pin::new(&mut this.stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_pending(context))?;
        Pin::new(&mut this.stream).poll_shutdown(context)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Explained<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: &[u8] = b"HTTP/1.1 414 URI Too Long\r\nconnection: close\r\ncontent-length: 0\r\ndate: now\r\n\r\n";

    #[test]
    fn only_hypers_own_answers_are_recognised() {
        assert_eq!(recognise(BARE), Some(Refusal::TargetTooLong));
        for other in [
            b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".as_slice(),
            b"HTTP/1.1 414 x\r\nconnection: close\r\ncontent-length: 0\r\nx-request-id: r\r\n\r\n",
            b"HTTP/1.1 414 x\r\nconnection: close\r\ncontent-length: 1\r\n\r\n",
            b"HTTP/1.1 414 x\r\nconnection: close\r\ncontent-length: 0\r\n",
            b"",
        ] {
            assert_eq!(recognise(other), None);
        }
    }

    #[test]
    fn the_explanation_is_well_formed() {
        let text = String::from_utf8(explain(Refusal::TargetTooLong, BARE).to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
        assert!(body.contains("\"code\":\"SPR-B04\""), "{body}");
    }
}
