//! A session's terminal, from PID 1's side.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bytes::BytesMut;
use nix::unistd::Pid;
use proto::agent::TerminalSize;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Read at once.
const PIECE_BYTES: usize = 16 << 10;

/// The master of a pseudo terminal.
#[derive(Debug)]
pub(super) struct Terminal {
    fd: AsyncFd<Arc<OwnedFd>>,
}

impl Terminal {
    pub(super) fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_RDWR;
        nix::fcntl::fcntl(&master, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        Ok(Self { fd: sys::watch_fd(Arc::new(master))? })
    }

    /// `EIO`, when the last program has closed the terminal, is the end.
    pub(super) async fn read(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        let mut piece = vec![0; PIECE_BYTES];
        let read = self.fd.async_io(tokio::io::Interest::READABLE, |fd| Ok(nix::unistd::read(fd, &mut piece)?)).await?;
        buffer.extend_from_slice(&piece[..read]);
        Ok(read)
    }

    pub(super) async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let written =
                self.fd.async_io(tokio::io::Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, data)?)).await?;
            data = &data[written..];
        }
        Ok(())
    }

    /// How large programs see it from now on.
    pub(super) fn resize(&self, size: TerminalSize) -> io::Result<()> {
        set_size(self.fd.get_ref(), size)
    }

    /// The process group that the keyboard belongs to. `None`: there is none any more.
    pub(super) fn foreground(&self) -> Option<Pid> {
        nix::unistd::tcgetpgrp(self.fd.get_ref()).ok().filter(|group| group.as_raw() > 1)
    }
}

/// The kernel has fewer columns than our protocol, and programs divide by them.
pub(super) fn set_size(terminal: impl AsFd, size: TerminalSize) -> io::Result<()> {
    let side = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX).max(1);
    sys::set_terminal_size(terminal, side(size.rows), side(size.cols))
}
