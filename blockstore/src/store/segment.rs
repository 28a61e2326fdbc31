//! Journal files: of one size, preallocated, and used again. Writing to one never allocates, so an `fdatasync` has only data to write.
//!
//! ```text
//!  <dir>/spare/<n>.seg                 free; their content is rubbish
//!  <dir>/vol/<id>/journal/<n>.seg      in use: renamed there, header written and synced before the first record
//! ```
//! A reclaimed file is renamed away at once, but handed out again only when no reader holds it.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::fcntl::{FallocateFlags, fallocate};

pub(super) const HEADER_BYTES: u64 = 4096;
const MAGIC: &[u8; 8] = b"SPRJSEG1";
/// Zeroed files made ready when a store opens.
const READY: usize = 4;

/// What a journal file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) volume: [u8; 16],
    pub(super) epoch: u64,
    pub(super) number: u64,
    /// In every record of this use of the file: records of an earlier use do not pass for new ones.
    pub(super) salt: u64,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(52);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.volume);
        for number in [self.epoch, self.number, self.salt] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, rest) = bytes.split_at_checked(48)?;
        let crc = u32::from_le_bytes(rest.get(..4)?.try_into().ok()?);
        if &body[..8] != MAGIC || crc32c::crc32c(body) != crc {
            return None;
        }
        let number = |at: usize| body[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let volume = body[8..24].try_into().ok()?;
        Some(Self { volume, epoch: number(24)?, number: number(32)?, salt: number(40)? })
    }
}

/// A journal file in use. Readers share it.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) file: File,
    pub(super) header: Header,
    pool: Arc<SegmentPool>,
    /// Where it lies since it was reclaimed.
    retired: Mutex<Option<PathBuf>>,
}

impl Segment {
    /// A file found in a volume's journal.
    pub(super) fn found(pool: &Arc<SegmentPool>, file: File, header: Header) -> Arc<Self> {
        Arc::new(Self { file, header, pool: Arc::clone(pool), retired: Mutex::new(None) })
    }

    pub(super) fn path(&self, journal: &Path) -> PathBuf {
        segment_path(journal, self.header.number)
    }

    /// Takes the file out of the journal; it is used again once nobody reads it.
    pub(super) fn retire(&self, journal: &Path) -> io::Result<()> {
        let spare = self.pool.spare_path();
        match fs::rename(self.path(journal), &spare) {
            Ok(()) => {
                *self.retired.lock().unwrap_or_else(PoisonError::into_inner) = Some(spare);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if let Some(path) = self.retired.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            self.pool.give_back(path);
        }
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

pub(super) fn segment_path(journal: &Path, number: u64) -> PathBuf {
    journal.join(format!("{number}.seg"))
}

/// Free journal files of a store.
#[derive(Debug)]
pub(super) struct SegmentPool {
    dir: PathBuf,
    segment_bytes: u64,
    keep: usize,
    next: AtomicU64,
    free: Mutex<Vec<PathBuf>>,
}

impl SegmentPool {
    /// Blocking, as everything here.
    pub(super) fn open(dir: &Path, segment_bytes: u64, keep: usize) -> io::Result<Arc<Self>> {
        fs::create_dir_all(dir)?;
        let (mut free, mut next) = (Vec::new(), 0);
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u64>().ok());
            next = next.max(number.map_or(0, |number| number + 1));
            if free.len() < keep && fs::metadata(&path)?.len() == segment_bytes {
                free.push(path);
            } else {
                fs::remove_file(&path)?;
            }
        }
        let next = AtomicU64::new(next);
        Ok(Arc::new(Self { dir: dir.to_owned(), segment_bytes, keep, next, free: Mutex::new(free) }))
    }

    pub(super) fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Prepares files ahead, so that the first volumes find theirs ready.
    pub(super) fn prepare(&self) -> io::Result<()> {
        while self.free().len() < READY.min(self.keep) {
            let path = self.spare_path();
            let file = self.make(&path)?;
            let zeros = vec![0; 1 << 20];
            let mut at = 0;
            while at < self.segment_bytes {
                let len = (self.segment_bytes - at).min(zeros.len() as u64);
                file.write_all_at(&zeros[..usize::try_from(len).unwrap_or(zeros.len())], at)?;
                at += len;
            }
            self.give_back(path);
        }
        Ok(())
    }

    fn make(&self, path: &Path) -> io::Result<File> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        let len = i64::try_from(self.segment_bytes).map_err(io::Error::other)?;
        match fallocate(file.as_fd(), FallocateFlags::empty(), 0, len) {
            Ok(()) => {}
            // A file system without it: then blocks are allocated as they are written.
            Err(nix::Error::EOPNOTSUPP) => file.set_len(self.segment_bytes)?,
            Err(error) => {
                drop(file);
                fs::remove_file(path).ok();
                return Err(error.into());
            }
        }
        Ok(file)
    }

    /// A file for a volume's journal: in place, named and synced.
    pub(super) fn take(self: &Arc<Self>, journal: &Path, header: Header) -> io::Result<Arc<Segment>> {
        let path = segment_path(journal, header.number);
        let spare = self.free().pop();
        let file = match spare {
            Some(spare) => {
                let file = File::options().read(true).write(true).open(&spare)?;
                fs::rename(&spare, &path)?;
                file
            }
            None => self.make(&path)?,
        };
        file.write_all_at(&header.encode(), 0)?;
        file.sync_data()?;
        sync_folder(journal)?;
        if header.number == 1 {
            // The volume's folder is as new as its first file.
            journal.ancestors().skip(1).take(2).try_for_each(sync_folder)?;
        }
        Ok(Segment::found(self, file, header))
    }

    fn spare_path(&self) -> PathBuf {
        self.dir.join(format!("{}.seg", self.next.fetch_add(1, Ordering::Relaxed)))
    }

    fn give_back(&self, path: PathBuf) {
        let mut free = self.free();
        if free.len() < self.keep {
            free.push(path);
        } else {
            drop(free);
            // What stays is found by the next open.
            fs::remove_file(path).ok();
        }
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<PathBuf>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
