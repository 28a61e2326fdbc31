//! The bucket: named objects that outlive every host, and records in them that change only by compare-and-swap.
//!
//! ```text
//!                       ┌── data ────▶ store client with patient retries: packs, images, listings
//!  Bucket (cheap clone) ┤
//!                       └── records ─▶ store client without retries, short timeout: heads, leases, names   (`record`)
//!  store = our own directory store (`fs_cas`) or S3 through `object_store`; `url` picks it, `probe` refuses one that lies
//! ```
//!
//! # Invariants
//!
//! 1. *Two clients.* A record never waits in the connection pool behind a 16 MiB pack, or a lease would run out during an upload.
//! 2. *Nothing here decides by a status code alone.* Every conditional write carries a nonce, and every answer that is not a plain
//!    success is resolved by reading the record back (`record`).
//! 3. *Keys are checked before any I/O*, so the same key means the same object on a file system and on S3.
//! 4. *Whole objects*: a reader sees an object complete or not at all, also after a crash in the middle of a put.
//!
//! # Not here
//!
//! What the objects mean (records of sprites: `proto`; packs and heads: the volume engine) and retries of data operations beyond those of
//! the client: the caller asks [`BucketError::retry`], because only it knows whether a VM is waiting.

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, path::Path as StorePath};

pub mod fs_cas;
pub mod probe;
pub mod record;
pub mod url;

pub use probe::{Finding, ProbeError};
pub use record::{Record, RecordError};
pub use url::{BadBucketUrl, Credentials, OpenError, endpoint_of};

/// Largest object that may be written or read whole: the hard cap of a pack (64 MiB) with room for its directory.
pub const OBJECT_BYTES_MAX: u64 = 80 << 20;
/// Longest key, prefix of the bucket included. S3 allows 1,024 bytes.
pub const KEY_BYTES_MAX: usize = 900;
/// Longest part of a key between two slashes: the limit of common file systems.
const KEY_PART_BYTES_MAX: usize = 200;
/// Most entries one [`Bucket::list`] returns; more is an error, so that a listing cannot take all memory.
pub const LIST_ENTRIES_MAX: usize = 1_000_000;

/// A bucket, opened and probed. Clones share the connections.
#[derive(Clone)]
pub struct Bucket {
    inner: Arc<Inner>,
}

struct Inner {
    records: Arc<dyn ObjectStore>,
    data: Arc<dyn ObjectStore>,
    /// Empty, or key parts ending in a slash.
    prefix: String,
    dialect: TagDialect,
    description: String,
}

/// How the store wants an ETag back in `If-Match`. Ceph RGW and its descendants refuse the quoted form that the RFC demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagDialect {
    /// As the server gave it.
    Verbatim,
    Unquoted,
}

/// Version of one object, to be compared for equality only. Comes from the store.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tag(String);

impl Tag {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An object read whole.
#[derive(Clone, Debug)]
pub struct Object {
    pub bytes: Bytes,
    pub tag: Tag,
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub size_bytes: u64,
    pub tag: Tag,
}

/// What the caller should do with a failed operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The store did not answer, or said "not now": repeat with a back-off.
    Soon,
    /// Repeating helps only after somebody frees space or grants access: raise an alarm, and keep trying slowly.
    AfterOperator,
    /// The same call fails again for ever.
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Get,
    GetRange,
    Put,
    Delete,
    List,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "read",
            Self::GetRange => "read a part of",
            Self::Put => "write",
            Self::Delete => "delete",
            Self::List => "list",
        })
    }
}

/// Why the store refused, as far as it lets us know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Unavailable,
    Denied,
    ReadOnly,
    NoSpace,
    /// The store holds bytes that no writer of ours left there.
    Damaged,
    Other,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unavailable => "the bucket does not answer properly; check that it is up and reachable",
            Self::Denied => {
                "the bucket refuses our credentials or file permissions; grant read, write, delete and list"
            }
            Self::ReadOnly => "the bucket is read-only; make it writable",
            Self::NoSpace => "the bucket is full; free space or raise its quota",
            Self::Damaged => "the object is damaged; restore it from a copy of the bucket",
            Self::Other => "the bucket refused",
        })
    }
}

/// An object operation failed. Whether a failed put or delete took effect is unknown, except for the first three variants.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    #[error("bucket key {key:?}: {reason}")]
    InvalidKey { key: String, reason: &'static str },
    #[error("object {key:?} of {size_bytes} bytes is larger than {OBJECT_BYTES_MAX}")]
    TooLarge { key: String, size_bytes: u64 },
    #[error("object {key:?} does not exist")]
    Missing { key: String },
    #[error("object {key:?} ended after {got_bytes} of {want_bytes} bytes")]
    Truncated { key: String, want_bytes: u64, got_bytes: u64 },
    #[error("listing {prefix:?} has more than {LIST_ENTRIES_MAX} entries")]
    TooMany { prefix: String },
    #[error("cannot {op} {key:?}: {cause}")]
    Store {
        op: Op,
        key: String,
        cause: Cause,
        #[source]
        source: Box<object_store::Error>,
    },
}

impl BucketError {
    pub fn retry(&self) -> Retry {
        match self {
            Self::InvalidKey { .. } | Self::TooLarge { .. } | Self::Missing { .. } | Self::TooMany { .. } => {
                Retry::Never
            }
            Self::Truncated { .. } => Retry::Soon,
            Self::Store { cause, .. } => match cause {
                Cause::Unavailable | Cause::Other => Retry::Soon,
                Cause::Denied | Cause::ReadOnly | Cause::NoSpace => Retry::AfterOperator,
                Cause::Damaged => Retry::Never,
            },
        }
    }

    fn store(op: Op, key: &str, source: object_store::Error) -> Self {
        Self::Store { op, key: key.to_owned(), cause: cause_of(&source), source: Box::new(source) }
    }
}

fn cause_of(error: &object_store::Error) -> Cause {
    use object_store::Error as E;
    match error {
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => return Cause::Denied,
        E::NotFound { .. } => return Cause::Unavailable,
        _ => {}
    }
    let mut link: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(at) = link {
        if let Some(io) = at.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind as K;
            return match io.kind() {
                K::StorageFull | K::QuotaExceeded | K::FileTooLarge => Cause::NoSpace,
                K::ReadOnlyFilesystem => Cause::ReadOnly,
                K::PermissionDenied => Cause::Denied,
                K::InvalidData => Cause::Damaged,
                _ => Cause::Unavailable,
            };
        }
        link = at.source();
    }
    match error {
        E::Generic { .. } => Cause::Unavailable,
        _ => Cause::Other,
    }
}

impl Bucket {
    /// Opens `dir:/abs/path` or `s3://bucket/prefix?endpoint=…&region=…&allow_http`, and probes that conditional writes are real.
    ///
    /// The directory is created if its parent exists. Credentials of S3 come from `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and
    /// `AWS_SESSION_TOKEN`. The probe writes and deletes a few small objects under `v1/probe/` and takes some dozen round trips.
    ///
    /// # Errors
    ///
    /// The URL is wrong, the store cannot be reached, or it does not keep the promises we build on: each says what to do.
    pub async fn open(url: &str) -> Result<Self, OpenError> {
        Self::open_as(url, None).await
    }

    /// As [`open`](Self::open), with credentials that do not come from the environment.
    pub async fn open_with(url: &str, credentials: Credentials) -> Result<Self, OpenError> {
        Self::open_as(url, Some(credentials)).await
    }

    async fn open_as(url: &str, credentials: Option<Credentials>) -> Result<Self, OpenError> {
        let mut bucket = url::connect(url, credentials).await?;
        let dialect = probe::run(&bucket).await?;
        Arc::get_mut(&mut bucket.inner).expect("nobody else has this bucket yet").dialect = dialect;
        Ok(bucket)
    }

    /// A bucket over any store, unprobed: for tests that inject faults through a wrapper, and for simulation.
    pub fn from_store(store: Arc<dyn ObjectStore>) -> Self {
        let description = store.to_string();
        Self::from_parts(Arc::clone(&store), store, String::new(), description)
    }

    fn from_parts(
        records: Arc<dyn ObjectStore>,
        data: Arc<dyn ObjectStore>,
        prefix: String,
        description: String,
    ) -> Self {
        Self { inner: Arc::new(Inner { records, data, prefix, dialect: TagDialect::Verbatim, description }) }
    }

    /// Where the bucket is, for people and logs; no secrets.
    pub fn describe(&self) -> &str {
        &self.inner.description
    }

    pub fn dialect(&self) -> TagDialect {
        self.inner.dialect
    }

    /// Reads an object whole; `None` if there is none.
    pub async fn get(&self, key: &str) -> Result<Option<Object>, BucketError> {
        self.get_from(&self.inner.data, key).await
    }

    async fn get_from(&self, store: &Arc<dyn ObjectStore>, key: &str) -> Result<Option<Object>, BucketError> {
        let path = self.path(key)?;
        let result = match store.get(&path).await {
            Ok(result) => result,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(source) => return Err(BucketError::store(Op::Get, key, source)),
        };
        let size_bytes = result.meta.size;
        if size_bytes > OBJECT_BYTES_MAX {
            return Err(BucketError::TooLarge { key: key.to_owned(), size_bytes });
        }
        let tag = tag_of(result.meta.e_tag.as_deref());
        let bytes = result.bytes().await.map_err(|source| BucketError::store(Op::Get, key, source))?;
        check_len(key, size_bytes, &bytes)?;
        Ok(Some(Object { bytes, tag }))
    }

    /// Reads exactly the bytes of `range`, in one request.
    ///
    /// # Errors
    ///
    /// [`BucketError::Missing`] without such an object, [`BucketError::Truncated`] if it is shorter than `range.end`.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, BucketError> {
        let path = self.path(key)?;
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let want_bytes = range.end - range.start;
        if want_bytes > OBJECT_BYTES_MAX {
            return Err(BucketError::TooLarge { key: key.to_owned(), size_bytes: want_bytes });
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let result = match self.inner.data.get_opts(&path, options).await {
            Ok(result) => result,
            Err(object_store::Error::NotFound { .. }) => return Err(BucketError::Missing { key: key.to_owned() }),
            Err(source) => return Err(BucketError::store(Op::GetRange, key, source)),
        };
        let bytes = result.bytes().await.map_err(|source| BucketError::store(Op::GetRange, key, source))?;
        check_len(key, want_bytes, &bytes)?;
        Ok(bytes)
    }

    /// Writes an object whole, replacing what was there. Atomic and durable when it returns; for immutable objects and scratch only:
    /// whatever two writers may want to change is a record.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), BucketError> {
        let path = self.path(key)?;
        let size_bytes = bytes.len() as u64;
        if size_bytes > OBJECT_BYTES_MAX {
            return Err(BucketError::TooLarge { key: key.to_owned(), size_bytes });
        }
        match self.inner.data.put(&path, bytes.into()).await {
            Ok(_) => Ok(()),
            Err(source) => Err(BucketError::store(Op::Put, key, source)),
        }
    }

    /// Deletes an object; an absent one is a success.
    pub async fn delete(&self, key: &str) -> Result<(), BucketError> {
        let path = self.path(key)?;
        match self.inner.data.delete(&path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(BucketError::store(Op::Delete, key, source)),
        }
    }

    /// Lists every object below the folder `prefix`, in key order. `v1/names` finds `v1/names/a/b` but not `v1/names2`; the empty
    /// prefix finds all.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Entry>, BucketError> {
        let folder = prefix.trim_end_matches('/');
        let path = match (folder.is_empty(), self.inner.prefix.is_empty()) {
            (true, true) => None,
            (true, false) => Some(StorePath::from(self.inner.prefix.trim_end_matches('/'))),
            (false, _) => Some(self.path(folder)?),
        };
        let mut entries = Vec::new();
        let mut stream = self.inner.data.list(path.as_ref());
        loop {
            let meta = match stream.try_next().await {
                Ok(Some(meta)) => meta,
                Ok(None) => break,
                Err(object_store::Error::NotFound { .. }) => break,
                Err(source) => return Err(BucketError::store(Op::List, prefix, source)),
            };
            // A foreign object outside our grammar cannot be ours; showing it would hand out a key that no other call accepts.
            let Some(key) = meta.location.as_ref().strip_prefix(self.inner.prefix.as_str()) else { continue };
            if check_key(key).is_err() {
                continue;
            }
            if entries.len() == LIST_ENTRIES_MAX {
                return Err(BucketError::TooMany { prefix: prefix.to_owned() });
            }
            entries.push(Entry { key: key.to_owned(), size_bytes: meta.size, tag: tag_of(meta.e_tag.as_deref()) });
        }
        entries.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(entries)
    }

    fn path(&self, key: &str) -> Result<StorePath, BucketError> {
        let invalid = |reason| BucketError::InvalidKey { key: key.to_owned(), reason };
        check_key(key).map_err(invalid)?;
        if self.inner.prefix.len() + key.len() > KEY_BYTES_MAX {
            return Err(invalid("longer than 900 bytes with the bucket's prefix"));
        }
        Ok(StorePath::from(format!("{}{key}", self.inner.prefix)))
    }
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket").field("at", &self.describe()).field("dialect", &self.inner.dialect).finish()
    }
}

/// The grammar of keys: parts of `[A-Za-z0-9._:=-]`, none empty or beginning with a dot, joined by single slashes. It means the same on
/// every store: nothing to escape, no `..`, no hidden files.
fn check_key(key: &str) -> Result<(), &'static str> {
    if key.len() > KEY_BYTES_MAX {
        return Err("longer than 900 bytes");
    }
    for part in key.split('/') {
        if part.is_empty() {
            return Err("empty, or with an empty part");
        }
        if part.len() > KEY_PART_BYTES_MAX {
            return Err("a part is longer than 200 bytes");
        }
        if part.starts_with('.') {
            return Err("a part begins with a dot");
        }
        if !part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:=-".contains(&b)) {
            return Err("a character is not one of A-Z a-z 0-9 . _ : = -");
        }
    }
    Ok(())
}

fn check_len(key: &str, want_bytes: u64, bytes: &Bytes) -> Result<(), BucketError> {
    let got_bytes = bytes.len() as u64;
    if got_bytes == want_bytes {
        Ok(())
    } else {
        Err(BucketError::Truncated { key: key.to_owned(), want_bytes, got_bytes })
    }
}

/// A store without ETags gives every object the empty tag; the probe refuses such a store.
fn tag_of(e_tag: Option<&str>) -> Tag {
    Tag::new(e_tag.unwrap_or_default())
}

#[cfg(test)]
mod tests;
