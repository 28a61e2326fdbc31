//! What lies where under the data folder, and the lock that gives it to one process.
//!
//! ```text
//! <data>/lock        held by the running sprited; holds its pid
//!        run/        sockets and `ready`; worthless when nothing runs
//!        node/       the node agent's local state: a cache of the bucket, plus what is not yet pushed
//!        ca/         the local certificate authority
//!        token       the first API token, for `./dev env`
//!        bucket/     the cluster's truth, unless `--bucket` names another place
//! ```

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

/// The kernel's limit for the path of a unix socket, without the final NUL.
const SOCKET_PATH_LEN_MAX: usize = 107;
/// Room that the node agent's own sockets need below `node/`.
const SOCKET_ROOM: usize = 48;

/// The data folder of one cluster member.
#[derive(Clone, Debug)]
pub(crate) struct DataDir(PathBuf);

/// Held as long as this process may touch the data folder.
#[derive(Debug)]
pub(crate) struct DataLock(#[expect(dead_code, reason = "dropping it releases the lock")] Flock<File>);

/// Why the data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DataDirError {
    #[error("another sprited{} works on {path}; stop it first (./dev down), or name another folder with --data", pid_text(.pid))]
    InUse { path: PathBuf, pid: Option<u32> },
    #[error(
        "the path {path} is too long: sockets below it would exceed the kernel's limit of {SOCKET_PATH_LEN_MAX} characters"
    )]
    TooLong { path: PathBuf },
    #[error("{doing} {path} failed")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn pid_text(pid: &Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

impl DataDir {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
    pub(crate) fn run(&self) -> PathBuf {
        self.0.join("run")
    }
    pub(crate) fn node(&self) -> PathBuf {
        self.0.join("node")
    }
    pub(crate) fn ca(&self) -> PathBuf {
        self.0.join("ca")
    }
    pub(crate) fn ca_certificate(&self) -> PathBuf {
        self.ca().join("ca.pem")
    }
    pub(crate) fn token(&self) -> PathBuf {
        self.0.join("token")
    }
    pub(crate) fn ready(&self) -> PathBuf {
        self.run().join("ready")
    }
    pub(crate) fn tsc_khz(&self) -> PathBuf {
        self.0.join("tsc_khz")
    }
    pub(crate) fn node_socket(&self) -> PathBuf {
        self.run().join("node.sock")
    }
    pub(crate) fn coordinator_socket(&self) -> PathBuf {
        self.run().join("coordinator.sock")
    }

    /// Makes the folder and takes it for this process. `part` names the lock, so that `node`, `coordinator` and `router` can share a folder.
    pub(crate) fn lock(&self, part: &str) -> Result<DataLock, DataDirError> {
        if self.0.as_os_str().len() + SOCKET_ROOM > SOCKET_PATH_LEN_MAX {
            return Err(DataDirError::TooLong { path: self.0.clone() });
        }
        for folder in [self.path().to_owned(), self.run(), self.node(), self.ca()] {
            fs::create_dir_all(&folder).map_err(|source| DataDirError::Io {
                doing: "making",
                path: folder.clone(),
                source,
            })?;
        }
        let private = Permissions::from_mode(0o700);
        fs::set_permissions(self.ca(), private).map_err(|source| DataDirError::Io {
            doing: "closing",
            path: self.ca(),
            source,
        })?;
        let path = self.0.join(if part == "dev" { "lock".to_owned() } else { format!("lock.{part}") });
        let io_error = |doing| {
            let path = path.clone();
            move |source| DataDirError::Io { doing, path, source }
        };
        let mut open = OpenOptions::new();
        let mut file = open
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("opening"))?;
        let mut holder = String::new();
        Read::by_ref(&mut file).take(32).read_to_string(&mut holder).map_err(io_error("reading"))?;
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                return Err(DataDirError::InUse { path: self.0.clone(), pid: holder.trim().parse().ok() });
            }
            Err((_, errno)) => return Err(io_error("locking")(errno.into())),
        };
        lock.set_len(0).map_err(io_error("writing"))?;
        lock.rewind().map_err(io_error("writing"))?;
        writeln!(lock, "{}", std::process::id()).map_err(io_error("writing"))?;
        Ok(DataLock(lock))
    }

    /// The pid of the process that holds the folder now.
    pub(crate) fn holder(&self) -> Option<u32> {
        let file = File::open(self.0.join("lock")).ok()?;
        let mut text = String::new();
        file.try_clone().ok()?.take(32).read_to_string(&mut text).ok()?;
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_nobody_holds_it) => None,
            Err(_) => text.trim().parse().ok(),
        }
    }
}

/// Writes a file that only root may read, whole or not at all.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> Result<(), DataDirError> {
    let temporary = path.with_extension("new");
    let error = |source| DataDirError::Io { doing: "writing", path: path.to_owned(), source };
    let mut open = OpenOptions::new();
    let mut file = open.write(true).create(true).truncate(true).mode(0o600).open(&temporary).map_err(error)?;
    file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path)).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_is_told_who_holds_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let data = DataDir::at(folder.path().to_owned());
        assert_eq!(data.holder(), None);
        let held = data.lock("dev").unwrap();
        let message = data.lock("dev").unwrap_err().to_string();
        assert!(message.contains(&format!("(pid {})", std::process::id())), "{message}");
        assert_eq!(data.holder(), Some(std::process::id()));
        drop(held);
        assert_eq!(data.holder(), None);
        data.lock("dev").unwrap();
    }

    #[test]
    fn parts_that_run_apart_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let data = DataDir::at(folder.path().to_owned());
        let _node = data.lock("node").unwrap();
        let _router = data.lock("router").unwrap();
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused_before_anything_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(90));
        assert!(matches!(DataDir::at(long.clone()).lock("dev"), Err(DataDirError::TooLong { .. })));
        assert!(!long.exists());
    }

    #[test]
    fn secrets_are_for_root_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        write_private(&path, b"secret").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
