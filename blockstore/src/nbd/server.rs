//! Accepts clients on a unix socket.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{FileTypeExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
};

use super::{connection, export::ExportTable};

/// Connections of one socket at a time. QEMU opens one per disk; test tools open up to 16.
const CONNECTIONS_MAX: usize = 256;
/// Pause after an accept that failed for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who may connect, besides root and ourselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketOwner {
    Us,
    /// The user of a jailed QEMU; the socket file is given to it.
    Uid(u32),
}

/// A running server. Dropping it closes the socket and all its connections, and removes the socket file.
#[derive(Debug)]
pub struct NbdServer {
    socket: PathBuf,
    task: JoinHandle<()>,
}

impl NbdServer {
    /// Serves `exports` on `socket`, mode 0600. Must be called within a Tokio runtime.
    ///
    /// A socket file left by a dead process is replaced; anything else at that path is an error.
    pub fn bind(socket: &Path, exports: ExportTable) -> io::Result<Self> {
        Self::bind_for(socket, exports, SocketOwner::Us)
    }

    /// As [`bind`](Self::bind), for a client that runs as another user.
    pub fn bind_for(socket: &Path, exports: ExportTable, owner: SocketOwner) -> io::Result<Self> {
        match fs::symlink_metadata(socket) {
            Ok(meta) if meta.file_type().is_socket() => fs::remove_file(socket)?,
            Ok(_) => return Err(io::Error::new(ErrorKind::AlreadyExists, "the path of the socket is in use")),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // Whoever connects before the mode is set is turned away by its user id.
        let listener = UnixListener::bind(socket)?;
        fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
        if let SocketOwner::Uid(uid) = owner {
            chown(socket, Some(uid), None)?;
        }
        let task = tokio::spawn(accept(listener, exports, owner));
        Ok(Self { socket: socket.to_owned(), task })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.task.abort();
        // A file left behind is replaced by the next bind.
        drop(fs::remove_file(&self.socket));
    }
}

async fn accept(listener: UnixListener, exports: ExportTable, owner: SocketOwner) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an NBD client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if !may_connect(&stream, owner) {
            continue;
        }
        let exports = exports.clone();
        connections.spawn(async move {
            let _slot = slot;
            if let Err(error) = connection::serve(stream, &exports).await {
                tracing::info!(error = &error as &dyn std::error::Error, "NBD connection ended");
            }
        });
    }
}

fn may_connect(stream: &UnixStream, owner: SocketOwner) -> bool {
    let uid = match stream.peer_cred() {
        Ok(peer) => peer.uid(),
        Err(error) => {
            tracing::warn!(%error, "an NBD client without credentials");
            return false;
        }
    };
    let allowed = uid == 0 || uid == nix::unistd::geteuid().as_raw() || owner == SocketOwner::Uid(uid);
    if !allowed {
        tracing::warn!(uid, "an NBD client of another user was turned away");
    }
    allowed
}
