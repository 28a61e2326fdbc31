//! The jail's file system: an empty tmpfs with read-only binds of what QEMU needs.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{chdir, pivot_root},
};

use super::{
    JailSpec,
    enter::{EnterError, step},
};

/// Mount point of the new root; only this process ever sees anything on it.
const STAGE: &str = "/run/sprites-jail";
/// Programs and libraries. On most systems all but the first are links into it.
const SYSTEM: [&str; 5] = ["/usr", "/bin", "/sbin", "/lib", "/lib64"];
/// What the dynamic loader reads.
const LOADER: [&str; 3] = ["/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/alternatives"];
const DEVICES: [&str; 2] = ["/dev/null", "/dev/urandom"];
const KVM: &str = "/dev/kvm";

/// Replaces the root of this mount namespace.
pub(super) fn build(spec: &JailSpec) -> Result<(), EnterError> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(step("make mounts private"))?;
    fs::create_dir_all(STAGE).map_err(step("make the new root's folder"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), STAGE, Some("tmpfs"), flags, Some("size=1m,mode=755")).map_err(step("mount the new root"))?;

    let read_only = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    for path in SYSTEM.iter().chain(&LOADER).map(Path::new).filter(|path| path.exists()) {
        show(path, read_only)?;
    }
    for path in program_folder(&spec.program).iter().chain(&spec.readable) {
        show(path, read_only)?;
    }
    if let Some(folder) = spec.watchdog.as_ref().and_then(|watchdog| watchdog.heartbeat.parent()) {
        // The folder, because the file is replaced by rename.
        show(folder, read_only | MsFlags::MS_NOEXEC)?;
    }
    let writable = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for path in std::iter::once(&spec.run).chain(&spec.writable) {
        show(path, writable)?;
    }
    for device in DEVICES.iter().chain(spec.kvm.then_some(&KVM)).map(Path::new) {
        show(device, MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC)?;
    }
    switch().map_err(step("switch to the new root"))
}

/// Folder of a program that is not among the system's.
fn program_folder(program: &Path) -> Option<PathBuf> {
    let among_system = SYSTEM.iter().any(|folder| program.starts_with(folder));
    if among_system { None } else { program.parent().map(Path::to_owned) }
}

/// Makes `path` visible in the new root under the same name.
fn show(path: &Path, flags: MsFlags) -> Result<(), EnterError> {
    let shown = || -> io::Result<()> {
        let target = staged(path)?;
        let kind = fs::symlink_metadata(path)?.file_type();
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        if kind.is_symlink() && SYSTEM.iter().any(|system| Path::new(system) == path) {
            return std::os::unix::fs::symlink(fs::read_link(path)?, target);
        }
        if fs::metadata(path)?.is_dir() {
            fs::create_dir_all(&target)?;
        } else if !target.exists() {
            File::create(&target)?;
        }
        let none = None::<&str>;
        mount(Some(path), &target, none, MsFlags::MS_BIND, none)?;
        // A bind takes its flags only in a second step.
        mount(none, &target, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags, none)?;
        Ok(())
    };
    shown().map_err(|source| EnterError::Mount { path: path.to_owned(), source })
}

fn staged(path: &Path) -> io::Result<PathBuf> {
    let below_root = path.strip_prefix("/").map_err(|_relative| io::Error::other("the path is not absolute"))?;
    Ok(Path::new(STAGE).join(below_root))
}

fn switch() -> io::Result<()> {
    chdir(STAGE)?;
    // The old root ends up on top of the new one and is unmounted there.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?;
    Ok(())
}
