//! What a name stands for, and who is connected to it.
//!
//! The table is shared by the server (which attaches connections) and the node agent (which changes exports). An [`Attached`] is one
//! connection's share of an export; it lives until the last change that the connection began has ended, also past the connection itself.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio_util::sync::CancellationToken;

use super::memory::MemoryDisk;
use crate::store::Volume;

/// A block device to serve.
#[derive(Clone, Debug)]
pub enum Export {
    Memory(MemoryDisk),
    Volume(Volume),
    /// Zeros, read-only: a disk whose content comes later (checkpoint mounts, ruling 10).
    Empty {
        size_bytes: u64,
    },
}

/// A device could not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error("no space left for writes")]
    NoSpace,
    /// Another host owns the volume now.
    #[error("the volume is owned elsewhere")]
    Fenced,
    #[error("data is lost or damaged")]
    Integrity,
    #[error("the disk below failed")]
    Io,
    #[error("beyond the end of the device")]
    OutOfRange,
    #[error("the device is read-only")]
    ReadOnly,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    Data,
    /// Reads as zeros and takes no space.
    Hole,
}

/// A stretch of a device in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub len_bytes: u64,
    pub kind: ExtentKind,
}

impl Export {
    pub fn size_bytes(&self) -> u64 {
        match self {
            Self::Memory(disk) => disk.size_bytes(),
            Self::Volume(volume) => volume.size_bytes(),
            Self::Empty { size_bytes } => *size_bytes,
        }
    }

    pub fn read_only(&self) -> bool {
        matches!(self, Self::Empty { .. })
    }

    /// `None`: nothing but zeros there.
    pub(super) async fn read(&self, offset: u64, len_bytes: u32) -> Result<Option<Bytes>, DeviceError> {
        match self {
            Self::Memory(disk) => disk.read(offset, len_bytes).await.map(Some),
            Self::Volume(volume) => volume.read(offset, len_bytes).await,
            Self::Empty { .. } => Ok(None),
        }
    }

    pub(super) async fn write(&self, offset: u64, bytes: Bytes) -> Result<(), DeviceError> {
        match self {
            Self::Memory(disk) => disk.write(offset, bytes).await,
            Self::Volume(volume) => volume.write(offset, bytes).await,
            Self::Empty { .. } => Err(DeviceError::ReadOnly),
        }
    }

    pub(super) async fn zero(&self, offset: u64, len_bytes: u32, trim: bool) -> Result<(), DeviceError> {
        match self {
            Self::Memory(disk) => disk.zero(offset, len_bytes, trim).await,
            Self::Volume(volume) => volume.zero(offset, len_bytes).await,
            Self::Empty { .. } => Err(DeviceError::ReadOnly),
        }
    }

    pub(super) async fn flush(&self) -> Result<(), DeviceError> {
        match self {
            Self::Memory(disk) => disk.flush().await,
            Self::Volume(volume) => volume.flush().await,
            Self::Empty { .. } => Ok(()),
        }
    }

    pub(super) async fn extents(&self, offset: u64, len_bytes: u32) -> Result<Vec<Extent>, DeviceError> {
        match self {
            Self::Memory(disk) => disk.extents(offset, len_bytes).await,
            Self::Volume(volume) => volume.extents(offset, len_bytes).await,
            Self::Empty { .. } => Ok(vec![Extent { len_bytes: u64::from(len_bytes), kind: ExtentKind::Hole }]),
        }
    }
}

/// Exports by name. Clones share the table.
#[derive(Clone, Debug, Default)]
pub struct ExportTable {
    inner: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    exports: HashMap<String, Export>,
    /// Outlives the export's entry: an export inserted again must wait for the changes of the old one's connections.
    attachments: HashMap<String, Vec<Arc<Attachment>>>,
}

/// The table's view of one connection.
#[derive(Debug)]
struct Attachment {
    /// A second descriptor of the connection's socket, to ask whether its client hung up.
    socket: OwnedFd,
    close: CancellationToken,
    /// Set once no change of the connection can reach the device any more.
    drained: CancellationToken,
}

/// One connection's share of an export.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) export: Export,
    name: String,
    attachment: Arc<Attachment>,
    table: ExportTable,
}

impl ExportTable {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an export or replaces the one of this name, whose connections are closed: clients that reconnect see the new one.
    pub fn insert(&self, name: impl Into<String>, export: Export) {
        let name = name.into();
        self.with(|table| {
            table.close(&name);
            table.exports.insert(name, export);
        });
    }

    /// Removes an export and closes its connections.
    pub fn remove(&self, name: &str) {
        self.with(|table| {
            table.close(name);
            table.exports.remove(name);
        });
    }

    /// Ends all connections to an export. A client that reconnects asks for the size again.
    pub fn close_connections(&self, name: &str) {
        self.with(|table| table.close(name));
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.with(|table| table.exports.keys().cloned().collect());
        names.sort_unstable();
        names
    }

    pub(super) fn get(&self, name: &str) -> Option<Export> {
        self.with(|table| table.exports.get(name).cloned())
    }

    /// Joins `name`, after every connection whose client has hung up or that we closed can change nothing any more.
    pub(super) async fn attach(&self, name: &str, socket: OwnedFd) -> Option<Attached> {
        for old in self.with(|table| table.attachments.get(name).cloned().unwrap_or_default()) {
            if hung_up(&old.socket) {
                old.close.cancel();
            }
            if old.close.is_cancelled() {
                old.drained.cancelled().await;
            }
        }
        let close = CancellationToken::new();
        let attachment = Arc::new(Attachment { socket, close, drained: CancellationToken::new() });
        let export = self.with(|table| {
            let export = table.exports.get(name)?.clone();
            table.attachments.entry(name.to_owned()).or_default().push(Arc::clone(&attachment));
            Some(export)
        })?;
        Some(Attached { export, name: name.to_owned(), attachment, table: self.clone() })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Table) -> T) -> T {
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Table {
    fn close(&self, name: &str) {
        for attachment in self.attachments.get(name).into_iter().flatten() {
            attachment.close.cancel();
        }
    }
}

impl Attached {
    /// Waits until the table wants this connection to end.
    pub(super) async fn closed(&self) {
        self.attachment.close.cancelled().await;
    }

    /// Tells new connections of the same client to wait until this one has drained.
    pub(super) fn close(&self) {
        self.attachment.close.cancel();
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.attachment.drained.cancel();
        self.table.with(|table| {
            let Some(attachments) = table.attachments.get_mut(&self.name) else { return };
            attachments.retain(|other| !Arc::ptr_eq(other, &self.attachment));
            if attachments.is_empty() {
                table.attachments.remove(&self.name);
            }
        });
    }
}

/// Whether the other end of a unix stream is closed. Requests it sent before may still lie in the socket.
fn hung_up(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)),
        // Not to know means not to wait; the connection's own end closes it.
        Err(_) => false,
    }
}
