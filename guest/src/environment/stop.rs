//! Ending an environment, and the proof that nothing holds its disk (ruling 15).
//!
//! Only with the proof may the host put other content under the living VM: with a holder of the raw device the guest has been seen to read old content.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    mount::{MntFlags, umount2},
    sys::signal::Signal,
};

use super::{DEVICE, Environment, VOLUME, is_mounted, lock};
use crate::{
    init::{c_string, pause},
    log, sys,
};

/// Between two attempts to unmount.
const RETRY: Duration = Duration::from_millis(5);
/// Processes named in an answer.
const NAMED_MAX: usize = 5;

/// Whether the disk is free, and if not, who holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stopped {
    pub clean: bool,
    pub holder: String,
}

impl Stopped {
    fn held(holder: impl Into<String>) -> Self {
        Self { clean: false, holder: holder.into() }
    }
}

impl Environment {
    /// The caller holds `change`.
    pub(super) async fn stop_now(&self, grace: Duration) -> Stopped {
        let deadline = Instant::now() + grace;
        let running = lock(&self.running).take();
        let swaps = tokio::task::spawn_blocking(swap_areas).await.unwrap_or_default();
        if let Some(running) = &running {
            if let Err(error) = running.init.signal(Signal::SIGKILL) {
                log!("cannot end the environment: {error}");
            }
            drop(lock(&running.jobs).take());
            drop(lock(&running.volume).take());
            let ended = tokio::time::timeout_at(deadline.into(), running.init.ended()).await;
            if ended.is_err() {
                *lock(&self.failed) = true;
                let names = tokio::task::spawn_blocking(stuck_processes).await.unwrap_or_default();
                return Stopped::held(format!("processes that do not end: {names}"));
            }
            let thread = lock(&running.thread).take();
            if let Some(thread) = thread
                && !join(thread, deadline).await
            {
                *lock(&self.failed) = true;
                return Stopped::held("the agent's own thread in the environment");
            }
        }
        drop(running);
        let released = tokio::task::spawn_blocking(move || release(&swaps, deadline));
        // A disk that does not answer must not hold up the answer.
        let stopped = match tokio::time::timeout_at((deadline + grace / 2).into(), released).await {
            Ok(Ok(stopped)) => stopped,
            Ok(Err(error)) => Stopped::held(error.to_string()),
            Err(_elapsed) => Stopped::held("unwritten data: unmounting takes too long"),
        };
        *lock(&self.failed) = !stopped.clean;
        stopped
    }
}

async fn join(thread: std::thread::JoinHandle<()>, deadline: Instant) -> bool {
    let joined = tokio::task::spawn_blocking(move || drop(thread.join()));
    tokio::time::timeout_at(deadline.into(), joined).await.is_ok()
}

/// Takes the disk back from the kernel, and proves it.
fn release(swaps: &[PathBuf], deadline: Instant) -> Stopped {
    for area in swaps {
        switch_swap_off(area);
    }
    detach_loops();
    while is_mounted(Path::new(VOLUME)) {
        match umount2(VOLUME, MntFlags::empty()) {
            Ok(()) => {}
            Err(Errno::EBUSY) if Instant::now() < deadline => pause(RETRY),
            Err(error) => return Stopped::held(format!("the mounted file system: {error}")),
        }
    }
    loop {
        let holder = match prove() {
            Ok(None) => return Stopped { clean: true, holder: String::new() },
            Ok(Some(holder)) => holder,
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            return Stopped::held(holder);
        }
        // Mounts of a namespace that has just gone are released a moment later.
        pause(RETRY);
    }
}

/// Files and devices that are swapped to, as paths seen from where they were switched on.
fn swap_areas() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    parse_swaps(&text)
}

fn parse_swaps(text: &str) -> Vec<PathBuf> {
    text.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(|path| unescape(path).into()).collect()
}

/// The kernel writes a blank in a path as `\040`.
fn unescape(path: &str) -> String {
    let mut out = String::new();
    let mut rest = path;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        match escape.get(1..4).and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &escape[4..];
            }
            None => {
                out.push('\\');
                rest = &escape[1..];
            }
        }
    }
    out + rest
}

fn switch_swap_off(area: &Path) {
    let device = area.starts_with("/dev");
    let path = if device { area.to_owned() } else { Path::new(VOLUME).join(area.strip_prefix("/").unwrap_or(area)) };
    let result = c_string(path.as_os_str().as_encoded_bytes()).and_then(|path| sys::swapoff(&path));
    if let Err(error) = result {
        log!("swap on {}: {error}", area.display());
    }
}

/// All loop devices but the one of the kernel's modules belong to the user.
fn detach_loops() {
    for (device, backing) in loops() {
        if backing != Path::new("/modules.squashfs") {
            let result = File::open(&device).and_then(|device| sys::detach_loop(&device));
            if let Err(error) = result {
                log!("{}: {error}", device.display());
            }
        }
    }
}

fn loops() -> Vec<(PathBuf, PathBuf)> {
    let Ok(blocks) = fs::read_dir("/sys/block") else { return Vec::new() };
    let attached = blocks.filter_map(|entry| {
        let entry = entry.ok()?;
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        Some((Path::new("/dev").join(entry.file_name()), PathBuf::from(backing.trim_end())))
    });
    attached.collect()
}

/// Writes out and drops what the kernel has cached of the disk, and looks for everything that could still use it. `None`: there is nothing.
fn prove() -> io::Result<Option<String>> {
    // Fails while it is mounted, swapped to, or claimed by the device mapper or RAID.
    let exclusive =
        fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(DEVICE);
    let device = match exclusive {
        Ok(device) => device,
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(Some(claimed())),
        Err(error) => return Err(error),
    };
    let number = device.metadata()?.rdev();
    if let Some((looped, _)) = loops().into_iter().find(|(_, backing)| is_device(backing, number)) {
        return Ok(Some(format!("{} on the raw device", looped.display())));
    }
    sys::flush_block_device(&device)?;
    drop(device);
    Ok(opener(number))
}

fn is_device(path: &Path, number: u64) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device() && metadata.rdev() == number)
}

fn claimed() -> String {
    let swapped = swap_areas().into_iter().find(|area| area.starts_with("/dev"));
    let name = Path::new(DEVICE).file_name().unwrap_or_default();
    let mapped = fs::read_dir(Path::new("/sys/block").join(name).join("holders"))
        .ok()
        .and_then(|mut holders| holders.next()?.ok());
    match (swapped, mapped) {
        (Some(area), _) => format!("swap on {}", area.display()),
        (None, Some(holder)) => format!("block device {}", holder.file_name().to_string_lossy()),
        (None, None) => "a mount in a namespace that still lives".to_owned(),
    }
}

/// A process that has the device open.
fn opener(number: u64) -> Option<String> {
    processes().into_iter().find_map(|pid| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let holds = fds.filter_map(Result::ok).any(|fd| is_device(&fd.path(), number));
        holds.then(|| format!("process {}", describe(pid)))
    })
}

fn processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// `41 (dd) in state D`.
fn describe(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let name = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')'));
    match name {
        Some((name, rest)) => format!("{pid} ({name}) in state {}", rest.trim_start().chars().next().unwrap_or('?')),
        None => pid.to_string(),
    }
}

/// Processes of the environment that are still there.
fn stuck_processes() -> String {
    let inside = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("NSpid:").is_some_and(|pids| pids.split_whitespace().count() > 1))
    };
    let stuck: Vec<String> = processes().into_iter().filter(inside).take(NAMED_MAX).map(describe).collect();
    stuck.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_areas_are_read_as_the_kernel_writes_them() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/swap\\040file                            file\t\t1048572\t\t0\t\t-2\n/dev/loop1 partition 1 0 -3\n";
        assert_eq!(parse_swaps(text), [PathBuf::from("/swap file"), PathBuf::from("/dev/loop1")]);
        assert!(parse_swaps("Filename Type\n").is_empty());
        assert_eq!(unescape("a\\b\\"), "a\\b\\");
    }

    #[test]
    fn processes_are_described_with_their_state() {
        let text = describe(std::process::id());
        assert!(text.starts_with(&format!("{} (", std::process::id())), "{text}");
        assert!(text.contains(") in state "), "{text}");
    }
}
