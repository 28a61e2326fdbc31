//! Seeds: a golden VM that has gone one step further, with its disk mounted, its environment started and a shell run once. New sprites begin as copies.
//!
//! ```text
//!  golden VM + fresh disk ──▶ environment starts, `bash` runs once ──▶ agent connection closed ──▶ stop ──▶ state, memory ┐
//!                                                  what was written to the disk meanwhile (`Patch`) ──────────────────────┴▶ golden/<key>/seed-…/
//!  new sprite = fresh disk + patch, copy of the memory, load of the state, identity
//! ```
//!
//! The guest has never been told who it is, so it has made no ids, keys or sockets (ruling 21): a copy makes all of them when it is named, as an entry of
//! the pool does. Disk and memory of a copy fit because every new disk begins as the same base, and gets what the seed has written before the VM runs.
//!
//! A seed is this host's own, and only a shortcut: without one, a sprite begins on the golden VM. Sleeping sprites, restores and other disks never use it.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use blockstore::{nbd::DeviceError, store::Patch};
use proto::{
    id::SpriteId,
    record::{DISK_BYTES_DEFAULT, SizeClass},
};

use crate::{
    digest, files,
    golden::Golden,
    pool,
    process::{RunDir, Snapshot, blocking},
    resources::Resources,
    vm::change::{self, Parts, chain},
};

/// How long the guest may take to notice that its host connection is closed, before the snapshot.
const SETTLE: Duration = Duration::from_millis(300);
/// The shell runs once, so that its pages are there.
const WARM_UP_LIMIT: Duration = Duration::from_secs(30);

/// A snapshot with its environment started, and what its disk has that a new one lacks.
#[derive(Debug)]
pub(crate) struct Seed {
    pub(crate) snapshot: Snapshot,
    pub(crate) disk: Patch,
}

/// The seeds of a host, by size.
#[derive(Debug, Default)]
pub(crate) struct Seeds([Mutex<State>; 3]);

#[derive(Clone, Debug, Default)]
enum State {
    #[default]
    None,
    Making,
    Ready(Arc<Seed>),
    /// One could not be made, or a copy of it did not start. Until the next start of the node agent.
    Useless,
}

impl Seeds {
    fn set(&self, size: SizeClass, to: State) -> State {
        let mut state = self.0[size as usize].lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut state, to)
    }

    /// The seed, if it is ready.
    pub(crate) fn get(&self, size: SizeClass) -> Option<Arc<Seed>> {
        match &*self.0[size as usize].lock().unwrap_or_else(PoisonError::into_inner) {
            State::Ready(seed) => Some(Arc::clone(seed)),
            State::None | State::Making | State::Useless => None,
        }
    }

    /// Nothing begins as a copy of it any more.
    pub(crate) fn give_up(&self, size: SizeClass) {
        self.set(size, State::Useless);
    }

    fn begin(&self, size: SizeClass) -> bool {
        let mut state = self.0[size as usize].lock().unwrap_or_else(PoisonError::into_inner);
        let begins = matches!(*state, State::None);
        if begins {
            *state = State::Making;
        }
        begins
    }
}

/// Why there is no seed. Sprites begin on the golden VM then.
#[derive(Debug, thiserror::Error)]
enum SeedError {
    #[error("cannot start its VM: {0}")]
    Start(String),
    #[error("cannot stop its VM: {0}")]
    Save(String),
    #[error("cannot read what it has written")]
    Disk(#[source] DeviceError),
    #[error("cannot keep its files")]
    Files(#[from] io::Error),
}

/// Finds this host's seed for `size` or makes it, unless somebody does already. Takes as long as a cold create.
pub(crate) async fn ensure(resources: &Resources, size: SizeClass) {
    if !resources.seeds.begin(size) {
        return;
    }
    let state = match find_or_make(resources, size).await {
        Ok(seed) => State::Ready(Arc::new(seed)),
        Err(error) => {
            tracing::warn!(size = size.as_str(), error = chain(&error), "no seed: new sprites begin on the golden VM");
            State::Useless
        }
    };
    resources.seeds.set(size, state);
}

/// Where the parts of a seed lie.
struct Place {
    /// State and patch; a folder that has this name is whole.
    folder: PathBuf,
    /// On tmpfs, beside the VMs; gone with the host's last boot.
    memory: PathBuf,
    /// Begin of the names of all seeds of this golden VM on tmpfs.
    siblings: String,
}

impl Place {
    /// Of the golden boot and the base that it belongs to: with another of either, disk and memory would not fit.
    fn of(resources: &Resources, golden: &Golden) -> Self {
        let (key, base) = (&golden.key, digest::short(resources.config.image.rootfs_digest.as_bytes()));
        let name = format!("seed-{}-{base}", golden.id);
        let siblings = format!("seed-{key}-");
        let memory = resources.config.memory.join(format!("{siblings}{name}.mem"));
        Self { folder: resources.golden_folder().join(key).join(name), memory, siblings }
    }

    fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    fn patch(&self) -> PathBuf {
        self.folder.join("patch")
    }

    fn load(&self) -> io::Result<Option<Seed>> {
        if !self.folder.exists() || !self.memory.exists() {
            return Ok(None);
        }
        let disk = Patch::decode(std::fs::read(self.patch())?.into())?;
        Ok(Some(Seed { snapshot: Snapshot { memory: self.memory.clone(), state: self.state() }, disk }))
    }

    /// Takes the files of the stopped VM in `run` over.
    fn keep(&self, run: &RunDir, disk: &Patch) -> io::Result<()> {
        if let Some(in_memory) = self.memory.parent() {
            self.remove_others(in_memory)?;
        }
        let new = self.folder.with_extension("new");
        for old in [&new, &self.folder] {
            if old.exists() {
                std::fs::remove_dir_all(old)?;
            }
        }
        std::fs::create_dir_all(&new)?;
        std::fs::copy(run.state(), new.join("state"))?;
        readable(&new.join("state"))?;
        files::write_atomically(&new.join("patch"), &disk.encode())?;
        std::fs::rename(&run.memory, &self.memory)?;
        std::fs::rename(&new, &self.folder)
    }

    /// Nobody starts from those of another base or boot any more.
    fn remove_others(&self, in_memory: &Path) -> io::Result<()> {
        for old in std::fs::read_dir(in_memory)? {
            let old = old?;
            if old.file_name().to_string_lossy().starts_with(&self.siblings) {
                files::remove_if_there(&old.path())?;
            }
        }
        Ok(())
    }
}

/// QEMU made it for its own user; every VM's user has to read it.
fn readable(file: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o644))
}

async fn find_or_make(resources: &Resources, size: SizeClass) -> Result<Seed, SeedError> {
    let golden = resources.golden(size).await.map_err(|error| SeedError::Start(chain(&error)))?;
    let place = Arc::new(Place::of(resources, golden));
    let known = Arc::clone(&place);
    match blocking(move || known.load()).await {
        Ok(Some(seed)) => return Ok(seed),
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(%error, folder = %place.folder.display(), "a seed is not readable; making another")
        }
    }
    let id = SpriteId::generate();
    let created = resources.store.create(id, &resources.base, DISK_BYTES_DEFAULT).await;
    let volume = created.map_err(|error| SeedError::Start(chain(&error)))?;
    volume.track_writes();
    let mut parts = Parts { id, size, record: None, process: None, volume: Some(volume), image: None };
    let made = make(resources, &mut parts, place).await;
    pool::free(resources, parts).await;
    made
}

async fn make(resources: &Resources, parts: &mut Parts, place: Arc<Place>) -> Result<Seed, SeedError> {
    change::start_nameless(resources, parts).await.map_err(|error| SeedError::Start(error.to_string()))?;
    let (Some(process), Some(volume)) = (&mut parts.process, parts.volume.clone()) else {
        return Err(SeedError::Start("it has no VM".into()));
    };
    warm_up(&process.agent).await.map_err(SeedError::Start)?;
    process.agent.sync().await.map_err(|error| SeedError::Save(chain(&error)))?;
    process.agent.disconnect().await;
    // The guest has to see the end of the connection, so that no half session is in the snapshot. There is no answer to wait for.
    tokio::time::sleep(SETTLE).await;
    process.suspend(|| 0).await.map_err(|error| SeedError::Save(chain(&error)))?;
    let disk = volume.written().await.map_err(SeedError::Disk)?;
    let run = process.run.clone();
    let seed = blocking(move || {
        place.keep(&run, &disk)?;
        Ok(Seed { snapshot: Snapshot { memory: place.memory.clone(), state: place.state() }, disk })
    })
    .await?;
    tracing::info!(size = parts.size.as_str(), disk_bytes = seed.disk.data_bytes(), "a seed for new sprites is ready");
    Ok(seed)
}

/// Runs a shell once, so that the pages it needs are there.
pub(crate) async fn warm_up(agent: &crate::agent::AgentClient) -> Result<(), String> {
    let run = agent.run_once(vec!["/bin/bash".into(), "-lc".into(), "true".into()]);
    match tokio::time::timeout(WARM_UP_LIMIT, run).await {
        Ok(Ok(_exit_code)) => Ok(()),
        Ok(Err(error)) => Err(format!("its shell does not start: {}", chain(&error))),
        Err(_elapsed) => Err("its shell does not end".into()),
    }
}
