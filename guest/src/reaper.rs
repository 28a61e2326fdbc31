//! Reaps children: the ones PID 1 started, whose exit somebody waits for, and orphans, which nobody does.
//!
//! One thread of its own waits for ended children. A child is registered under the lock under which it is forked, and reaped under the same lock, so
//! that its exit always finds whoever waits, and a signal never goes to a number that somebody else has by now.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    errno::Errno,
    libc::pid_t,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::sync::watch;

use crate::{log, sys};

/// Without children the thread looks again after this; a fork wakes it at once.
const IDLE: Duration = Duration::from_secs(5);

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    /// As a shell's `$?`.
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    children: Mutex<HashMap<pid_t, watch::Sender<Option<Exit>>>>,
    forked: Condvar,
}

/// A child that was started here.
#[derive(Clone, Debug)]
pub(crate) struct Child {
    /// As PID 1 sees it.
    pub pid: pid_t,
    exit: watch::Receiver<Option<Exit>>,
    reaper: Reaper,
}

impl Child {
    /// Waits for its end. Cancel safe.
    pub(crate) async fn ended(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::Signal(9)),
            // The reaper never drops a sender without an answer.
            Err(_closed) => Exit::Signal(9),
        }
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Sends a signal to the process alone. One that has ended is fine.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        self.send(Pid::from_raw(self.pid), signal)
    }

    /// Sends a signal to its process group.
    pub(crate) fn signal_group(&self, signal: Signal) -> io::Result<()> {
        self.send(Pid::from_raw(-self.pid), signal)
    }

    fn send(&self, to: Pid, signal: Signal) -> io::Result<()> {
        let children = self.reaper.children();
        if !children.contains_key(&self.pid) {
            return Ok(());
        }
        match kill(to, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A child that nobody has taken over yet. Dropped before [`KillOnDrop::keep`] it is killed: no process outlives a start that was given up.
#[derive(Debug)]
pub(crate) struct KillOnDrop {
    child: Child,
    kept: bool,
}

impl KillOnDrop {
    pub(crate) fn new(child: Child) -> Self {
        Self { child, kept: false }
    }

    pub(crate) fn child(&self) -> &Child {
        &self.child
    }

    /// From now on it lives as long as it likes.
    pub(crate) fn keep(mut self) -> Child {
        self.kept = true;
        self.child.clone()
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = self.child.signal(Signal::SIGKILL)
        {
            log!("cannot end process {}: {error}", self.child.pid);
        }
    }
}

impl Reaper {
    /// Starts the thread.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let own = reaper.clone();
        std::thread::Builder::new().name("reaper".into()).spawn(move || own.run())?;
        Ok(reaper)
    }

    fn children(&self) -> MutexGuard<'_, HashMap<pid_t, watch::Sender<Option<Exit>>>> {
        self.0.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `fork`, which returns the pid, and registers it before anybody can reap it.
    pub(crate) fn fork(&self, fork: impl FnOnce() -> io::Result<pid_t>) -> io::Result<Child> {
        let mut children = self.children();
        let pid = fork()?;
        let (sender, exit) = watch::channel(None);
        children.insert(pid, sender);
        self.0.forked.notify_one();
        Ok(Child { pid, exit, reaper: self.clone() })
    }

    fn run(&self) {
        loop {
            match sys::peek_ended_child() {
                Ok(Some(pid)) => self.reap(pid),
                Ok(None) => {
                    let children = self.children();
                    if children.is_empty() {
                        drop(self.0.forked.wait_timeout(children, IDLE));
                    }
                }
                Err(error) => log!("cannot wait for children: {error}"),
            }
        }
    }

    fn reap(&self, pid: pid_t) {
        let mut children = self.children();
        let exit = match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal as i32),
            Ok(_) => return,
            Err(error) => {
                log!("cannot reap process {pid}: {error}");
                // A real-time signal, which nix does not know: it is reaped all the same.
                Exit::Signal(9)
            }
        };
        if let Some(waiting) = children.remove(&pid) {
            waiting.send_replace(Some(exit));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;
    use crate::spawn::{self, Credentials, Program, Report, Step};

    fn program(candidates: &[&str], argv: &[&str], dir: &str) -> Program {
        let null = || std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap().into();
        let strings = |texts: &[&str]| texts.iter().map(|text| CString::new(*text).unwrap()).collect();
        Program {
            candidates: strings(candidates),
            argv: strings(argv),
            env: strings(&["PATH=/bin:/usr/bin"]),
            dir: Some(CString::new(dir).unwrap()),
            stdin: null(),
            stdout: null(),
            stderr: null(),
            tty: false,
            user: Credentials {
                uid: nix::unistd::getuid().as_raw(),
                gid: nix::unistd::getgid().as_raw(),
                groups: vec![],
            },
            cgroup: None,
            oom_score_adj: b"0",
            nice: 0,
        }
    }

    /// One test, because the reaper waits for every child of the test process.
    #[tokio::test]
    async fn children_are_started_reported_and_reaped() {
        let reaper = Reaper::start().unwrap();
        let run = async |program: Program| {
            let (child, report) = spawn::start(&reaper, &program).unwrap();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut std::fs::File::from(report), &mut bytes).unwrap();
            let exit = tokio::time::timeout(Duration::from_secs(10), child.ended()).await.unwrap();
            (spawn::parse_report(&bytes), exit)
        };
        let (report, exit) = run(program(&["/no/such/sh", "/bin/sh"], &["sh", "-c", "exit 42"], "/")).await;
        assert!(matches!(report, Report::Running { candidate: 1, .. }), "{report:?}");
        assert_eq!(exit, Exit::Code(42));
        let (_, exit) = run(program(&["/bin/sh"], &["sh", "-c", "kill -TERM $$"], "/")).await;
        assert_eq!(exit.code(), 128 + 15);
        let (report, _) = run(program(&["/bin/sh"], &["sh"], "/no/such/folder")).await;
        assert_eq!(report, Report::Failed { step: Step::Folder, errno: Errno::ENOENT as i32 });
        let (report, _) = run(program(&["/etc/passwd"], &["passwd"], "/")).await;
        assert_eq!(report, Report::Failed { step: Step::Exec, errno: Errno::EACCES as i32 });
        let (report, _) = run(program(&["/no/such"], &["such"], "/")).await;
        assert_eq!(report, Report::Failed { step: Step::Exec, errno: Errno::ENOENT as i32 });

        // Its taker has gone, as a start's does whose caller broke off.
        let sleeper = || spawn::start(&reaper, &program(&["/bin/sleep"], &["sleep", "1000"], "/")).unwrap().0;
        let exit = async |child: &Child| tokio::time::timeout(Duration::from_secs(10), child.ended()).await.unwrap();
        let (given_up, kept) = (sleeper(), sleeper());
        let (ready, taker) = tokio::sync::oneshot::channel();
        drop(taker);
        drop(ready.send(KillOnDrop::new(given_up.clone())));
        assert_eq!(exit(&given_up).await, Exit::Signal(9));
        let kept = KillOnDrop::new(kept).keep();
        assert_eq!(kept.exit(), None, "a child that was taken over lives on");
        kept.signal(Signal::SIGTERM).unwrap();
        assert_eq!(exit(&kept).await, Exit::Signal(15));
    }
}
