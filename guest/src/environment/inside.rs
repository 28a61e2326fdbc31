//! The thread that lives in the environment's namespaces, and how they are arranged.
//!
//! ```text
//!  unshare mounts, IPC, pids of its children ─▶ volume becomes the root ─▶ file systems ─▶ fork `sprite-init` ─▶ its cgroup namespace ─▶ jobs
//! ```

use std::{
    ffi::CStr,
    fs::{self, File},
    io::{self, Read as _},
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    path::Path,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    unistd::{chdir, chroot},
};
use tokio::sync::{mpsc, oneshot};

use super::{INIT_NAME, Job, StartError, VOLUME};
use crate::{
    init::{MODULE_TREE, c_string, mount_new},
    log,
    reaper::{KillOnDrop, Reaper},
    spawn::{self, Credentials, Program, Report},
    sys,
};

/// Our folder in the environment: in memory, so that nothing of it is in a checkpoint.
pub(crate) const SPRITE_DIR: &str = "/.sprite";
const OUR_BINARY: &CStr = c"/init";
const SPRITE_ENV: &str = "/.sprite/bin/sprite-env";

/// Runs until all senders of `jobs` are gone. The namespaces live as long as something is in them.
pub(super) fn run(
    reaper: &Reaper,
    cgroup: OwnedFd,
    ready: oneshot::Sender<Result<KillOnDrop, StartError>>,
    mut jobs: mpsc::Receiver<Job>,
) {
    let started = arrange().and_then(|()| start_init(reaper, cgroup));
    let failed = started.is_err();
    // With nobody at the other end the init dies with what is dropped here.
    if ready.send(started).is_err() || failed {
        return;
    }
    while let Some(job) = jobs.blocking_recv() {
        job();
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
    let what = what.into();
    move |source| StartError::Arrange { what, source }
}

fn arrange() -> Result<(), StartError> {
    let spaces = CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWPID;
    unshare(spaces).map_err(io::Error::from).map_err(failed("namespaces"))?;
    propagate(MsFlags::MS_PRIVATE).map_err(failed("private mounts"))?;
    let binary = sys::clone_mount(OUR_BINARY).map_err(failed("copy of this program"))?;
    let modules = module_tree();
    enter_volume().map_err(failed("root"))?;
    mount_kernel_file_systems()?;
    sprite_folder(&binary)?;
    // All the rest works without.
    if let Some(device) = modules
        && let Err(error) =
            mount_new(&device, MODULE_TREE, "squashfs", MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID, "")
    {
        log!("no {MODULE_TREE} in the environment: {error}");
    }
    propagate(MsFlags::MS_SHARED).map_err(failed("shared mounts"))
}

fn propagate(how: MsFlags) -> io::Result<()> {
    Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | how, None::<&str>)?)
}

/// The device that the machine has mounted at `/lib/modules`.
fn module_tree() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (device, folder) = (words.next()?, words.next()?);
        (folder == MODULE_TREE).then(|| device.to_owned())
    })
}

/// The initramfs cannot be pivoted away from, so the volume is moved over it, as an initramfs does for any Linux.
fn enter_volume() -> io::Result<()> {
    chdir(VOLUME)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

fn mount_kernel_file_systems() -> Result<(), StartError> {
    let device = MsFlags::MS_NOSUID;
    let data = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let kernel = data | MsFlags::MS_NOEXEC;
    for (kind, target, flags, options) in [
        ("sysfs", "/sys", kernel, ""),
        ("devtmpfs", "/dev", device, "mode=755"),
        ("devpts", "/dev/pts", device | MsFlags::MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", data, "mode=1777"),
        ("mqueue", "/dev/mqueue", kernel, ""),
        ("tmpfs", "/run", data, "mode=755,size=20%"),
        ("tmpfs", SPRITE_DIR, data, "mode=755,size=16m"),
    ] {
        mount_new(kind, target, kind, flags, options).map_err(failed(target))?;
    }
    // These two are mounted by `sprite-init`, which has the right namespaces; their folders have to be there.
    for folder in ["/proc", "/sys/fs/cgroup", "/tmp"] {
        fs::create_dir_all(folder).map_err(failed(folder))?;
    }
    for folder in ["/tmp", "/run/lock"] {
        let made =
            fs::create_dir_all(folder).and_then(|()| fs::set_permissions(folder, fs::Permissions::from_mode(0o1777)));
        made.map_err(failed(folder))?;
    }
    Ok(())
}

fn sprite_folder(binary: &OwnedFd) -> Result<(), StartError> {
    let root = Path::new(SPRITE_DIR);
    let make = || -> io::Result<()> {
        for folder in ["bin", "etc", "logs", "checkpoints"] {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::write(root.join("version.txt"), format!("{}\n", proto::VERSION))?;
        File::create(SPRITE_ENV)?;
        sys::attach_mount(binary, &c_string(SPRITE_ENV)?)?;
        // It is the file that PID 1 runs from.
        let read_only =
            MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        Ok(mount(None::<&str>, SPRITE_ENV, None::<&str>, read_only, None::<&str>)?)
    };
    make().map_err(failed(SPRITE_DIR))
}

/// The first child of this thread becomes PID 1 of the new pid namespace.
fn start_init(reaper: &Reaper, cgroup: OwnedFd) -> Result<KillOnDrop, StartError> {
    let (mut said, stdout) = pipe().map_err(failed("pipe"))?;
    let null = || fs::OpenOptions::new().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let console = || fs::OpenOptions::new().write(true).open("/dev/console").map(OwnedFd::from);
    let program = Program {
        candidates: vec![c_string(SPRITE_ENV).map_err(failed("init"))?],
        argv: vec![c_string(INIT_NAME).map_err(failed("init"))?],
        env: Vec::new(),
        dir: Some(c"/".to_owned()),
        stdin: null().map_err(failed("/dev/null"))?,
        stdout,
        stderr: console().or_else(|_none| null()).map_err(failed("/dev/null"))?,
        tty: false,
        user: Credentials::root(),
        cgroup: Some(cgroup),
        oom_score_adj: b"-1000",
        nice: 0,
    };
    let (child, report) = spawn::start(reaper, &program).map_err(failed("init"))?;
    let init = KillOnDrop::new(child);
    // Its end of the pipe is in the child now.
    drop(program);
    let mut bytes = Vec::new();
    File::from(report).read_to_end(&mut bytes).map_err(failed("init"))?;
    match spawn::parse_report(&bytes) {
        Report::Running { .. } => {}
        Report::Failed { step, errno } => {
            return Err(StartError::Init(format!("{step:?}: {}", io::Error::from_raw_os_error(errno))));
        }
        Report::Nothing => return Err(StartError::Init("it ended at once".into())),
    }
    let mut answer = String::new();
    said.read_to_string(&mut answer).map_err(failed("init"))?;
    if answer != super::init::READY {
        return Err(StartError::Init(answer));
    }
    let cgroups = File::open("/proc/1/ns/cgroup").map_err(failed("cgroup namespace"))?;
    setns(&cgroups, CloneFlags::CLONE_NEWCGROUP).map_err(io::Error::from).map_err(failed("cgroup namespace"))?;
    Ok(init)
}

fn pipe() -> io::Result<(File, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    Ok((read.into(), write))
}
