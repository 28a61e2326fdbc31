//! Starting a program by fork and exec, with everything prepared before the fork.
//!
//! PID 1 has many threads, so that between fork and exec only calls that are safe in a signal handler are allowed: no allocation, no locks. The standard
//! library's `Command` cannot do what a session needs in the right order (cgroup, terminal, user, folder) and blocks its caller until exec has
//! happened; a user's file system that hangs must not stop PID 1, so here the parent only reads a pipe.
//!
//! ```text
//!  parent: prepare strings ─▶ fork (registered with the reaper) ─▶ returns the report pipe
//!  child:  own pid ─▶ cgroup, session, fds, terminal, limits, user, folder ─▶ for each candidate: its index, execve ─▶ failure: step and errno
//! ```
//! The report is a sequence of native `i32`; its end without a failure means that the last candidate runs.

#![expect(unsafe_code, reason = "fork and exec; each block says why it is sound")]

use std::{
    ffi::{CString, c_char},
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use nix::libc;

use crate::reaper::{Child, Reaper};

/// Open files a session may have: soft as on any Debian but enough for a server, hard as systemd sets it.
const OPEN_FILES_SOFT: u64 = 65_536;
const OPEN_FILES_HARD: u64 = 1_048_576;
/// Marks the failure record; candidates and pids are never negative.
const FAILED: i32 = -1;

/// What to run. Paths are seen from the calling thread's root.
#[derive(Debug)]
pub(crate) struct Program {
    /// Tried in order, as a shell does along PATH.
    pub candidates: Vec<CString>,
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    /// `None`: stay.
    pub dir: Option<CString>,
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    /// Stdin is a terminal that becomes the controlling one.
    pub tty: bool,
    pub user: Credentials,
    /// An open `cgroup.procs`, which the child enters.
    pub cgroup: Option<OwnedFd>,
    /// The kernel's preference for killing it when memory is short.
    pub oom_score_adj: &'static [u8],
    pub nice: libc::c_int,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub uid: libc::uid_t,
    pub gid: libc::gid_t,
    pub groups: Vec<libc::gid_t>,
}

impl Credentials {
    pub(crate) fn root() -> Self {
        Self { uid: 0, gid: 0, groups: vec![0] }
    }
}

/// Steps of the child that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Setup,
    User,
    Folder,
    Exec,
}

impl Step {
    const ALL: [Self; 4] = [Self::Setup, Self::User, Self::Folder, Self::Exec];

    fn number(self) -> i32 {
        match self {
            Self::Setup => 0,
            Self::User => 1,
            Self::Folder => 2,
            Self::Exec => 3,
        }
    }
}

/// What a child reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// `pid` is its number in its own namespace.
    Running {
        pid: i32,
        candidate: usize,
    },
    Failed {
        step: Step,
        errno: i32,
    },
    /// It died before it could say anything.
    Nothing,
}

/// Reads a whole report.
pub(crate) fn parse_report(bytes: &[u8]) -> Report {
    let mut records = bytes.chunks_exact(4).map(|four| i32::from_ne_bytes([four[0], four[1], four[2], four[3]]));
    let Some(pid) = records.next() else { return Report::Nothing };
    let mut candidate = None;
    while let Some(record) = records.next() {
        if record == FAILED {
            let (step, errno) = (records.next(), records.next());
            let step = Step::ALL.into_iter().find(|known| Some(known.number()) == step);
            return match (step, errno) {
                (Some(step), Some(errno)) => Report::Failed { step, errno },
                _ => Report::Nothing,
            };
        }
        candidate = usize::try_from(record).ok();
    }
    match candidate {
        Some(candidate) => Report::Running { pid, candidate },
        None => Report::Nothing,
    }
}

/// Everything the child needs, as pointers that stay valid until it execs: they belong to the parent's copied memory.
struct Prepared<'a> {
    candidates: Vec<*const c_char>,
    argv: Vec<*const c_char>,
    /// For a script without `#!`: `/bin/sh`, its path, its arguments. The path is filled in by the child.
    sh_argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    program: &'a Program,
    report: RawFd,
}

/// Forks. The child runs in the pid namespace that the calling thread has chosen for its children.
///
/// # Errors
///
/// When there is no process or pipe to be had; everything later is in the report.
pub(crate) fn start(reaper: &Reaper, program: &Program) -> io::Result<(Child, OwnedFd)> {
    let (report, to_parent) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let pointers =
        |strings: &[CString]| -> Vec<*const c_char> { strings.iter().map(|string| string.as_ptr()).collect() };
    let terminated = |mut pointers: Vec<*const c_char>| {
        pointers.push(std::ptr::null());
        pointers
    };
    let mut sh_argv = vec![c"/bin/sh".as_ptr(), std::ptr::null()];
    sh_argv.extend(program.argv.iter().skip(1).map(|string| string.as_ptr()));
    let prepared = Prepared {
        candidates: pointers(&program.candidates),
        argv: terminated(pointers(&program.argv)),
        sh_argv: terminated(sh_argv),
        env: terminated(pointers(&program.env)),
        program,
        report: to_parent.as_raw_fd(),
    };
    let child = reaper.fork(|| {
        // SAFETY: the child of a process with threads does only what a signal handler may do: `child` keeps to that.
        match unsafe { libc::fork() } {
            0 => child(prepared),
            pid if pid < 0 => Err(io::Error::last_os_error()),
            pid => Ok(pid),
        }
    })?;
    Ok((child, report))
}

/// The child's life until exec. Only raw kernel calls on prepared memory.
fn child(mut prepared: Prepared<'_>) -> ! {
    // SAFETY: calls without memory arguments, or with pointers into `prepared`, which lives until exec replaces it.
    unsafe {
        say(prepared.report, &[libc::getpid()]);
        let (step, errno) = match set_up(&prepared) {
            Err(failed) => failed,
            Ok(()) => (Step::Exec, run(&mut prepared)),
        };
        say(prepared.report, &[FAILED, step.number(), errno]);
        libc::_exit(127)
    }
}

unsafe fn say(report: RawFd, records: &[i32]) {
    // SAFETY: the slice is valid for its length. A parent that has gone is no reason to stop.
    unsafe { libc::write(report, records.as_ptr().cast(), size_of_val(records)) };
}

fn errno() -> i32 {
    // `last_os_error` reads errno and allocates nothing.
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

unsafe fn set_up(prepared: &Prepared<'_>) -> Result<(), (Step, i32)> {
    let program = prepared.program;
    let check = |step: Step, result: libc::c_long| if result < 0 { Err((step, errno())) } else { Ok(()) };
    // SAFETY: see `child`.
    unsafe {
        if let Some(cgroup) = &program.cgroup {
            check(Step::Setup, libc::write(cgroup.as_raw_fd(), b"0".as_ptr().cast(), 1) as libc::c_long)?;
        }
        libc::setsid();
        let adj = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if adj >= 0 {
            libc::write(adj, program.oom_score_adj.as_ptr().cast(), program.oom_score_adj.len());
        }
        for (fd, number) in [(&program.stdin, 0), (&program.stdout, 1), (&program.stderr, 2)] {
            check(Step::Setup, libc::dup2(fd.as_raw_fd(), number).into())?;
        }
        if program.tty {
            check(Step::Setup, libc::ioctl(0, libc::TIOCSCTTY, 0).into())?;
        }
        let limit = libc::rlimit { rlim_cur: OPEN_FILES_SOFT, rlim_max: OPEN_FILES_HARD };
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        libc::setpriority(libc::PRIO_PROCESS, 0, program.nice);
        // The runtime ignores SIGPIPE, and an ignored signal stays ignored over exec.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::umask(0o022);
        // The raw calls: those of the C library want to tell all threads, which the child does not have.
        let user = &program.user;
        check(Step::User, libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()))?;
        check(Step::User, libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid))?;
        check(Step::User, libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid))?;
        if let Some(dir) = &program.dir {
            check(Step::Folder, libc::chdir(dir.as_ptr()).into())?;
        }
    }
    Ok(())
}

/// Tries the candidates; returns only with the reason why none runs.
unsafe fn run(prepared: &mut Prepared<'_>) -> i32 {
    let mut reason = libc::ENOENT;
    for index in 0..prepared.candidates.len() {
        let candidate = prepared.candidates[index];
        // SAFETY: see `child`; all arrays end with null.
        unsafe {
            say(prepared.report, &[i32::try_from(index).unwrap_or(i32::MAX)]);
            libc::execve(candidate, prepared.argv.as_ptr(), prepared.env.as_ptr());
            match errno() {
                libc::ENOEXEC => {
                    prepared.sh_argv[1] = candidate;
                    libc::execve(c"/bin/sh".as_ptr(), prepared.sh_argv.as_ptr(), prepared.env.as_ptr());
                    return errno();
                }
                // As a shell: go on, but remember that there was something.
                libc::EACCES => reason = libc::EACCES,
                libc::ENOENT | libc::ENOTDIR => {}
                other => return other,
            }
        }
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(records: &[i32]) -> Vec<u8> {
        records.iter().flat_map(|record| record.to_ne_bytes()).collect()
    }

    #[test]
    fn a_report_says_which_candidate_runs_or_what_failed() {
        assert_eq!(parse_report(&records(&[7, 0, 1])), Report::Running { pid: 7, candidate: 1 });
        assert_eq!(parse_report(&records(&[7, 0, -1, 3, 2])), Report::Failed { step: Step::Exec, errno: 2 });
        assert_eq!(parse_report(&records(&[7, -1, 2, 13])), Report::Failed { step: Step::Folder, errno: 13 });
        for incomplete in [&[][..], &[7], &[7, -1], &[7, -1, 99, 1]] {
            assert_eq!(parse_report(&records(incomplete)), Report::Nothing, "{incomplete:?}");
        }
    }
}
