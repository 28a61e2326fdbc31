//! What all VMs of a host share: settings, store, network, golden snapshots, slots.

use std::{
    collections::BTreeSet,
    io,
    os::fd::RawFd,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use blockstore::store::{BaseId, Store};
use proto::{id::SpriteId, record::SizeClass};
use tokio::sync::{OnceCell, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::Config,
    digest,
    golden::{Golden, GoldenError},
    jail::{JailSpec, Limits},
    net::{Network, SpriteNet},
    process::RunDir,
    qemu::{Accel, MachineModel},
    seed::Seeds,
};

/// VMs one host can have, asleep ones not counted: each takes a network of four addresses and a user id.
pub const SLOTS: u32 = 4096;
/// Threads of one QEMU: vCPUs, I/O workers, one for each device at most.
const QEMU_TASKS_MAX: u32 = 256;
/// What a VM touches from its start to its first shell, about: 120 MiB of the golden memory and as much again. So much has to be free for one more, on the
/// host and where the memory of VMs lies: a QEMU that finds no page there is killed (SIGBUS), and containers often have a `/dev/shm` of 64 MiB.
pub const VM_START_MIB: u64 = 256;
/// Starts of VMs at a time, for each core: some of them wait for the disk.
const STARTS_PER_CORE: usize = 2;
/// First user id of the VMs; above what distributions and `adduser` give out.
const UID_BASE: u32 = 1_500_000;

/// Shared by every sprite task.
#[derive(Debug)]
pub struct Resources {
    pub config: Config,
    pub store: Arc<Store>,
    pub base: BaseId,
    pub network: Network,
    pub slots: Slots,
    /// Path of the QEMU binary.
    pub qemu: PathBuf,
    pub qemu_version: String,
    pub kernel_digest: String,
    pub goldens: [OnceCell<Golden>; 3],
    pub(crate) seeds: Seeds,
    /// VMs that may start at a time. Each costs CPU time until its guest answers: twenty side by side on two cores all take longer than a guest
    /// that answers at all ever should, and are given up; one after the other they are there in the same time.
    pub starts: Semaphore,
    /// Work ahead of need: seed and pool. Waited for when the node agent ends, so that no VM is left that nobody holds.
    pub background: TaskTracker,
    /// The node agent ends: nothing is begun ahead of need.
    pub closing: CancellationToken,
}

/// A turn for each VM that may start now.
pub fn start_turns() -> Semaphore {
    Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from) * STARTS_PER_CORE)
}

impl Resources {
    /// The golden snapshot of a size; made at first need.
    pub async fn golden(&self, size: SizeClass) -> Result<&Golden, GoldenError> {
        self.goldens[size as usize].get_or_try_init(|| Golden::ensure(self, size)).await
    }

    pub fn model(&self, size: SizeClass) -> MachineModel {
        MachineModel {
            accel: self.config.accel.clone(),
            size,
            qemu_version: self.qemu_version.clone(),
            kernel_digest: self.kernel_digest.clone(),
        }
    }

    pub fn golden_folder(&self) -> PathBuf {
        self.config.data.join("golden")
    }

    pub fn vms_folder(&self) -> PathBuf {
        self.config.data.join("vms")
    }

    pub fn run_dir(&self, id: SpriteId) -> RunDir {
        RunDir { folder: self.vms_folder().join(id.to_string()), memory: self.config.memory.join(format!("{id}.mem")) }
    }

    pub fn uid(&self, slot: u32) -> u32 {
        UID_BASE + slot
    }

    pub fn is_vm_uid(uid: u32) -> bool {
        (UID_BASE..UID_BASE + SLOTS).contains(&uid)
    }

    /// How a VM is locked up: it sees its own folder (and may write in QEMU's part of it) and memory, the golden snapshots and the kernel, nothing else.
    pub fn jail_spec(&self, run: &RunDir, slot: u32, args: Vec<String>, net: &SpriteNet, tap: RawFd) -> JailSpec {
        let uid = self.uid(slot);
        JailSpec {
            run: run.folder.clone(),
            program: self.qemu.clone(),
            args,
            writable: vec![run.memory.clone()],
            readable: vec![self.golden_folder(), self.config.image.kernel.clone(), self.config.image.initrd.clone()],
            netns: Some(net.netns_path().to_owned()),
            uid,
            gid: uid,
            keep_fds: vec![tap],
            kvm: matches!(self.config.accel, Accel::Kvm { .. }),
            limits: Limits {
                cgroup: Some(format!("{}-{slot}", self.config.instance)),
                // Guest memory is bounded by its size; this is for QEMU itself, so that it cannot fork or grow without end.
                tasks_max: Some(QEMU_TASKS_MAX),
                ..Limits::default()
            },
            watchdog: None,
        }
    }

    /// Whether the host has room for one more VM, without touching what it keeps for itself. Memory is given out as VMs touch it, so that a host holds more
    /// of them than their sizes add up to.
    pub fn has_room(&self) -> bool {
        self.free_memory_bytes() >= self.config.memory_reserve_bytes.saturating_add(VM_START_MIB << 20)
            && self.memory_folder_free_mib() >= VM_START_MIB
    }

    /// What the file system with the memory of VMs could still hold. One that does not say is taken for large enough.
    pub fn memory_folder_free_mib(&self) -> u64 {
        match nix::sys::statvfs::statvfs(&self.config.memory) {
            Ok(fs) => (fs.blocks_available() * fs.fragment_size()) >> 20,
            Err(error) => {
                tracing::warn!(%error, folder = %self.config.memory.display(), "cannot read the free space; VMs are started all the same");
                u64::MAX
            }
        }
    }

    /// What the kernel says could still be used without swapping.
    pub fn free_memory_bytes(&self) -> u64 {
        match available_memory() {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(%error, "cannot read the free memory; VMs are started all the same");
                u64::MAX
            }
        }
    }
}

fn available_memory() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().map_err(io::Error::other)?;
    Ok(kib << 10)
}

/// Digest of kernel and initramfs, for the snapshot's key.
pub fn kernel_digest(config: &Config) -> io::Result<String> {
    digest::of_files(&[&config.image.kernel, &config.image.initrd])
}

/// Numbers for networks and user ids of VMs that have a process.
#[derive(Clone, Debug, Default)]
pub struct Slots(Arc<Mutex<BTreeSet<u32>>>);

/// A number that is free again when this is dropped.
#[derive(Debug)]
pub struct Slot {
    number: u32,
    slots: Slots,
}

impl Slots {
    /// The lowest free number, or `None` when all [`SLOTS`] are taken.
    pub fn take(&self) -> Option<Slot> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (0..SLOTS).find(|number| !taken.contains(number))?;
        taken.insert(number);
        Some(Slot { number, slots: self.clone() })
    }

    /// A certain number, for a VM that already has it.
    pub fn take_number(&self, number: u32) -> Option<Slot> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(number).then(|| Slot { number, slots: self.clone() })
    }
}

impl Slot {
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}
