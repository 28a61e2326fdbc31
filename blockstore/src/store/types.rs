//! What callers of the store see: numbers, settings, errors.

use std::{fmt, io, path::PathBuf, time::Duration};

use proto::id::SpriteId;
use serde::{Deserialize, Serialize};

use crate::bucket::{Bucket, BucketError, RecordError};

/// A position in a volume's order of writes. All writes up to it are a state the guest could have seen at a power failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

/// Rises with each change of owner, also when the same host takes the volume again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// Rises when the volume's history forks or rolls back: a restore, a lost tail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

macro_rules! shown_as_number {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
shown_as_number!(Lsn, Epoch, Generation);

/// Bounds of one store. Tests make them small.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Journal of one volume. Full while the bucket is away, the guest hears that there is no space.
    pub journal_bytes: u64,
    /// One journal file.
    pub segment_bytes: u64,
    /// Journal files kept ready for reuse.
    pub spare_segments: usize,
    /// Dirty bytes that start a push.
    pub push_bytes: u64,
    /// Age of the oldest unpushed write that starts a push (ruling 7).
    pub push_age: Duration,
    /// Age of the oldest unpushed write from which on writes are delayed while the bucket answers (ruling 7).
    pub delay_age: Duration,
    /// Packs end at about this size.
    pub pack_bytes: usize,
    /// Pushes until compaction looks at the packs of a volume again.
    pub survey_pushes: u32,
    /// Frames on the local disk.
    pub cache_bytes: u64,
    /// Chunks in RAM, of all volumes.
    pub chunks_in_ram: usize,
    /// Manifest pages in RAM, of all volumes.
    pub pages_in_ram: usize,
    /// How long an order (release, restore, publish) tries before it says that the bucket is away; longer where much is to be pushed.
    pub order: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            journal_bytes: 8 << 30,
            segment_bytes: 16 << 20,
            spare_segments: 16,
            push_bytes: 16 << 20,
            push_age: Duration::from_millis(1500),
            delay_age: Duration::from_secs(4),
            pack_bytes: 16 << 20,
            survey_pushes: 64,
            cache_bytes: 20 << 30,
            chunks_in_ram: 1024,
            pages_in_ram: 8192,
            order: Duration::from_secs(30),
        }
    }
}

/// Where a store is and what it may use.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub bucket: Bucket,
    /// Local folder: journals and cache. Belongs to one store at a time.
    pub dir: PathBuf,
    /// Name of this host as the owner of heads.
    pub node: String,
    pub limits: Limits,
}

/// A volume could not be opened, created or freed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot use {} as the local store: check that it is on a local disk that we may write", path.display())]
    Dir { path: PathBuf, source: io::Error },
    #[error("{} is in use by another process; stop it first", path.display())]
    InUse { path: PathBuf },
    #[error("volume {id} does not exist in the bucket")]
    Unknown { id: SpriteId },
    #[error("volume {id} was destroyed")]
    Destroyed { id: SpriteId },
    #[error("volume {id} exists already")]
    Exists { id: SpriteId },
    #[error("volume {id} belongs to host {node} (epoch {epoch}); it must release it, or be declared lost, first")]
    OwnedElsewhere { id: SpriteId, node: String, epoch: Epoch },
    #[error(
        "a disk of {disk_bytes} bytes cannot hold the base image of {base_bytes} bytes, or is no multiple of 4096 up to 16 TiB"
    )]
    BadSize { disk_bytes: u64, base_bytes: u64 },
    /// Flushed writes of the guest are unreadable. The journal is left as it is.
    #[error("the journal of volume {id} is damaged ({reason}): flushed writes are lost; its folder is kept for salvage at {}", path.display())]
    Damaged { id: SpriteId, path: PathBuf, reason: String },
    #[error("cannot read or write the journal of volume {id}")]
    Journal { id: SpriteId, source: io::Error },
    #[error("cannot read or change the head of volume {id}")]
    Head { id: SpriteId, source: RecordError },
    #[error("cannot use the bucket for volume {id}")]
    Bucket { id: SpriteId, source: BucketError },
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// A base image could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    #[error("cannot read the image {}", path.display())]
    Image { path: PathBuf, source: io::Error },
    #[error("the image {} has {size_bytes} bytes; a raw disk of 4096 bytes up to 16 TiB is needed", path.display())]
    BadSize { path: PathBuf, size_bytes: u64 },
    #[error("cannot read or write the record of the base image")]
    Record(#[source] RecordError),
    #[error("cannot write the base image to the bucket")]
    Bucket(#[source] VolumeError),
}

/// An operation on an open volume failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("another host owns the volume now")]
    Fenced,
    #[error("the volume is closed")]
    Closed,
    #[error("the local disk failed under the volume's journal; the volume takes no more writes")]
    Poisoned,
    #[error(
        "no space is left for the volume's journal: free some on the host's disk, and see that the bucket takes what is pushed"
    )]
    NoSpace,
    #[error("cannot read or write local files of the volume")]
    Local(#[source] io::Error),
    #[error("the bucket does not take the volume's changes; check that it is up")]
    Bucket(#[source] BucketError),
    #[error("the bucket does not take the volume's head; check that it is up")]
    Head(#[source] RecordError),
    #[error("data of the volume in the bucket is missing or damaged: {0}")]
    Integrity(String),
    #[error("not done within {0:?}: the bucket does not keep up, or is away")]
    Slow(Duration),
    #[error("a disk can only grow, to a multiple of 4096 bytes up to 16 TiB: it has {now}, {wanted} were asked for")]
    BadSize { now: u64, wanted: u64 },
}

/// A checkpoint could not be taken, found, restored or deleted.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("there is no checkpoint {id}")]
    Unknown { id: String },
    #[error("checkpoint {id} is what the disk was last restored to or saved as; take a newer one first")]
    CurrentBase { id: String },
    #[error("checkpoint {id} was lost with its host before it reached the bucket")]
    Lost { id: String },
    #[error("a sprite has at most {max} checkpoints; delete some")]
    TooMany { max: usize },
    #[error("the comment has {len} bytes; at most {max} are kept")]
    CommentTooLong { len: usize, max: usize },
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Store(#[from] Box<StoreError>),
}

impl From<StoreError> for CheckpointError {
    fn from(error: StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

/// A volume could not be made out of another's checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    #[error("cannot fork checkpoint {checkpoint} of volume {parent}")]
    Parent { parent: SpriteId, checkpoint: String, source: CheckpointError },
    #[error("volume {parent} has {max} forks, which is the most there can be; fork one of them")]
    TooMany { parent: SpriteId, max: usize },
    #[error(
        "the disk of checkpoint {checkpoint} has {has_bytes} bytes; a fork cannot have fewer ({wanted_bytes} were asked for)"
    )]
    TooSmall { checkpoint: String, has_bytes: u64, wanted_bytes: u64 },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A memory image could not be published, retired or fetched.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot read or write {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the disk changed while its memory was published; it is no image of a sleeping sprite")]
    DiskChanged,
    #[error("there is no memory image for the disk as it is")]
    None,
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// What a checkpoint was like when it was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// The guest's file system was frozen.
    Filesystem,
    /// As after a power failure.
    Crash,
}

/// What a caller says about a new checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointMeta {
    pub comment: String,
    pub consistency: Consistency,
    pub is_auto: bool,
}

/// A checkpoint as listed (ruling 8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// `v1`, `v2`, … in the order of sealing; never used twice.
    pub id: String,
    pub created_unix_ms: u64,
    pub comment: String,
    pub consistency: Consistency,
    pub is_auto: bool,
    /// It is in the bucket.
    pub durable: bool,
    /// Its host was lost before it was durable.
    pub lost: bool,
    /// The disk's content descends from it: the last one restored, or sealed since.
    pub is_current_base: bool,
    pub lsn: Lsn,
}

/// Numbers of a volume, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeStatus {
    /// Position of the newest write.
    pub lsn: Lsn,
    /// Everything up to it is in the bucket.
    pub pushed_lsn: Lsn,
    /// Everything written before it is in the bucket.
    pub watermark_unix_ms: u64,
    /// Bytes of the disk that hold data, in whole chunks.
    pub used_bytes: u64,
    pub unpushed_bytes: u64,
    pub journal_bytes: u64,
    pub epoch: Epoch,
    pub generation: Generation,
    /// Since the last attempt to push failed.
    pub bucket_away: bool,
}

/// Files of a suspended VM, finished and no longer written.
#[derive(Clone, Debug)]
pub struct MemorySource {
    pub memory_file: PathBuf,
    /// Memory of the golden snapshot; only what differs from it is kept.
    pub golden_file: PathBuf,
    /// State of the devices.
    pub state_file: PathBuf,
    /// What has to be equal on the host that resumes.
    pub snapshot_key: String,
}

/// Files to be made from a memory image in the bucket.
#[derive(Clone, Debug)]
pub struct MemoryTarget {
    pub memory_file: PathBuf,
    pub golden_file: PathBuf,
    pub state_file: PathBuf,
}

/// A memory image in the bucket, valid for the disk as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    pub lsn: Lsn,
    pub snapshot_key: String,
    pub memory_bytes: u64,
}
