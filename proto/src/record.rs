//! The API record of a sprite (`v1/sprites/<id>/rec`): what its owner asked for. Who runs it and what is on its disk stands in the head.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{SpriteId, SpriteName};

/// The records and heads of all sprites lie under it.
pub const KEY_PREFIX: &str = "v1/sprites/";

/// Bytes of a checkpoint's comment. Up to 1,000 of them stand in one head, which is written at every push.
pub const CHECKPOINT_COMMENT_BYTES_MAX: usize = 256;

/// Where the record of a sprite is in the bucket. Its host writes it first.
pub fn key(id: SpriteId) -> String {
    format!("{KEY_PREFIX}{id}/rec")
}

/// The sprite whose record has that key; `None` for any other object.
pub fn id_of_key(key: &str) -> Option<SpriteId> {
    key.strip_prefix(KEY_PREFIX)?.strip_suffix("/rec")?.parse().ok()
}

/// Desired state and description of a sprite. Changed only by compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpriteRecord {
    pub id: SpriteId,
    pub name: SpriteName,
    pub org: String,
    /// Six characters that make the URL label unique: `<name>-<oid>`.
    pub oid: String,
    pub url: String,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub size: SizeClass,
    pub disk_bytes: u64,
    #[serde(default)]
    pub labels: Vec<String>,
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    #[serde(default)]
    pub url_settings: UrlSettings,
    #[serde(default)]
    pub idle: IdlePolicy,
    /// Woken by its host after a restart or loss, and never put to sleep.
    #[serde(default)]
    pub always_on: bool,
    /// Times at which the sprite is woken, soonest first.
    #[serde(default)]
    pub wake_at: Vec<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake_every_ms: Option<u64>,
    /// Set by destroy before anything is freed.
    #[serde(default)]
    pub deleted: bool,
}

/// vCPU and memory, one golden snapshot each (ruling 12).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SizeClass {
    S,
    #[default]
    M,
    L,
}

impl SizeClass {
    pub const ALL: [Self; 3] = [Self::S, Self::M, Self::L];

    pub const fn vcpus(self) -> u32 {
        match self {
            Self::S => 1,
            Self::M => 2,
            Self::L => 4,
        }
    }

    pub const fn memory_bytes(self) -> u64 {
        (self.vcpus() as u64) << 30
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::S => "s",
            Self::M => "m",
            Self::L => "l",
        }
    }
}

/// The text is not `s`, `m` or `l`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("size {0:?} is not one of s (1 vCPU, 1 GiB), m (2, 2) and l (4, 4)")]
pub struct BadSize(pub String);

impl std::str::FromStr for SizeClass {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "s" => Ok(Self::S),
            "" | "m" => Ok(Self::M),
            "l" => Ok(Self::L),
            other => Err(BadSize(other.to_owned())),
        }
    }
}

/// The disk of a new sprite: thin, so it costs what is written (ruling 12).
pub const DISK_BYTES_DEFAULT: u64 = 100 << 30;

/// Who may reach the sprite's URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UrlSettings {
    pub auth: UrlAuth,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_access: Option<String>,
}

impl Default for UrlSettings {
    fn default() -> Self {
        Self { auth: UrlAuth::Sprite, private_access: None }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UrlAuth {
    /// A token of the organisation.
    Sprite,
    Public,
}

/// When an unused sprite falls asleep, and how deep (ruling 28). Each delay begins where the one before ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdlePolicy {
    /// Idle this long → paused. `None`: never sleeps by itself.
    pub pause_after_ms: Option<u64>,
    /// Paused this long → suspended.
    pub suspend_after_ms: u64,
    /// Suspended this long → cold.
    pub cold_after_ms: u64,
}

impl Default for IdlePolicy {
    fn default() -> Self {
        Self { pause_after_ms: Some(30_000), suspend_after_ms: 30_000, cold_after_ms: 600_000 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_records_key_is_read_back_and_no_other_object_is_taken_for_one() {
        let id = SpriteId::generate();
        assert_eq!(id_of_key(&key(id)), Some(id));
        for other in [format!("v1/sprites/{id}/head"), format!("v1/sprites/{id}"), "v1/sprites/x/rec".to_owned()] {
            assert_eq!(id_of_key(&other), None, "{other}");
        }
    }
}
