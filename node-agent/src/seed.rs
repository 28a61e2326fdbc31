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
    fs::Permissions,
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
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
/// What the guest has written meanwhile has to be on its disk.
const SYNC_LIMIT: Duration = Duration::from_secs(30);
/// After a failure the next create may try again so much later; twice as much after each further one. What is broken costs this host one more VM then.
const RETRY_FIRST: Duration = Duration::from_secs(30);
const RETRY_MAX: Duration = Duration::from_secs(3600);

/// A snapshot with its environment started, and what its disk has that a new one lacks.
#[derive(Debug)]
pub(crate) struct Seed {
    pub(crate) snapshot: Snapshot,
    pub(crate) disk: Patch,
}

impl Seed {
    fn remove(&self) -> io::Result<()> {
        if let Some(folder) = self.snapshot.state.parent() {
            std::fs::remove_dir_all(folder)?;
        }
        files::remove_if_there(&self.snapshot.memory)
    }
}

/// The seeds of a host, by size.
#[derive(Debug, Default)]
pub(crate) struct Seeds([Mutex<Known>; 3]);

/// What is known of the seed of one size.
#[derive(Debug, Default)]
struct Known {
    state: State,
    /// Of the making or of copies, one after the other.
    failures: u32,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    None,
    Making,
    Ready(Arc<Seed>),
    /// One could not be made, or a copy of it did not start. Not tried again before this.
    Failed {
        until: Instant,
    },
}

impl Known {
    /// Whether the caller is to make one.
    fn begin(&mut self, now: Instant) -> bool {
        let begins = match self.state {
            State::None => true,
            State::Failed { until } => now >= until,
            State::Making | State::Ready(_) => false,
        };
        if begins {
            self.state = State::Making;
        }
        begins
    }

    fn fail(&mut self, now: Instant) {
        let wait = RETRY_FIRST.saturating_mul(1 << self.failures.min(16)).min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        self.state = State::Failed { until: now + wait };
    }
}

impl Seeds {
    fn known(&self, size: SizeClass) -> MutexGuard<'_, Known> {
        self.0[size as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The seed, if it is ready.
    pub(crate) fn get(&self, size: SizeClass) -> Option<Arc<Seed>> {
        match &self.known(size).state {
            State::Ready(seed) => Some(Arc::clone(seed)),
            State::None | State::Making | State::Failed { .. } => None,
        }
    }

    /// A copy of it has become a sprite.
    pub(crate) fn worked(&self, size: SizeClass) {
        self.known(size).failures = 0;
    }

    /// A copy of `seed` did not start: nothing begins as one any more, and another is made later, also by the next node agent.
    pub(crate) async fn give_up(&self, size: SizeClass, seed: &Arc<Seed>) {
        {
            let mut known = self.known(size);
            if !matches!(&known.state, State::Ready(ready) if Arc::ptr_eq(ready, seed)) {
                return;
            }
            known.fail(Instant::now());
        }
        let seed = Arc::clone(seed);
        if let Err(error) = blocking(move || seed.remove()).await {
            tracing::warn!(size = size.as_str(), %error, "a useless seed stays on this host");
        }
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
    #[error("the node agent ends")]
    Closing,
}

/// Finds this host's seed for `size` or makes it, unless somebody does already, or it has just failed. Takes as long as a cold create.
pub(crate) async fn ensure(resources: &Resources, size: SizeClass) {
    if resources.closing.is_cancelled() || !resources.seeds.known(size).begin(Instant::now()) {
        return;
    }
    match find_or_make(resources, size).await {
        Ok(seed) => resources.seeds.known(size).state = State::Ready(Arc::new(seed)),
        Err(error) => {
            tracing::warn!(size = size.as_str(), error = chain(&error), "no seed: new sprites begin on the golden VM");
            resources.seeds.known(size).fail(Instant::now());
        }
    }
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
        let state = new.join("state");
        std::fs::copy(run.state(), &state)?;
        // QEMU made both for its own user. The state every VM's user has to read; the memory is copied by us, and nobody else may change it.
        std::fs::set_permissions(&state, Permissions::from_mode(0o644))?;
        std::fs::File::open(&state)?.sync_all()?;
        files::write_atomically(&new.join("patch"), &disk.encode())?;
        std::os::unix::fs::chown(&run.memory, Some(0), Some(0))?;
        std::fs::set_permissions(&run.memory, Permissions::from_mode(0o600))?;
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
    match tokio::time::timeout(SYNC_LIMIT, process.agent.sync()).await {
        Ok(synced) => synced.map_err(|error| SeedError::Save(chain(&error)))?,
        Err(_elapsed) => return Err(SeedError::Save("its disk is not synced in time".into())),
    }
    if resources.closing.is_cancelled() {
        return Err(SeedError::Closing);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn seed(in_folder: &Path) -> Arc<Seed> {
        let folder = in_folder.join("seed");
        std::fs::create_dir_all(&folder).unwrap();
        let snapshot = Snapshot { memory: in_folder.join("seed.mem"), state: folder.join("state") };
        for file in [&snapshot.memory, &snapshot.state] {
            std::fs::write(file, "").unwrap();
        }
        Arc::new(Seed { snapshot, disk: Patch::default() })
    }

    #[test]
    fn a_failure_is_tried_again_later_and_ever_later() {
        let (mut known, mut now) = (Known::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..10 {
            assert!(known.begin(now), "{known:?}");
            assert!(!known.begin(now), "two make one");
            known.fail(now);
            assert!(!known.begin(now));
            let State::Failed { until } = known.state else { panic!("{known:?}") };
            waits.push(until - now);
            now = until;
        }
        assert_eq!((waits[0], waits[1], waits[9]), (RETRY_FIRST, RETRY_FIRST * 2, RETRY_MAX));
        known.failures = u32::MAX;
        known.fail(now);
        assert!(matches!(known.state, State::Failed { until } if until == now + RETRY_MAX));
    }

    #[tokio::test]
    async fn a_useless_seed_is_removed_and_a_newer_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (seeds, size) = (Seeds::default(), SizeClass::default());
        let useless = seed(dir.path());
        seeds.known(size).state = State::Ready(Arc::clone(&useless));
        seeds.give_up(size, &useless).await;
        assert!(seeds.get(size).is_none());
        assert!(
            !useless.snapshot.state.exists() && !useless.snapshot.memory.exists(),
            "the next node agent would load it"
        );

        let newer = seed(dir.path());
        seeds.known(size).state = State::Ready(Arc::clone(&newer));
        seeds.give_up(size, &useless).await;
        assert!(seeds.get(size).is_some() && newer.snapshot.state.exists());
    }

    /// What a stopped VM leaves, and where its seed goes.
    fn stopped(dir: &Path) -> (RunDir, Place) {
        let run = RunDir { folder: dir.join("vm"), memory: dir.join("vm.mem") };
        std::fs::create_dir_all(run.state().parent().unwrap()).unwrap();
        std::fs::write(run.state(), "state").unwrap();
        std::fs::write(&run.memory, "memory").unwrap();
        let place = Place {
            folder: dir.join("golden/key/seed-boot-base"),
            memory: dir.join("seed-key-seed-boot-base.mem"),
            siblings: "seed-key-".into(),
        };
        (run, place)
    }

    #[test]
    fn a_kept_seed_is_loaded_again_until_one_of_its_files_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (run, place) = stopped(dir.path());
        assert!(place.load().unwrap().is_none());
        let of_another_base = dir.path().join("seed-key-seed-boot-old.mem");
        std::fs::write(&of_another_base, "").unwrap();
        place.keep(&run, &Patch::default()).unwrap();
        assert!(!of_another_base.exists());
        let seed = place.load().unwrap().expect("it was kept");
        assert_eq!(std::fs::read(&seed.snapshot.memory).unwrap(), b"memory");
        assert_eq!(std::fs::metadata(&seed.snapshot.memory).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read(&seed.snapshot.state).unwrap(), b"state");

        std::fs::write(place.patch(), "no patch").unwrap();
        assert!(place.load().is_err(), "damaged, and used all the same");

        // The host died between the two renames: the memory is new, the folder is not there.
        let (run, place) = stopped(dir.path());
        std::fs::remove_dir_all(&place.folder).unwrap();
        assert!(place.load().unwrap().is_none());
        place.keep(&run, &Patch::default()).unwrap();
        assert!(place.load().unwrap().is_some());
        // The host was started anew: what lay on tmpfs is gone.
        std::fs::remove_file(&place.memory).unwrap();
        assert!(place.load().unwrap().is_none());
    }
}
