//! A volume as a block device: reads, writes, flushes, seals.
//!
//! ```text
//!  write ─▶ pressure? ─▶ queue ─▶ drain (one blocking thread at a time): append to the log ▸ insert into the overlay ▸ answer
//!  flush ─▶ anything unsynced? ─▶ one fdatasync for all who wait
//!  read  ─▶ resolve under the lock ─▶ journal files, cache, bucket, without it
//! ```
//! The queue is drained in order by one thread, so LSNs, the log and the overlay agree. It is bounded by [`QUEUE_MAX`].

use std::{
    collections::VecDeque,
    fmt,
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::{Bytes, BytesMut};
use proto::id::SpriteId;
use tokio::sync::{
    Mutex as AsyncMutex, Notify, OwnedRwLockReadGuard, OwnedSemaphorePermit, RwLock, Semaphore, oneshot, watch,
};

use super::{
    core::{Core, Mode, Part, Pressure, Source, now_unix_ms},
    fetch::{Fetcher, blocking},
    frame::CHUNK_BYTES,
    head::{KeptCheckpoint, Root},
    journal::{Appended, Log, LogError, PAYLOAD_BYTES_MAX, Record},
    pack::PackNames,
    patch::Tracked,
    tree,
    types::{CheckpointMeta, Limits, Lsn, VolumeError},
};
use crate::nbd::{DeviceError, Extent, ExtentKind};

/// Changes of one volume that wait for the log.
const QUEUE_MAX: usize = 4096;

/// A volume's state, shared by its device side and its owner task.
pub(super) struct Device {
    pub(super) id: SpriteId,
    pub(super) limits: Limits,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) names: PackNames,
    /// The volume's local folder.
    pub(super) folder: PathBuf,
    core: Mutex<Core>,
    log: Mutex<Log>,
    synced: Arc<AtomicU64>,
    syncing: AsyncMutex<()>,
    queue: Mutex<Queue>,
    queue_room: Arc<Semaphore>,
    /// Held shared by changes on their way through the queue, alone by whoever needs them to stand still.
    pub(super) gate: Arc<RwLock<()>>,
    /// A seal that waits for a read.
    bell: Mutex<Option<Bell>>,
    /// Length of the read that rings it; 0 without one, so that reads need no lock.
    bell_bytes: AtomicU32,
    /// Set while somebody wants to know what is written.
    pub(super) tracked: OnceLock<Tracked>,
    /// One at a time.
    pub(super) bell_turn: Arc<AsyncMutex<()>>,
    /// Something to push.
    pub(super) dirty: Notify,
    /// Counts up with every push, every change of the mode.
    progress: watch::Sender<u64>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    draining: bool,
}

struct Job {
    record: JobRecord,
    done: Done,
}

type Answer = Result<Option<KeptCheckpoint>, DeviceError>;

/// Who waits for a change, and what the change holds until it is answered, also if nobody waits any more.
struct Done {
    answer: oneshot::Sender<Answer>,
    _pass: OwnedRwLockReadGuard<()>,
    _room: OwnedSemaphorePermit,
}

impl Done {
    fn send(self, answer: Answer) {
        // Fails only if nobody waits any more.
        drop(self.answer.send(answer));
    }
}

/// A seal that is made when the first `read_bytes` bytes of the disk are read.
struct Bell {
    read_bytes: u32,
    meta: CheckpointMeta,
    rung: oneshot::Sender<Result<KeptCheckpoint, VolumeError>>,
}

enum JobRecord {
    Change(Record),
    Seal(CheckpointMeta),
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Device {
    pub(super) fn new(
        id: SpriteId,
        (limits, fetcher): (Limits, Arc<Fetcher>),
        names: PackNames,
        folder: PathBuf,
        mut core: Core,
        log: Log,
    ) -> Self {
        core.journal_bytes = log.bytes();
        Self {
            id,
            limits,
            fetcher,
            names,
            folder,
            core: Mutex::new(core),
            synced: log.synced(),
            log: Mutex::new(log),
            syncing: AsyncMutex::new(()),
            queue: Mutex::default(),
            queue_room: Arc::new(Semaphore::new(QUEUE_MAX)),
            gate: Arc::default(),
            bell: Mutex::default(),
            bell_bytes: AtomicU32::new(0),
            tracked: OnceLock::new(),
            bell_turn: Arc::default(),
            dirty: Notify::new(),
            progress: watch::Sender::new(0),
        }
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For blocking threads: the log is locked during its I/O.
    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn tear(&self, keep: f64) {
        self.log().tear(keep);
    }

    pub(super) fn progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    pub(super) fn progressed(&self) {
        self.progress.send_modify(|count| *count += 1);
    }

    pub(super) fn set_mode(&self, mode: Mode) {
        {
            let mut core = self.core();
            if core.mode == mode || (core.mode != Mode::Open && mode == Mode::Poisoned) {
                return;
            }
            core.mode = mode;
        }
        self.progressed();
    }

    pub(super) async fn read(self: &Arc<Self>, offset: u64, len_bytes: u32) -> Result<Option<Bytes>, DeviceError> {
        if offset == 0 && len_bytes == self.bell_bytes.load(Ordering::Acquire) {
            self.ring(len_bytes).await;
        }
        let range = self.checked(offset, u64::from(len_bytes))?;
        let (parts, (root, _reading), mode) = {
            let core = self.core();
            (core.resolve(range.clone()), core.read_root(), core.mode)
        };
        if mode == Mode::Fenced {
            return Err(DeviceError::Fenced);
        }
        if parts.iter().all(|(_, part)| matches!(part, Part::Newer(Source::Hole))) {
            return Ok(None);
        }
        if let [(whole, Part::Base)] = parts.as_slice()
            && whole.start / CHUNK_BYTES == (whole.end - 1) / CHUNK_BYTES
        {
            let chunk = tree::chunk(&self.fetcher, root, whole.start / CHUNK_BYTES).await.map_err(device_error)?;
            let within = within_chunk(whole);
            return Ok(chunk.map(|chunk| chunk.slice(within)));
        }
        let bytes = read_parts(&self.fetcher, root, range, parts).await.map_err(device_error)?;
        Ok(Some(bytes.freeze()))
    }

    pub(super) async fn write(self: &Arc<Self>, offset: u64, bytes: Bytes) -> Result<(), DeviceError> {
        self.track(self.checked(offset, bytes.len() as u64)?);
        // A record lies in one segment.
        let most =
            usize::try_from(self.limits.segment_bytes / 4).map_or(PAYLOAD_BYTES_MAX, |max| max.min(PAYLOAD_BYTES_MAX));
        let records = (0..bytes.len()).step_by(most).map(|from| {
            let part = bytes.slice(from..bytes.len().min(from + most));
            Record::Write { offset: offset + from as u64, bytes: part }
        });
        for record in records {
            self.change(record).await?;
        }
        Ok(())
    }

    pub(super) async fn zero(self: &Arc<Self>, offset: u64, len_bytes: u32) -> Result<(), DeviceError> {
        let len = u64::from(len_bytes);
        self.track(self.checked(offset, len)?);
        self.change(Record::Hole { offset, len }).await
    }

    fn track(&self, range: Range<u64>) {
        if let Some(tracked) = self.tracked.get() {
            tracked.add(range);
        }
    }

    async fn change(self: &Arc<Self>, record: Record) -> Result<(), DeviceError> {
        self.under_pressure().await?;
        self.submit(JobRecord::Change(record)).await.map(drop)
    }

    async fn under_pressure(&self) -> Result<(), DeviceError> {
        let mut progress = None;
        loop {
            let pressure = self.core().pressure(&self.limits, Instant::now());
            match pressure {
                Pressure::None => return Ok(()),
                Pressure::Delay(pause) => {
                    tokio::time::sleep(pause).await;
                    return Ok(());
                }
                Pressure::NoSpace => return Err(DeviceError::NoSpace),
                Pressure::Wait => {
                    let progress = progress.get_or_insert_with(|| self.progress());
                    // The sender lives in self.
                    if progress.changed().await.is_err() {
                        return Err(DeviceError::Io);
                    }
                }
            }
        }
    }

    async fn submit(self: &Arc<Self>, record: JobRecord) -> Result<Option<KeptCheckpoint>, DeviceError> {
        let pass = Arc::clone(&self.gate).read_owned().await;
        // Never closed.
        let room = Arc::clone(&self.queue_room).acquire_owned().await.map_err(|_closed| DeviceError::Io)?;
        let mode = self.core().mode;
        match mode {
            Mode::Open => {}
            Mode::Closed => std::future::pending().await,
            Mode::Fenced => return Err(DeviceError::Fenced),
            Mode::Poisoned => return Err(DeviceError::Io),
        }
        let (sender, answer) = oneshot::channel();
        self.enqueue(Job { record, done: Done { answer: sender, _pass: pass, _room: room } });
        answer.await.unwrap_or(Err(DeviceError::Io))
    }
}

/// The queue, and the thread that drains it.
impl Device {
    fn enqueue(self: &Arc<Self>, job: Job) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.jobs.push_back(job);
        if !std::mem::replace(&mut queue.draining, true) {
            drop(queue);
            let this = Arc::clone(self);
            tokio::task::spawn_blocking(move || this.drain());
        }
    }

    fn drain(&self) {
        loop {
            let jobs: Vec<Job> = {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                if queue.jobs.is_empty() {
                    queue.draining = false;
                    return;
                }
                queue.jobs.drain(..).collect()
            };
            let mut changes = Vec::new();
            for job in jobs {
                match job.record {
                    JobRecord::Change(record) => changes.push((record, job.done)),
                    JobRecord::Seal(meta) => {
                        self.append(std::mem::take(&mut changes));
                        job.done.send(self.append_seal(meta).map(Some));
                    }
                }
            }
            self.append(changes);
            self.dirty.notify_one();
        }
    }

    fn append(&self, changes: Vec<(Record, Done)>) {
        let (records, waiting): (Vec<_>, Vec<_>) = changes.into_iter().unzip();
        let (mut records, mut waiting) = (records.as_slice(), waiting.into_iter());
        while !records.is_empty() {
            let appended = match self.append_some(records) {
                Ok(appended) => appended,
                Err(error) => {
                    waiting.for_each(|done| done.send(Err(error)));
                    return;
                }
            };
            records = &records[appended..];
            for done in waiting.by_ref().take(appended) {
                done.send(Ok(None));
            }
        }
    }

    fn append_some(&self, records: &[Record]) -> Result<usize, DeviceError> {
        let appended = self.log_records(records)?;
        let mut core = self.core();
        for (record, Appended { lsn, segment, offset }) in records.iter().zip(&appended) {
            match record {
                Record::Write { offset: at, bytes } => {
                    let source = Source::Journal { segment: Arc::clone(segment), offset: *offset };
                    core.insert(Lsn(*lsn), *at..at + bytes.len() as u64, source);
                }
                Record::Hole { offset, len } => core.insert(Lsn(*lsn), *offset..offset + len, Source::Hole),
                Record::Checkpoint { .. } => core.lsn = Lsn(*lsn),
            }
        }
        core.bound_layer();
        Ok(appended.len())
    }

    fn log_records(&self, records: &[Record]) -> Result<Vec<Appended>, DeviceError> {
        if self.core().mode == Mode::Poisoned {
            return Err(DeviceError::Io);
        }
        let append = || {
            let mut log = self.log();
            (log.append(records), log.bytes())
        };
        let (mut appended, mut bytes) = append();
        if matches!(appended, Err(LogError::NoSegment(_))) {
            // What can be fetched again makes room for what cannot.
            self.fetcher.make_room();
            (appended, bytes) = append();
        }
        match appended {
            Ok(appended) => {
                let mut core = self.core();
                core.journal_bytes = bytes;
                core.current = appended.last().map(|last| Arc::clone(&last.segment)).or_else(|| core.current.take());
                Ok(appended)
            }
            Err(LogError::NoSegment(error)) => {
                tracing::error!(volume = %self.id, %error, "no room for the journal");
                Err(DeviceError::NoSpace)
            }
            Err(LogError::Failed(error)) => {
                tracing::error!(volume = %self.id, %error, "the journal failed; the volume takes no more writes");
                self.set_mode(Mode::Poisoned);
                Err(DeviceError::Io)
            }
        }
    }

    fn append_seal(&self, meta: CheckpointMeta) -> Result<KeptCheckpoint, DeviceError> {
        let CheckpointMeta { comment, consistency, is_auto } = meta;
        let (number, lsn) = {
            let core = self.core();
            (core.next_checkpoint, Lsn(core.lsn.0 + 1))
        };
        let created_unix_ms = now_unix_ms();
        let checkpoint =
            KeptCheckpoint { number, created_unix_ms, comment, consistency, is_auto, lsn, kept: None, lost: false };
        let body = serde_json::to_vec(&checkpoint).map_err(|error| {
            tracing::error!(%error, "a checkpoint does not become JSON");
            DeviceError::Io
        })?;
        self.append_some(&[Record::Checkpoint { body: body.into() }])?;
        self.core().freeze(Some(checkpoint.clone()));
        Ok(checkpoint)
    }

    /// Seals at the next read of so many bytes at the disk's begin. What comes of it is sent; nothing, if it is disarmed before.
    pub(super) fn arm(
        &self,
        read_bytes: u32,
        meta: CheckpointMeta,
    ) -> oneshot::Receiver<Result<KeptCheckpoint, VolumeError>> {
        let (rung, sealed) = oneshot::channel();
        *self.bell.lock().unwrap_or_else(PoisonError::into_inner) = Some(Bell { read_bytes, meta, rung });
        self.bell_bytes.store(read_bytes, Ordering::Release);
        sealed
    }

    pub(super) fn disarm(&self) {
        self.bell_bytes.store(0, Ordering::Release);
        self.bell.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// The cut, before the read that asks for it is answered. Not on the local disk yet: nobody has been told.
    async fn ring(self: &Arc<Self>, read_bytes: u32) {
        let bell = {
            let mut bell = self.bell.lock().unwrap_or_else(PoisonError::into_inner);
            bell.take_if(|bell| bell.read_bytes == read_bytes)
        };
        let Some(Bell { meta, rung, .. }) = bell else { return };
        self.bell_bytes.store(0, Ordering::Release);
        let sealed = self.submit(JobRecord::Seal(meta)).await.map_err(Self::volume_error);
        // Fails only if nobody waits any more.
        drop(rung.send(sealed.and_then(|sealed| sealed.ok_or(VolumeError::Closed))));
    }

    /// Cuts the disk here, on the local disk when it returns.
    pub(super) async fn seal(self: &Arc<Self>, meta: CheckpointMeta) -> Result<KeptCheckpoint, VolumeError> {
        let sealed = self.submit(JobRecord::Seal(meta)).await.map_err(Self::volume_error)?;
        self.keep_sealed().await?;
        sealed.ok_or(VolumeError::Closed)
    }

    /// Sealed so far is on the local disk when it returns.
    pub(super) async fn keep_sealed(&self) -> Result<(), VolumeError> {
        self.flush().await.map_err(Self::volume_error)
    }

    fn volume_error(error: DeviceError) -> VolumeError {
        match error {
            DeviceError::Fenced => VolumeError::Fenced,
            DeviceError::NoSpace => VolumeError::NoSpace,
            DeviceError::Io | DeviceError::Integrity | DeviceError::OutOfRange | DeviceError::ReadOnly => {
                VolumeError::Poisoned
            }
        }
    }
}

impl Device {
    /// Everything answered before is on the local disk when it returns.
    pub(super) async fn flush(&self) -> Result<(), DeviceError> {
        let (wanted, mode) = {
            let core = self.core();
            (core.lsn.0, core.mode)
        };
        match mode {
            Mode::Open => {}
            Mode::Closed => std::future::pending().await,
            Mode::Fenced => return Err(DeviceError::Fenced),
            Mode::Poisoned => return Err(DeviceError::Io),
        }
        if self.synced.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        let _alone = self.syncing.lock().await;
        if self.synced.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        // What is in older files was synced when the log went on to this one.
        let (segment, upto) = {
            let core = self.core();
            (core.current.clone(), core.lsn.0)
        };
        let Some(segment) = segment else { return Ok(()) };
        let synced = blocking(move || segment.file.sync_data()).await;
        match synced {
            Ok(Ok(())) => {
                self.synced.fetch_max(upto, Ordering::AcqRel);
                Ok(())
            }
            Ok(Err(error)) => {
                tracing::error!(volume = %self.id, %error, "fdatasync failed; the volume takes no more writes");
                self.set_mode(Mode::Poisoned);
                Err(DeviceError::Io)
            }
            Err(error) => {
                tracing::error!(volume = %self.id, %error, "cannot sync the journal");
                Err(DeviceError::Io)
            }
        }
    }

    pub(super) async fn extents(&self, offset: u64, len_bytes: u32) -> Result<Vec<Extent>, DeviceError> {
        let range = self.checked(offset, u64::from(len_bytes))?;
        let (parts, (root, _reading)) = {
            let core = self.core();
            (core.resolve(range.clone()), core.read_root())
        };
        let mut extents = Vec::new();
        for (part, source) in parts {
            let kind = match source {
                Part::Newer(Source::Journal { .. }) => ExtentKind::Data,
                Part::Newer(Source::Hole) => ExtentKind::Hole,
                Part::Base => {
                    let chunks = part.start / CHUNK_BYTES..part.end.div_ceil(CHUNK_BYTES);
                    let (runs, end) = tree::runs(&self.fetcher, root, chunks).await.map_err(device_error)?;
                    let mut at = part.start;
                    let end = (end * CHUNK_BYTES).min(part.end);
                    for run in runs {
                        let (from, to) =
                            ((run.start * CHUNK_BYTES).clamp(at, end), (run.end * CHUNK_BYTES).clamp(at, end));
                        extents.push(Extent { len_bytes: from - at, kind: ExtentKind::Hole });
                        extents.push(Extent { len_bytes: to - from, kind: ExtentKind::Data });
                        at = to;
                    }
                    extents.push(Extent { len_bytes: end - at, kind: ExtentKind::Hole });
                    if end < part.end {
                        return Ok(extents);
                    }
                    continue;
                }
            };
            extents.push(Extent { len_bytes: part.end - part.start, kind });
        }
        Ok(extents)
    }

    fn checked(&self, offset: u64, len: u64) -> Result<Range<u64>, DeviceError> {
        let size_bytes = self.core().size_bytes;
        match offset.checked_add(len) {
            Some(end) if end <= size_bytes => Ok(offset..end),
            _ => Err(DeviceError::OutOfRange),
        }
    }
}

/// Reads parts that lie side by side in `range`.
pub(super) async fn read_parts(
    fetcher: &Fetcher,
    root: Option<Root>,
    range: Range<u64>,
    parts: Vec<(Range<u64>, Part)>,
) -> Result<BytesMut, VolumeError> {
    let len = usize::try_from(range.end - range.start).expect("a request is at most 32 MiB");
    let mut out = BytesMut::zeroed(len);
    let place = |part: &Range<u64>| within(part.start - range.start, part.end - range.start);
    let mut journal = Vec::new();
    for (part, source) in parts {
        match source {
            Part::Newer(Source::Hole) => {}
            Part::Newer(Source::Journal { segment, offset }) => journal.push((place(&part), segment, offset)),
            Part::Base => {
                let mut at = part.start;
                while at < part.end {
                    let end = part.end.min((at / CHUNK_BYTES + 1) * CHUNK_BYTES);
                    if let Some(chunk) = tree::chunk(fetcher, root, at / CHUNK_BYTES).await? {
                        out[place(&(at..end))].copy_from_slice(&chunk[within_chunk(&(at..end))]);
                    }
                    at = end;
                }
            }
        }
    }
    if journal.is_empty() {
        return Ok(out);
    }
    let read = blocking(move || {
        for (place, segment, offset) in journal {
            segment.file.read_exact_at(&mut out[place], offset)?;
        }
        Ok(out)
    });
    read.await?.map_err(VolumeError::Local)
}

fn within(start: u64, end: u64) -> Range<usize> {
    let index = |at| usize::try_from(at).expect("a request is at most 32 MiB");
    index(start)..index(end)
}

/// Where in its chunk a range lies that does not leave it.
fn within_chunk(range: &Range<u64>) -> Range<usize> {
    let first = range.start / CHUNK_BYTES * CHUNK_BYTES;
    within(range.start - first, range.end - first)
}

fn device_error(error: VolumeError) -> DeviceError {
    tracing::error!(%error, "a read failed");
    match error {
        VolumeError::Fenced => DeviceError::Fenced,
        VolumeError::Integrity(_) => DeviceError::Integrity,
        VolumeError::NoSpace => DeviceError::NoSpace,
        VolumeError::Closed
        | VolumeError::Poisoned
        | VolumeError::Local(_)
        | VolumeError::Bucket(_)
        | VolumeError::Head(_)
        | VolumeError::Slow(_)
        | VolumeError::BadSize { .. } => DeviceError::Io,
    }
}
