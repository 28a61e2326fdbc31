//! PID 1: from the kernel's first call to serving the host, for ever.
//!
//! ```text
//!  mounts ─▶ modules (initramfs: /modules) ─▶ /lib/modules ─▶ cgroups ─▶ port `agent` ─▶ sessions with the host, one after the other
//! ```
//! The golden snapshot is taken at the last step (ruling 21): until the host configures the VM nothing here makes keys, ids or connections.
//!
//! PID 1 ends only with the VM: every failure is logged to the console and lived with.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read as _},
    iter,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    mount::{MsFlags, mount},
    sys::resource::{Resource, setrlimit},
};

use crate::{agent::Agent, cgroup, channel, log, reaper::Reaper, sys};

/// Where the kernel's modules of the boot lie in the initramfs, and the whole tree.
const BOOT_MODULES: &str = "/modules";
const MODULE_TREE_IMAGE: &str = "/modules.squashfs";
pub(crate) const MODULE_TREE: &str = "/lib/modules";
/// Open files of PID 1: several for each session.
const OPEN_FILES: u64 = 1 << 20;
/// Threads that may block on the disk. One thread carries all the async work, which only moves bytes: without hardware virtualisation a second one
/// costs a wake several milliseconds, because it runs code of the runtime that is not needed otherwise.
const BLOCKING_THREADS_MAX: usize = 32;
/// Calls in PID 1 are shallow; memory of many VMs adds up.
const THREAD_STACK_BYTES: usize = 512 << 10;
/// The port appears within milliseconds of its driver.
const PORT_LIMIT: Duration = Duration::from_secs(30);
const PORT_POLL: Duration = Duration::from_millis(2);
/// The kernel's own limit for one record, and more records than a boot has.
const KMSG_RECORD_BYTES: usize = 8192;
const KMSG_RECORDS_MAX: usize = 10_000;
/// The name the host gives the port of the control channel.
const PORT_NAME: &str = "agent";

/// Never returns: the kernel dies with PID 1.
pub(crate) fn run() -> ! {
    set_up_machine();
    loop {
        if let Err(error) = serve() {
            log!("the agent cannot run: {error}; trying again");
        }
        pause(Duration::from_secs(1));
    }
}

/// A pause outside of async code, where there is no state to wait for.
pub(crate) fn pause(time: Duration) {
    std::thread::park_timeout(time);
}

fn serve() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_stack_size(THREAD_STACK_BYTES)
        .enable_all()
        .build()?;
    let port = open_port()?;
    let reaper = Reaper::start()?;
    runtime.block_on(async move {
        let agent = Arc::new(Agent::new(reaper, timer_trouble()));
        channel::serve(port.into(), agent).await
    })
}

/// What the kernel said if it does not use the CPU's own timer. A VM like that must not become a snapshot (the node agent's `golden` says why).
fn timer_trouble() -> String {
    let Ok(log) = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg") else {
        return String::new();
    };
    // One read is one record; the end is "would block".
    let mut record = [0; KMSG_RECORD_BYTES];
    let records =
        iter::from_fn(|| (&log).read(&mut record).ok().map(|len| String::from_utf8_lossy(&record[..len]).into_owned()));
    records.take(KMSG_RECORDS_MAX).find_map(|record| trouble_in(&record)).unwrap_or_default()
}

/// The text of a record of `/dev/kmsg`, `priority,number,time,flags;text`, if it says that the APIC timer is not used.
fn trouble_in(record: &str) -> Option<String> {
    let (_, text) = record.split_once(';')?;
    let text = text.lines().next()?;
    let off = ["APIC timer disabled", "Disabling APIC timer"].iter().any(|words| text.contains(words));
    off.then(|| text.to_owned())
}

fn set_up_machine() {
    for (source, target, kind, flags, data) in [
        ("proc", "/proc", "proc", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, ""),
        ("sysfs", "/sys", "sysfs", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, ""),
        ("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=755"),
        ("tmpfs", "/run", "tmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=755,size=16m"),
        ("cgroup2", cgroup::ROOT, "cgroup2", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, ""),
    ] {
        attempt(target, mount_new(source, target, kind, flags, data));
    }
    attempt("the console", open_console());
    for (target, link) in
        [("/proc/self/fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr"), ("/proc/kcore", "core")]
    {
        attempt(link, symlink(target, Path::new("/dev").join(link)));
    }
    attempt("the kernel's modules", load_modules());
    attempt(MODULE_TREE, mount_module_tree());
    attempt("device nodes of modules", make_module_nodes());
    attempt("open files", setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).map_err(io::Error::from));
    attempt("oom_score_adj", fs::write("/proc/self/oom_score_adj", "-1000"));
    attempt("the loopback interface", crate::net::loopback_up());
    for (file, value) in [
        // `ping` without root.
        ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
        ("/proc/sys/net/ipv6/conf/default/accept_dad", "0"),
        ("/proc/sys/fs/inotify/max_user_watches", "524288"),
        ("/proc/sys/fs/inotify/max_user_instances", "1024"),
        ("/proc/sys/vm/max_map_count", "262144"),
    ] {
        attempt(file, fs::write(file, value));
    }
    attempt("cgroups", cgroup::set_up());
}

fn attempt(what: &str, result: io::Result<()>) {
    match result {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => log!("{what}: {error}"),
    }
}

/// Mounts a new file system; the folder is made if need be. Mounted already is fine.
pub(crate) fn mount_new(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    match mount(Some(source), target, Some(kind), flags, Some(data)) {
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The kernel opened none when the initramfs has no `/dev/console`.
fn open_console() -> io::Result<()> {
    let console = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open("/dev/console")?;
    nix::unistd::dup2_stdin(&console)?;
    nix::unistd::dup2_stdout(&console)?;
    nix::unistd::dup2_stderr(&console)?;
    Ok(())
}

fn load_modules() -> io::Result<()> {
    for name in fs::read_to_string(Path::new(BOOT_MODULES).join("order"))?.split_whitespace() {
        let loaded =
            File::open(Path::new(BOOT_MODULES).join(format!("{name}.ko"))).and_then(|file| sys::load_module(&file));
        attempt(name, loaded);
    }
    Ok(())
}

/// The modules that are loaded on demand: a compressed image in the initramfs, so that it costs each VM little memory.
fn mount_module_tree() -> io::Result<()> {
    let image = match File::open(MODULE_TREE_IMAGE) {
        Ok(image) => image,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let number = sys::free_loop(&File::open("/dev/loop-control")?)?;
    let path = format!("/dev/loop{number}");
    let device = fs::OpenOptions::new().read(true).write(true).open(&path)?;
    sys::attach_loop(&device, &image)?;
    mount_new(&path, MODULE_TREE, "squashfs", MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID, "")
}

/// Nodes whose opening makes the kernel load a module. On a usual system `kmod static-nodes` makes them.
fn make_module_nodes() -> io::Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let list = match fs::read_to_string(Path::new(MODULE_TREE).join(release.trim()).join("modules.devname")) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for node in list.lines().filter_map(ModuleNode::parse) {
        let path = Path::new("/dev").join(&node.name);
        attempt(&node.name, node.make(&path));
    }
    Ok(())
}

/// A line of `modules.devname`: `fuse fuse c10:229`.
#[derive(Debug, PartialEq, Eq)]
struct ModuleNode {
    name: String,
    block: bool,
    major: u64,
    minor: u64,
}

impl ModuleNode {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (module, name, device) = (words.next()?, words.next()?, words.next()?);
        if module.starts_with('#') || name.split('/').any(|part| part == "..") {
            return None;
        }
        let (major, minor) = device.get(1..)?.split_once(':')?;
        Some(Self {
            name: name.to_owned(),
            block: device.starts_with('b'),
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }

    fn make(&self, path: &Path) -> io::Result<()> {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let kind = if self.block { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
        match mknod(path, kind, Mode::from_bits_truncate(0o600), makedev(self.major, self.minor)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        // As udev's rules have it: these two are for everybody.
        if matches!(self.name.as_str(), "fuse" | "net/tun") {
            fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        }
        Ok(())
    }
}

/// Opens the port of the control channel, once and for ever: it can be open only once.
fn open_port() -> io::Result<OwnedFd> {
    let deadline = Instant::now() + PORT_LIMIT;
    loop {
        let error = match find_port() {
            Ok(Some(path)) => {
                match fs::OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                    .open(path)
                {
                    Ok(port) => return Ok(port.into()),
                    // ENXIO: the driver is not ready yet (ruling 18).
                    Err(error) => error,
                }
            }
            Ok(None) => io::Error::new(io::ErrorKind::NotFound, "this VM has no port named agent"),
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            return Err(error);
        }
        pause(PORT_POLL);
    }
}

fn find_port() -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT_NAME) {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

/// A C string from text that may come from anywhere.
pub(crate) fn c_string(text: impl Into<Vec<u8>>) -> io::Result<CString> {
    CString::new(text)
        .map_err(|_nul| io::Error::new(io::ErrorKind::InvalidInput, "a NUL byte in a text for the kernel"))
}

/// A descriptor that is duplicated, for another owner.
pub(crate) fn duplicate(fd: &OwnedFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_the_apic_timer_is_found_out() {
        let failed = "4,297,431056,-;APIC timer disabled due to verification failure\n SUBSYSTEM=cpu\n";
        assert_eq!(trouble_in(failed).as_deref(), Some("APIC timer disabled due to verification failure"));
        assert!(trouble_in("6,120,9000,-;Disabling APIC timer\n").is_some());
        assert_eq!(trouble_in("6,121,9001,-;APIC: Switch to symmetric I/O mode setup\n"), None);
        assert_eq!(trouble_in("no record"), None);
    }

    #[test]
    fn nodes_of_modules_are_read_as_kmod_writes_them() {
        let node = |name: &str, block, major, minor| Some(ModuleNode { name: name.into(), block, major, minor });
        assert_eq!(ModuleNode::parse("fuse fuse c10:229"), node("fuse", false, 10, 229));
        assert_eq!(ModuleNode::parse("tun net/tun c10:200"), node("net/tun", false, 10, 200));
        assert_eq!(ModuleNode::parse("loop loop0 b7:0"), node("loop0", true, 7, 0));
        for bad in ["# Device nodes to trigger on-demand module loading.", "", "x ../../etc c1:1", "x y z", "x y c1"] {
            assert_eq!(ModuleNode::parse(bad), None, "{bad:?}");
        }
    }
}
