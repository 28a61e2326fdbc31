//! `sprite resize`: a larger disk under a running guest.
//!
//! The volume grows, its NBD connection is closed so that QEMU connects again and reads the new size, QEMU tells the guest's driver, and the guest grows
//! its file system online. A sprite that sleeps is woken for it.

use proto::id::SpriteId;
use tonic::Status;

use crate::{
    host::Host,
    vm::change::{GROW_LIMIT, chain},
};

/// A thin disk costs what is written; this only keeps numbers sane (ext4 with 4 KiB blocks ends at 16 TiB).
const DISK_BYTES_MAX: u64 = 16 << 40;

/// Grows the disk to `disk_bytes` and returns its new size.
pub(crate) async fn grow(host: &Host, id: SpriteId, disk_bytes: u64) -> Result<u64, Status> {
    if !disk_bytes.is_multiple_of(1 << 20) || disk_bytes > DISK_BYTES_MAX {
        return Err(Status::invalid_argument("the size must be whole MiB and at most 16 TiB"));
    }
    let running = host.running(id).await.map_err(crate::grpc::wake_status)?;
    let volume = host.resources().store.volume(id).ok_or_else(|| proto::not_here(id))?;
    let now = volume.size_bytes();
    if disk_bytes < now {
        return Err(Status::invalid_argument(format!("a disk can only grow: it has {now} bytes")));
    }
    volume.resize(disk_bytes).await.map_err(|error| Status::unavailable(chain(&error)))?;
    host.announce_disk_size(id, disk_bytes).await.map_err(Status::internal)?;
    match tokio::time::timeout(GROW_LIMIT, running.agent.grow_filesystem(disk_bytes)).await {
        Ok(Ok(())) => Ok(disk_bytes),
        Ok(Err(error)) => Err(Status::internal(format!("the disk grew, its file system did not: {}", chain(&error)))),
        Err(_elapsed) => Err(Status::deadline_exceeded("the disk grew; its file system is still growing")),
    }
}
