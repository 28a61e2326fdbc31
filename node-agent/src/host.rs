//! The host: every sprite this node agent runs or can wake.
//!
//! Tasks: one owner per sprite (`vm::task`), one for the pool, one per living VM that reads the guest's events (`inside`).
//! The table only maps ids to owners; it holds no state of a sprite.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use blockstore::{bucket::RecordError, store::ForkError};
use proto::{
    id::SpriteId,
    node::SpriteStatus,
    record::{DISK_BYTES_DEFAULT, SpriteRecord},
};
use tokio::sync::{broadcast, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::AgentClient,
    laps::Laps,
    net::SpriteNet,
    pool::{self, Pool, Prepared},
    resources::Resources,
    seed,
    vm::{
        Depth, Settled,
        change::{self, BootError, Parts, chain},
        task::{self, Command, OrderError, SleepReport, SpriteHandle, UseGuard},
    },
};

/// A request that waits for a wake gives up after this; the longest wake is a cold boot on a busy host.
const WAKE_LIMIT: Duration = Duration::from_secs(60);
/// An order to sleep includes the push of disk and memory.
const SLEEP_LIMIT: Duration = Duration::from_secs(600);
const JOB_LIMIT: Duration = Duration::from_secs(120);
/// Table changes a slow route watcher may lag behind before it has to start over.
const TABLE_CHANGES_KEPT: usize = 1024;

/// Handle to the node agent's sprites. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    resources: Arc<Resources>,
    sprites: Mutex<HashMap<SpriteId, SpriteHandle>>,
    changes: broadcast::Sender<TableChange>,
    pool: Pool,
}

/// A sprite came to this host or left it.
#[derive(Clone, Debug)]
pub(crate) enum TableChange {
    Came(watch::Receiver<SpriteStatus>),
    Gone(SpriteId),
}

/// A sprite that answers, held awake for as long as this value lives.
#[derive(Debug)]
pub struct Running {
    pub agent: AgentClient,
    pub net: Arc<SpriteNet>,
    /// Cancelled when the VM ends although it is held awake: put to sleep by order, restarted, restored, or dead.
    pub ended: CancellationToken,
    /// How it was found: `none` (was running), `paused`, `memory`, `disk`.
    pub was: &'static str,
    pub guard: UseGuard,
}

/// Why a sprite cannot serve a request.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    #[error("sprite {0} is not on this host")]
    NotHere(SpriteId),
    #[error("this host has no room to wake sprite {0}; retry, or free memory")]
    NoCapacity(SpriteId),
    #[error("sprite {sprite} cannot start: {reason}; the next request tries a boot from its disk")]
    Failed { sprite: SpriteId, reason: String },
    #[error("sprite {0} did not come up within {WAKE_LIMIT:?}")]
    Timeout(SpriteId),
}

/// Why a sprite was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("{0}")]
    NoCapacity(String),
    #[error("cannot write the record of the new sprite")]
    Record(#[source] RecordError),
    #[error("the new sprite does not start: {0}")]
    Start(String),
    #[error(transparent)]
    Fork(ForkError),
}

/// A sprite that was just made.
#[derive(Clone, Copy, Debug)]
pub struct Created {
    pub id: SpriteId,
    /// `pool`, `seed`, `golden` or `fork`.
    pub from: &'static str,
}

impl Host {
    pub(crate) fn new(resources: Arc<Resources>, pool: Pool) -> Self {
        let (changes, _) = broadcast::channel(TABLE_CHANGES_KEPT);
        Self(Arc::new(Inner { resources, sprites: Mutex::default(), changes, pool }))
    }

    pub(crate) fn resources(&self) -> &Arc<Resources> {
        &self.0.resources
    }

    /// Wakes the sprite if it sleeps and holds it awake. The request waits; concurrent calls share one wake.
    pub async fn running(&self, id: SpriteId) -> Result<Running, WakeError> {
        let handle = self.handle(id).ok_or(WakeError::NotHere(id))?;
        let (reply, answer) = oneshot::channel();
        handle.commands.send(Command::Use { reply }).await.map_err(|_closed| WakeError::NotHere(id))?;
        match tokio::time::timeout(WAKE_LIMIT, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_closed)) => Err(WakeError::NotHere(id)),
            Err(_elapsed) => Err(WakeError::Timeout(id)),
        }
    }

    /// Makes a sprite out of `record` (its id is filled in) and returns when commands can run in it.
    ///
    /// Not cancel safe: a sprite made for a caller that is gone stays, and its name object says so.
    pub async fn create(&self, mut record: SpriteRecord) -> Result<Created, CreateError> {
        let mut laps = Laps::begin();
        let is_plain = record.from.is_none() && record.disk_bytes == DISK_BYTES_DEFAULT;
        let fits = is_plain && record.size == self.0.pool.size();
        let pooled = if fits { self.0.pool.take().await } else { None };
        let named = match pooled {
            Some(prepared) => self.name(prepared, &mut record).await,
            None => None,
        };
        let (parts, from) = match named {
            Some(parts) => (parts, "pool"),
            None => {
                record.id = SpriteId::generate();
                self.make(&record).await?
            }
        };
        laps.lap(from);
        let id = record.id;
        let key = record_key(id);
        if let Err(source) = self.0.resources.config.bucket.create_record(&key, record.clone()).await {
            pool::free(&self.0.resources, parts).await;
            return Err(CreateError::Record(source));
        }
        laps.lap("record");
        tracing::info!(sprite = %id, %laps, "created");
        self.adopt(parts, Settled::Running, "created", None);
        Ok(Created { id, from })
    }

    /// `None` when the entry is of no use, for example because its VM has died; it is freed.
    async fn name(&self, prepared: Prepared, record: &mut SpriteRecord) -> Option<Parts> {
        let mut parts = prepared.parts;
        record.id = parts.id;
        parts.record = Some(record.clone());
        let named = match &mut parts.process {
            Some(process) => name_process(process, record).await,
            None => Err("it has no VM".into()),
        };
        match named {
            Ok(()) => Some(parts),
            Err(reason) => {
                tracing::warn!(sprite = %parts.id, reason, "an entry of the pool is of no use; starting from the golden VM");
                pool::free(&self.0.resources, parts).await;
                None
            }
        }
    }

    async fn make(&self, record: &SpriteRecord) -> Result<(Parts, &'static str), CreateError> {
        let resources = &self.0.resources;
        let record_size = record.size;
        let volume = match &record.from {
            None => {
                let created = resources.store.create(record.id, &resources.base, record.disk_bytes).await;
                created.map_err(|error| CreateError::Start(chain(&error)))?
            }
            Some(from) => {
                let forked = resources.store.fork(record.id, from.id, &from.checkpoint, Some(record.disk_bytes)).await;
                match forked {
                    Ok(volume) => volume,
                    Err(error) => {
                        if let Err(left) = resources.store.destroy(record.id).await {
                            tracing::warn!(sprite = %record.id, error = chain(&left), "half a fork is left");
                        }
                        return Err(CreateError::Fork(error));
                    }
                }
            }
        };
        let mut parts = Parts {
            id: record.id,
            size: record.size,
            record: Some(record.clone()),
            process: None,
            volume: Some(volume),
            image: None,
        };
        match change::begin_life(resources, &mut parts).await {
            Ok(from) => {
                // The next one of this size begins quicker.
                let seeding = Arc::clone(resources);
                resources.background.spawn(async move { seed::ensure(&seeding, record_size).await });
                Ok((parts, from))
            }
            Err(error) => {
                pool::free(resources, parts).await;
                Err(match error {
                    BootError::NoRoom(_) => CreateError::NoCapacity(error.to_string()),
                    BootError::Failed(reason) => CreateError::Start(reason),
                })
            }
        }
    }

    /// Gives a sprite its owner task.
    ///
    /// `event` is what people should know about how it got there.
    pub(crate) fn adopt(&self, parts: Parts, settled: Settled, reason: &str, event: Option<String>) {
        let id = parts.id;
        let handle = task::spawn(Arc::clone(&self.0.resources), parts, settled, reason, event);
        let status = handle.status.clone();
        self.sprites().insert(id, handle);
        // Nobody may be watching.
        drop(self.0.changes.send(TableChange::Came(status)));
    }

    /// Puts the sprite to sleep by order and returns when it is asleep that deep and preserved.
    pub async fn sleep(&self, id: SpriteId, depth: Depth) -> Result<SleepReport, OrderError> {
        self.order(id, SLEEP_LIMIT, |reply| Command::Sleep { depth, reply }).await
    }

    /// Puts the disk back to a checkpoint; returns when commands can run again.
    pub async fn restore(&self, id: SpriteId, checkpoint: String) -> Result<(), OrderError> {
        self.order(id, JOB_LIMIT, |reply| Command::Restore { checkpoint, reply }).await
    }

    /// Ends the VM and starts a fresh one on the same disk.
    pub async fn reboot(&self, id: SpriteId) -> Result<(), OrderError> {
        self.order(id, JOB_LIMIT, |reply| Command::Reboot { reply }).await
    }

    /// Frees everything. A sprite that is not here is freed all the same: its disk may be.
    pub async fn destroy(&self, id: SpriteId) -> Result<(), OrderError> {
        if self.handle(id).is_some() {
            self.order(id, JOB_LIMIT, |reply| Command::Destroy { reply }).await?;
        } else if let Err(error) = self.0.resources.store.destroy(id).await {
            return Err(OrderError::Failed(chain(&error)));
        }
        self.sprites().remove(&id);
        drop(self.0.changes.send(TableChange::Gone(id)));
        Ok(())
    }

    /// The record changed: policy, timers, labels.
    pub async fn reload(&self, record: SpriteRecord) {
        if let Some(handle) = self.handle(record.id) {
            drop(handle.commands.send(Command::Reload { record: Box::new(record) }).await);
        }
    }

    /// Makes the living VM of a sprite see its new disk size.
    pub(crate) async fn announce_disk_size(&self, id: SpriteId, size_bytes: u64) -> Result<(), String> {
        let handle = self.handle(id).ok_or_else(|| format!("sprite {id} is not on this host"))?;
        let (reply, answer) = oneshot::channel();
        let sent = handle.commands.send(Command::AnnounceDiskSize { size_bytes, reply }).await;
        sent.map_err(|_closed| format!("sprite {id} is gone"))?;
        answer.await.map_err(|_closed| format!("sprite {id} is gone"))?
    }

    async fn order<T>(
        &self,
        id: SpriteId,
        limit: Duration,
        command: impl FnOnce(oneshot::Sender<Result<T, OrderError>>) -> Command,
    ) -> Result<T, OrderError> {
        let missing = || OrderError::Failed(format!("sprite {id} is not on this host"));
        let handle = self.handle(id).ok_or_else(missing)?;
        let (reply, answer) = oneshot::channel();
        handle.commands.send(command(reply)).await.map_err(|_closed| missing())?;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_closed)) => Err(missing()),
            Err(_elapsed) => Err(OrderError::Failed(format!("not done within {limit:?}; it goes on"))),
        }
    }

    pub fn status(&self, id: SpriteId) -> Option<SpriteStatus> {
        self.handle(id).map(|handle| handle.status.borrow().clone())
    }

    /// Status watches of all sprites, and a channel for those that come and go. Taken together, so nothing is missed.
    pub(crate) fn watch(&self) -> (Vec<watch::Receiver<SpriteStatus>>, broadcast::Receiver<TableChange>) {
        let sprites = self.sprites();
        let changes = self.0.changes.subscribe();
        (sprites.values().map(|handle| handle.status.clone()).collect(), changes)
    }

    fn handle(&self, id: SpriteId) -> Option<SpriteHandle> {
        self.sprites().get(&id).cloned()
    }

    pub(crate) fn ids(&self) -> Vec<SpriteId> {
        self.sprites().keys().copied().collect()
    }

    /// Lets go of a sprite; its VM stays as it is.
    pub(crate) async fn leave(&self, id: SpriteId) {
        let Some(handle) = self.handle(id) else { return };
        let (reply, left) = oneshot::channel();
        if handle.commands.send(Command::Leave { reply }).await.is_ok() {
            // An owner that ended by itself has left as well.
            drop(left.await);
        }
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.0.pool
    }

    fn sprites(&self) -> std::sync::MutexGuard<'_, HashMap<SpriteId, SpriteHandle>> {
        self.0.sprites.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An anonymous sprite gets its name: hostname, clock, entropy. Its keys and ids it has since it was made.
async fn name_process(process: &mut crate::process::VmProcess, record: &SpriteRecord) -> Result<(), String> {
    process.unpause().await.map_err(|error| chain(&error))?;
    change::configure(process, Some(record), false).await.map_err(|error| chain(&error))?;
    process.note.pooled = false;
    process.note.write_volatile(&process.run).map_err(|error| error.to_string())
}

pub use proto::record::key as record_key;
