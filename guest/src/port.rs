//! The virtio-serial port as an async byte stream.
//!
//! The port is opened once and stays open; a [`Port`] is one registration of it with the runtime. It is made new for each session, because "the other
//! side has hung up" stays set in a registration for ever.

use std::{
    io::{self, IoSlice},
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

/// The driver takes at most this much at a time.
const WRITE_BYTES_MAX: usize = 32 << 10;

#[derive(Debug)]
pub(crate) struct Port {
    fd: AsyncFd<Arc<OwnedFd>>,
    /// Read before, by the session before.
    early: Bytes,
    /// Written, but not flushed. Each write to the driver costs an exit to the host, and HTTP/2 writes in small pieces.
    late: BytesMut,
}

impl Port {
    pub(crate) fn new(fd: Arc<OwnedFd>, early: Bytes) -> io::Result<Self> {
        Ok(Self { fd: crate::sys::watch_fd(fd)?, early, late: BytesMut::with_capacity(WRITE_BYTES_MAX) })
    }

    /// The same stream in a new registration, once the host has been heard: the old one may be from before it came, and then "hung up" is set in it.
    pub(crate) fn renewed(self) -> io::Result<Self> {
        let Self { fd, early, late } = self;
        Ok(Self { fd: crate::sys::watch_fd(fd.into_inner())?, early, late })
    }
}

/// The host has left, and may be back already: "hung up" stays set, so that waiting for readiness would be a loop without a rest.
fn left() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the host has left")
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
            let hung_up = guard.ready().is_read_closed();
            match guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), buffer.initialize_unfilled())?)) {
                Ok(read) => {
                    buffer.advance(read?);
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) if hung_up => return Poll::Ready(Err(left())),
                Err(_would_block) => {}
            }
        }
    }
}

impl Port {
    /// Gives what waits to the driver.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.late.is_empty() {
            let mut guard = ready!(self.fd.poll_write_ready(context))?;
            let hung_up = guard.ready().is_write_closed();
            match guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), &self.late)?)) {
                Ok(written) => self.late.advance(written?),
                Err(_would_block) if hung_up => return Poll::Ready(Err(left())),
                Err(_would_block) => {}
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.late.len() >= WRITE_BYTES_MAX {
            ready!(self.poll_drain(context))?;
        }
        let before = self.late.len();
        for slice in slices {
            let room = WRITE_BYTES_MAX - self.late.len();
            self.late.extend_from_slice(&slice[..slice.len().min(room)]);
        }
        Poll::Ready(Ok(self.late.len() - before))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_drain(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_drain(context)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

    use nix::{libc, sys::stat::Mode};
    use tokio::io::AsyncReadExt as _;

    use super::*;

    fn writer(fifo: &Path) -> std::fs::File {
        std::fs::OpenOptions::new().write(true).open(fifo).unwrap()
    }

    /// A port whose host has been there and left, as the runtime knows it.
    async fn left_alone(fifo: &Path) -> Port {
        let reader = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(fifo).unwrap();
        drop(writer(fifo));
        let port = Port::new(Arc::new(reader.into()), Bytes::new()).unwrap();
        assert!(port.fd.readable().await.unwrap().ready().is_read_closed());
        port
    }

    #[tokio::test]
    async fn a_host_that_comes_right_after_the_registration_is_not_taken_for_one_that_has_left() {
        let folder = std::env::temp_dir().join(format!("sprites-port-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let fifo = folder.join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();

        let mut port = left_alone(&fifo).await;
        let mut host = writer(&fifo);
        host.write_all(b"marker").unwrap();
        port.read_exact(&mut [0; 6]).await.unwrap();
        port.read(&mut [0; 4]).await.expect_err("this is why it has to be renewed");

        let mut port = port.renewed().unwrap();
        let mut session = [0; 4];
        let (read, ()) = tokio::join!(port.read_exact(&mut session), async {
            tokio::task::yield_now().await;
            host.write_all(b"more").unwrap();
        });
        read.unwrap();
        assert_eq!(&session, b"more");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
