//! The pool: whole anonymous sprites, ready to be named (ruling 13).
//!
//! An entry has its own id and disk, mounted, its environment started and a shell run once; then its vCPUs are stopped. Naming it takes milliseconds.
//! One task fills the pool, one entry at a time, and lets a burst of creates pass first, because on a small host filling would slow them down.

use std::{sync::Arc, time::Duration};

use proto::{
    id::SpriteId,
    record::{DISK_BYTES_DEFAULT, SizeClass},
};
use tokio::sync::{Mutex, mpsc};

use crate::{
    resources::Resources,
    seed,
    vm::change::{self, Parts, chain},
};

/// Filling waits until no entry was taken for so long.
const CALM: Duration = Duration::from_secs(2);
/// After a failed attempt.
const RETRY: Duration = Duration::from_secs(15);
/// Entries at most, whatever is configured.
const ENTRIES_MAX: usize = 64;

/// An anonymous sprite with its vCPUs stopped.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) parts: Parts,
}

/// Handle to the pool.
#[derive(Debug)]
pub(crate) struct Pool {
    ready: Mutex<mpsc::Receiver<Prepared>>,
    size: SizeClass,
}

impl Pool {
    /// The empty pool, and the task that makes the seed and keeps `entries` sprites ready. None: every create starts from the seed or the golden VM.
    ///
    /// The task must not begin before the sprites of this host are taken up: what it starts would be a VM that nobody holds, in a network that
    /// nobody uses.
    pub(crate) fn new(resources: Arc<Resources>, entries: usize) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let size = SizeClass::default();
        let entries = entries.min(ENTRIES_MAX);
        let (sender, receiver) = mpsc::channel(entries.max(1));
        let filling = async move {
            seed::ensure(&resources, size).await;
            if entries > 0 {
                fill(resources, size, sender).await;
            }
        };
        (Self { ready: Mutex::new(receiver), size }, filling)
    }

    pub(crate) fn size(&self) -> SizeClass {
        self.size
    }

    /// An entry that is ready now.
    pub(crate) async fn take(&self) -> Option<Prepared> {
        self.ready.lock().await.try_recv().ok()
    }

    /// Entries that are ready.
    pub(crate) async fn len(&self) -> usize {
        self.ready.lock().await.len()
    }

    /// Ends the pool; what is in it is returned to be freed. An entry that is still being made is not waited for.
    pub(crate) async fn drain(&self) -> Vec<Prepared> {
        let mut ready = self.ready.lock().await;
        ready.close();
        let mut entries = Vec::new();
        while let Ok(entry) = ready.try_recv() {
            entries.push(entry);
        }
        entries
    }
}

async fn fill(resources: Arc<Resources>, size: SizeClass, sender: mpsc::Sender<Prepared>) {
    let mut full = sender.capacity() == 0;
    let closing = resources.closing.clone();
    loop {
        let Some(Ok(permit)) = closing.run_until_cancelled(sender.reserve()).await else { return };
        if full && closing.run_until_cancelled(tokio::time::sleep(CALM)).await.is_none() {
            return;
        }
        match prepare(&resources, size).await {
            Ok(parts) => permit.send(Prepared { parts }),
            Err(reason) => {
                tracing::warn!(reason, "cannot prepare a sprite for the pool");
                drop(permit);
                if closing.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
                    return;
                }
            }
        }
        full = sender.capacity() == 0;
    }
}

async fn prepare(resources: &Resources, size: SizeClass) -> Result<Parts, String> {
    let id = SpriteId::generate();
    let volume =
        resources.store.create(id, &resources.base, DISK_BYTES_DEFAULT).await.map_err(|error| chain(&error))?;
    let mut parts = Parts { id, size, record: None, process: None, volume: Some(volume), image: None };
    match start(resources, &mut parts).await {
        Ok(()) => Ok(parts),
        Err(reason) => {
            free(resources, parts).await;
            Err(reason)
        }
    }
}

async fn start(resources: &Resources, parts: &mut Parts) -> Result<(), String> {
    change::begin_life(resources, parts).await.map_err(|error| error.to_string())?;
    let process = parts.process.as_ref().ok_or("it has no VM")?;
    seed::warm_up(&process.agent).await?;
    process.pause().await.map_err(|error| chain(&error))
}

/// Frees an entry that nobody will name.
pub(crate) async fn free(resources: &Resources, mut parts: Parts) {
    change::end_process(&mut parts).await;
    drop(parts.volume.take());
    let run = resources.run_dir(parts.id);
    if let Err(error) = resources.store.destroy(parts.id).await {
        tracing::warn!(sprite = %parts.id, error = chain(&error), "cannot free an anonymous sprite");
    }
    if let Err(error) = crate::process::blocking(move || run.remove()).await {
        tracing::warn!(%error, "cannot remove the files of an anonymous sprite");
    }
}
