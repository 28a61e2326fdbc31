//! One QEMU process and what belongs to it: control socket, guest agent, network, disk server, memory file.
//!
//! ```text
//!  start ── from the golden snapshot, or from the sprite's own suspended image ──▶ VmProcess ── suspend ──▶ image files, no process
//!                                                                       ▲   └───── kill ─────▶ nothing
//!  adopt ── after the node agent was restarted under a living QEMU ─────┘
//! ```
//!
//! # Invariants
//!
//! 1. Device state is loaded at most once (ruling 2): [`VmProcess::resume`] renames the state file away and syncs the folder before the VM runs.
//! 2. A state file that has its final name and is named by the note is whole: it is written in QEMU's folder, taken out and synced before the note says so.
//! 3. The process outlives the node agent: nothing here kills it on drop.

use std::{
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use blockstore::{
    nbd::{Export, ExportTable, NbdServer, SocketOwner},
    store::Volume,
};
use proto::{id::SpriteId, record::SizeClass};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{AgentClient, ConnectError},
    files,
    golden::Golden,
    jail::{self, JailSpec},
    laps::Laps,
    net::{NetError, SpriteNet},
    pid::Process,
    qemu::{DiskBackend, Start, VOLUME_EXPORT, VmFiles},
    qmp::{Qmp, QmpError},
    resources::{Resources, Slot},
};

/// A fresh QEMU listens within milliseconds; a host under a storm of starts may need longer.
const QMP_LIMIT: Duration = Duration::from_secs(20);
/// How long a restored guest may need to its first answer. Measured: 0.17 s alone, seconds when many start at once.
const AGENT_LIMIT: Duration = Duration::from_secs(45);
/// SIGKILL to the end of the process; longer means that the kernel holds it in I/O.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// QEMU's end to its watcher's.
const WATCHER_LIMIT: Duration = Duration::from_secs(5);
const WATCHER_POLL: Duration = Duration::from_millis(10);
/// How long QEMU may take to connect to its disk again.
const RESIZE_LIMIT: Duration = Duration::from_secs(20);
const RESIZE_POLL: Duration = Duration::from_millis(20);
/// What an error shows of the guest's console.
const CONSOLE_TAIL_CHARS: usize = 2000;

/// Files of one VM. The folder outlives node agent and process.
///
/// Only what lies in [`RunDir::qemu`] is QEMU's to write: the rest of the folder is root's, so that a QEMU that was taken over from inside finds no name
/// in it that root will open, write or believe.
#[derive(Clone, Debug)]
pub struct RunDir {
    pub folder: PathBuf,
    pub memory: PathBuf,
}

impl RunDir {
    /// QEMU's own folder: its sockets, and the device state while it writes it.
    pub fn qemu(&self) -> PathBuf {
        self.folder.join("qemu")
    }

    pub fn qmp(&self) -> PathBuf {
        self.qemu().join("qmp.sock")
    }

    pub fn agent(&self) -> PathBuf {
        self.qemu().join("agent.sock")
    }

    pub fn nbd(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }

    /// Device state of a suspended VM.
    pub fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Where device state goes before it is loaded; never loaded twice.
    pub fn spent_state(&self) -> PathBuf {
        self.folder.join("state.spent")
    }

    /// What the node agent has to know to find this VM again.
    pub fn note(&self) -> PathBuf {
        self.folder.join("vm.json")
    }

    /// Memory of a suspended VM on the disk: what is left of it after the host's reboot.
    pub fn memory_on_disk(&self) -> PathBuf {
        self.folder.join("memory.img")
    }

    /// Where QEMU writes its device state.
    pub(crate) fn unfinished_state(&self) -> PathBuf {
        self.qemu().join("state")
    }

    /// Makes the folder, and in it QEMU's, which `uid` gets empty.
    pub(crate) fn prepare(&self, uid: u32) -> io::Result<()> {
        std::fs::create_dir_all(self.qemu())?;
        if let Some(folder) = self.memory.parent() {
            std::fs::create_dir_all(folder)?;
        }
        for file in [self.qmp(), self.agent(), self.unfinished_state()] {
            files::remove_if_there(&file)?;
        }
        std::os::unix::fs::chown(self.qemu(), Some(uid), Some(uid))
    }

    /// Takes the device state that QEMU has written out of its folder, synced.
    ///
    /// # Errors
    ///
    /// `InvalidData`: QEMU has put something else there than a file.
    pub(crate) fn keep_state(&self) -> io::Result<()> {
        std::fs::rename(self.unfinished_state(), self.state())?;
        if !std::fs::symlink_metadata(self.state())?.is_file() {
            files::remove_if_there(&self.state())?;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "QEMU left no file where its state should be"));
        }
        std::fs::File::open(self.state())?.sync_all()
    }

    /// Removes everything of a VM whose process has ended; nothing there is fine. The jail's watcher may still be writing down how it ended.
    pub(crate) fn remove(&self) -> io::Result<()> {
        files::remove_if_there(&self.memory)?;
        let deadline = Instant::now() + WATCHER_LIMIT;
        loop {
            match std::fs::remove_dir_all(&self.folder) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < deadline => {
                    std::thread::park_timeout(WATCHER_POLL);
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => return Ok(()),
            }
        }
    }

    /// Everything of a suspended image, wherever it is.
    pub fn drop_image(&self) -> io::Result<()> {
        for file in
            [self.state(), self.spent_state(), self.unfinished_state(), self.memory_on_disk(), self.memory.clone()]
        {
            files::remove_if_there(&file)?;
        }
        files::sync_folder(&self.folder)
    }
}

/// `vm.json`: written at every transition, so that a restarted node agent finds its VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmNote {
    pub sprite: SpriteId,
    pub size: SizeClass,
    pub slot: u32,
    /// The golden snapshot (and with it QEMU, CPU model, kernel, layout) this VM descends from.
    pub snapshot_key: String,
    /// What can load its memory ([`MachineModel::machine_key`](crate::qemu::MachineModel::machine_key)); empty in notes of earlier builds.
    #[serde(default)]
    pub machine_key: String,
    pub process: Option<ProcessNote>,
    /// Its start is not finished: it does not run yet, or (a copy of a snapshot) it has not got its identity and environment. Nothing is lost with it.
    #[serde(default)]
    pub loading: bool,
    /// Set while the VM is suspended: where in the volume's history the memory belongs (ruling 2).
    pub suspended_lsn: Option<u64>,
    /// Not yet named.
    pub pooled: bool,
}

/// A QEMU process that can be told from another with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessNote {
    pub pid: i32,
    pub started: u64,
}

impl VmNote {
    pub fn write(&self, run: &RunDir) -> io::Result<()> {
        files::write_atomically(&run.note(), &serde_json::to_vec_pretty(self)?)
    }

    /// For a VM that runs: has to outlive the node agent, not the host.
    pub fn write_volatile(&self, run: &RunDir) -> io::Result<()> {
        files::replace(&run.note(), &serde_json::to_vec_pretty(self)?)
    }

    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }
}

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot prepare {what} for the VM")]
    Prepare { what: &'static str, source: io::Error },
    #[error("cannot set up the VM's network")]
    Network(#[source] NetError),
    #[error("QEMU did not start; the end of its log: {log}")]
    Launch { log: String, source: QmpError },
    #[error("QEMU ended while it started; the end of its log: {log}")]
    Ended { log: String },
    #[error("cannot load the VM's state")]
    Load(#[source] QmpError),
    #[error("the guest does not answer; the end of its console: {console}")]
    Agent { console: String, source: ConnectError },
    #[error("the suspended image belongs to snapshot {image}, this host has {host}")]
    Incompatible { image: String, host: String },
    #[error("its process is gone")]
    Gone(#[source] io::Error),
    #[error("its start was not finished")]
    Unfinished,
    #[error("its process does not end, so its disk cannot be used by another")]
    Unkillable(#[source] io::Error),
}

/// Why a VM could not be suspended. It may still run: look at its run state.
#[derive(Debug, thiserror::Error)]
pub enum SuspendError {
    #[error("cannot save the VM's state")]
    Save(#[source] QmpError),
    #[error("cannot make the VM's state durable")]
    Durable(#[source] io::Error),
}

/// A running or paused VM.
#[derive(Debug)]
pub struct VmProcess {
    pub run: RunDir,
    pub note: VmNote,
    pub agent: AgentClient,
    pub net: Arc<SpriteNet>,
    /// Cancelled when the process ends: connections into the VM are lost with it, and nothing else would say so.
    pub ended: CancellationToken,
    pub exports: ExportTable,
    pub process: Arc<Process>,
    pub qmp: Qmp,
    _slot: Slot,
    _nbd: NbdServer,
}

/// What a process is started with.
#[derive(Debug)]
pub struct Plan {
    pub note: VmNote,
    pub slot: Slot,
    pub volume: Volume,
}

/// A stopped VM on files, of which any number of copies are started.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Sparse memory file, kept on tmpfs beside the VMs.
    pub memory: PathBuf,
    pub state: PathBuf,
}

/// Where a new process gets its state from.
enum Source<'a> {
    Copy(&'a Snapshot),
    Suspended,
}

impl Source<'_> {
    fn state(&self, run: &RunDir) -> PathBuf {
        match self {
            Self::Copy(snapshot) => snapshot.state.clone(),
            Self::Suspended => run.spent_state(),
        }
    }
}

impl VmProcess {
    /// A fresh copy of `snapshot`, on a disk that fits it. The guest answers; it has no identity.
    pub async fn start(
        resources: &Resources,
        run: RunDir,
        snapshot: &Snapshot,
        plan: Plan,
    ) -> Result<Self, StartError> {
        Self::launch(resources, run, Source::Copy(snapshot), plan).await
    }

    /// The sprite's own memory and processes again, once. After an error the image is spent: boot from the disk.
    pub async fn resume(resources: &Resources, run: RunDir, golden: &Golden, plan: Plan) -> Result<Self, StartError> {
        let note = &plan.note;
        if note.snapshot_key != golden.key && note.machine_key != resources.model(note.size).machine_key() {
            return Err(StartError::Incompatible { image: note.snapshot_key.clone(), host: golden.key.clone() });
        }
        Self::launch(resources, run, Source::Suspended, plan).await
    }

    /// Finds the VM of `note` again under a living QEMU: the node agent was restarted, the VM was not. Also says whether it is paused.
    ///
    /// # Errors
    ///
    /// [`StartError::Gone`] when the process has ended; otherwise what could not be reached, and then the process has been ended.
    pub async fn adopt(resources: &Resources, run: RunDir, plan: Plan) -> Result<(Self, bool), StartError> {
        let known = plan.note.process.ok_or_else(|| StartError::Gone(io::ErrorKind::NotFound.into()))?;
        let process = Process::find(known.pid, known.started).map_err(StartError::Gone)?;
        let process = Arc::new(process);
        let adopted = Self::adopt_process(resources, run, plan, Arc::clone(&process)).await;
        if adopted.is_err() {
            // Left alone it would find the disk server of the VM that comes after it.
            process.kill(KILL_LIMIT).await.map_err(StartError::Unkillable)?;
        }
        adopted
    }

    async fn adopt_process(
        resources: &Resources,
        run: RunDir,
        plan: Plan,
        process: Arc<Process>,
    ) -> Result<(Self, bool), StartError> {
        let Plan { note, slot, volume } = plan;
        if note.loading {
            return Err(StartError::Unfinished);
        }
        let net = resources.network.reattach(note.slot).await.map_err(StartError::Network)?;
        let (exports, nbd) = serve_disk(&run, volume, resources.uid(note.slot))?;
        let qmp = Qmp::connect(&run.qmp(), QMP_LIMIT)
            .await
            .map_err(|source| StartError::Launch { log: String::new(), source })?;
        let state = qmp.run_state().await.map_err(StartError::Load)?;
        let paused = state == "paused";
        // A paused guest cannot answer; its agent is met when it runs again.
        let agent = if paused {
            AgentClient::absent()
        } else {
            if state != "running" {
                // A suspend was under way, or the host's disk was full.
                qmp.cont().await.map_err(StartError::Load)?;
            }
            connect_agent(&run, &qmp, &process).await?
        };
        let ended = CancellationToken::new();
        let net = Arc::new(net);
        Ok((Self { run, note, agent, net, ended, exports, process, qmp, _slot: slot, _nbd: nbd }, paused))
    }

    async fn launch(resources: &Resources, run: RunDir, source: Source<'_>, plan: Plan) -> Result<Self, StartError> {
        // Until its guest answers. The semaphore is never closed.
        let mut laps = Laps::begin();
        let _turn = resources.starts.acquire().await;
        laps.lap("turn");
        let Plan { mut note, slot, volume } = plan;
        note.slot = slot.number();
        let uid = resources.uid(note.slot);
        let prepare = |what: &'static str| move |source: io::Error| StartError::Prepare { what, source };
        run.prepare(uid).map_err(prepare("the run folder"))?;
        let filled_from = make_memory(&run, &source, &note, uid).await.map_err(prepare("the memory file"))?;
        // QEMU maps the file, and looks into it only when it is told to load.
        let filling = fill_memory(&run, &source, filled_from);
        let launching = Launched::begin(resources, &run, &mut note, volume);
        let (filled, launched) = tokio::join!(filling, launching);
        laps.lap("process and memory");
        let Launched { net, exports, nbd, process, qmp } = launched?;
        let started = async {
            filled.map_err(prepare("the memory file"))?;
            load(&run, &mut note, &source, &qmp).await?;
            laps.lap("load");
            connect_agent(&run, &qmp, &process).await
        };
        let started = started.await;
        laps.lap("agent");
        match started {
            Ok(agent) => {
                tracing::info!(sprite = %note.sprite, %laps, "a VM has started");
                let ended = CancellationToken::new();
                let net = Arc::new(net);
                Ok(Self { run, note, agent, net, ended, exports, process, qmp, _slot: slot, _nbd: nbd })
            }
            Err(error) => {
                end(&process, &net).await?;
                Err(error)
            }
        }
    }

    /// The environment of a fresh copy of the golden VM runs: from now on the VM is worth taking up after a restart of the node agent.
    pub(crate) fn start_is_finished(&mut self) -> io::Result<()> {
        self.note.loading = false;
        self.note.write_volatile(&self.run)
    }

    /// Stops the vCPUs. Memory and connections stay.
    pub async fn pause(&self) -> Result<(), QmpError> {
        self.qmp.stop().await
    }

    /// Lets the vCPUs run again, and meets the guest if its session has ended. Its clock stood still: configure it before user code is trusted.
    pub async fn unpause(&mut self) -> Result<(), StartError> {
        self.qmp.cont().await.map_err(StartError::Load)?;
        if self.agent.is_closed() { self.reconnect().await } else { Ok(()) }
    }

    /// Writes the device state and ends the process. Memory stays in its file. Returns how long the guest was stopped before it was frozen for good.
    ///
    /// `lsn` is called when the guest can write no more; the image is valid only for that position of the volume.
    pub async fn suspend(&mut self, lsn: impl Fn() -> u64) -> Result<Duration, SuspendError> {
        let begun = Instant::now();
        self.agent.disconnect().await;
        self.qmp.stop().await.map_err(SuspendError::Save)?;
        self.qmp.save_state(&self.run.unfinished_state()).await.map_err(SuspendError::Save)?;
        let frozen = begun.elapsed();
        let note = VmNote { suspended_lsn: Some(lsn()), process: None, ..self.note.clone() };
        let run = self.run.clone();
        let written = note.clone();
        blocking(move || {
            run.keep_state()?;
            written.write(&run)
        })
        .await
        .map_err(SuspendError::Durable)?;
        self.note = note;
        self.kill().await.map_err(SuspendError::Durable)?;
        Ok(frozen)
    }

    /// A new control-channel session, after the old one was closed or broke.
    pub async fn reconnect(&mut self) -> Result<(), StartError> {
        self.agent = connect_agent(&self.run, &self.qmp, &self.process).await?;
        Ok(())
    }

    /// Makes QEMU and the guest's driver see the volume's present size.
    ///
    /// QEMU learns the size of an NBD export only when it connects, so the connection is closed; it comes back at once and repeats what was under way.
    pub async fn announce_disk_size(&self, size_bytes: u64) -> Result<(), QmpError> {
        self.exports.close_connections(VOLUME_EXPORT);
        let deadline = Instant::now() + RESIZE_LIMIT;
        loop {
            let arguments = serde_json::json!({ "node-name": VOLUME_EXPORT, "size": size_bytes });
            match self.qmp.run("block_resize", arguments).await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_not_connected_yet) => tokio::time::sleep(RESIZE_POLL).await,
            }
        }
    }

    /// Ends the process at once, and every connection into the VM.
    pub async fn kill(&self) -> io::Result<()> {
        self.ended.cancel();
        self.process.kill(KILL_LIMIT).await
    }
}

/// Makes the files that QEMU is started with, for the VM's user: the memory, which may still have to be filled, and the state. That of a suspended VM is
/// renamed away, for good. Returns what the memory is filled from.
async fn make_memory(run: &RunDir, source: &Source<'_>, note: &VmNote, uid: u32) -> io::Result<Option<PathBuf>> {
    let (run, bytes) = (run.clone(), note.size.memory_bytes());
    let copied = match source {
        Source::Copy(snapshot) => Some(snapshot.memory.clone()),
        Source::Suspended => None,
    };
    blocking(move || {
        let filled_from = match copied {
            Some(snapshot) => Some(snapshot),
            None => {
                std::fs::rename(run.state(), run.spent_state())?;
                std::os::unix::fs::lchown(run.spent_state(), Some(uid), Some(uid))?;
                // Not there if the host was rebooted since.
                (!run.memory.exists()).then(|| run.memory_on_disk())
            }
        };
        if filled_from.is_some() {
            std::fs::File::create(&run.memory)?.set_len(bytes)?;
        }
        std::os::unix::fs::lchown(&run.memory, Some(uid), Some(uid))?;
        Ok(filled_from)
    })
    .await
}

/// After this the memory is complete, and an image that was renamed away is gone whatever happens to the host (ruling 2).
async fn fill_memory(run: &RunDir, source: &Source<'_>, filled_from: Option<PathBuf>) -> io::Result<()> {
    let (run, spent) = (run.clone(), matches!(source, Source::Suspended));
    blocking(move || {
        if spent {
            files::sync_folder(&run.folder)?;
        }
        if let Some(from) = filled_from {
            files::copy_sparse(&from, &run.memory)?;
        }
        if spent { files::remove_if_there(&run.memory_on_disk()) } else { Ok(()) }
    })
    .await
}

/// A QEMU that waits for its state, and what it stands on.
struct Launched {
    net: SpriteNet,
    exports: ExportTable,
    nbd: NbdServer,
    process: Arc<Process>,
    qmp: Qmp,
}

impl Launched {
    async fn begin(resources: &Resources, run: &RunDir, note: &mut VmNote, volume: Volume) -> Result<Self, StartError> {
        let mut laps = Laps::begin();
        let uid = resources.uid(note.slot);
        let prepare = |what: &'static str| move |source: io::Error| StartError::Prepare { what, source };
        let net = resources.network.attach(note.slot, uid).await.map_err(StartError::Network)?;
        let tap = net.open_tap().map_err(StartError::Network)?;
        let (exports, nbd) = serve_disk(run, volume, uid)?;
        laps.lap("network");
        let vm_files = VmFiles {
            memory: run.memory.clone(),
            qmp_socket: run.qmp(),
            agent_socket: run.agent(),
            disk: DiskBackend::Nbd { socket: run.nbd() },
            tap_fd: tap.as_raw_fd(),
        };
        let args = resources.model(note.size).arguments(&vm_files, &Start::Incoming);
        let spec = resources.jail_spec(run, note.slot, args, &net, tap.as_raw_fd());
        let process = Arc::new(spawn(resources, &spec).await.map_err(prepare("the process"))?);
        drop(tap);
        note.process = Some(ProcessNote { pid: process.pid(), started: process.started() });
        note.suspended_lsn = None;
        note.loading = true;
        laps.lap("jail");
        // The note is on disk before the VM can do anything, so that a next start finds the process.
        let qmp_socket = run.qmp();
        let meeting = async {
            tokio::select! {
                connected = Qmp::connect(&qmp_socket, QMP_LIMIT) => {
                    connected.map_err(|source| StartError::Launch { log: log_tail(&spec), source })
                }
                () = process.ended() => Err(StartError::Ended { log: log_tail(&spec) }),
            }
        };
        let (written, met) = tokio::join!(write_note(note, run), meeting);
        laps.lap("QEMU");
        tracing::debug!(sprite = %note.sprite, %laps, "a process has started");
        match written.and(met) {
            Ok(qmp) => Ok(Self { net, exports, nbd, process, qmp }),
            Err(error) => {
                end(&process, &net).await?;
                Err(error)
            }
        }
    }
}

async fn write_note(note: &VmNote, run: &RunDir) -> Result<(), StartError> {
    let (note, run) = (note.clone(), run.clone());
    let written = blocking(move || note.write_volatile(&run)).await;
    written.map_err(|source| StartError::Prepare { what: "the VM's note", source })
}

/// Of a VM that did not start. Nobody would hold it: it must not go on with the disk.
async fn end(process: &Process, net: &SpriteNet) -> Result<(), StartError> {
    process.kill(KILL_LIMIT).await.map_err(StartError::Unkillable)?;
    net.detach().await.map_err(StartError::Network)
}

fn serve_disk(run: &RunDir, volume: Volume, uid: u32) -> Result<(ExportTable, NbdServer), StartError> {
    let exports = ExportTable::default();
    exports.insert(VOLUME_EXPORT, Export::Volume(volume));
    let nbd = NbdServer::bind_for(&run.nbd(), exports.clone(), SocketOwner::Uid(uid))
        .map_err(|source| StartError::Prepare { what: "the disk server", source })?;
    Ok((exports, nbd))
}

async fn spawn(resources: &Resources, spec: &JailSpec) -> io::Result<Process> {
    let jailed = jail::spawn(&resources.config.sprited, spec).await?;
    Process::watch(jailed.qemu_pid)
}

/// Loads the device state and lets the VM run.
async fn load(run: &RunDir, note: &mut VmNote, source: &Source<'_>, qmp: &Qmp) -> Result<(), StartError> {
    qmp.load_state(&source.state(run)).await.map_err(StartError::Load)?;
    // A VM that has its memory again is whole. A copy of a snapshot is not, until it has its identity.
    if matches!(source, Source::Suspended) {
        note.loading = false;
        write_note(note, run).await?;
    }
    qmp.cont().await.map_err(StartError::Load)
}

async fn connect_agent(run: &RunDir, qmp: &Qmp, process: &Process) -> Result<AgentClient, StartError> {
    let path = run.agent();
    let connected = tokio::select! {
        connected = AgentClient::connect(&path, AGENT_LIMIT) => connected,
        () = process.ended() => return Err(StartError::Gone(io::ErrorKind::NotFound.into())),
    };
    match connected {
        Ok(agent) => Ok(agent),
        Err(source) => {
            let console = qmp.console_tail().await.unwrap_or_else(|error| format!("(no console: {error})"));
            let from = console.char_indices().rev().nth(CONSOLE_TAIL_CHARS).map_or(0, |(at, _)| at);
            Err(StartError::Agent { console: console[from..].to_owned(), source })
        }
    }
}

fn log_tail(spec: &JailSpec) -> String {
    match std::fs::read_to_string(spec.log_path()) {
        Ok(log) if log.trim().is_empty() => "(empty)".to_owned(),
        Ok(log) => log.lines().rev().take(10).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n"),
        Err(error) => format!("(no log: {error})"),
    }
}

/// Runs file operations off the async threads.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_which_the_watcher_still_writes_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir { folder: folder.path().join("run"), memory: folder.path().join("memory") };
        std::fs::create_dir_all(&run.folder).unwrap();
        let writer = std::thread::spawn({
            let run = run.clone();
            move || {
                for _ in 0..50 {
                    // It fails once the folder is gone.
                    drop(std::fs::write(run.folder.join("exit.json"), "{}"));
                    std::thread::park_timeout(Duration::from_millis(1));
                }
            }
        });
        run.remove().unwrap();
        writer.join().unwrap();
        assert!(!run.folder.exists());
        run.remove().unwrap();
    }

    #[test]
    fn only_a_file_is_taken_out_of_qemus_folder() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir { folder: folder.path().join("run"), memory: folder.path().join("memory") };
        std::fs::create_dir_all(run.qemu()).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", run.unfinished_state()).unwrap();
        assert_eq!(run.keep_state().unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(!run.state().exists());
        std::fs::write(run.unfinished_state(), "state").unwrap();
        run.keep_state().unwrap();
        assert_eq!(std::fs::read(run.state()).unwrap(), b"state");
    }
}
