//! The store: opens, creates and frees volumes of one host.
//!
//! ```text
//!  <dir>/lock            one process at a time
//!  <dir>/vol/<id>/       a volume's journal; there exactly while this host owns it (or owned it and does not know better yet)
//!  <dir>/spare/          free journal files
//!  <dir>/cache/          parts of packs
//!  <dir>/lost/           journals of volumes that another host took: unpushed writes, for salvage
//! ```
//! To acquire: read the head. Ours: the journal holds what the bucket lacks; it is read *before* the CAS, so that damage changes nothing. Not ours: a
//! journal here is of an older life and is set aside before the CAS, or a crash right after it would make it look current.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use nix::fcntl::{Flock, FlockArg};
use proto::id::SpriteId;
use tokio::sync::{Mutex as AsyncMutex, mpsc};
use tokio_util::sync::CancellationToken;

use super::{
    base::{self, BaseId},
    cache::DiskCache,
    compact::Compaction,
    core::{Core, Source, now_unix_ms},
    device::Device,
    fetch::{Fetcher, backoff, blocking},
    head::{Head, HeadState, KeptCheckpoint, Origin, Root, checkpoint_id, head_key},
    journal::{Found, Log, Scan, ScanError, What, scan},
    lost::{clean, set_aside},
    owner::{COMMANDS_MAX, Command, Owner, bury},
    pack::PackNames,
    segment::SegmentPool,
    types::{
        BaseError, Checkpoint, CheckpointError, Epoch, Generation, Limits, Lsn, StoreConfig, StoreError, VolumeError,
    },
    volume::{Volume, number_of},
};
use crate::bucket::{Bucket, Record, RecordError};

/// How long a store waits for the process before it to end.
const LOCK_WAITS: u32 = 100;
/// Tries against others that change the same head.
const CAS_ATTEMPTS: u32 = 8;

/// Volumes of one host.
pub struct Store {
    pub(super) shared: Arc<Shared>,
    /// Held as long as the store lives.
    _lock: Flock<File>,
}

/// What a new volume begins as.
pub(super) struct Start {
    pub(super) root: Option<Root>,
    pub(super) size_bytes: u64,
    pub(super) parent: Option<SpriteId>,
}

/// What volumes of a store share.
pub(super) struct Shared {
    pub(super) node: String,
    dir: PathBuf,
    limits: Limits,
    pub(super) fetcher: Arc<Fetcher>,
    pool: Arc<SegmentPool>,
    volumes: Mutex<HashMap<SpriteId, Volume>>,
    /// Who opens or frees which volume, one at a time.
    opening: Mutex<HashMap<SpriteId, Weak<AsyncMutex<()>>>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { node, dir, .. } = &*self.shared;
        f.debug_struct("Store").field("node", node).field("dir", dir).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the local folder. Volumes are opened one by one, by [`acquire`](Self::acquire).
    pub async fn open(config: StoreConfig) -> Result<Arc<Self>, StoreError> {
        let StoreConfig { bucket, dir, node, limits } = config;
        let failed = |source| StoreError::Dir { path: dir.clone(), source };
        let lock = lock_dir(&dir).await?;
        let (local, bounds) = (dir.clone(), limits.clone());
        let opened = blocking(move || {
            for folder in ["vol", "lost"] {
                fs::create_dir_all(local.join(folder))?;
            }
            clean(&local.join("lost"))?;
            let cache = DiskCache::open(&local.join("cache"), bounds.cache_bytes)?;
            let pool = SegmentPool::open(&local.join("spare"), bounds.segment_bytes, bounds.spare_segments)?;
            Ok((cache, pool))
        });
        let (cache, pool) = opened.await?.map_err(failed)?;
        let ahead = Arc::clone(&pool);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = ahead.prepare() {
                tracing::warn!(%error, "cannot prepare journal files");
            }
        });
        let fetcher = Arc::new(Fetcher::new(bucket, cache, &limits));
        let (volumes, opening) = Default::default();
        let shared = Arc::new(Shared { node, dir, limits, fetcher, pool, volumes, opening });
        Ok(Arc::new(Self { shared, _lock: lock }))
    }

    /// Imports a raw disk image into the bucket, unless one of that digest is there. `progress` gets bytes done and bytes in all.
    ///
    /// # Cancel safety
    ///
    /// Dropped or killed, it leaves objects that nothing names; the next call begins again.
    pub async fn ensure_base(
        &self,
        image: &Path,
        digest: &str,
        progress: impl Fn(u64, u64) + Send + Sync,
    ) -> Result<BaseId, BaseError> {
        self.ensure_filled_base(image, digest, &[], progress).await
    }

    /// The same, for measurements that need a large disk at once: where the image has no content, the disk gets some in the ranges `filled`, made of a
    /// few frames again and again. It costs the bucket a few packs, and its manifest is that of a disk which was written so far.
    pub async fn ensure_filled_base(
        &self,
        image: &Path,
        digest: &str,
        filled: &[Range<u64>],
        progress: impl Fn(u64, u64) + Send + Sync,
    ) -> Result<BaseId, BaseError> {
        let image = base::Image { path: image, digest, filled };
        base::ensure(&self.shared.fetcher, self.shared.limits.pack_bytes, image, progress).await
    }

    /// Creates a volume that begins as `base`, and opens it. Costs one small object, whatever the sizes.
    pub async fn create(&self, id: SpriteId, base: &BaseId, disk_bytes: u64) -> Result<Volume, StoreError> {
        if !base.fits(disk_bytes) {
            return Err(StoreError::BadSize { disk_bytes, base_bytes: base.size_bytes });
        }
        self.create_from(id, Start { root: base.root, size_bytes: disk_bytes, parent: None }).await
    }

    pub(super) async fn create_from(&self, id: SpriteId, start: Start) -> Result<Volume, StoreError> {
        let shared = &self.shared;
        let head = Head {
            state: HeadState::Owned,
            node: Some(shared.node.clone()),
            epoch: Epoch(1),
            generation: Generation(1),
            lsn: Lsn(0),
            cut_unix_ms: now_unix_ms(),
            size_bytes: start.size_bytes,
            root: start.root,
            next_checkpoint: 1,
            current_base: None,
            checkpoints: Vec::new(),
            memory: None,
            forks: Vec::new(),
            parent: start.parent,
            pushes_since_survey: 0,
        };
        let lock = shared.opening(id);
        let _alone = lock.lock().await;
        let created = self.bucket().create_record(&head_key(id), head).await;
        let record = created.map_err(|source| match source {
            RecordError::Conflict { .. } => StoreError::Exists { id },
            source => StoreError::Head { id, source },
        })?;
        let folder = shared.folder(id);
        let made = blocking(move || {
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
            }
            fs::create_dir_all(folder.join("journal"))
        });
        made.await?.map_err(|source| StoreError::Journal { id, source })?;
        let core = Core::new(record.value.clone());
        Ok(shared.start(id, record, core, &Scan::default()))
    }

    /// Takes a volume for this host, with everything the guest was promised: from the bucket, and from the local journal if this host had it.
    /// An open one is returned as it is.
    pub async fn acquire(&self, id: SpriteId) -> Result<Volume, StoreError> {
        let shared = &self.shared;
        let lock = shared.opening(id);
        let _alone = lock.lock().await;
        if let Some(volume) = shared.volume(id) {
            if volume.is_open() {
                return Ok(volume);
            }
            volume.stop();
            volume.ended().await;
        }
        for attempt in 0..CAS_ATTEMPTS {
            let record = self.live_head(id).await?;
            let head = &record.value;
            if head.state == HeadState::Owned && !head.is_owned_by(&shared.node) {
                let node = head.node.clone().unwrap_or_default();
                return Err(StoreError::OwnedElsewhere { id, node, epoch: head.epoch });
            }
            let found = shared.read_journal(id, head).await?;
            let (head, core) = take_over(head, &shared.node, &found);
            match self.bucket().update_record(&record, head).await {
                Ok(record) => {
                    let mut core = core;
                    core.head = Arc::new(record.value.clone());
                    return Ok(shared.start(id, record, core, &found));
                }
                Err(RecordError::Conflict { .. } | RecordError::Superseded { .. } | RecordError::Unknown { .. }) => {
                    tokio::time::sleep(backoff(attempt)).await;
                }
                Err(source) => return Err(StoreError::Head { id, source }),
            }
        }
        let key = head_key(id);
        Err(StoreError::Head { id, source: RecordError::Unknown { key, source: None } })
    }

    /// An open volume.
    pub fn volume(&self, id: SpriteId) -> Option<Volume> {
        self.shared.volume(id)
    }

    /// What the bucket says of a volume; `None` if it never existed. Costs a request.
    pub async fn head(&self, id: SpriteId) -> Result<Option<Head>, StoreError> {
        Ok(self.read_head(id).await?.map(|record| record.value))
    }

    /// Frees a volume: tombstone, journal, packs. One that does not exist, or not any more, is a success.
    pub async fn destroy(&self, id: SpriteId) -> Result<(), StoreError> {
        let lock = self.shared.opening(id);
        let _alone = lock.lock().await;
        if let Some(volume) = self.shared.volume(id) {
            match volume.destroy().await {
                Ok(()) => return self.free(id).await,
                Err(error @ (VolumeError::Fenced | VolumeError::Closed)) => {
                    tracing::debug!(volume = %id, %error, "destroyed by its head");
                    volume.stop();
                    volume.ended().await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.bury(id).await?;
        let folder = self.shared.folder(id);
        let removed = blocking(move || if folder.exists() { fs::remove_dir_all(&folder) } else { Ok(()) });
        removed.await?.map_err(|source| StoreError::Journal { id, source })?;
        self.free(id).await
    }

    async fn bury(&self, id: SpriteId) -> Result<(), StoreError> {
        let buried = self.change_head(id, |head| {
            if !head.is_deleted() {
                head.epoch = Epoch(head.epoch.0 + 1);
                bury(head);
            }
            Ok(())
        });
        match buried.await {
            Err(StoreError::Unknown { .. }) => Ok(()),
            buried => buried,
        }
    }

    /// Changes the head of a volume that is not open, and that no other host has. `change` may run several times, on what is there by then.
    pub(super) async fn change_head<T, E: From<StoreError>>(
        &self,
        id: SpriteId,
        change: impl Fn(&mut Head) -> Result<T, E>,
    ) -> Result<T, E> {
        for attempt in 0..CAS_ATTEMPTS {
            let Some(record) = self.read_head(id).await? else { return Err(StoreError::Unknown { id }.into()) };
            let mut head = record.value.clone();
            if head.state == HeadState::Owned && !head.is_owned_by(&self.shared.node) {
                let node = head.node.unwrap_or_default();
                return Err(StoreError::OwnedElsewhere { id, node, epoch: head.epoch }.into());
            }
            let changed = change(&mut head)?;
            if head == record.value {
                return Ok(changed);
            }
            match self.bucket().update_record(&record, head).await {
                Ok(_) => return Ok(changed),
                Err(RecordError::Conflict { .. } | RecordError::Superseded { .. } | RecordError::Unknown { .. }) => {
                    tokio::time::sleep(backoff(attempt)).await;
                }
                Err(source) => return Err(StoreError::Head { id, source }.into()),
            }
        }
        Err(StoreError::Head { id, source: RecordError::Unknown { key: head_key(id), source: None } }.into())
    }

    /// All checkpoints of a volume, open or not.
    pub async fn checkpoints(&self, id: SpriteId) -> Result<Vec<Checkpoint>, CheckpointError> {
        if let Some(volume) = self.volume(id) {
            return Ok(volume.checkpoints().await);
        }
        let record = self.live_head(id).await.map_err(Box::new)?;
        let head = record.value;
        Ok(head.checkpoints.iter().map(|kept| kept.shown(head.current_base)).collect())
    }

    /// Forgets a checkpoint of a volume, open or not.
    pub async fn delete_checkpoint(&self, id: SpriteId, checkpoint: &str) -> Result<(), CheckpointError> {
        let number = number_of(checkpoint)?;
        let lock = self.shared.opening(id);
        let _alone = lock.lock().await;
        if let Some(volume) = self.volume(id) {
            return volume.delete_checkpoint(checkpoint).await;
        }
        let deleted = self.change_head(id, |head| {
            if head.is_deleted() {
                return Err(StoreError::Destroyed { id }.into());
            }
            if head.checkpoint(number).is_none() {
                return Err(CheckpointError::Unknown { id: checkpoint.to_owned() });
            }
            if head.current_base == Some(number) {
                return Err(CheckpointError::CurrentBase { id: checkpoint_id(number) });
            }
            head.checkpoints.retain(|kept| kept.number != number);
            Ok(())
        });
        deleted.await
    }

    pub(super) fn bucket(&self) -> &Bucket {
        &self.shared.fetcher.bucket
    }

    pub(super) async fn read_head(&self, id: SpriteId) -> Result<Option<Record<Head>>, StoreError> {
        let read = self.bucket().read_record::<Head>(&head_key(id)).await;
        read.map_err(|source| StoreError::Head { id, source })
    }

    pub(super) async fn live_head(&self, id: SpriteId) -> Result<Record<Head>, StoreError> {
        match self.read_head(id).await? {
            None => Err(StoreError::Unknown { id }),
            Some(record) if record.value.is_deleted() => Err(StoreError::Destroyed { id }),
            Some(record) => Ok(record),
        }
    }
}

async fn lock_dir(dir: &Path) -> Result<Flock<File>, StoreError> {
    let failed = |source| StoreError::Dir { path: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(failed)?;
    let path = dir.join("lock");
    let mut file = File::options().create(true).truncate(false).write(true).open(path).map_err(failed)?;
    for _ in 0..LOCK_WAITS {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((again, nix::Error::EWOULDBLOCK)) => file = again,
            Err((_, error)) => return Err(failed(error.into())),
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    Err(StoreError::InUse { path: dir.to_owned() })
}

impl Shared {
    fn folder(&self, id: SpriteId) -> PathBuf {
        self.dir.join("vol").join(id.to_string())
    }

    fn lost(&self) -> PathBuf {
        self.dir.join("lost")
    }

    fn volume(&self, id: SpriteId) -> Option<Volume> {
        self.volumes().get(&id).cloned()
    }

    fn volumes(&self) -> std::sync::MutexGuard<'_, HashMap<SpriteId, Volume>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn forget(&self, volume: &Volume) {
        let mut volumes = self.volumes();
        if volumes.get(&volume.id()).is_some_and(|known| known.is_same(volume)) {
            volumes.remove(&volume.id());
        }
    }

    pub(super) fn opening(&self, id: SpriteId) -> Arc<AsyncMutex<()>> {
        let mut opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        opening.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = opening.get(&id).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        opening.insert(id, Arc::downgrade(&lock));
        lock
    }

    /// What the local journal has beyond the head; nothing if the head is not ours.
    async fn read_journal(&self, id: SpriteId, head: &Head) -> Result<Scan, StoreError> {
        let folder = self.folder(id);
        let (ours, pushed) = (head.is_owned_by(&self.node), head.lsn.0);
        let (pool, lost, name) = (Arc::clone(&self.pool), self.lost(), format!("{id}-{}", head.epoch));
        let journal = folder.join("journal");
        let read = blocking(move || {
            if !ours && folder.exists() {
                let unpushed = fs::read_dir(folder.join("journal")).is_ok_and(|mut files| files.next().is_some());
                if unpushed { set_aside(&folder, &lost, &name)? } else { fs::remove_dir_all(&folder)? }
            }
            scan(&folder.join("journal"), &pool, *id.uuid().as_bytes(), pushed)
        });
        read.await?.map_err(|error| match error {
            ScanError::Io(source) => StoreError::Journal { id, source },
            ScanError::Damaged(reason) => StoreError::Damaged { id, path: journal, reason },
        })
    }

    /// Brings a volume to life whose head is ours.
    fn start(self: &Arc<Self>, id: SpriteId, record: Record<Head>, core: Core, found: &Scan) -> Volume {
        let folder = self.folder(id);
        let epoch = record.value.epoch;
        let names = PackNames::new(Origin::of_volume(id), epoch.0);
        let lsn = core.lsn.0;
        let journal = folder.join("journal");
        let log = Log::new(journal, Arc::clone(&self.pool), *id.uuid().as_bytes(), epoch.0, found, lsn);
        let shared = (self.limits.clone(), Arc::clone(&self.fetcher));
        let device = Arc::new(Device::new(id, shared, names, folder, core, log));
        let (commands, orders) = mpsc::channel::<Command>(COMMANDS_MAX);
        let closing = CancellationToken::new();
        let owner = Owner {
            device: Arc::clone(&device),
            bucket: self.fetcher.bucket.clone(),
            record,
            node: self.node.clone(),
            commands: orders,
            closing: closing.clone(),
            lost: self.lost(),
            failures: 0,
            not_before: None,
            compaction: Compaction::new(self.limits.survey_pushes),
        };
        let task = tokio::spawn(owner.run());
        let volume = Volume::new(device, commands, closing, task, Arc::downgrade(self));
        self.volumes().insert(id, volume.clone());
        volume
    }
}

/// The head this host wants, and what it knows in RAM with the journal applied.
fn take_over(old: &Head, node: &str, found: &Scan) -> (Head, Core) {
    let mut head = old.clone();
    head.epoch = Epoch(old.epoch.0 + 1);
    head.state = HeadState::Owned;
    head.node = Some(node.to_owned());
    let mut core = Core::new(head.clone());
    for Found { lsn, what } in &found.records {
        let lsn = Lsn(*lsn);
        match what {
            What::Write { range, segment, offset } => {
                core.insert(lsn, range.clone(), Source::Journal { segment: Arc::clone(segment), offset: *offset });
            }
            What::Hole { range } => core.insert(lsn, range.clone(), Source::Hole),
            What::Checkpoint { body } => {
                core.lsn = lsn;
                match serde_json::from_slice::<KeptCheckpoint>(body) {
                    Ok(checkpoint) => core.freeze(Some(checkpoint)),
                    Err(error) => tracing::error!(%lsn, %error, "a sealed checkpoint cannot be read"),
                }
            }
        }
    }
    let sealed: Vec<u32> =
        core.frozen.iter().filter_map(|frozen| frozen.checkpoint.as_ref()).map(|c| c.number).collect();
    for kept in &mut head.checkpoints {
        if kept.kept.is_none() && !kept.lost && !sealed.contains(&kept.number) {
            kept.lost = true;
            head.generation = Generation(old.generation.0 + 1);
        }
    }
    (head, core)
}

impl From<io::Error> for VolumeError {
    fn from(error: io::Error) -> Self {
        Self::Local(error)
    }
}
