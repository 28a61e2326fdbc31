//! The file system below the data folder.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::Path,
};

use nix::sys::statvfs::statvfs;

use super::Finding;

/// Image, golden snapshots and a first sprite.
const FREE_BYTES_MIN: u64 = 8 << 30;

pub(super) fn examine(data: &Path) -> Vec<Finding> {
    // Nothing may exist yet: look at the nearest folder that does.
    let folder = data.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    vec![space(folder), reflink(folder)]
}

fn space(folder: &Path) -> Finding {
    const CHECK: &str = "disk space";
    match statvfs(folder) {
        Ok(fs) => {
            let bytes = fs.blocks_available() * fs.fragment_size();
            let found = format!("{} GiB free at {}", bytes >> 30, folder.display());
            if bytes >= FREE_BYTES_MIN {
                Finding::ok(CHECK, found)
            } else {
                Finding::warn(CHECK, found, format!("keep {} GiB free", FREE_BYTES_MIN >> 30))
            }
        }
        Err(error) => Finding::fail(CHECK, format!("{}: {error}", folder.display()), "choose another --data folder"),
    }
}

fn reflink(folder: &Path) -> Finding {
    const CHECK: &str = "reflink";
    match try_reflink(folder) {
        Ok(()) => Finding::ok(CHECK, format!("{} shares blocks between copies", folder.display())),
        Err(Reflink::Unsupported) => Finding::ok(
            CHECK,
            format!("not on {}; memory is copied from tmpfs instead, some 30 ms a VM", folder.display()),
        ),
        Err(Reflink::Failed(error)) => Finding::fail(
            CHECK,
            format!("cannot write into {}: {error}", folder.display()),
            "choose another --data folder, or run as root",
        ),
    }
}

enum Reflink {
    Unsupported,
    Failed(io::Error),
}

impl From<io::Error> for Reflink {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// Clones one small file. Both are removed again, whatever happens.
fn try_reflink(folder: &Path) -> Result<(), Reflink> {
    let (from, to) = (folder.join(".doctor-from"), folder.join(".doctor-to"));
    let outcome = (|| {
        fs::write(&from, [1; 65_536])?;
        clone_file(&File::open(&from)?, &File::create(&to)?)
    })();
    for path in [from, to] {
        // Already gone is as good; anything else was reported by the write.
        drop(fs::remove_file(path));
    }
    outcome
}

#[expect(unsafe_code, reason = "the clone ioctl has no safe wrapper")]
fn clone_file(from: &File, to: &File) -> Result<(), Reflink> {
    // SAFETY: both descriptors are open for the whole call; the ioctl takes the source by value and touches no memory of ours.
    let answer = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) };
    if answer == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EXDEV | libc::EINVAL | libc::ENOTTY) => Err(Reflink::Unsupported),
        Some(_) | None => Err(Reflink::Failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!matches!(try_reflink(folder.path()), Err(Reflink::Failed(_))));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_missing_folder_is_judged_by_its_parent() {
        let folder = tempfile::tempdir().unwrap();
        let findings = examine(&folder.path().join("not/yet/there"));
        assert!(findings[0].found.contains(&folder.path().display().to_string()), "{findings:?}");
    }
}
