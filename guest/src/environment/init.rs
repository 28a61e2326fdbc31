//! `sprite-init`, PID 1 of the environment: mounts what needs its namespaces, then reaps orphans until it is killed.
//!
//! It holds no open file of the volume and does nothing for users: commands are started by the machine's PID 1.

use std::{fs, io, path::Path};

use nix::{
    errno::Errno,
    mount::MsFlags,
    sched::{CloneFlags, unshare},
    sys::{
        signal::{SigSet, Signal},
        wait::wait,
    },
};

use crate::{cgroup, init::mount_new, log};

/// What it writes to its standard output when all is arranged; anything else is what went wrong.
pub(super) const READY: &str = "ready";

pub(crate) fn run() -> ! {
    let (answer, code) = match arrange() {
        Ok(()) => (READY.to_owned(), 0),
        Err(error) => (error.to_string(), 1),
    };
    let mut stdout = io::stdout();
    drop(io::Write::write_all(&mut stdout, answer.as_bytes()).and_then(|()| io::Write::flush(&mut stdout)));
    if let Err(error) = close_stdout() {
        log!("sprite-init cannot close its output: {error}");
        std::process::exit(1);
    }
    if code != 0 {
        std::process::exit(code);
    }
    reap()
}

fn arrange() -> io::Result<()> {
    let blocked: SigSet = Signal::SIGCHLD.into();
    blocked.thread_block()?;
    let kernel = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let told = |what: &'static str| move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
    mount_new("proc", "/proc", "proc", kernel, "").map_err(told("/proc"))?;
    unshare(CloneFlags::CLONE_NEWCGROUP).map_err(io::Error::from).map_err(told("cgroup namespace"))?;
    mount_new("cgroup2", cgroup::ROOT, "cgroup2", kernel, "").map_err(told("cgroups"))?;
    let root = Path::new(cgroup::ROOT);
    for group in [cgroup::INIT, cgroup::SESSIONS] {
        fs::create_dir_all(root.join(group)).map_err(told("cgroups"))?;
    }
    fs::write(root.join(cgroup::INIT).join("cgroup.procs"), "0").map_err(told("cgroups"))?;
    cgroup::enable_controllers(root).map_err(told("controllers"))
}

fn close_stdout() -> io::Result<()> {
    let null = fs::OpenOptions::new().write(true).open("/dev/null")?;
    Ok(nix::unistd::dup2_stdout(&null)?)
}

fn reap() -> ! {
    let children: SigSet = Signal::SIGCHLD.into();
    loop {
        if wait() == Err(Errno::ECHILD) {
            // SIGCHLD is blocked, so that one that came before this call is not lost.
            let _which: Result<Signal, Errno> = children.wait();
        }
    }
}
