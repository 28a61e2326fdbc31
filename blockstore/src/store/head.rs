//! The head: one record per volume, changed by compare-and-swap, never deleted.
//!
//! `v1/sprites/<id>/head` holds who owns the volume (node, epoch), where its disk is (root of the manifest), up to which write (LSN), and which
//! checkpoints and memory image exist. About 600 bytes plus 350 per checkpoint. Checkpoints are kept here, not in objects of their own: listing,
//! numbering, deleting and the move of the disk then are one decision.
//!
//! A checkpoint without a root was announced by an owner that sealed it and had not pushed it yet; if that owner's journal is gone, it is lost.

use std::{fmt, str::FromStr};

use proto::id::SpriteId;
use serde::{Deserialize, Serialize};

use super::types::{Checkpoint, Consistency, Epoch, Generation, Lsn};

/// Checkpoints of one volume. Keeps the head far below the largest record.
pub(super) const CHECKPOINTS_MAX: usize = 1000;
/// Bytes of a checkpoint's comment.
pub(super) const COMMENT_BYTES_MAX: usize = 256;

/// What the head of a volume says. For reading; only the volume's owner changes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    pub state: HeadState,
    /// Name of the owning node, while `owned`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    pub epoch: Epoch,
    pub generation: Generation,
    /// Everything up to it is in `root`.
    pub lsn: Lsn,
    /// When the last push cut the disk.
    pub cut_unix_ms: u64,
    pub size_bytes: u64,
    /// `None`: all zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) root: Option<Root>,
    /// Number of the next checkpoint.
    pub(super) next_checkpoint: u32,
    /// Number of the checkpoint the disk descends from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) current_base: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) checkpoints: Vec<KeptCheckpoint>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<KeptMemory>,
    /// Volumes that began as one of its checkpoints, and what each may name of this one's packs. Kept in a tombstone as well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) forks: Vec<Fork>,
    /// The volume that this one began as, until that one was told that it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<SpriteId>,
    /// Pushes since compaction last looked at the packs. Here, so that a volume which is open for a few pushes at a time has its turn as well.
    #[serde(default)]
    pub(super) pushes_since_survey: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadState {
    /// Everything is in the bucket; whoever wakes it may take it.
    Cold,
    Owned,
    /// A tombstone.
    Deleted,
}

/// A checkpoint in the head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeptCheckpoint {
    pub(super) number: u32,
    pub(super) created_unix_ms: u64,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) comment: String,
    pub(super) consistency: Consistency,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) is_auto: bool,
    pub(super) lsn: Lsn,
    /// Set once its push landed.
    pub(super) kept: Option<KeptDisk>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) lost: bool,
}

/// The disk of a durable checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeptDisk {
    pub(super) root: Option<Root>,
    pub(super) size_bytes: u64,
}

/// Another volume that names packs of this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fork {
    pub(super) child: SpriteId,
    /// What it began as: everything below stays.
    pub(super) root: Option<Root>,
    pub(super) since_unix_ms: u64,
}

/// A memory image. Valid only while `lsn` is the head's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeptMemory {
    pub(super) lsn: Lsn,
    pub(super) snapshot_key: String,
    /// Chunks that differ from the golden snapshot's memory. `None`: none differs.
    pub(super) root: Option<Root>,
    pub(super) memory_bytes: u64,
    pub(super) state_root: Option<Root>,
    pub(super) state_bytes: u64,
}

impl Head {
    /// Whether this node may go on with the volume without asking anybody.
    pub fn is_owned_by(&self, node: &str) -> bool {
        self.state == HeadState::Owned && self.node.as_deref() == Some(node)
    }

    pub fn is_deleted(&self) -> bool {
        self.state == HeadState::Deleted
    }

    /// Whether a memory image of the disk as it is lies in the bucket.
    pub fn has_memory(&self) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.lsn == self.lsn)
    }

    pub(super) fn checkpoint(&self, number: u32) -> Option<&KeptCheckpoint> {
        self.checkpoints.iter().find(|kept| kept.number == number)
    }
}

impl KeptCheckpoint {
    pub(super) fn shown(&self, current_base: Option<u32>) -> Checkpoint {
        Checkpoint {
            id: checkpoint_id(self.number),
            created_unix_ms: self.created_unix_ms,
            comment: self.comment.clone(),
            consistency: self.consistency,
            is_auto: self.is_auto,
            durable: self.kept.is_some(),
            lost: self.lost,
            is_current_base: current_base == Some(self.number),
            lsn: self.lsn,
        }
    }
}

pub(super) fn checkpoint_id(number: u32) -> String {
    format!("v{number}")
}

/// The number in `v<number>`, spelled as we spell it.
pub(super) fn checkpoint_number(id: &str) -> Option<u32> {
    let number = id.strip_prefix('v')?.parse().ok()?;
    (checkpoint_id(number) == id).then_some(number)
}

pub(super) fn head_key(id: SpriteId) -> String {
    format!("v1/sprites/{id}/head")
}

/// Where packs of one kind lie: of a sprite's volume, or of a base image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Origin {
    Volume([u8; 16]),
    Base([u8; 16]),
}

/// One pack. Never written twice with different content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PackId {
    pub(super) origin: Origin,
    pub(super) epoch: u64,
    pub(super) seq: u32,
}

/// Bytes in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) pack: PackId,
    pub(super) offset: u32,
    pub(super) len: u32,
}

/// The root page of a manifest: where, and what it must hash to. In the head as one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Root {
    pub(super) place: Place,
    pub(super) hash: [u8; 32],
    /// Chunks that hold data.
    pub(super) chunks: u64,
}

impl Origin {
    pub(super) fn of_volume(id: SpriteId) -> Self {
        Self::Volume(*id.uuid().as_bytes())
    }

    pub(super) fn prefix(self) -> String {
        match self {
            Self::Volume(id) => format!("v1/vol/{}", uuid::Uuid::from_bytes(id)),
            Self::Base(id) => format!("v1/tmpl/{}", uuid::Uuid::from_bytes(id).simple()),
        }
    }

    /// The folder of its packs.
    pub(super) fn packs(self) -> String {
        format!("{}/p", self.prefix())
    }

    pub(super) fn code(self) -> (u8, [u8; 16]) {
        match self {
            Self::Volume(id) => (0, id),
            Self::Base(id) => (1, id),
        }
    }

    pub(super) fn from_code(kind: u8, id: [u8; 16]) -> Option<Self> {
        match kind {
            0 => Some(Self::Volume(id)),
            1 => Some(Self::Base(id)),
            _ => None,
        }
    }
}

impl PackId {
    pub(super) fn key(self) -> String {
        format!("{}/{}-{}.pack", self.origin.packs(), self.epoch, self.seq)
    }

    /// `None` if the object is no pack of that origin.
    pub(super) fn from_key(origin: Origin, key: &str) -> Option<Self> {
        let name = key.strip_prefix(&origin.packs())?.strip_prefix('/')?.strip_suffix(".pack")?;
        let (epoch, seq) = name.split_once('-')?;
        let pack = Self { origin, epoch: epoch.parse().ok()?, seq: seq.parse().ok()? };
        (pack.key() == key).then_some(pack)
    }

    /// One file name.
    pub(super) fn file_name(self) -> String {
        let (kind, id) = self.origin.code();
        format!("{kind}-{}-{}-{}", uuid::Uuid::from_bytes(id).simple(), self.epoch, self.seq)
    }

    pub(super) fn from_file_name(name: &str) -> Option<Self> {
        let mut parts = name.split('-');
        let kind = parts.next()?.parse().ok()?;
        let id = uuid::Uuid::try_parse(parts.next()?).ok()?;
        let (epoch, seq) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let origin = Origin::from_code(kind, id.into_bytes())?;
        parts.next().is_none().then_some(Self { origin, epoch, seq })
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place: Place { pack, offset, len }, hash, chunks } = self;
        let hash = blake3::Hash::from_bytes(*hash);
        write!(f, "{}:{offset}:{len}:{chunks}:{hash}", pack.file_name())
    }
}

/// The text is no root.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not the root of a manifest")]
pub(super) struct BadRoot(String);

impl FromStr for Root {
    type Err = BadRoot;

    fn from_str(text: &str) -> Result<Self, BadRoot> {
        let parse = || {
            let mut parts = text.split(':');
            let pack = PackId::from_file_name(parts.next()?)?;
            let (offset, len) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            let chunks = parts.next()?.parse().ok()?;
            let hash = *blake3::Hash::from_hex(parts.next()?).ok()?.as_bytes();
            parts.next().is_none().then_some(Self { place: Place { pack, offset, len }, hash, chunks })
        };
        parse().ok_or_else(|| BadRoot(text.to_owned()))
    }
}

impl Serialize for Root {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Root {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_and_packs_have_one_spelling() {
        let pack = PackId { origin: Origin::Base([7; 16]), epoch: 3, seq: 9 };
        let root = Root { place: Place { pack, offset: 64, len: 100 }, hash: [5; 32], chunks: 12 };
        assert_eq!(root.to_string().parse::<Root>().unwrap(), root);
        assert!("x".parse::<Root>().is_err());
        assert!(format!("{root}:").parse::<Root>().is_err());
        assert_eq!(pack.key(), "v1/tmpl/07070707070707070707070707070707/p/3-9.pack");
        let volume = PackId { origin: Origin::Volume([7; 16]), epoch: 3, seq: 9 };
        assert_eq!(volume.key(), "v1/vol/07070707-0707-0707-0707-070707070707/p/3-9.pack");
        assert_ne!(volume.file_name(), pack.file_name());
        assert_eq!(PackId::from_key(volume.origin, &volume.key()), Some(volume));
        for key in [pack.key(), format!("{}x", volume.key()), volume.key().replace("/3-", "/03-")] {
            assert_eq!(PackId::from_key(volume.origin, &key), None, "{key}");
        }
    }

    #[test]
    fn checkpoint_numbers_have_one_spelling() {
        assert_eq!(checkpoint_number("v12"), Some(12));
        for text in ["v012", "v+1", "12", "v", "V1", "v1 ", "v99999999999"] {
            assert_eq!(checkpoint_number(text), None, "{text}");
        }
    }
}
