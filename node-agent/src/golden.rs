//! Golden snapshots: a booted VM without a disk, one per size, from which every VM starts.
//!
//! ```text
//!  boot kernel and PID 1 (≈ 3 s, once) ──▶ agent answers ──▶ agent connection closed ──▶ stop, save state ──▶ a copy of it runs, agent answers
//!                                                 the same for all hosts ◀──▶ bucket (`share`) ◀──▶ golden/<key>/{memory, state, id}
//!  new VM = copy of `memory` + load of `state` (≈ 0.1 s)
//! ```
//!
//! A snapshot of which no copy has answered is never used, nor one whose kernel has given up the APIC timer: the VM is booted anew.
//! A stall of a busy host makes the kernel's check of that timer fail at boot; then it lives on the PIT, takes 10 s to boot instead of 3, and every copy of
//! it halts for ever (seen with QEMU 10.0 without hardware virtualisation; `nolapic_timer` on the kernel's command line shows it).
//!
//! The snapshot is taken before any socket, key or mount exists in the guest, so clones share nothing secret (ruling 21).
//! `<key>` names everything it depends on; a folder that has its name is whole. Two boots differ in their bytes, so each snapshot also has an id.

use std::{
    io,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use proto::record::{DISK_BYTES_DEFAULT, SizeClass};

use crate::{
    agent::{AgentClient, ConnectError},
    digest, files, jail,
    net::{NetError, SpriteNet},
    pid::Process,
    process::{RunDir, Snapshot, blocking},
    qemu::{DiskBackend, Start, VmFiles},
    qmp::{Qmp, QmpError},
    resources::{Resources, VM_START_MIB},
    vm::change::chain,
};

mod share;
mod sweep;

/// Cold boot takes 3 s; a machine that runs a compiler beside it has been seen to need 40 s.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Beside `memory` and `state`.
const ID_FILE: &str = "id";
/// How long the guest may take to notice that its host connection is closed, before the snapshot.
const SETTLE: Duration = Duration::from_millis(300);
/// How long a copy may take to its first answer. Alone it takes 0.2 s.
const TRIAL_LIMIT: Duration = Duration::from_secs(30);
/// SIGKILL to the end of the process.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Boots until one can be used.
const BOOTS_MAX: u32 = 6;
/// Of the console of one that ended, the newest first.
const CONSOLE_LINES_SHOWN: usize = 12;

/// A snapshot that is ready to be started from.
#[derive(Clone, Debug)]
pub struct Golden {
    /// Which QEMU can load it, and everything that descends from it.
    pub key: String,
    /// Which boot it is.
    pub id: String,
    pub size: SizeClass,
    pub snapshot: Snapshot,
}

/// Why no golden snapshot could be made.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    #[error("cannot prepare {what} for the golden VM")]
    Prepare { what: &'static str, source: io::Error },
    #[error(
        "{folder}, where the memory of VMs lies, has {free_mib} MiB free and needs {VM_START_MIB}; enlarge it \
         (mount -o remount,size=75% on a tmpfs), or name another with --memory-dir"
    )]
    NoMemory { folder: PathBuf, free_mib: u64 },
    #[error("cannot set up the golden VM's network")]
    Network(#[source] NetError),
    #[error("the golden VM's QEMU does not answer; see {log}")]
    Qemu { log: PathBuf, source: QmpError },
    #[error("the golden VM did not boot; its console is in {console}")]
    Boot { console: PathBuf, source: ConnectError },
    #[error("a copy of the golden VM cannot be loaded; see {log}")]
    Load { log: PathBuf, source: QmpError },
    #[error("a copy of the golden VM does not answer")]
    Trial(#[source] ConnectError),
    #[error(
        "the host was too busy while the golden VM booted, so that copies of it would stand still; its kernel says: {said}"
    )]
    Clock { said: String },
}

/// Removes what no VM can start from any more; for the start of a node agent.
pub async fn sweep(resources: &Resources) -> io::Result<()> {
    let current = SizeClass::ALL.map(|size| resources.model(size).key()).into();
    let (folders, in_memory) = (resources.golden_folder(), resources.config.memory.clone());
    let base = digest::short(resources.config.image.rootfs_digest.as_bytes());
    let removed = blocking(move || sweep::sweep(&folders, &in_memory, &current, &base)).await?;
    if removed > 0 {
        tracing::info!(removed, "removed golden snapshots of earlier versions");
    }
    Ok(())
}

impl Golden {
    /// Finds the snapshot for `size`, or boots a VM and makes it.
    pub async fn ensure(resources: &Resources, size: SizeClass) -> Result<Self, GoldenError> {
        let key = resources.model(size).key();
        let folder = resources.golden_folder().join(&key);
        let id = find_or_make(resources, size, &key, &folder).await?;
        let memory = resources.config.memory.join(format!("golden-{key}-{id}.mem"));
        if !memory.exists() {
            let (from, to) = (folder.join("memory"), memory.clone());
            let (in_memory, same_key) = (resources.config.memory.clone(), format!("golden-{key}-"));
            blocking(move || {
                // Gone with the host's last boot.
                std::fs::create_dir_all(&in_memory)?;
                // Of another boot of the same machine: nobody starts from it any more.
                for old in std::fs::read_dir(&in_memory)? {
                    let old = old?;
                    if old.file_name().to_string_lossy().starts_with(&same_key) {
                        files::remove_if_there(&old.path())?;
                    }
                }
                let unfinished = to.with_extension("tmp");
                files::copy_sparse(&from, &unfinished)?;
                std::fs::rename(unfinished, to)
            })
            .await
            .map_err(|source| GoldenError::Prepare { what: "its memory on tmpfs", source })?;
        }
        Ok(Self { key, id, size, snapshot: Snapshot { memory, state: folder.join("state") } })
    }

    /// What has to be equal for a memory image in the bucket: it holds only what differs from this boot.
    pub fn image_key(&self) -> String {
        format!("{}-{}", self.key, self.id)
    }
}

/// Brings the cluster's snapshot, or one of our own, to `folder` and returns its id.
async fn find_or_make(resources: &Resources, size: SizeClass, key: &str, folder: &Path) -> Result<String, GoldenError> {
    let bucket = &resources.config.bucket;
    let local = if folder.join("state").exists() { std::fs::read_to_string(folder.join(ID_FILE)).ok() } else { None };
    let shared = share::find(bucket, key).await.unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), "cannot look for the cluster's golden snapshot");
        None
    });
    if let Some(shared) = &shared {
        if local.as_ref() == Some(&shared.id) {
            return Ok(shared.id.clone());
        }
        match take(resources, key, shared, folder).await {
            Ok(()) => return Ok(shared.id.clone()),
            Err(error) => tracing::warn!(error = chain(&error), "cannot use the cluster's golden snapshot"),
        }
    }
    let id = match local {
        Some(id) => id,
        None => {
            tracing::info!(size = size.as_str(), key, "booting the golden VM");
            let id = uuid::Uuid::now_v7().simple().to_string();
            make(resources, size, folder, &id).await?;
            id
        }
    };
    if shared.is_some() {
        return Ok(id);
    }
    match share::publish(bucket, key, &id, folder).await {
        Ok(shared) if shared.id != id => match take(resources, key, &shared, folder).await {
            Ok(()) => return Ok(shared.id),
            Err(error) => tracing::warn!(error = chain(&error), "cannot use the cluster's golden snapshot"),
        },
        Ok(_) => {}
        Err(error) => tracing::warn!(
            error = chain(&error),
            "cannot share the golden snapshot; memory in the bucket is of use to this host only"
        ),
    }
    Ok(id)
}

/// Fetches the cluster's snapshot into `folder`.
async fn take(
    resources: &Resources,
    key: &str,
    shared: &share::Shared,
    folder: &Path,
) -> Result<(), share::ShareError> {
    let work = resources.golden_folder().join(format!("fetching-{key}"));
    let empty = work.clone();
    blocking(move || {
        if empty.exists() {
            std::fs::remove_dir_all(&empty)?;
        }
        std::fs::create_dir_all(&empty)
    })
    .await?;
    share::fetch(&resources.config.bucket, key, shared, &work).await?;
    let (id, folder) = (shared.id.clone(), folder.to_owned());
    blocking(move || {
        finish(&work, &id)?;
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::rename(&work, &folder)
    })
    .await?;
    Ok(())
}

/// The last steps of a snapshot whose `memory` and `state` are complete.
fn finish(folder: &Path, id: &str) -> io::Result<()> {
    // QEMU made it for its own user; every VM's user has to read it.
    std::fs::set_permissions(folder.join("state"), std::fs::Permissions::from_mode(0o644))?;
    std::fs::write(folder.join(ID_FILE), id)?;
    for name in ["memory", "state", ID_FILE] {
        std::fs::File::open(folder.join(name))?.sync_all()?;
    }
    files::sync_folder(folder)
}

async fn make(resources: &Resources, size: SizeClass, folder: &Path, id: &str) -> Result<(), GoldenError> {
    let prepare = |what: &'static str| move |source: io::Error| GoldenError::Prepare { what, source };
    let slot =
        resources.slots.take().ok_or_else(|| prepare("a network slot")(io::Error::other("all slots are in use")))?;
    let uid = resources.uid(slot.number());
    std::fs::create_dir_all(&resources.config.memory).map_err(prepare("the memory folder"))?;
    let free_mib = resources.memory_folder_free_mib();
    if free_mib < VM_START_MIB {
        return Err(GoldenError::NoMemory { folder: resources.config.memory.clone(), free_mib });
    }
    let net = resources.network.attach(slot.number(), uid).await.map_err(GoldenError::Network)?;
    let workbench = Workbench { resources, size, slot: slot.number(), net: &net };
    let made = workbench.make().await;
    net.detach().await.map_err(GoldenError::Network)?;
    let work = made?;

    let (folder, id) = (folder.to_owned(), id.to_owned());
    blocking(move || publish(&work, &folder, &id)).await.map_err(prepare("the snapshot's folder"))
}

/// Where a snapshot is made: the network and the user of one VM.
struct Workbench<'a> {
    resources: &'a Resources,
    size: SizeClass,
    slot: u32,
    net: &'a SpriteNet,
}

impl Workbench<'_> {
    /// Boots and saves, until a copy of what was saved answers.
    async fn make(&self) -> Result<RunDir, GoldenError> {
        let mut boots = 1;
        loop {
            let work = self.run_dir("making").await?;
            let made = match self.boot_and_save(&work).await {
                Ok(()) => self.try_copy(&work).await,
                failed => failed,
            };
            match made {
                Err(error @ (GoldenError::Trial(_) | GoldenError::Clock { .. })) if boots < BOOTS_MAX => {
                    tracing::warn!(error = chain(&error), boots, "booting the golden VM again");
                    boots += 1;
                }
                // It ended: a kernel that panics ends its QEMU. One that is silent has had its time.
                Err(GoldenError::Boot { console, source }) if boots < BOOTS_MAX && !source.is_silence() => {
                    let said = std::fs::read_to_string(&console).unwrap_or_default();
                    let said: Vec<&str> = said.lines().rev().take(CONSOLE_LINES_SHOWN).collect();
                    tracing::warn!(error = chain(&source), boots, ?said, "the golden VM ended; booting it again");
                    boots += 1;
                }
                made => return made.map(|()| work),
            }
        }
    }

    /// An empty folder and memory file that the VM may use.
    async fn run_dir(&self, purpose: &str) -> Result<RunDir, GoldenError> {
        let name = format!("{purpose}-{}", self.size.as_str());
        let run = RunDir {
            folder: self.resources.config.data.join("golden").join(&name),
            memory: self.resources.config.memory.join(format!("{name}.mem")),
        };
        let (made, uid, bytes) = (run.clone(), self.resources.uid(self.slot), self.size.memory_bytes());
        blocking(move || {
            made.remove()?;
            made.prepare(uid)?;
            std::fs::File::create(&made.memory)?.set_len(bytes)?;
            std::os::unix::fs::chown(&made.memory, Some(uid), Some(uid))
        })
        .await
        .map_err(|source| GoldenError::Prepare { what: "its folder", source })?;
        Ok(run)
    }

    async fn spawn(&self, run: &RunDir, start: &Start) -> Result<(Process, PathBuf), GoldenError> {
        let tap = self.net.open_tap().map_err(GoldenError::Network)?;
        let vm_files = VmFiles {
            memory: run.memory.clone(),
            qmp_socket: run.qmp(),
            agent_socket: run.agent(),
            disk: DiskBackend::Null { size_bytes: DISK_BYTES_DEFAULT },
            tap_fd: tap.as_raw_fd(),
        };
        let args = self.resources.model(self.size).arguments(&vm_files, start);
        let spec = self.resources.jail_spec(run, self.slot, args, self.net, tap.as_raw_fd());
        let spawned = jail::spawn(&self.resources.config.sprited, &spec).await;
        let process = spawned.and_then(|jailed| Process::watch(jailed.qemu_pid));
        Ok((process.map_err(|source| GoldenError::Prepare { what: "the process", source })?, spec.log_path()))
    }

    async fn boot_and_save(&self, work: &RunDir) -> Result<(), GoldenError> {
        let image = &self.resources.config.image;
        let start = Start::Boot { kernel: image.kernel.clone(), initrd: image.initrd.clone() };
        let (process, log) = self.spawn(work, &start).await?;
        let saved = save_when_up(work, log).await;
        end(&process).await?;
        saved
    }

    /// Starts a VM from what `made` holds, as every sprite will be, and waits for its agent.
    async fn try_copy(&self, made: &RunDir) -> Result<(), GoldenError> {
        let copy = self.run_dir("trial").await?;
        let (from, to) = (made.memory.clone(), copy.memory.clone());
        blocking(move || files::copy_sparse(&from, &to).map(drop))
            .await
            .map_err(|source| GoldenError::Prepare { what: "a copy of its memory", source })?;
        let (process, log) = self.spawn(&copy, &Start::Incoming).await?;
        let answered = answer_when_loaded(&copy, &made.state(), log).await;
        end(&process).await?;
        blocking(move || copy.remove()).await.map_err(|source| GoldenError::Prepare { what: "its folder", source })?;
        answered
    }
}

async fn end(process: &Process) -> Result<(), GoldenError> {
    let killed = process.kill(KILL_LIMIT).await;
    killed.map_err(|source| GoldenError::Prepare { what: "the end of its process", source })
}

async fn save_when_up(work: &RunDir, log: PathBuf) -> Result<(), GoldenError> {
    let qemu = |source: QmpError| GoldenError::Qemu { log: log.clone(), source };
    let qmp = Qmp::connect(&work.qmp(), BOOT_LIMIT).await.map_err(qemu)?;
    let agent = match AgentClient::connect(&work.agent(), BOOT_LIMIT).await {
        Ok(agent) => agent,
        Err(source) => {
            let console = work.folder.join("console.log");
            let text = qmp.console_tail().await.unwrap_or_else(|error| format!("no console: {error}"));
            std::fs::write(&console, text)
                .map_err(|source| GoldenError::Prepare { what: "its console log", source })?;
            return Err(GoldenError::Boot { console, source });
        }
    };
    let said = &agent.hello().timer_trouble;
    if !said.is_empty() {
        return Err(GoldenError::Clock { said: said.clone() });
    }
    agent.disconnect().await;
    // The guest has to see the end of the connection, so that no half session is in the snapshot. There is no answer to wait for.
    tokio::time::sleep(SETTLE).await;
    qmp.stop().await.map_err(qemu)?;
    qmp.save_state(&work.unfinished_state()).await.map_err(qemu)?;
    let work = work.clone();
    blocking(move || work.keep_state())
        .await
        .map_err(|source| GoldenError::Prepare { what: "the device state it has written", source })
}

async fn answer_when_loaded(copy: &RunDir, state: &Path, log: PathBuf) -> Result<(), GoldenError> {
    let load = |source: QmpError| GoldenError::Load { log: log.clone(), source };
    let qmp = Qmp::connect(&copy.qmp(), TRIAL_LIMIT).await.map_err(load)?;
    qmp.load_state(state).await.map_err(load)?;
    qmp.cont().await.map_err(load)?;
    let agent = AgentClient::connect(&copy.agent(), TRIAL_LIMIT).await.map_err(GoldenError::Trial)?;
    agent.disconnect().await;
    Ok(())
}

/// Moves the finished snapshot to its name: a folder that has it is whole.
fn publish(work: &RunDir, folder: &Path, id: &str) -> io::Result<()> {
    let new = folder.with_extension("new");
    for old in [&new, folder] {
        if old.exists() {
            std::fs::remove_dir_all(old)?;
        }
    }
    std::fs::create_dir_all(&new)?;
    files::copy_sparse(&work.memory, &new.join("memory"))?;
    std::fs::copy(work.state(), new.join("state"))?;
    finish(&new, id)?;
    std::fs::rename(&new, folder)?;
    files::sync_folder(folder.parent().unwrap_or(folder))?;
    work.remove()
}
