//! The task that owns a volume: pushes, and everything else that changes its head, one at a time.
//!
//! ```text
//!  commands (bounded) ─┐                       ┌─▶ push: packs, CAS, journal reclaimed
//!  writes (`dirty`) ───┼─▶ one loop per volume ┼─▶ restore, resize, checkpoints, memory: CAS
//!  timer ──────────────┤                       └─▶ release, destroy: CAS, local files removed, end
//!  a survey's end ─────┘                           (`compact`, beside the loop; the next push takes along what it moved)
//! ```
//! A push that fails is tried again for ever, with a back-off; the guest goes on meanwhile, up to its journal's quota. A head that turns out to be
//! another epoch's ends the task: the volume is fenced, its journal set aside for salvage.

use std::{
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use proto::id::SpriteId;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    compact::Compaction,
    core::Mode,
    device::Device,
    fetch::{backoff, blocking},
    fork,
    head::{Head, HeadState, KeptCheckpoint, KeptDisk, KeptMemory, checkpoint_id},
    lost::set_aside,
    push,
    types::{CheckpointError, Generation, Lsn, MemoryError, VolumeError},
};
use crate::bucket::{Bucket, Record, RecordError};

/// Orders that wait for a volume's owner.
pub(super) const COMMANDS_MAX: usize = 64;
/// A cut of more bytes is announced in the head before it is pushed, so that its loss would be known (ruling 8).
const ANNOUNCE_BYTES: u64 = 4 << 20;
/// A bucket that takes less is away.
const SLOWEST_BYTES_PER_S: u64 = 4 << 20;
/// CAS attempts of one change against our own earlier, unanswered ones.
const COMMIT_ATTEMPTS: u32 = 4;

pub(super) enum Command {
    Push { reply: oneshot::Sender<Result<(), VolumeError>> },
    Resize { size_bytes: u64, reply: oneshot::Sender<Result<(), VolumeError>> },
    Restore { number: u32, reply: oneshot::Sender<Result<(), CheckpointError>> },
    DeleteCheckpoint { number: u32, reply: oneshot::Sender<Result<(), CheckpointError>> },
    Pin { number: u32, child: SpriteId, reply: oneshot::Sender<Result<KeptDisk, CheckpointError>> },
    Unpin { child: SpriteId, reply: oneshot::Sender<Result<(), VolumeError>> },
    KeepMemory { memory: Box<KeptMemory>, reply: oneshot::Sender<Result<(), MemoryError>> },
    RetireMemory { reply: oneshot::Sender<Result<(), VolumeError>> },
    Release { reply: oneshot::Sender<Result<(), VolumeError>> },
    Destroy { reply: oneshot::Sender<Result<(), VolumeError>> },
}

/// Whether the loop goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Go,
    End,
}

pub(super) struct Owner {
    pub(super) device: Arc<Device>,
    pub(super) bucket: Bucket,
    pub(super) record: Record<Head>,
    pub(super) node: String,
    pub(super) commands: mpsc::Receiver<Command>,
    /// Ends the task between two steps, or in the middle of one: nothing it does depends on being finished.
    pub(super) closing: CancellationToken,
    /// Where fenced volumes' journals go.
    pub(super) lost: PathBuf,
    pub(super) failures: u32,
    pub(super) not_before: Option<Instant>,
    pub(super) compaction: Compaction,
}

impl Owner {
    pub(super) async fn run(mut self) {
        let closing = self.closing.clone();
        loop {
            let due = self.device.core().push_due(&self.device.limits, Instant::now());
            let due = due.map(|due| self.not_before.map_or(due, |not_before| due.max(not_before)));
            let next = tokio::select! {
                biased;
                () = closing.cancelled() => return,
                command = self.commands.recv() => match command {
                    Some(command) => match closing.run_until_cancelled(self.obey(command)).await {
                        Some(next) => next,
                        None => return,
                    },
                    None => return,
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {
                    match closing.run_until_cancelled(self.push_once()).await {
                        Some(Ok(()) | Err(_)) => Next::Go,
                        None => return,
                    }
                }
                () = self.device.dirty.notified() => Next::Go,
                () = self.compaction.ended(&self.device), if self.compaction.is_under_way() => Next::Go,
            };
            if self.device.core().mode == Mode::Fenced || next == Next::End {
                return;
            }
        }
    }

    async fn obey(&mut self, command: Command) -> Next {
        let order = self.device.limits.order;
        match command {
            Command::Push { mut reply } => {
                let target = self.device.core().lsn;
                if let Some(result) = until_closed(&mut reply, self.push_to(target, order)).await {
                    answer(reply, result);
                }
            }
            Command::Resize { size_bytes, reply } => {
                let result = self.commit(|head| head.size_bytes = size_bytes.max(head.size_bytes)).await;
                if result.is_ok() {
                    self.device.core().size_bytes = size_bytes;
                }
                answer(reply, result);
            }
            Command::Restore { number, reply } => answer(reply, self.restore(number).await),
            Command::DeleteCheckpoint { number, reply } => answer(reply, self.delete_checkpoint(number).await),
            Command::Pin { number, child, reply } => answer(reply, self.pin(number, child).await),
            Command::Unpin { child, reply } => {
                answer(reply, self.commit(|head| head.forks.retain(|fork| fork.child != child)).await);
            }
            Command::KeepMemory { memory, reply } => {
                // The one who wanted it is gone: the sprite wakes.
                if !reply.is_closed() {
                    answer(reply, self.keep_memory(*memory).await);
                }
            }
            Command::RetireMemory { reply } => answer(reply, self.retire_memory().await),
            Command::Release { mut reply } => {
                let released = until_closed(&mut reply, self.push_to(Lsn(u64::MAX), order)).await;
                let result = match released {
                    Some(Ok(())) => self.release().await,
                    Some(Err(error)) => Err(error),
                    None => return Next::Go,
                };
                let next = if result.is_ok() { Next::End } else { Next::Go };
                answer(reply, result);
                return next;
            }
            Command::Destroy { reply } => {
                let result = self.destroy().await;
                let next = if result.is_ok() { Next::End } else { Next::Go };
                answer(reply, result);
                return next;
            }
        }
        Next::Go
    }

    /// Pushes the oldest layer, after cutting one if there is none.
    async fn push_once(&mut self) -> Result<(), VolumeError> {
        let result = self.try_push().await;
        match &result {
            Ok(()) => {
                self.failures = 0;
                self.not_before = None;
            }
            Err(VolumeError::Fenced) => {}
            Err(error) => {
                let pause = backoff(self.failures);
                self.failures = self.failures.saturating_add(1);
                self.not_before = Some(Instant::now() + pause);
                tracing::warn!(volume = %self.device.id, %error, source = ?std::error::Error::source(error), ?pause, "a push failed");
            }
        }
        let away = matches!(result, Err(VolumeError::Bucket(_) | VolumeError::Head(_)));
        self.device.core().bucket_away = away;
        self.device.progressed();
        result
    }

    async fn try_push(&mut self) -> Result<(), VolumeError> {
        let device = Arc::clone(&self.device);
        let (frozen, root) = {
            let mut core = device.core();
            if core.frozen.is_empty() {
                core.freeze(None);
            }
            let Some(frozen) = core.frozen.front().map(Arc::clone) else { return Ok(()) };
            (frozen, core.root)
        };
        if let Some(checkpoint) = &frozen.checkpoint
            && frozen.layer.dirty_bytes > ANNOUNCE_BYTES
            && self.record.value.checkpoint(checkpoint.number).is_none()
        {
            self.commit(|head| keep_checkpoint(head, checkpoint.clone())).await?;
        }
        let uploaded = push::upload(&device, &frozen, root, self.compaction.moves()).await;
        if matches!(uploaded, Err(VolumeError::Integrity(_))) {
            self.compaction.give_up_moves();
        }
        let root = uploaded?;
        let pushes_since_survey = self.compaction.count(self.record.value.pushes_since_survey);
        let gone_forks = self.compaction.gone_forks().to_vec();
        self.commit(|head| {
            head.forks.retain(|fork| !gone_forks.contains(&fork.child));
            head.root = root;
            head.lsn = frozen.lsn;
            head.cut_unix_ms = frozen.cut_unix_ms;
            head.pushes_since_survey = pushes_since_survey;
            if head.memory.as_ref().is_some_and(|memory| memory.lsn != head.lsn) {
                head.memory = None;
            }
            if let Some(checkpoint) = &frozen.checkpoint {
                let kept = Some(KeptDisk { root, size_bytes: frozen.size_bytes });
                head.current_base = Some(checkpoint.number);
                keep_checkpoint(head, KeptCheckpoint { kept, ..checkpoint.clone() });
            }
        })
        .await?;
        {
            let mut core = device.core();
            core.move_to(root);
            core.frozen.pop_front();
        }
        self.compaction.pushed();
        self.compaction.begin_if_due(&device, &self.record.value);
        self.reclaim(frozen.lsn).await
    }

    async fn reclaim(&self, pushed: Lsn) -> Result<(), VolumeError> {
        let device = Arc::clone(&self.device);
        let reclaimed = blocking(move || {
            let mut log = device.log();
            (log.reclaim(pushed.0), log.bytes())
        });
        let (result, bytes) = reclaimed.await?;
        self.device.core().journal_bytes = bytes;
        if let Err(error) = result {
            tracing::warn!(volume = %self.device.id, %error, "cannot reclaim journal files");
        }
        Ok(())
    }

    /// Pushes until the bucket has everything up to `target` (or all there is), for at most `limit`.
    async fn push_to(&mut self, target: Lsn, limit: Duration) -> Result<(), VolumeError> {
        // A single push of everything has to fit in, or it would begin again and again.
        let limit = limit + Duration::from_secs(self.device.core().status().unpushed_bytes / SLOWEST_BYTES_PER_S);
        let deadline = Instant::now() + limit;
        loop {
            {
                let core = self.device.core();
                if core.head.lsn >= target || core.is_pushed() {
                    return Ok(());
                }
            }
            match tokio::time::timeout_at(deadline.into(), self.push_once()).await {
                Err(_elapsed) => return Err(VolumeError::Slow(limit)),
                Ok(Ok(())) => {}
                Ok(Err(VolumeError::Fenced)) => return Err(VolumeError::Fenced),
                Ok(Err(error)) => {
                    let again = self.not_before.unwrap_or_else(Instant::now);
                    if again >= deadline {
                        return Err(error);
                    }
                    tokio::time::sleep_until(again.into()).await;
                }
            }
        }
    }

    /// Changes the head. `change` may run several times, on what is there by then.
    async fn commit(&mut self, change: impl Fn(&mut Head)) -> Result<(), VolumeError> {
        let result = self.try_commit(change).await;
        if matches!(result, Err(VolumeError::Fenced)) {
            self.fenced().await;
        }
        result
    }

    async fn try_commit(&mut self, change: impl Fn(&mut Head)) -> Result<(), VolumeError> {
        let mut last = None;
        for _ in 0..COMMIT_ATTEMPTS {
            let mut head = self.record.value.clone();
            head.state = HeadState::Owned;
            head.node = Some(self.node.clone());
            change(&mut head);
            match self.bucket.update_record(&self.record, head).await {
                Ok(record) => {
                    self.device.core().head = Arc::new(record.value.clone());
                    self.record = record;
                    return Ok(());
                }
                Err(
                    error @ (RecordError::Bucket(_) | RecordError::Malformed { .. } | RecordError::Unwritable { .. }),
                ) => {
                    return Err(VolumeError::Head(error));
                }
                Err(error) => {
                    self.reread().await?;
                    last = Some(error);
                }
            }
        }
        let key = self.record.key.clone();
        Err(VolumeError::Head(last.unwrap_or(RecordError::Conflict { key })))
    }

    /// After an unclear answer: takes what is there, if it is still ours. Nobody else writes a head of our epoch.
    async fn reread(&mut self) -> Result<(), VolumeError> {
        let record = self.bucket.read_record::<Head>(&self.record.key).await.map_err(VolumeError::Head)?;
        match record {
            Some(record) if record.value.epoch == self.record.value.epoch && !record.value.is_deleted() => {
                self.record = record;
                Ok(())
            }
            _ => Err(VolumeError::Fenced),
        }
    }

    async fn fenced(&mut self) {
        let device = &self.device;
        tracing::error!(volume = %device.id, unpushed = device.core().status().unpushed_bytes, "another host owns the volume");
        device.set_mode(Mode::Fenced);
        let (folder, lost) = (device.folder.clone(), self.lost.clone());
        let name = format!("{}-{}", device.id, self.record.value.epoch);
        let moved = blocking(move || if folder.exists() { set_aside(&folder, &lost, &name) } else { Ok(()) });
        if let Ok(Err(error)) = moved.await {
            tracing::warn!(volume = %device.id, %error, "cannot set the journal aside");
        }
    }
}

/// Orders that change more than what is pushed.
impl Owner {
    /// The disk becomes a checkpoint. The head first: what the journal has by then is behind the head's LSN, so a crash right after has restored
    /// as well, and a crash before has not.
    async fn restore(&mut self, number: u32) -> Result<(), CheckpointError> {
        self.check_known(number)?;
        let device = Arc::clone(&self.device);
        // From here on no change enters the log.
        let _alone = device.gate.write().await;
        self.push_checkpoints().await?;
        let Some(kept) = self.record.value.checkpoint(number).and_then(|known| known.kept.clone()) else {
            return Err(CheckpointError::Lost { id: checkpoint_id(number) });
        };
        let (lsn, size_bytes) = {
            let core = device.core();
            (Lsn(core.lsn.0 + 1), core.size_bytes.max(kept.size_bytes))
        };
        let generation = Generation(self.record.value.generation.0 + 1);
        let mut attempt = 0;
        loop {
            let committed = self.commit(|head| {
                head.root = kept.root;
                head.lsn = lsn;
                head.size_bytes = size_bytes;
                head.generation = generation;
                head.cut_unix_ms = super::core::now_unix_ms();
                head.current_base = Some(number);
                head.memory = None;
            });
            match committed.await {
                Ok(()) => break,
                Err(VolumeError::Fenced) => return Err(VolumeError::Fenced.into()),
                // It may have been written: going on as if it had not would number new writes behind it.
                Err(error) => {
                    tracing::warn!(volume = %device.id, %error, attempt, "a restore waits for the bucket");
                    tokio::time::sleep(backoff(attempt)).await;
                    attempt += 1;
                }
            }
        }
        {
            let mut core = device.core();
            core.active = Default::default();
            core.frozen.clear();
            core.move_to(kept.root);
            core.lsn = lsn;
            core.size_bytes = size_bytes;
            core.current_base = Some(number);
            core.current = None;
        }
        let log = Arc::clone(&device);
        let restarted = blocking(move || {
            let mut log_side = log.log();
            (log_side.restart(lsn.0), log_side.bytes())
        });
        let (result, bytes) = restarted.await?;
        device.core().journal_bytes = bytes;
        device.progressed();
        if let Err(error) = result {
            tracing::warn!(volume = %device.id, %error, "old journal files are left behind");
        }
        Ok(())
    }

    fn check_known(&self, number: u32) -> Result<(), CheckpointError> {
        let id = checkpoint_id(number);
        match self.device.core().checkpoints().iter().find(|known| known.id == id) {
            None => Err(CheckpointError::Unknown { id }),
            Some(known) if known.lost => Err(CheckpointError::Lost { id }),
            Some(_) => Ok(()),
        }
    }

    /// Pushes until no sealed checkpoint is only local.
    async fn push_checkpoints(&mut self) -> Result<(), VolumeError> {
        let target = self.device.core().frozen.iter().filter(|frozen| frozen.checkpoint.is_some()).map(|f| f.lsn).max();
        match target {
            Some(target) => self.push_to(target, self.device.limits.order).await,
            None => Ok(()),
        }
    }

    async fn delete_checkpoint(&mut self, number: u32) -> Result<(), CheckpointError> {
        let id = checkpoint_id(number);
        {
            let core = self.device.core();
            match core.checkpoints().iter().find(|known| known.id == id) {
                None => return Err(CheckpointError::Unknown { id }),
                Some(known) if known.is_current_base => return Err(CheckpointError::CurrentBase { id }),
                Some(_) => {}
            }
        }
        self.push_checkpoints().await?;
        self.commit(|head| head.checkpoints.retain(|kept| kept.number != number)).await?;
        Ok(())
    }

    /// What the checkpoint holds stays as long as `child` does.
    async fn pin(&mut self, number: u32, child: SpriteId) -> Result<KeptDisk, CheckpointError> {
        self.check_known(number)?;
        self.push_checkpoints().await?;
        let kept = fork::kept(&self.record.value, number)?;
        let (root, since_unix_ms) = (kept.root, super::core::now_unix_ms());
        self.commit(|head| fork::pin(head, child, root, since_unix_ms)).await?;
        Ok(kept)
    }

    async fn keep_memory(&mut self, memory: KeptMemory) -> Result<(), MemoryError> {
        {
            let core = self.device.core();
            if core.lsn != memory.lsn || core.head.lsn != memory.lsn {
                return Err(MemoryError::DiskChanged);
            }
        }
        self.commit(|head| head.memory = (head.lsn == memory.lsn).then(|| memory.clone())).await?;
        Ok(())
    }

    async fn retire_memory(&mut self) -> Result<(), VolumeError> {
        if self.record.value.memory.is_none() {
            return Ok(());
        }
        self.commit(|head| head.memory = None).await
    }

    /// Everything is in the bucket: anybody may take it.
    async fn release(&mut self) -> Result<(), VolumeError> {
        let device = Arc::clone(&self.device);
        let _alone = device.gate.write().await;
        self.push_to(Lsn(u64::MAX), device.limits.order).await?;
        self.commit(|head| {
            head.state = HeadState::Cold;
            head.node = None;
        })
        .await?;
        device.set_mode(Mode::Fenced);
        self.remove_folder().await;
        Ok(())
    }

    async fn destroy(&mut self) -> Result<(), VolumeError> {
        self.device.set_mode(Mode::Fenced);
        self.commit(bury).await?;
        self.compaction.stop().await;
        self.remove_folder().await;
        Ok(())
    }

    async fn remove_folder(&self) {
        let device = Arc::clone(&self.device);
        let removed = blocking(move || {
            if let Err(error) = device.log().restart(0) {
                tracing::debug!(%error, "a journal file is not reused");
            }
            if device.folder.exists() { std::fs::remove_dir_all(&device.folder) } else { Ok(()) }
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(volume = %self.device.id, %error, "cannot remove the volume's local folder");
        }
    }
}

/// Makes a tombstone of a head. Forks go on: what they name stays.
pub(super) fn bury(head: &mut Head) {
    head.state = HeadState::Deleted;
    head.node = None;
    head.root = None;
    head.checkpoints.clear();
    head.current_base = None;
    head.memory = None;
}

fn keep_checkpoint(head: &mut Head, checkpoint: KeptCheckpoint) {
    head.next_checkpoint = head.next_checkpoint.max(checkpoint.number + 1);
    match head.checkpoints.iter_mut().find(|known| known.number == checkpoint.number) {
        Some(known) => *known = checkpoint,
        None => head.checkpoints.push(checkpoint),
    }
}

/// `None` if nobody waits for the answer any more.
async fn until_closed<T, R>(reply: &mut oneshot::Sender<T>, work: impl Future<Output = R>) -> Option<R> {
    tokio::select! {
        result = work => Some(result),
        () = reply.closed() => None,
    }
}

fn answer<T>(reply: oneshot::Sender<T>, result: T) {
    // Fails only if nobody waits any more.
    drop(reply.send(result));
}
