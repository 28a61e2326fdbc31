//! Control groups, where the host has them: version 1 (a hierarchy for each controller) or 2 (one for all). Without any the VM runs all the same,
//! and [`super::Jailed::cgroups`] says so.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, RawFd},
    path::{Path, PathBuf},
};

use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Limits;

const HIERARCHY: &str = "/sys/fs/cgroup";
/// Parent of all VMs' groups.
const PARENT: &str = "sprites";

/// Groups this process has joined. The folders are held open, because their paths are gone once the root is switched.
#[derive(Debug, Default)]
pub(super) struct Group {
    joined: Vec<Joined>,
}

#[derive(Debug)]
struct Joined {
    controllers: &'static str,
    parent: File,
    name: String,
}

impl Group {
    /// Joins what can be joined. A group that cannot be made is left out.
    pub(super) fn join(limits: &Limits) -> Self {
        let Some(name) = limits.cgroup.as_deref().filter(|name| !name.contains('/') && !name.is_empty()) else {
            return Self::default();
        };
        let root = Path::new(HIERARCHY);
        let joined = if root.join("cgroup.controllers").exists() {
            vec![join_unified(root, name, limits)]
        } else {
            vec![
                join_one("memory", &root.join("memory"), name, &memory_v1(limits)),
                join_one("pids", &root.join("pids"), name, &tasks(limits)),
                join_one("cpu", &root.join("cpu"), name, &shares_v1(limits)),
            ]
        };
        Self { joined: joined.into_iter().flatten().collect() }
    }

    pub(super) fn controllers(&self) -> impl Iterator<Item = &str> {
        self.joined.iter().flat_map(|joined| joined.controllers.split(' '))
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.joined.iter().map(|joined| joined.parent.as_raw_fd())
    }

    /// Leaves and removes the groups; best effort, an empty group costs nothing.
    pub(super) fn remove(&self) {
        for joined in &self.joined {
            // A process has to be elsewhere before its group can go.
            drop(write_own_pid(&joined.parent));
            unlinkat(&joined.parent, joined.name.as_str(), UnlinkatFlags::RemoveDir).ok();
        }
    }
}

type Setting = (&'static str, String);

fn memory_v1(limits: &Limits) -> Vec<Setting> {
    limits.memory_bytes.map(|bytes| ("memory.limit_in_bytes", bytes.to_string())).into_iter().collect()
}

fn tasks(limits: &Limits) -> Vec<Setting> {
    limits.tasks_max.map(|tasks| ("pids.max", tasks.to_string())).into_iter().collect()
}

/// Version 1 counts in 1024ths of a usual share.
fn shares_v1(limits: &Limits) -> Vec<Setting> {
    limits
        .cpu_weight
        .map(|weight| ("cpu.shares", (u64::from(weight) * 1024 / 100).max(2).to_string()))
        .into_iter()
        .collect()
}

fn join_unified(root: &Path, name: &str, limits: &Limits) -> Option<Joined> {
    let parent = root.join(PARENT);
    fs::create_dir_all(&parent).ok()?;
    for folder in [root, &parent] {
        for controller in ["+memory", "+pids", "+cpu"] {
            // One that the host does not delegate is left out.
            drop(fs::write(folder.join("cgroup.subtree_control"), controller));
        }
    }
    let mut settings = tasks(limits);
    settings.extend(limits.memory_bytes.map(|bytes| ("memory.max", bytes.to_string())));
    settings.extend(limits.cpu_weight.map(|weight| ("cpu.weight", weight.clamp(1, 10_000).to_string())));
    join_one("memory pids cpu", root, name, &settings)
}

fn join_one(controllers: &'static str, hierarchy: &Path, name: &str, settings: &[Setting]) -> Option<Joined> {
    let parent = hierarchy.join(PARENT);
    let group = parent.join(name);
    fs::create_dir_all(&group).ok()?;
    let joined = set_and_enter(&group, settings).and_then(|()| File::open(&parent));
    match joined {
        Ok(parent) => Some(Joined { controllers, parent, name: name.to_owned() }),
        Err(_not_delegated) => {
            drop(fs::remove_dir(&group));
            None
        }
    }
}

fn set_and_enter(group: &Path, settings: &[Setting]) -> io::Result<()> {
    for (file, value) in settings {
        fs::write(group.join(file), value)?;
    }
    fs::write(group.join("cgroup.procs"), "0")
}

fn write_own_pid(folder: &File) -> io::Result<()> {
    // By descriptor: `/proc` is not there in the jail.
    let procs: PathBuf = "cgroup.procs".into();
    let flags = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC;
    let file = nix::fcntl::openat(folder, &procs, flags, nix::sys::stat::Mode::empty())?;
    nix::unistd::write(file, b"0")?;
    Ok(())
}
