//! The handle of an open volume: what the NBD server and the node agent call.

use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Instant,
};

use bytes::Bytes;
use proto::id::SpriteId;
use tokio::{
    sync::{OwnedMutexGuard, mpsc, oneshot},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    core::{LAYERS_MAX, Mode},
    device::Device,
    head::{
        CHECKPOINTS_MAX, COMMENT_BYTES_MAX, KeptCheckpoint, KeptDisk, KeptMemory, checkpoint_id, checkpoint_number,
    },
    memory,
    open::Shared,
    owner::Command,
    patch::{PATCH_BYTES_MAX, Patch, Piece, Tracked},
    tree::DISK_BYTES_MAX,
    types::{
        Checkpoint, CheckpointError, CheckpointMeta, MemoryError, MemoryInfo, MemorySource, MemoryTarget, VolumeError,
        VolumeStatus,
    },
};
use crate::nbd::{DeviceError, Extent};

const SECTOR_BYTES: u32 = 512;
/// The read that asks for a seal is shorter than so many sectors: one chunk, which is near at hand.
const BELL_SECTORS: u32 = 128;

/// An open volume of this host. Clones share it.
#[derive(Clone)]
pub struct Volume {
    inner: Arc<Inner>,
}

struct Inner {
    device: Arc<Device>,
    commands: mpsc::Sender<Command>,
    closing: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
    store: Weak<Shared>,
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.device.fmt(f)
    }
}

impl Volume {
    pub(super) fn new(
        device: Arc<Device>,
        commands: mpsc::Sender<Command>,
        closing: CancellationToken,
        task: JoinHandle<()>,
        store: Weak<Shared>,
    ) -> Self {
        Self { inner: Arc::new(Inner { device, commands, closing, task: Mutex::new(Some(task)), store }) }
    }

    fn device(&self) -> &Arc<Device> {
        &self.inner.device
    }

    pub fn id(&self) -> SpriteId {
        self.device().id
    }

    pub fn size_bytes(&self) -> u64 {
        self.device().core().size_bytes
    }

    pub fn status(&self) -> VolumeStatus {
        self.device().core().status()
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.device().core().mode, Mode::Open | Mode::Poisoned)
    }

    /// Makes the disk larger. NBD clients see it when they connect again.
    pub async fn resize(&self, size_bytes: u64) -> Result<(), VolumeError> {
        let now = self.size_bytes();
        if size_bytes < now || size_bytes > DISK_BYTES_MAX || !size_bytes.is_multiple_of(4096) {
            return Err(VolumeError::BadSize { now, wanted: size_bytes });
        }
        self.order(|reply| Command::Resize { size_bytes, reply }).await?
    }

    /// Keeps the disk as it is now, under a new number: in the local journal when it returns, in the bucket some time later
    /// ([`wait_durable`](Self::wait_durable)). The cost does not depend on the size of the disk or of the changes.
    pub async fn seal_checkpoint(&self, meta: CheckpointMeta) -> Result<Checkpoint, CheckpointError> {
        self.room_for(&meta).await?;
        let sealed = self.device().seal(meta).await?;
        Ok(self.listed(&sealed))
    }

    /// Keeps the disk as it is when the guest next reads the first [`SealOnRead::read_bytes`] bytes of it: the shortest way for a guest whose file
    /// system stands still to say "now". One at a time; another call waits for its turn.
    pub async fn seal_on_read(&self, meta: CheckpointMeta) -> Result<SealOnRead, CheckpointError> {
        let turn = Arc::clone(&self.device().bell_turn).lock_owned().await;
        self.room_for(&meta).await?;
        // A length by chance: no other reader hits it but by the same.
        let read_bytes = rand::Rng::random_range(&mut rand::rng(), 1..BELL_SECTORS) * SECTOR_BYTES;
        let sealed = self.device().arm(read_bytes, meta);
        Ok(SealOnRead { volume: self.clone(), read_bytes, sealed, _turn: turn })
    }

    fn listed(&self, sealed: &KeptCheckpoint) -> Checkpoint {
        let id = checkpoint_id(sealed.number);
        let listed = self.device().core().checkpoints().into_iter().find(|known| known.id == id);
        listed.unwrap_or_else(|| sealed.shown(None))
    }

    async fn room_for(&self, meta: &CheckpointMeta) -> Result<(), CheckpointError> {
        let len = meta.comment.len();
        if len > COMMENT_BYTES_MAX {
            return Err(CheckpointError::CommentTooLong { len, max: COMMENT_BYTES_MAX });
        }
        if self.device().core().checkpoints().len() >= CHECKPOINTS_MAX {
            return Err(CheckpointError::TooMany { max: CHECKPOINTS_MAX });
        }
        self.until(|device| (device.core().frozen.len() < LAYERS_MAX).then_some(Ok(()))).await
    }

    /// All checkpoints, the oldest first.
    pub async fn checkpoints(&self) -> Vec<Checkpoint> {
        self.device().core().checkpoints()
    }

    /// Forgets a checkpoint. Its space is freed by garbage collection.
    pub async fn delete_checkpoint(&self, id: &str) -> Result<(), CheckpointError> {
        let number = number_of(id)?;
        self.order(|reply| Command::DeleteCheckpoint { number, reply }).await?
    }

    /// Makes the disk what it was at a checkpoint. Writes wait meanwhile; what was written since is gone. The caller sees to it that nobody holds
    /// old content (ruling 15).
    ///
    /// # Cancel safety
    ///
    /// The restore goes on when the future is dropped.
    pub async fn restore(&self, id: &str) -> Result<(), CheckpointError> {
        let number = number_of(id)?;
        self.order(|reply| Command::Restore { number, reply }).await?
    }

    /// Waits until a checkpoint is in the bucket.
    pub async fn wait_durable(&self, id: &str) -> Result<(), CheckpointError> {
        let found = self.until(|device| {
            let core = device.core();
            let known = core.checkpoints().into_iter().find(|known| known.id == id);
            match known {
                None => Some(Err(CheckpointError::Unknown { id: id.to_owned() })),
                Some(known) if known.lost => Some(Err(CheckpointError::Lost { id: id.to_owned() })),
                Some(known) if known.durable => Some(Ok(())),
                Some(_) if core.mode != Mode::Open => Some(Err(VolumeError::Closed.into())),
                Some(_) => None,
            }
        });
        found.await
    }

    /// Waits until everything written so far is in the bucket (a barrier).
    pub async fn push(&self) -> Result<(), VolumeError> {
        self.order(|reply| Command::Push { reply }).await?
    }

    /// Keeps what the checkpoint holds for a fork, and says what that is.
    pub(super) async fn pin(&self, number: u32, child: SpriteId) -> Result<KeptDisk, CheckpointError> {
        self.order(|reply| Command::Pin { number, child, reply }).await?
    }

    pub(super) async fn unpin(&self, child: SpriteId) -> Result<(), VolumeError> {
        self.order(|reply| Command::Unpin { child, reply }).await?
    }

    /// Puts the memory of the suspended VM into the bucket, beside the disk it belongs to.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it has no effect unless it was about to return. [`retire_memory`](Self::retire_memory) after it undoes it in any case.
    pub async fn publish_memory(&self, source: MemorySource) -> Result<(), MemoryError> {
        let lsn = self.status().lsn;
        self.push().await?;
        // Compaction keeps its hands off until the head names what is uploaded here.
        let _under_way = self.device().core().uploads.token();
        let memory = Box::new(memory::upload(self.device(), &source, lsn).await?);
        self.order(|reply| Command::KeepMemory { memory, reply }).await?
    }

    /// Makes sure that no memory image of this volume can be resumed any more. Before every resume and start (ruling 2).
    pub async fn retire_memory(&self) -> Result<(), MemoryError> {
        Ok(self.order(|reply| Command::RetireMemory { reply }).await??)
    }

    fn kept_memory(&self) -> Option<KeptMemory> {
        let core = self.device().core();
        core.head.memory.clone().filter(|memory| memory.lsn == core.lsn)
    }

    /// The memory image in the bucket, if one belongs to the disk as it is now.
    pub fn memory(&self) -> Option<MemoryInfo> {
        let KeptMemory { lsn, snapshot_key, memory_bytes, .. } = self.kept_memory()?;
        Some(MemoryInfo { lsn, snapshot_key, memory_bytes })
    }

    /// Makes the files of the memory image again, on a host that has not got them. They must not be used before
    /// [`retire_memory`](Self::retire_memory) returned.
    pub async fn fetch_memory(&self, target: MemoryTarget) -> Result<MemoryInfo, MemoryError> {
        let (_, _reading) = self.device().core().read_root();
        let Some(memory) = self.kept_memory() else { return Err(MemoryError::None) };
        memory::fetch(&self.device().fetcher, &memory, &target).await?;
        let KeptMemory { lsn, snapshot_key, memory_bytes, .. } = memory;
        Ok(MemoryInfo { lsn, snapshot_key, memory_bytes })
    }

    /// Pushes everything and gives the volume up: any host may acquire it. On an error it stays open.
    pub async fn release(self) -> Result<(), VolumeError> {
        self.order(|reply| Command::Release { reply }).await??;
        self.ended().await;
        Ok(())
    }

    /// Stops working on the volume and leaves it to the next process of this host, journal and all. Operations on it then wait for ever.
    pub async fn close(&self) {
        self.inner.closing.cancel();
        self.ended().await;
        // After the last change on its way; those to come find the mode.
        let _alone = self.device().gate.write().await;
        if let Err(error) = self.flush_if_open().await {
            tracing::error!(volume = %self.id(), %error, "the journal is not synced");
        }
        if self.is_open() {
            self.device().set_mode(Mode::Closed);
        }
    }

    async fn flush_if_open(&self) -> Result<(), DeviceError> {
        let open = self.device().core().mode == Mode::Open;
        if open { self.device().flush().await } else { Ok(()) }
    }

    /// Destroys an open volume: its head becomes a tombstone.
    pub(super) async fn destroy(&self) -> Result<(), VolumeError> {
        self.order(|reply| Command::Destroy { reply }).await??;
        self.ended().await;
        Ok(())
    }

    /// Waits for the end of the owner task and leaves the store's table.
    pub(super) async fn ended(&self) {
        let task = self.inner.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(volume = %self.id(), %error, "the owner task of a volume failed");
        }
        if let Some(store) = self.inner.store.upgrade() {
            store.forget(self);
        }
    }

    pub(super) fn stop(&self) {
        self.inner.closing.cancel();
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    async fn order<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, VolumeError> {
        let (reply, answer) = oneshot::channel();
        let gone = || if self.device().core().mode == Mode::Fenced { VolumeError::Fenced } else { VolumeError::Closed };
        self.inner.commands.send(command(reply)).await.map_err(|_closed| gone())?;
        answer.await.map_err(|_closed| gone())
    }

    /// Waits until `found` has an answer; asks again after every step of the owner.
    async fn until<T>(
        &self,
        found: impl Fn(&Device) -> Option<Result<T, CheckpointError>>,
    ) -> Result<T, CheckpointError> {
        let limit = self.device().limits.order;
        let deadline = Instant::now() + limit;
        let mut progress = self.device().progress();
        loop {
            progress.borrow_and_update();
            if let Some(answer) = found(self.device()) {
                return answer;
            }
            match tokio::time::timeout_at(deadline.into(), progress.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(VolumeError::Closed.into()),
                Err(_elapsed) => return Err(VolumeError::Slow(limit).into()),
            }
        }
    }
}

/// The block device.
impl Volume {
    pub(crate) async fn read(&self, offset: u64, len_bytes: u32) -> Result<Option<Bytes>, DeviceError> {
        self.device().read(offset, len_bytes).await
    }

    pub(crate) async fn write(&self, offset: u64, bytes: Bytes) -> Result<(), DeviceError> {
        self.device().write(offset, bytes).await
    }

    pub(crate) async fn zero(&self, offset: u64, len_bytes: u32) -> Result<(), DeviceError> {
        self.device().zero(offset, len_bytes).await
    }

    pub(crate) async fn flush(&self) -> Result<(), DeviceError> {
        self.device().flush().await
    }

    pub(crate) async fn extents(&self, offset: u64, len_bytes: u32) -> Result<Vec<Extent>, DeviceError> {
        self.device().extents(offset, len_bytes).await
    }

    /// From now on it is remembered where something is written, for [`written`](Self::written).
    pub fn track_writes(&self) {
        self.device().tracked.get_or_init(Tracked::default);
    }

    /// What the disk holds where it was written since [`track_writes`](Self::track_writes). Nobody may be writing.
    ///
    /// # Errors
    ///
    /// [`DeviceError::NoSpace`]: it is more than [`PATCH_BYTES_MAX`](super::PATCH_BYTES_MAX).
    pub async fn written(&self) -> Result<Patch, DeviceError> {
        let ranges = self.device().tracked.get().map(Tracked::pieces).unwrap_or_default();
        let (mut pieces, mut held) = (Vec::with_capacity(ranges.len()), 0);
        for Range { start, end } in ranges {
            let len = u32::try_from(end - start).map_err(|_too_long| DeviceError::OutOfRange)?;
            let bytes = self.read(start, len).await?;
            held += bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
            if held > PATCH_BYTES_MAX {
                return Err(DeviceError::NoSpace);
            }
            pieces.push(Piece { offset: start, len, bytes });
        }
        Ok(Patch { pieces })
    }

    /// Writes a patch, on the local disk when this returns. A volume that began as the same base then equals the one the patch was made from.
    pub async fn apply(&self, patch: &Patch) -> Result<(), DeviceError> {
        for Piece { offset, len, bytes } in &patch.pieces {
            match bytes {
                Some(bytes) => self.write(*offset, bytes.clone()).await?,
                None => self.zero(*offset, *len).await?,
            }
        }
        self.flush().await
    }

    #[cfg(test)]
    pub(super) fn device_for_tests(&self) -> &Arc<Device> {
        self.device()
    }
}

/// A checkpoint that waits for a read. Dropped, there is none.
#[derive(Debug)]
pub struct SealOnRead {
    volume: Volume,
    read_bytes: u32,
    sealed: oneshot::Receiver<Result<KeptCheckpoint, VolumeError>>,
    _turn: OwnedMutexGuard<()>,
}

impl SealOnRead {
    /// How many bytes at the begin of the disk have to be read in one request.
    pub fn read_bytes(&self) -> u32 {
        self.read_bytes
    }

    /// The checkpoint, in the local journal, if the guest has read. `None` if it has not, and then no read makes one any more.
    pub async fn finish(mut self) -> Option<Result<Checkpoint, CheckpointError>> {
        self.volume.device().disarm();
        // One that has begun gets to its end.
        let sealed = match (&mut self.sealed).await.ok()? {
            Ok(sealed) => self.volume.device().keep_sealed().await.map(|()| self.volume.listed(&sealed)),
            Err(error) => Err(error),
        };
        Some(sealed.map_err(CheckpointError::from))
    }
}

impl Drop for SealOnRead {
    fn drop(&mut self) {
        self.volume.device().disarm();
    }
}

pub(super) fn number_of(id: &str) -> Result<u32, CheckpointError> {
    checkpoint_number(id).ok_or_else(|| CheckpointError::Unknown { id: id.to_owned() })
}
