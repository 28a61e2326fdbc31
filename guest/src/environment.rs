//! The user's environment: namespaces over the volume, with full root inside and our own program as their PID 1.
//!
//! ```text
//!  stopped ── start: mount the volume, arrange namespaces, start `sprite-init` ──▶ started
//!     ▲                                                                              │
//!     └── stop: kill every process, undo swap and loops, unmount, prove ◀────────────┘   (also when `sprite-init` ends by itself)
//! ```
//!
//! One thread lives in the environment's mount, IPC, cgroup and pid namespaces ([`inside`]): commands are forked there, so that they are children of the
//! real PID 1 (which learns their exit) and members of the environment. Files of the environment are touched only there, where symbolic links cannot lead out.
//!
//! Namespaces that are shared with the machine: network and UTS (one of each per VM).

pub(crate) mod init;
mod inside;
mod stop;

use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    cgroup, log,
    reaper::{Child, Reaper},
};

pub(crate) use self::inside::SPRITE_DIR;
pub(crate) use self::stop::Stopped;

/// How our program calls itself when it is PID 1 of the environment.
pub(crate) const INIT_NAME: &str = "sprite-init";
/// The sprite's disk, and where PID 1 mounts it.
pub(crate) const DEVICE: &str = "/dev/vda";
pub(crate) const VOLUME: &str = "/volume";
/// Discards go to the volume as files are deleted, so that it stays thin; tables of a sparse file system are not zeroed behind the user's back.
const MOUNT_OPTIONS: &str = "discard,noinit_itable";
/// Work that waits for the thread inside.
const JOBS_MAX: usize = 64;
/// An environment that ended by itself is cleared away within this.
const CLEAR_LIMIT: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// Why there is no environment.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot mount the sprite's disk: {0}; restore a checkpoint to get a sound file system back")]
    Mount(#[source] io::Error),
    #[error("cannot make the environment's control group: {0}")]
    Cgroup(#[source] io::Error),
    #[error("cannot make the environment's {what}: {source}")]
    Arrange { what: String, source: io::Error },
    #[error("the environment's init did not start: {0}")]
    Init(String),
}

/// The environment is not there, or not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sprite's environment is not running")]
pub(crate) struct NotRunning;

/// Times of a start.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Started {
    pub mount: Duration,
    pub start: Duration,
    /// It was there before.
    pub already: bool,
}

/// The environment's state, as the host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Stopped,
    Started,
    Failed,
}

#[derive(Debug)]
pub(crate) struct Environment {
    reaper: Reaper,
    /// Held for the whole of a start or stop.
    change: tokio::sync::Mutex<()>,
    running: Mutex<Option<Arc<Running>>>,
    failed: Mutex<bool>,
    /// Rises when an environment ended by itself; carries why.
    ended: watch::Sender<Option<String>>,
}

#[derive(Debug)]
struct Running {
    init: Child,
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    /// The volume's root, for what concerns the file system. Closed before it is unmounted.
    volume: Mutex<Option<Arc<File>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Environment {
    pub(crate) fn new(reaper: Reaper) -> Self {
        Self {
            reaper,
            change: tokio::sync::Mutex::new(()),
            running: Mutex::new(None),
            failed: Mutex::new(false),
            ended: watch::Sender::new(None),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        match (self.current(), *lock(&self.failed)) {
            (Ok(_), _) => Phase::Started,
            (Err(NotRunning), true) => Phase::Failed,
            (Err(NotRunning), false) => Phase::Stopped,
        }
    }

    fn current(&self) -> Result<Arc<Running>, NotRunning> {
        lock(&self.running).clone().filter(|running| running.init.exit().is_none()).ok_or(NotRunning)
    }

    /// Says why when an environment has ended by itself.
    pub(crate) fn ended(&self) -> watch::Receiver<Option<String>> {
        self.ended.subscribe()
    }

    /// Returns when the environment that runs now has ended.
    pub(crate) fn ending(&self) -> Result<impl Future<Output = ()> + Send + use<>, NotRunning> {
        let init = self.current()?.init.clone();
        Ok(async move {
            init.ended().await;
        })
    }

    /// The volume's root folder, as an open file.
    pub(crate) fn volume(&self) -> Result<Arc<File>, NotRunning> {
        lock(&self.current()?.volume).clone().ok_or(NotRunning)
    }

    /// Runs `job` on the thread that lives in the environment: its root is the environment's. It must not wait for anything a user controls.
    pub(crate) async fn inside<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NotRunning> {
        let jobs = lock(&self.current()?.jobs).clone().ok_or(NotRunning)?;
        let (reply, done) = oneshot::channel();
        let job = Box::new(move || drop(reply.send(job())));
        jobs.send(job).await.map_err(|_closed| NotRunning)?;
        done.await.map_err(|_closed| NotRunning)
    }

    /// Mounts the volume and starts the environment, if there is none.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropped half-way it leaves the disk mounted and a control group that the next start stumbles over. [`Life`](crate::life::Life)
    /// runs it in a task of its own.
    pub(crate) async fn start(self: &Arc<Self>) -> Result<Started, StartError> {
        let _change = self.change.lock().await;
        if self.current().is_ok() {
            return Ok(Started { already: true, ..Started::default() });
        }
        let begun = Instant::now();
        let result = self.start_now(begun).await;
        *lock(&self.failed) = result.is_err();
        if result.is_err() {
            // Whatever was mounted; a failed start leaves nothing behind.
            drop(tokio::task::spawn_blocking(|| umount2(VOLUME, MntFlags::empty())).await);
        }
        result
    }

    async fn start_now(self: &Arc<Self>, begun: Instant) -> Result<Started, StartError> {
        let joined = |error: tokio::task::JoinError| StartError::Init(error.to_string());
        let (volume, procs) = tokio::task::spawn_blocking(|| {
            let volume = mount_volume().map_err(StartError::Mount)?;
            let procs = cgroup::make_environment().map_err(StartError::Cgroup)?;
            Ok::<_, StartError>((volume, procs))
        })
        .await
        .map_err(joined)??;
        let mounted = begun.elapsed();
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        let (ready, arranged) = oneshot::channel();
        let reaper = self.reaper.clone();
        let thread = std::thread::Builder::new()
            .name("inside".into())
            .spawn(move || inside::run(&reaper, procs.into(), ready, queue))
            .map_err(|source| StartError::Arrange { what: "thread".into(), source })?;
        let init = arranged.await.map_err(|_closed| StartError::Init("its thread ended".into()))??.keep();
        let running = Arc::new(Running {
            init: init.clone(),
            jobs: Mutex::new(Some(jobs)),
            thread: Mutex::new(Some(thread)),
            volume: Mutex::new(Some(Arc::new(volume))),
        });
        *lock(&self.running) = Some(Arc::clone(&running));
        tokio::spawn(Arc::clone(self).watch(running));
        Ok(Started { mount: mounted, start: begun.elapsed().saturating_sub(mounted), already: false })
    }

    /// Clears the environment away when its PID 1 ends without being told to.
    async fn watch(self: Arc<Self>, running: Arc<Running>) {
        let exit = running.init.ended().await;
        let _change = self.change.lock().await;
        let same = lock(&self.running).as_ref().is_some_and(|current| Arc::ptr_eq(current, &running));
        if !same {
            return;
        }
        let why = match exit.code() {
            // How the kernel reports that reboot(2) was called in a pid namespace.
            129 => "rebooted from inside".to_owned(),
            130 => "switched off from inside".to_owned(),
            code => format!("its init ended with {code}"),
        };
        let stopped = self.stop_now(CLEAR_LIMIT).await;
        if !stopped.clean {
            log!("the environment ended ({why}), but its disk is held: {}", stopped.holder);
        }
        self.ended.send_replace(Some(why));
    }

    /// Ends every process of the environment and unmounts the volume (ruling 15).
    pub(crate) async fn stop(&self, grace: Duration) -> Stopped {
        let _change = self.change.lock().await;
        self.stop_now(grace).await
    }
}

fn mount_volume() -> io::Result<File> {
    std::fs::create_dir_all(VOLUME)?;
    match mount(Some(DEVICE), VOLUME, Some("ext4"), MsFlags::MS_NOATIME, Some(MOUNT_OPTIONS)) {
        Ok(()) => {}
        // Left by a start that failed.
        Err(Errno::EBUSY) if is_mounted(Path::new(VOLUME)) => {}
        Err(error) => return Err(error.into()),
    }
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(VOLUME)
}

fn is_mounted(folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| path.metadata().map(|metadata| metadata.dev()).ok();
    device(folder) != device(Path::new("/"))
}
