//! Objects of all buckets: an index in memory, contents in memory or in one file each.
//!
//! On disk an object is `<root>/<bucket>/<md5 of key>`: one line of JSON {key, etag, size} and the content, written to a temporary file,
//! fsynced and renamed. The index is rebuilt from these lines at start, so `kill -9` leaves each object old or new. A change holds the
//! key's write lock from the check of its condition to the update of the index; a read holds the read lock until the content is open.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    ops::{Bound, Range},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use bytes::Bytes;
use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};

/// Locks of keys. Two keys may share one: they only wait for each other.
const LOCK_SHARDS: usize = 256;
const TEMP_PREFIX: &str = ".tmp-";

/// The folder of the objects cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep objects in {}", path.display())]
pub struct OpenStoreError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What must hold for a write to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    None,
    Absent,
    /// `None`: any version.
    Version(Option<String>),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("the condition does not hold")]
    Precondition,
    #[error("there is no such object")]
    Missing,
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Clone, Debug)]
pub(crate) struct Meta {
    pub(crate) etag: String,
    pub(crate) size_bytes: u64,
    pub(crate) modified: SystemTime,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Memory(Bytes),
    File { path: PathBuf, header_bytes: u64 },
}

/// First line of an object's file.
#[derive(Serialize, Deserialize)]
struct FileHeader {
    key: String,
    etag: String,
    size: u64,
}

type Index = BTreeMap<String, BTreeMap<String, Meta>>;

#[derive(Debug)]
pub(crate) struct Store {
    root: Option<PathBuf>,
    /// Held for look-ups and updates only, never across I/O.
    index: RwLock<Index>,
    locks: Vec<tokio::sync::RwLock<()>>,
    next_temp: AtomicU64,
}

impl Store {
    pub(crate) fn open(root: Option<&Path>) -> Result<Self, OpenStoreError> {
        let index = match root {
            None => Index::new(),
            Some(root) => load(root).map_err(|source| OpenStoreError { path: root.to_owned(), source })?,
        };
        Ok(Self {
            root: root.map(Path::to_owned),
            index: RwLock::new(index),
            locks: (0..LOCK_SHARDS).map(|_| tokio::sync::RwLock::new(())).collect(),
            next_temp: AtomicU64::new(0),
        })
    }

    /// `false` if it exists already.
    pub(crate) fn create_bucket(&self, bucket: &str) -> io::Result<bool> {
        if self.has_bucket(bucket) {
            return Ok(false);
        }
        if let Some(root) = &self.root {
            fs::create_dir_all(root.join(bucket))?;
            File::open(root)?.sync_all()?;
        }
        Ok(self.change(|index| index.insert(bucket.to_owned(), BTreeMap::new())).is_none())
    }

    pub(crate) fn has_bucket(&self, bucket: &str) -> bool {
        self.look(|index| index.contains_key(bucket))
    }

    pub(crate) fn buckets(&self) -> Vec<String> {
        self.look(|index| index.keys().cloned().collect())
    }

    pub(crate) async fn put(
        &self,
        bucket: &str,
        key: &str,
        body: Bytes,
        condition: &Condition,
    ) -> Result<String, WriteError> {
        let _lock = self.lock_of(key).write().await;
        let found = self.meta(bucket, key);
        match (condition, &found) {
            (Condition::None, _) | (Condition::Absent, None) | (Condition::Version(None), Some(_)) => {}
            (Condition::Version(_), None) => return Err(WriteError::Missing),
            (Condition::Version(Some(etag)), Some(meta)) if *etag == meta.etag => {}
            (Condition::Absent | Condition::Version(Some(_)), Some(_)) => return Err(WriteError::Precondition),
        }
        let etag = hex(&Md5::digest(&body));
        let size_bytes = body.len() as u64;
        let content = match &self.root {
            None => Content::Memory(body),
            Some(root) => self.write_file(&root.join(bucket), key, &etag, &body)?,
        };
        let meta = Meta { etag: etag.clone(), size_bytes, modified: SystemTime::now(), content };
        self.change(|index| index.entry(bucket.to_owned()).or_default().insert(key.to_owned(), meta));
        Ok(etag)
    }

    /// Blocks on the disk: a development server serves few clients, and its runtime has other threads.
    fn write_file(&self, folder: &Path, key: &str, etag: &str, body: &Bytes) -> io::Result<Content> {
        let header = FileHeader { key: key.to_owned(), etag: etag.to_owned(), size: body.len() as u64 };
        let mut line = serde_json::to_vec(&header)?;
        line.push(b'\n');
        let temp = folder.join(format!("{TEMP_PREFIX}{}", self.next_temp.fetch_add(1, Ordering::Relaxed)));
        let path = folder.join(hex(&Md5::digest(key)));
        let write = || {
            let mut file = File::create(&temp)?;
            file.write_all(&line)?;
            file.write_all(body)?;
            file.sync_all()?;
            fs::rename(&temp, &path)?;
            File::open(folder)?.sync_all()
        };
        write().inspect_err(|_| drop(fs::remove_file(&temp)))?;
        Ok(Content::File { path, header_bytes: line.len() as u64 })
    }

    pub(crate) async fn delete(&self, bucket: &str, key: &str) -> io::Result<()> {
        let _lock = self.lock_of(key).write().await;
        let removed = self.change(|index| index.get_mut(bucket).and_then(|objects| objects.remove(key)));
        match removed.map(|meta| meta.content) {
            Some(Content::File { path, .. }) => fs::remove_file(path),
            Some(Content::Memory(_)) | None => Ok(()),
        }
    }

    pub(crate) fn meta(&self, bucket: &str, key: &str) -> Option<Meta> {
        self.look(|index| index.get(bucket)?.get(key).cloned())
    }

    /// Version and bytes that belong together. `range` picks the bytes once the version is known.
    pub(crate) async fn read<E: From<io::Error>>(
        &self,
        bucket: &str,
        key: &str,
        range: impl FnOnce(&Meta) -> Result<Range<u64>, E>,
    ) -> Result<Option<(Meta, Range<u64>, Bytes)>, E> {
        let _lock = self.lock_of(key).read().await;
        let Some(meta) = self.meta(bucket, key) else { return Ok(None) };
        let range = range(&meta)?;
        let bytes = meta.content.read(&range)?;
        Ok(Some((meta, range, bytes)))
    }

    /// At most `limit` objects whose keys begin with `prefix` and come after `after`, in key order.
    pub(crate) fn list(&self, bucket: &str, prefix: &str, after: &str, limit: usize) -> Vec<(String, Meta)> {
        let from = if after < prefix { Bound::Included(prefix) } else { Bound::Excluded(after) };
        self.look(|index| {
            let Some(objects) = index.get(bucket) else { return Vec::new() };
            let from_here = objects.range::<str, _>((from, Bound::Unbounded));
            let ours = from_here.take_while(|(key, _)| key.starts_with(prefix));
            ours.take(limit).map(|(key, meta)| (key.clone(), meta.clone())).collect()
        })
    }

    fn lock_of(&self, key: &str) -> &tokio::sync::RwLock<()> {
        let shard = usize::from(Md5::digest(key)[0]);
        &self.locks[shard % LOCK_SHARDS]
    }

    fn look<T>(&self, work: impl FnOnce(&Index) -> T) -> T {
        work(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<T>(&self, work: impl FnOnce(&mut Index) -> T) -> T {
        work(&mut self.index.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Content {
    fn read(&self, range: &Range<u64>) -> io::Result<Bytes> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        match self {
            Self::Memory(bytes) => {
                let start = usize::try_from(range.start).map_err(io::Error::other)?;
                Ok(bytes.slice(start..start + len))
            }
            Self::File { path, header_bytes } => {
                let mut bytes = vec![0; len];
                File::open(path)?.read_exact_at(&mut bytes, header_bytes + range.start)?;
                Ok(bytes.into())
            }
        }
    }
}

fn load(root: &Path) -> io::Result<Index> {
    fs::create_dir_all(root)?;
    let mut index = Index::new();
    for bucket in fs::read_dir(root)? {
        let bucket = bucket?;
        let (true, Ok(name)) = (bucket.file_type()?.is_dir(), bucket.file_name().into_string()) else { continue };
        let mut objects = BTreeMap::new();
        for file in fs::read_dir(bucket.path())? {
            let path = file?.path();
            let temporary = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(TEMP_PREFIX.as_bytes()));
            if temporary {
                fs::remove_file(&path)?;
                continue;
            }
            let (key, meta) = load_object(path)?;
            objects.insert(key, meta);
        }
        index.insert(name, objects);
    }
    Ok(index)
}

fn load_object(path: PathBuf) -> io::Result<(String, Meta)> {
    let file = File::open(&path)?;
    let file_meta = file.metadata()?;
    let mut line = Vec::new();
    BufReader::new(file).read_until(b'\n', &mut line)?;
    let header: FileHeader = serde_json::from_slice(&line)?;
    let header_bytes = line.len() as u64;
    if header_bytes + header.size != file_meta.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} has a wrong length", path.display())));
    }
    let content = Content::File { path, header_bytes };
    let meta = Meta { etag: header.etag, size_bytes: header.size, modified: file_meta.modified()?, content };
    Ok((header.key, meta))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}
