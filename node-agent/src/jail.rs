//! QEMU's prison: a process of its own, with its own root, network, user and limits, that lives on when the node agent dies.
//!
//! ```text
//!  node agent ── spawn ──▶ sprited jail SPEC          own session, own mounts, sprite's netns, limits
//!       ▲                     │ fork
//!       │ {"qemu_pid":…}      ▼
//!       └───────────────── watcher (root in the jail) ── fork ──▶ QEMU (own user, no capabilities)
//!                             │ waits for QEMU, keeps its log short, is the watchdog (ruling 19)
//!                             ▼
//!                          exit.json
//! ```
//!
//! # Invariants
//!
//! 1. Inside the jail only these exist: the system's programs and libraries (read-only), a few device nodes, the VM's run folder, and what the spec names.
//!    Paths are the same inside and outside.
//! 2. QEMU has no capabilities, cannot gain any, and has no descriptors but stdio and those of [`JailSpec::keep_fds`].
//! 3. `exit.json` appears when QEMU has ended, whole or not at all.
//!
//! [`main`] must run before the process has any second thread: it changes the process's namespaces and forks.

use std::{
    io,
    os::fd::RawFd,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::{Deserialize, Serialize};

mod cgroup;
mod confine;
mod enter;
mod root;
mod watcher;

#[cfg(test)]
mod tests;

/// From `spawn` to a running QEMU; mounts and two forks, so more means a host in trouble.
const SPAWN_LIMIT: Duration = Duration::from_secs(20);

/// Everything about one jail. Written to `<run>/jail.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailSpec {
    /// Folder of the VM, visible inside. Holds the log and `exit.json`; what QEMU may write in it is said by owner and mode.
    pub run: PathBuf,
    /// Absolute path of QEMU.
    pub program: PathBuf,
    pub args: Vec<String>,
    /// More that QEMU may write, for example its memory file. Files or folders that exist.
    #[serde(default)]
    pub writable: Vec<PathBuf>,
    /// More that QEMU may read, for example kernel and snapshot.
    #[serde(default)]
    pub readable: Vec<PathBuf>,
    /// Network namespace to live in; `None` for an empty one.
    pub netns: Option<PathBuf>,
    pub uid: u32,
    pub gid: u32,
    /// Descriptors that QEMU inherits under the same numbers, for example the tap.
    #[serde(default)]
    pub keep_fds: Vec<RawFd>,
    /// Whether `/dev/kvm` is there.
    #[serde(default)]
    pub kvm: bool,
    #[serde(default)]
    pub limits: Limits,
    /// Set where a VM must not outlive its host's lease (ruling 19); off on a single host.
    #[serde(default)]
    pub watchdog: Option<Watchdog>,
}

/// Limits of a jail's processes. Each is enforced where the host has a writable control group hierarchy for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Name of the control group, below `sprites/`; `None`: none.
    pub cgroup: Option<String>,
    pub memory_bytes: Option<u64>,
    pub tasks_max: Option<u32>,
    /// Share of the CPU against other VMs; 100 is the usual.
    pub cpu_weight: Option<u32>,
}

/// Stops QEMU while its node agent gives no sign of life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watchdog {
    /// A file in its own folder, replaced by rename; its content is [`boottime_ms`] in decimal.
    pub heartbeat: PathBuf,
    /// Older than this: the VM is stopped until the heartbeat is fresh again.
    pub ttl_ms: u64,
}

/// A QEMU that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jailed {
    pub qemu_pid: i32,
    /// Parent of QEMU, which writes `exit.json`.
    pub watcher_pid: i32,
    /// Controllers that enforce [`Limits`].
    pub cgroups: Vec<String>,
}

/// How QEMU ended: content of `exit.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub ended_unix_ms: u64,
}

impl JailSpec {
    /// QEMU's own words; bounded, the beginning is kept.
    pub fn log_path(&self) -> PathBuf {
        self.run.join("qemu.log")
    }

    /// Where [`Exit`] appears.
    pub fn exit_path(&self) -> PathBuf {
        self.run.join("exit.json")
    }

    fn spec_path(&self) -> PathBuf {
        self.run.join("jail.json")
    }
}

/// Milliseconds since boot, the time asleep included: what a heartbeat file holds.
pub fn boottime_ms() -> u64 {
    let Ok(now) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) else { return 0 };
    u64::try_from(now.tv_sec()).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec()).unwrap_or(0) / 1_000_000
}

/// Starts a QEMU in a jail and returns when it has been executed. `sprited` is the binary with the hidden `jail` subcommand.
///
/// The descriptors in [`JailSpec::keep_fds`] have to be open until this returns; the caller closes its copies afterwards.
///
/// # Errors
///
/// The message says which step failed; no process is left.
pub async fn spawn(sprited: &Path, spec: &JailSpec) -> io::Result<Jailed> {
    crate::jail::watcher::remove_if_there(&spec.exit_path())?;
    std::fs::write(spec.spec_path(), serde_json::to_vec_pretty(spec)?)?;
    let mut command = tokio::process::Command::new(sprited);
    command.arg("jail").arg(spec.spec_path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    confine::inherit(&mut command, spec.keep_fds.clone());
    let output = match tokio::time::timeout(SPAWN_LIMIT, command.output()).await {
        Ok(output) => output?,
        Err(_elapsed) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the jail was not ready in time")),
    };
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout)?);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("the jail could not be built: {}", stderr.trim())))
}

/// The `jail` subcommand: becomes the watcher of a jailed QEMU. The calling process ends as soon as QEMU runs.
pub fn main(spec: &Path) -> ! {
    let code = match enter::enter(spec) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    };
    std::process::exit(code)
}
