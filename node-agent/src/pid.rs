//! A process that is not our child: found again after a restart, and its end noticed.
//!
//! A pid alone may name another process by the time we look; pid and start time together do not.

#![expect(unsafe_code, reason = "pidfd_open has no safe wrapper here")]

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::{Interest, unix::AsyncFd};

/// A living process, held by a pidfd.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    started: u64,
    handle: AsyncFd<OwnedFd>,
}

impl Process {
    /// Takes hold of a process that runs now.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is none.
    pub fn watch(pid: i32) -> io::Result<Self> {
        // SAFETY: the system call takes two integers and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::ESRCH) => io::ErrorKind::NotFound.into(),
                _ => error,
            });
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: `fd` was just returned by the kernel and nobody else owns it.
        let handle = unsafe { OwnedFd::from_raw_fd(fd) };
        let started = start_time(pid)?;
        // SAFETY: the descriptor is owned by the `AsyncFd` and closed with it, after it is taken out of the reactor.
        let handle = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?;
        Ok(Self { pid, started, handle })
    }

    /// Takes hold of the process only if it is the one that started at `started`.
    pub fn find(pid: i32, started: u64) -> io::Result<Self> {
        let process = Self::watch(pid)?;
        if process.started == started { Ok(process) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Start time in clock ticks since boot, as in `/proc/<pid>/stat`.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// Returns when the process has ended. Cancel safe.
    pub async fn ended(&self) {
        // A pidfd becomes readable when the process ends and stays so. An error would mean a broken reactor: then say "ended", so that nobody waits for ever.
        if let Err(error) = self.handle.readable().await {
            tracing::error!(pid = self.pid, %error, "cannot watch the process");
        }
    }

    /// Whether the process has ended by now.
    pub fn has_ended(&self) -> bool {
        let mut handle = [PollFd::new(self.handle.get_ref().as_fd(), PollFlags::POLLIN)];
        poll(&mut handle, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Sends SIGKILL and waits for the end.
    pub async fn kill(&self, limit: Duration) -> io::Result<()> {
        // SAFETY: the system call takes integers and a null pointer, which is allowed for siginfo.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.handle.get_ref().as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if sent < 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::ESRCH) {
                return Err(error);
            }
        }
        tokio::time::timeout(limit, self.ended()).await.map_err(|_elapsed| io::ErrorKind::TimedOut.into())
    }
}

/// Field 22 of `/proc/<pid>/stat`; the name in field 2 may hold anything, so fields are counted behind its closing bracket.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let behind_name = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let field = behind_name.split_ascii_whitespace().nth(19).unwrap_or_default();
    field.parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_is_found_again_only_with_its_start_time() {
        let mut child = tokio::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let process = Process::watch(pid).unwrap();
        assert!(Process::find(pid, process.started()).is_ok());
        assert!(!process.has_ended());
        assert_eq!(Process::find(pid, process.started() + 1).unwrap_err().kind(), io::ErrorKind::NotFound);
        let reaper = tokio::spawn(async move { child.wait().await });
        process.kill(Duration::from_secs(10)).await.unwrap();
        assert!(process.has_ended());
        reaper.await.unwrap().unwrap();
        assert_eq!(Process::watch(pid).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
