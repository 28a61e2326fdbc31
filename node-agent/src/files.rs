//! Copies of sparse files, and files that are whole or not there.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    ops::Range,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    panic::resume_unwind,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, available_parallelism},
};

use nix::unistd::{Whence, lseek64};

/// Copy buffer: large enough that a system call is cheap beside the copy.
const COPY_BYTES: usize = 1 << 20;
/// Threads of one copy; more do not make memory quicker.
const COPIERS_MAX: usize = 4;

/// Copies the data extents of `from`; holes stay holes. Returns the bytes copied.
///
/// Tries a reflink first, which is free on file systems that have it. Else several threads copy: on tmpfs that is a matter of memory and page tables.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> io::Result<u64> {
    let source = File::open(from)?;
    let size = source.metadata()?.len();
    let target = OpenOptions::new().write(true).create(true).truncate(true).open(to)?;
    if reflink(&source, &target) {
        return Ok(size);
    }
    target.set_len(size)?;
    let mut pieces = Vec::new();
    for_each_extent(&source, |start, end| {
        pieces.extend((start..end).step_by(COPY_BYTES).map(|at| at..end.min(at + COPY_BYTES as u64)));
        Ok(())
    })?;
    let next = AtomicUsize::new(0);
    let copy = || {
        let mut buffer = vec![0; COPY_BYTES];
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            copy_range(&source, &target, piece, &mut buffer)?;
        }
        Ok(())
    };
    let threads = available_parallelism().map_or(1, usize::from).min(COPIERS_MAX).min(pieces.len());
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(copy)).collect();
        let own = copy();
        let joined = others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        joined.fold(own, io::Result::and)
    })?;
    Ok(pieces.iter().map(|piece| piece.end - piece.start).sum())
}

/// `buffer` holds at least the range.
fn copy_range(source: &File, target: &File, range: &Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let want = usize::try_from(range.end - at).map_err(io::Error::other)?;
        let got = source.read_at(&mut buffer[..want], at)?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        target.write_all_at(&buffer[..got], at)?;
        at += got as u64;
    }
    Ok(())
}

/// Calls `each(start, end)` for every range that holds data.
pub(crate) fn for_each_extent(file: &File, mut each: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    let mut at = 0;
    loop {
        let Some(start) = seek(file, at, Whence::SeekData)? else { return Ok(()) };
        let end = seek(file, start, Whence::SeekHole)?.unwrap_or(file.metadata()?.len());
        each(start, end)?;
        at = end;
    }
}

/// `None` past the last extent.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    match lseek64(file, from, whence) {
        Ok(at) => Ok(Some(u64::try_from(at).map_err(io::Error::other)?)),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[expect(unsafe_code, reason = "FICLONE has no safe wrapper")]
fn reflink(source: &File, target: &File) -> bool {
    const FICLONE: libc::c_ulong = 0x4004_9409;
    // SAFETY: both descriptors are open files for the whole call, and FICLONE takes the source descriptor by value.
    unsafe { libc::ioctl(target.as_raw_fd(), FICLONE, source.as_raw_fd()) == 0 }
}

/// Writes a file so that after a crash it is there whole, or as before: temporary file, fsync, rename, fsync of the folder.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("a file needs a folder"))?;
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_folder(folder)
}

/// Writes a file so that whoever opens it finds it whole, or as before. After a crash of the host it may be empty.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, content)?;
    fs::rename(&temporary, path)
}

/// Makes renames and removals in `folder` survive a crash.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes a file; one that is not there is fine.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_copy_keeps_content_and_holes() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        file.write_all_at(&vec![7; (5 << 20) + 3], 9 << 20).unwrap();
        assert!(copy_sparse(&from, &to).unwrap() < 8 << 20);
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() < 16384, "the hole was written out");
    }
}
