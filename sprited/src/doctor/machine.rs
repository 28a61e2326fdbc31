//! Processor, kernel, QEMU, memory, limits, clock.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::sys::{
    resource::{Resource, getrlimit},
    statvfs::statvfs,
};
use node_agent::kvm::{self, Probe};

use super::{Finding, output_of};

/// Older ones lack `file:` migration, with which VMs are saved.
const QEMU_MAJOR_MIN: u32 = 9;
/// A VM of the smallest size and the host itself.
const MEMORY_BYTES_MIN: u64 = 2 << 30;
/// QEMU, its log, NBD, agent and monitor sockets, times a hundred sprites.
const OPEN_FILES_MIN: u64 = 16_384;
/// Any clock before this is wrong: the first release was later.
const CLOCK_FLOOR: Duration = Duration::from_secs(1_750_000_000);

pub(super) fn examine() -> Vec<Finding> {
    vec![root(), acceleration(), qemu(), kernel(), memory(), shared_memory(), open_files(), cgroups(), clock()]
}

fn root() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::ok("user", "root")
    } else {
        Finding::fail("user", "not root", "run as root: VMs get their own users, namespaces and network devices")
    }
}

fn acceleration() -> Finding {
    match kvm::probe() {
        Probe::Works { loop_micros } => {
            Finding::ok("acceleration", format!("KVM works: a million rounds of a guest loop in {loop_micros} µs"))
        }
        Probe::Unusable(reason) => Finding::warn(
            "acceleration",
            format!("TCG (software), because {reason}"),
            "fine for development; several times slower, and no boundary between tenants. For more: a host with hardware virtualisation",
        ),
    }
}

fn qemu() -> Finding {
    const CHECK: &str = "qemu";
    let install = "install qemu-system-x86 9 or newer; `./dev up` does it (on Debian 12 from backports)";
    let version = match output_of("qemu-system-x86_64", &["--version"]) {
        Ok(text) => text.lines().next().unwrap_or_default().to_owned(),
        Err(error) => return Finding::fail(CHECK, error, install),
    };
    if qemu_major(&version).is_none_or(|major| major < QEMU_MAJOR_MIN) {
        return Finding::fail(CHECK, format!("too old: {version}"), install);
    }
    match output_of("qemu-system-x86_64", &["-M", "help"]) {
        Ok(machines) if machines.lines().any(|line| line.starts_with("microvm")) => {
            Finding::ok(CHECK, format!("{version}, with the microvm machine"))
        }
        Ok(_) => Finding::fail(
            CHECK,
            format!("{version}, without the microvm machine"),
            "install the distribution's full qemu-system-x86",
        ),
        Err(error) => Finding::fail(CHECK, error, install),
    }
}

fn qemu_major(version_line: &str) -> Option<u32> {
    version_line.strip_prefix("QEMU emulator version ")?.split('.').next()?.parse().ok()
}

fn kernel() -> Finding {
    match nix::sys::utsname::uname() {
        Ok(name) => Finding::ok("kernel", format!("{} on {}", name.release().display(), name.machine().display())),
        Err(error) => Finding::fail("kernel", error.to_string(), "uname must work"),
    }
}

fn memory() -> Finding {
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    });
    match available {
        Some(bytes) if bytes >= MEMORY_BYTES_MIN => Finding::ok("memory", format!("{} MiB available", bytes >> 20)),
        Some(bytes) => Finding::warn(
            "memory",
            format!("{} MiB available", bytes >> 20),
            "a sprite of size s needs 1 GiB while it runs",
        ),
        None => Finding::fail("memory", "/proc/meminfo is unreadable", "mount /proc"),
    }
}

fn shared_memory() -> Finding {
    const CHECK: &str = "/dev/shm";
    match statvfs("/dev/shm") {
        Ok(fs) => {
            let bytes = fs.blocks_available() * fs.fragment_size();
            let found = format!("{} MiB free", bytes >> 20);
            if bytes >= MEMORY_BYTES_MIN {
                Finding::ok(CHECK, found)
            } else {
                Finding::warn(
                    CHECK,
                    found,
                    "the memory of VMs lies there; enlarge it: mount -o remount,size=75% /dev/shm",
                )
            }
        }
        Err(error) => {
            Finding::fail(CHECK, error.to_string(), "mount a tmpfs at /dev/shm, or name one with --memory-dir")
        }
    }
}

fn open_files() -> Finding {
    const CHECK: &str = "open files";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= OPEN_FILES_MIN => Finding::ok(CHECK, format!("limit {hard}")),
        Ok((_, hard)) => Finding::warn(
            CHECK,
            format!("limit {hard}"),
            format!("raise the hard limit to {OPEN_FILES_MIN}: `ulimit -Hn` or LimitNOFILE="),
        ),
        Err(error) => Finding::fail(CHECK, error.to_string(), "getrlimit must work"),
    }
}

fn cgroups() -> Finding {
    const CHECK: &str = "cgroups";
    let advice = "VMs run without CPU and memory limits of their own; boot with the unified hierarchy (systemd.unified_cgroup_hierarchy=1)";
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
        Finding::ok(CHECK, format!("version 2 ({})", controllers.trim()))
    } else if Path::new("/sys/fs/cgroup/memory").exists() {
        Finding::warn(CHECK, "version 1", advice)
    } else {
        Finding::warn(CHECK, "none mounted", advice)
    }
}

fn clock() -> Finding {
    const CHECK: &str = "clock";
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) if since >= CLOCK_FLOOR => {
            Finding::ok(CHECK, format!("{}", jiff::Timestamp::now().strftime("%F %T UTC")))
        }
        Ok(_) | Err(_) => Finding::fail(CHECK, "years in the past", "set it: certificates would not be valid"),
    }
}

#[cfg(test)]
mod tests {
    use super::qemu_major;

    #[test]
    fn qemu_says_its_version_in_one_known_way() {
        assert_eq!(qemu_major("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)"), Some(10));
        assert_eq!(qemu_major("QEMU emulator version 7.2.19"), Some(7));
        assert_eq!(qemu_major("something else"), None);
    }
}
