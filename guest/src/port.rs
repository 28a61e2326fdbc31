//! The virtio-serial port as an async byte stream.
//!
//! The port is opened once and stays open; a [`Port`] is one registration of it with the runtime. It is made new for each session, because "the other
//! side has hung up" stays set in a registration for ever.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

/// The driver takes at most this much at a time.
const WRITE_BYTES_MAX: usize = 32 << 10;

#[derive(Debug)]
pub(crate) struct Port {
    fd: AsyncFd<Arc<OwnedFd>>,
    /// Read before, by the session before.
    early: Bytes,
}

impl Port {
    pub(crate) fn new(fd: Arc<OwnedFd>, early: Bytes) -> io::Result<Self> {
        Ok(Self { fd: crate::sys::watch_fd(fd)?, early })
    }
}

impl AsyncRead for Port {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let len = self.early.len().min(buffer.remaining());
            buffer.put_slice(&self.early[..len]);
            self.early.advance(len);
            return Poll::Ready(Ok(()));
        }
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(context))?;
            match guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), buffer.initialize_unfilled())?)) {
                Ok(read) => {
                    buffer.advance(read?);
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let data = &data[..data.len().min(WRITE_BYTES_MAX)];
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(context))?;
            match guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), data)?)) {
                Ok(written) => return Poll::Ready(written),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
