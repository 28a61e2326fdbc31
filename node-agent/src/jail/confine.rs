//! Descriptors, limits, user and capabilities of a jailed process.

#![expect(unsafe_code, reason = "prctl, close_range and fork hooks have no safe wrapper")]

use std::{
    io,
    os::{
        fd::{BorrowedFd, RawFd},
        unix::fs::MetadataExt as _,
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};

/// QEMU opens a handful of sockets and files.
const OPEN_FILES_MAX: u64 = 1024;
/// Threads of one VM: vCPUs, I/O workers, main loop.
const TASKS_MAX: u64 = 512;
/// Above the kernel's last capability; the kernel says where the real end is.
const CAPABILITIES_MAX: libc::c_ulong = 64;

/// Lets the child of `command` keep `fds` open under the same numbers.
pub(super) fn inherit(command: &mut tokio::process::Command, fds: Vec<RawFd>) {
    let hook = move || {
        for fd in &fds {
            // SAFETY: the caller of `spawn` keeps the descriptors open until the child has been started.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the hook makes only fcntl calls and neither allocates nor locks.
    unsafe { command.pre_exec(hook) };
}

/// Closes every descriptor above stdio that is not in `keep`.
pub(super) fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<libc::c_uint> = keep.iter().filter_map(|fd| libc::c_uint::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep.into_iter().filter(|fd| *fd >= 3).chain([libc::c_uint::MAX]) {
        if fd > from {
            let last = if fd == libc::c_uint::MAX { fd } else { fd - 1 };
            // SAFETY: takes integers. The descriptors closed here belong to nobody: this process was just started, or has forked to become the watcher.
            Errno::result(unsafe { libc::close_range(from, last, 0) })?;
        }
        from = fd.saturating_add(1);
    }
    Ok(())
}

/// stdin, stdout and stderr to nowhere.
pub(super) fn silence_stdio() -> io::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

pub(super) fn limit_resources() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES_MAX, OPEN_FILES_MAX)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NPROC, TASKS_MAX, TASKS_MAX)?;
    Ok(())
}

/// The last step before QEMU is executed: its own user, no groups but that of `/dev/kvm`, no capabilities now or ever.
pub(super) fn drop_privileges(uid: u32, gid: u32, kvm: bool) -> io::Result<()> {
    for capability in 0..CAPABILITIES_MAX {
        // SAFETY: PR_CAPBSET_DROP takes an integer.
        match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
            Ok(_) => {}
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    let groups = if kvm { vec![Gid::from_raw(std::fs::metadata("/dev/kvm")?.gid())] } else { Vec::new() };
    setgroups(&groups)?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    prctl::set_no_new_privs()?;
    Ok(())
}
