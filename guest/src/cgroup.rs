//! The environment's control group: its limits leave PID 1 enough memory and process numbers to go on answering, whatever users do.
//!
//! ```text
//!  /                     PID 1, the kernel's helpers
//!  └── environment       memory.max, pids.max; what programs inside see as the root (a cgroup namespace)
//!      ├── init          the environment's own PID 1
//!      ├── sessions      commands that were started through the agent
//!      └── …             whatever programs inside make, e.g. Docker
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::Path,
};

pub(crate) const ROOT: &str = "/sys/fs/cgroup";
const ENVIRONMENT: &str = "/sys/fs/cgroup/environment";
/// Names below `environment`.
pub(crate) const INIT: &str = "init";
pub(crate) const SESSIONS: &str = "sessions";
/// What PID 1, the initramfs, the kernel and its own reserve take (133 MiB of 2 GiB, measured), with some more: this, and a part of all memory. With less
/// the whole machine runs out before the environment's limit is met, and stands still for minutes in reclaim.
const MEMORY_RESERVE_BYTES: u64 = 112 << 20;
const MEMORY_RESERVE_PART: u64 = 32;
const PIDS_RESERVE: u64 = 512;

/// Once, at boot: the controllers are handed to `environment`.
pub(crate) fn set_up() -> io::Result<()> {
    enable_controllers(Path::new(ROOT))
}

/// Makes all controllers of `group` available to its children. No process may be in it, unless it is the root.
pub(crate) fn enable_controllers(group: &Path) -> io::Result<()> {
    for controller in fs::read_to_string(group.join("cgroup.controllers"))?.split_whitespace() {
        fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"))?;
    }
    Ok(())
}

/// A fresh group for an environment that is about to start. Returns its `cgroup.procs`.
pub(crate) fn make_environment() -> io::Result<File> {
    let environment = Path::new(ENVIRONMENT);
    if environment.exists() {
        remove_tree(environment)?;
    }
    fs::create_dir(environment)?;
    fs::write(environment.join("memory.max"), memory_max()?.to_string())?;
    fs::write(environment.join("pids.max"), pids_max()?.to_string())?;
    procs(environment)
}

/// `cgroup.procs` of the group for commands. Programs inside may have removed it.
pub(crate) fn sessions() -> io::Result<File> {
    let sessions = Path::new(ENVIRONMENT).join(SESSIONS);
    match fs::create_dir(&sessions) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => procs(&sessions),
    }
}

fn procs(group: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).open(group.join("cgroup.procs"))
}

/// Groups are removed leaves first.
fn remove_tree(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}

fn memory_max() -> io::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let total_kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let total = total_kib.ok_or_else(|| io::Error::other("/proc/meminfo does not tell MemTotal"))? << 10;
    Ok(total.saturating_sub(MEMORY_RESERVE_BYTES + total / MEMORY_RESERVE_PART).max(total / 2))
}

fn pids_max() -> io::Result<u64> {
    let read = |file: &str| -> io::Result<u64> { fs::read_to_string(file)?.trim().parse().map_err(io::Error::other) };
    let limit = read("/proc/sys/kernel/threads-max")?.min(read("/proc/sys/kernel/pid_max")?);
    Ok(limit.saturating_sub(PIDS_RESERVE).max(limit / 2))
}
