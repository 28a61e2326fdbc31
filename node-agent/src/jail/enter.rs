//! The steps from an ordinary process to a jailed QEMU. Single-threaded.

#![expect(unsafe_code, reason = "fork")]

use std::{
    fs::File,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::{ForkResult, Pid, fork, pipe2, setsid},
};

use super::{JailSpec, Jailed, cgroup::Group, confine, root, watcher};

/// Which step of building the jail failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnterError {
    #[error("cannot read the spec {path}: {source}")]
    Spec { path: PathBuf, source: io::Error },
    #[error("cannot {what}: {source}")]
    Step { what: &'static str, source: io::Error },
    #[error("cannot show {path} in the jail: {source}")]
    Mount { path: PathBuf, source: io::Error },
}

/// Names a step for its error.
pub(super) fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> EnterError {
    move |error| EnterError::Step { what, source: error.into() }
}

/// Builds the jail around this process, starts watcher and QEMU, and returns in the process that is no longer needed.
pub(super) fn enter(path: &Path) -> Result<(), EnterError> {
    let bytes = std::fs::read(path).map_err(|source| EnterError::Spec { path: path.to_owned(), source })?;
    let spec: JailSpec = serde_json::from_slice(&bytes)
        .map_err(|error| EnterError::Spec { path: path.to_owned(), source: error.into() })?;
    // Fails only for the leader of a session, which is just as good.
    setsid().ok();
    confine::close_others(&spec.keep_fds).map_err(step("close inherited descriptors"))?;
    let netns = spec.netns.as_ref().map(File::open).transpose().map_err(step("open the network namespace"))?;
    let group = Group::join(&spec.limits);
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("make a mount namespace"))?;
    root::build(&spec)?;
    match netns {
        Some(netns) => setns(netns, CloneFlags::CLONE_NEWNET).map_err(step("enter the network namespace"))?,
        None => unshare(CloneFlags::CLONE_NEWNET).map_err(step("make an empty network namespace"))?,
    }
    confine::limit_resources().map_err(step("set resource limits"))?;
    start_watcher(&spec, group)
}

/// The watcher is a grandchild of the node agent, so that init reaps it and nobody's end ends it.
fn start_watcher(spec: &JailSpec, group: Group) -> Result<(), EnterError> {
    let (news, tell) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(step("make a pipe"))?;
    // SAFETY: the process has one thread, so the child may do anything.
    match unsafe { fork() }.map_err(step("fork the watcher"))? {
        ForkResult::Parent { .. } => {
            drop(tell);
            let text = io::read_to_string(File::from(news)).map_err(step("hear from the watcher"))?;
            match text.strip_prefix("ok ") {
                Some(jailed) => {
                    io::stdout().write_all(jailed.as_bytes()).map_err(step("report to the node agent"))?;
                    Ok(())
                }
                None => Err(EnterError::Step { what: "start QEMU", source: io::Error::other(text) }),
            }
        }
        ForkResult::Child => {
            drop(news);
            let code = match run_watcher(spec, group, tell) {
                Ok(()) => 0,
                Err(_told) => 1,
            };
            std::process::exit(code)
        }
    }
}

fn run_watcher(spec: &JailSpec, group: Group, tell: OwnedFd) -> io::Result<()> {
    let mut tell = File::from(tell);
    confine::silence_stdio()?;
    let started = start_qemu(spec);
    let (qemu, log) = match started {
        Ok(started) => started,
        Err(error) => {
            write!(tell, "{error}")?;
            group.remove();
            return Err(error);
        }
    };
    let jailed = Jailed {
        qemu_pid: qemu.as_raw(),
        watcher_pid: Pid::this().as_raw(),
        cgroups: group.controllers().map(str::to_owned).collect(),
    };
    write!(tell, "ok {}", serde_json::to_string(&jailed)?)?;
    drop(tell);
    confine::close_others(&watcher::descriptors(&log, &group))?;
    let watched = watcher::watch(spec, qemu, log);
    group.remove();
    watched
}

/// Forks and executes QEMU. Returns when it has been executed, with the reading end of its output.
fn start_qemu(spec: &JailSpec) -> io::Result<(Pid, File)> {
    let (log, output) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let mut command = Command::new(&spec.program);
    command.args(&spec.args).env_clear().current_dir("/");
    command.stdin(std::process::Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let (uid, gid, kvm) = (spec.uid, spec.gid, spec.kvm);
    // SAFETY: the process has one thread, so the hook may allocate and take locks.
    unsafe { command.pre_exec(move || confine::drop_privileges(uid, gid, kvm)) };
    // `spawn` returns after the program was executed, with the error if it was not. The child is waited for by its pid.
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    Ok((Pid::from_raw(pid), File::from(log)))
}
