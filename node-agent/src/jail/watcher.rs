//! QEMU's parent: writes down how it ended, keeps its log short, and stops it while the node agent gives no sign of life.

#![expect(unsafe_code, reason = "pidfd_open has no safe wrapper here")]

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{Exit, JailSpec, Watchdog, boottime_ms, cgroup::Group};

/// What QEMU may say altogether; a guest can provoke messages without end.
const LOG_BYTES_MAX: usize = 256 << 10;
/// How often the heartbeat is looked at.
const LOOK_MS: u16 = 500;

/// Descriptors the watcher needs.
pub(super) fn descriptors(log: &File, group: &Group) -> Vec<RawFd> {
    group.descriptors().chain([log.as_raw_fd()]).collect()
}

/// Watches QEMU until it ends.
pub(super) fn watch(spec: &JailSpec, qemu: Pid, output: File) -> io::Result<()> {
    let handle = pidfd(qemu)?;
    let mut log = Log::create(&spec.log_path(), output)?;
    let mut dog = spec.watchdog.as_ref().map(Dog::new);
    let timeout = if dog.is_some() { PollTimeout::from(LOOK_MS) } else { PollTimeout::NONE };
    loop {
        let mut polled = vec![PollFd::new(handle.as_fd(), PollFlags::POLLIN)];
        if let Some(output) = &log.output {
            polled.push(PollFd::new(output.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ended = polled[0].any() == Some(true);
        if polled.get(1).is_some_and(|output| output.any() == Some(true)) {
            log.take();
        }
        if let Some(dog) = &mut dog {
            dog.look(qemu);
        }
        if ended {
            // What QEMU said last is worth most; the pipe's writer is gone, so this ends.
            while log.output.is_some() {
                log.take();
            }
            return write_exit(spec, waitpid(qemu, None)?);
        }
    }
}

fn write_exit(spec: &JailSpec, status: WaitStatus) -> io::Result<()> {
    let (code, signal) = match status {
        WaitStatus::Exited(_, code) => (Some(code), None),
        WaitStatus::Signaled(_, signal, _) => (None, Some(signal as i32)),
        _ => (None, None),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let exit = Exit { code, signal, ended_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX) };
    let unfinished = spec.run.join("exit.json.tmp");
    remove_if_there(&unfinished)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&unfinished)?;
    file.write_all(&serde_json::to_vec(&exit)?)?;
    file.sync_all()?;
    fs::rename(unfinished, spec.exit_path())
}

pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and returns a new descriptor or an error.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: `fd` was just returned by the kernel and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// QEMU's output and where it goes.
struct Log {
    /// `None` after its end.
    output: Option<File>,
    file: File,
    room_bytes: usize,
}

impl Log {
    fn create(path: &Path, output: File) -> io::Result<Self> {
        remove_if_there(path)?;
        // The folder belongs to QEMU's user, so a name in it is not to be trusted: the file is made here, never opened.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
        Ok(Self { output: Some(output), file, room_bytes: LOG_BYTES_MAX })
    }

    /// Moves one piece. Behind the limit output is read and dropped, so that QEMU never blocks on it.
    fn take(&mut self) {
        let Some(output) = &mut self.output else { return };
        let mut piece = [0; 4096];
        match output.read(&mut piece) {
            Ok(0) | Err(_) => self.output = None,
            Ok(len) => {
                let kept = len.min(self.room_bytes);
                self.room_bytes -= kept;
                // A full disk must not end the VM.
                drop(self.file.write_all(&piece[..kept]));
            }
        }
    }
}

/// The watchdog of ruling 19.
struct Dog<'a> {
    spec: &'a Watchdog,
    /// Last sign of life, in milliseconds since boot. At the start the VM has just been started by a living node agent.
    last_ms: u64,
    stopped: bool,
}

impl<'a> Dog<'a> {
    fn new(spec: &'a Watchdog) -> Self {
        Self { spec, last_ms: boottime_ms(), stopped: false }
    }

    fn look(&mut self, qemu: Pid) {
        let heartbeat = fs::read_to_string(&self.spec.heartbeat).ok().and_then(|text| text.trim().parse().ok());
        self.last_ms = self.last_ms.max(heartbeat.unwrap_or(0));
        let stale = boottime_ms().saturating_sub(self.last_ms) > self.spec.ttl_ms;
        if stale == self.stopped {
            return;
        }
        let signal = if stale { Signal::SIGSTOP } else { Signal::SIGCONT };
        if kill(qemu, signal).is_ok() {
            self.stopped = stale;
        }
    }
}
