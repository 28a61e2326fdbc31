//! A bucket in a local directory, with real compare-and-swap.
//!
//! `object_store` has a local store, but it cannot do a conditional update and its ETag repeats when a clock or inode does. Here:
//!
//! ```text
//!  <root>/v1/sprites/…/head        one file per object:  header (64 bytes: magic, random tag, length)  body
//!  <root>/.fscas/tmp/<uuid>        being written; locked by its writer for as long as it lives
//!  <root>/.fscas/lock/<00..ff>     one lock per shard of keys: flock held from the check of the tag to the rename
//! ```
//!
//! A put writes and fsyncs a temporary file, takes the key's lock, compares the tag, renames, fsyncs the folder. `kill -9` and power loss
//! leave the old object or the new one, and at worst a temporary file, which the next open sweeps. Readers take no lock: tag and body are
//! one file, so one `open` pairs them. Locks are the kernel's, so several processes may share the directory and a dead one frees its locks.
//!
//! # Not here
//!
//! Keys are checked by [`Bucket`](super::Bucket). Multipart, copy and attributes: refused, nothing of ours needs them.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream, stream::BoxStream};
use nix::fcntl::{Flock, FlockArg};
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, path::Path as StorePath,
};
use uuid::Uuid;

const STORE: &str = "directory bucket";
/// Our own files, hidden from listings: a key part never begins with a dot.
const HIDDEN: &str = ".fscas";
const HEADER_BYTES: usize = 64;
const MAGIC: &str = "sprite-obj1";
/// How often a put starts again because a folder vanished under it (a concurrent delete removed the empty parent).
const PLACE_ATTEMPTS: u32 = 8;
/// Deletes in flight of one [`ObjectStore::delete_stream`].
const DELETES_IN_FLIGHT: usize = 8;

type StoreResult<T> = Result<T, object_store::Error>;

/// See the module's header. Cheap to clone.
#[derive(Clone, Debug)]
pub struct FsCas {
    root: Arc<PathBuf>,
}

/// The directory cannot serve as a bucket.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {} as a bucket: check that it is a directory on a local disk that we may write", path.display())]
pub struct FsOpenError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl FsCas {
    /// Opens or creates the store in `root` and removes temporary files whose writers are dead. Blocks on the disk.
    pub fn open(root: &Path) -> Result<Self, FsOpenError> {
        let prepare = || {
            let created = !root.exists();
            for folder in ["tmp", "lock"] {
                fs::create_dir_all(root.join(HIDDEN).join(folder))?;
            }
            if created {
                sync_dir(root)?;
                sync_dir(root.parent().unwrap_or(Path::new("/")))?;
            }
            sweep(&root.join(HIDDEN).join("tmp"))
        };
        match prepare() {
            Ok(()) => Ok(Self { root: Arc::new(root.to_owned()) }),
            Err(source) => Err(FsOpenError { path: root.to_owned(), source }),
        }
    }

    fn file_of(&self, key: &StorePath) -> PathBuf {
        self.root.join(key.as_ref())
    }

    /// Waits for the lock that serialises all changes of `key`. Held only across a compare and a rename.
    fn lock(&self, key: &StorePath) -> io::Result<Flock<File>> {
        let shard = blake3::hash(key.as_ref().as_bytes()).as_bytes()[0];
        let path = self.root.join(HIDDEN).join("lock").join(format!("{shard:02x}"));
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(path)?;
        flock(file, FlockArg::LockExclusive)
    }

    fn put(&self, key: &StorePath, body: &Bytes, mode: &PutMode) -> StoreResult<PutResult> {
        let tag = Uuid::new_v4().simple().to_string();
        let io = |source| io_error(key, source);
        for _ in 0..PLACE_ATTEMPTS {
            let mut temp = Temp::create(&self.root).map_err(io)?;
            temp.write(&tag, body).map_err(io)?;
            match self.place(key, &mut temp, mode)? {
                Placed::Yes => {
                    return Ok(PutResult { e_tag: Some(tag), version: None, extensions: Default::default() });
                }
                Placed::FolderVanished => {}
            }
        }
        Err(io(io::Error::other("its folder vanished again and again")))
    }

    /// The linearisation point of a put: under the key's lock, checks what is there and renames `temp` over it.
    fn place(&self, key: &StorePath, temp: &mut Temp, mode: &PutMode) -> StoreResult<Placed> {
        let io = |source| io_error(key, source);
        let target = self.file_of(key);
        let folder = target.parent().expect("a key has a folder above it: the root");
        create_folders(&self.root, folder).map_err(io)?;
        let _lock = self.lock(key).map_err(io)?;
        match mode {
            PutMode::Overwrite => {}
            PutMode::Create => {
                if target.symlink_metadata().is_ok() {
                    return Err(already_exists(key));
                }
            }
            PutMode::Update(version) => {
                let found = match read_header(&target) {
                    Ok((_, header)) => Some(header.tag),
                    Err(error) if absent(&error) => None,
                    Err(error) => return Err(io(error)),
                };
                if found.is_none() || found != version.e_tag {
                    return Err(precondition(key));
                }
            }
        }
        match fs::rename(&temp.path, &target) {
            Ok(()) => temp.placed = true,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Placed::FolderVanished),
            Err(error) => return Err(io(error)),
        }
        sync_dir(folder).map_err(io)?;
        Ok(Placed::Yes)
    }

    fn get(&self, key: &StorePath, options: &GetOptions) -> StoreResult<GetResult> {
        let (file, header) = match read_header(&self.file_of(key)) {
            Ok(found) => found,
            Err(error) if absent(&error) => return Err(not_found(key, error)),
            Err(error) => return Err(io_error(key, error)),
        };
        let modified = file.metadata().and_then(|m| m.modified()).map_err(|error| io_error(key, error))?;
        let meta = ObjectMeta {
            location: key.clone(),
            last_modified: modified.into(),
            size: header.body_bytes,
            e_tag: Some(header.tag),
            version: None,
        };
        options.check_preconditions(&meta)?;
        let range = match &options.range {
            None => 0..meta.size,
            Some(wanted) => wanted
                .as_range(meta.size)
                .map_err(|error| io_error(key, io::Error::new(ErrorKind::InvalidInput, error)))?,
        };
        let bytes = if options.head { Ok(Bytes::new()) } else { read_body(&file, &range) };
        let bytes = bytes.map_err(|error| io_error(key, error))?;
        Ok(GetResult {
            payload: GetResultPayload::Stream(stream::once(async move { Ok(bytes) }).boxed()),
            meta,
            range,
            attributes: Default::default(),
            extensions: Default::default(),
        })
    }

    fn delete(&self, key: &StorePath) -> StoreResult<()> {
        let target = self.file_of(key);
        let folder = target.parent().expect("a key has a folder above it: the root");
        {
            let _lock = self.lock(key).map_err(|error| io_error(key, error))?;
            match fs::remove_file(&target) {
                Ok(()) => sync_dir(folder).map_err(|error| io_error(key, error))?,
                Err(error) if absent(&error) => return Ok(()),
                Err(error) => return Err(io_error(key, error)),
            }
        }
        // Empty folders are not objects. A put that loses its folder here makes it again (`PLACE_ATTEMPTS`).
        let mut empty = folder;
        while empty != self.root.as_path() && fs::remove_dir(empty).is_ok() {
            let Some(parent) = empty.parent() else { break };
            empty = parent;
        }
        Ok(())
    }

    /// Every object below `prefix`, unordered. An object deleted during the walk is left out.
    fn walk(&self, prefix: Option<&StorePath>) -> StoreResult<Vec<ObjectMeta>> {
        let top = prefix.cloned().unwrap_or_default();
        let mut folders = vec![top];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(self.file_of(&folder)) {
                Ok(entries) => entries,
                Err(error) if absent(&error) => continue,
                Err(error) => return Err(io_error(&folder, error)),
            };
            for entry in entries {
                let entry = entry.map_err(|error| io_error(&folder, error))?;
                let Some(name) = entry.file_name().to_str().map(ToOwned::to_owned) else { continue };
                if name.starts_with('.') {
                    continue;
                }
                let key = folder.clone().join(name.as_str());
                if entry.file_type().map_err(|error| io_error(&key, error))?.is_dir() {
                    folders.push(key);
                    continue;
                }
                match self.get(&key, &GetOptions { head: true, ..GetOptions::default() }) {
                    Ok(result) => found.push(result.meta),
                    Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(found)
    }
}

enum Placed {
    Yes,
    FolderVanished,
}

/// A file being written. Removed on drop unless it was renamed to its place; its lock tells the sweep that its writer lives.
struct Temp {
    path: PathBuf,
    file: Flock<File>,
    placed: bool,
}

impl Temp {
    fn create(root: &Path) -> io::Result<Self> {
        let path = root.join(HIDDEN).join("tmp").join(Uuid::new_v4().simple().to_string());
        let file = OpenOptions::new().create_new(true).write(true).open(&path)?;
        Ok(Self { file: flock(file, FlockArg::LockExclusive)?, path, placed: false })
    }

    fn write(&mut self, tag: &str, body: &Bytes) -> io::Result<()> {
        self.file.write_all(&encode_header(tag, body.len() as u64))?;
        self.file.write_all(body)?;
        self.file.sync_all()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.placed {
            // Failing leaves a file that the next open sweeps.
            drop(fs::remove_file(&self.path));
        }
    }
}

struct Header {
    tag: String,
    body_bytes: u64,
}

/// One line of text, so that `tail -n +2` shows a record to a person.
fn encode_header(tag: &str, body_bytes: u64) -> [u8; HEADER_BYTES] {
    let line = format!("{MAGIC} {tag} {body_bytes:016x}");
    let mut header = [b' '; HEADER_BYTES];
    header[..line.len()].copy_from_slice(line.as_bytes());
    header[HEADER_BYTES - 1] = b'\n';
    header
}

fn decode_header(header: &[u8; HEADER_BYTES]) -> Option<Header> {
    let mut words = std::str::from_utf8(header).ok()?.strip_suffix('\n')?.split_ascii_whitespace();
    let (magic, tag, len) = (words.next()?, words.next()?, words.next()?);
    if magic != MAGIC || tag.len() != 32 || words.next().is_some() {
        return None;
    }
    Some(Header { tag: tag.to_owned(), body_bytes: u64::from_str_radix(len, 16).ok()? })
}

/// Opens the object and checks that the file is as long as its header says, so a truncated file is an error and not a short object.
fn read_header(path: &Path) -> io::Result<(File, Header)> {
    let mut file = File::open(path)?;
    let file_bytes = match file.metadata()? {
        meta if meta.is_dir() => return Err(ErrorKind::IsADirectory.into()),
        meta => meta.len(),
    };
    let damaged = || io::Error::new(ErrorKind::InvalidData, format!("{} is no object of ours", path.display()));
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => damaged(),
        _ => error,
    })?;
    let header = decode_header(&header).ok_or_else(damaged)?;
    if header.body_bytes.checked_add(HEADER_BYTES as u64) != Some(file_bytes) {
        return Err(damaged());
    }
    Ok((file, header))
}

/// `range` lies within the body, whose length was checked against the file's.
fn read_body(file: &File, range: &Range<u64>) -> io::Result<Bytes> {
    let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let mut body = vec![0; len];
    file.read_exact_at(&mut body, HEADER_BYTES as u64 + range.start)?;
    Ok(body.into())
}

fn flock(file: File, how: FlockArg) -> io::Result<Flock<File>> {
    Flock::lock(file, how).map_err(|(_, errno)| errno.into())
}

/// Removes the temporary files that no living writer holds.
fn sweep(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Ok(file) = File::open(&path) else { continue };
        if let Ok(_dead) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Makes `folder` below `root` with every new link on disk, so that a completed put cannot vanish with its folder.
fn create_folders(root: &Path, folder: &Path) -> io::Result<()> {
    if folder == root || folder.is_dir() {
        return Ok(());
    }
    let parent = folder.parent().expect("below the root");
    create_folders(root, parent)?;
    match fs::create_dir(folder) {
        // The parent may just have been removed as empty: `rename` fails then, and the put starts again.
        Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_dir(parent),
    }
}

fn sync_dir(folder: &Path) -> io::Result<()> {
    match File::open(folder) {
        Ok(dir) => dir.sync_all(),
        // Removed since as empty, so there is nothing in it to keep.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory)
}

fn io_error(key: &StorePath, source: io::Error) -> object_store::Error {
    tracing::debug!(%key, %source, "directory bucket");
    object_store::Error::Generic { store: STORE, source: Box::new(source) }
}

fn not_found(key: &StorePath, source: io::Error) -> object_store::Error {
    object_store::Error::NotFound { path: key.to_string(), source: Box::new(source) }
}

fn already_exists(key: &StorePath) -> object_store::Error {
    object_store::Error::AlreadyExists { path: key.to_string(), source: "there is an object with this key".into() }
}

fn precondition(key: &StorePath) -> object_store::Error {
    object_store::Error::Precondition { path: key.to_string(), source: "the tag is another one by now".into() }
}

fn unsupported(operation: &str) -> object_store::Error {
    object_store::Error::NotImplemented { operation: operation.to_owned(), implementer: STORE.to_owned() }
}

/// Runs file-system work where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> StoreResult<T> + Send + 'static) -> StoreResult<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(source) => Err(object_store::Error::JoinError { source }),
    }
}

impl fmt::Display for FsCas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dir:{}", self.root.display())
    }
}

#[async_trait::async_trait]
impl ObjectStore for FsCas {
    async fn put_opts(&self, location: &StorePath, payload: PutPayload, opts: PutOptions) -> StoreResult<PutResult> {
        let (store, key) = (self.clone(), location.clone());
        blocking(move || store.put(&key, &payload.into(), &opts.mode)).await
    }

    async fn put_multipart_opts(
        &self,
        _location: &StorePath,
        _opts: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        Err(unsupported("multipart upload"))
    }

    async fn get_opts(&self, location: &StorePath, options: GetOptions) -> StoreResult<GetResult> {
        let (store, key) = (self.clone(), location.clone());
        blocking(move || store.get(&key, &options)).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, StoreResult<StorePath>>,
    ) -> BoxStream<'static, StoreResult<StorePath>> {
        let store = self.clone();
        locations
            .map(move |key| {
                let store = store.clone();
                blocking(move || {
                    let key = key?;
                    store.delete(&key)?;
                    Ok(key)
                })
            })
            .buffered(DELETES_IN_FLIGHT)
            .boxed()
    }

    fn list(&self, prefix: Option<&StorePath>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        let (store, prefix) = (self.clone(), prefix.cloned());
        stream::once(blocking(move || store.walk(prefix.as_ref())))
            .flat_map(|found| match found {
                Ok(metas) => stream::iter(metas).map(Ok).boxed(),
                Err(error) => stream::once(async move { Err(error) }).boxed(),
            })
            .boxed()
    }

    async fn list_with_delimiter(&self, _prefix: Option<&StorePath>) -> StoreResult<ListResult> {
        Err(unsupported("list with delimiter"))
    }

    async fn copy_opts(&self, _from: &StorePath, _to: &StorePath, _options: CopyOptions) -> StoreResult<()> {
        Err(unsupported("copy"))
    }
}
