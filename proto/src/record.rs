//! The API record of a sprite (`v1/sprites/<id>/rec`): what its owner asked for. Who runs it and what is on its disk stands in the head.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
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
    /// Timed wakes that were due until then are done, and the period counts from there; before the first of them from the sprite's birth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wakes_done: Option<Timestamp>,
    /// What its maker called the create, so that a repeated one finds this sprite instead of a name that is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// What its disk began as; none: the base image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<ForkedFrom>,
    /// Set by destroy before anything is freed.
    #[serde(default)]
    pub deleted: bool,
}

/// A checkpoint of another sprite, which may be gone by now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkedFrom {
    pub id: SpriteId,
    /// What it was called then.
    pub name: SpriteName,
    pub checkpoint: String,
}

impl SpriteRecord {
    /// When a timer wakes it next. In the past: the wake was missed, because no host was up, and has to be made up for.
    pub fn next_wake(&self) -> Option<Timestamp> {
        let period = self.wake_every_ms.filter(|ms| *ms > 0).and_then(|ms| i64::try_from(ms).ok());
        let periodic = period.and_then(|ms| {
            self.wakes_done.unwrap_or(self.created_at).checked_add(SignedDuration::from_millis(ms)).ok()
        });
        self.wake_at.iter().copied().chain(periodic).min()
    }

    /// Whatever was due until `now` is done by one wake.
    pub fn finish_wakes(&mut self, now: Timestamp) {
        self.wake_at.retain(|at| *at > now);
        self.wakes_done = self.wakes_done.max(Some(now));
    }
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

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).expect("a date")
    }

    fn record(wake_at: &[i64], every_s: Option<u64>) -> SpriteRecord {
        SpriteRecord {
            id: SpriteId::generate(),
            name: "timed".parse().expect("a name"),
            org: "local".to_owned(),
            oid: "aaaaaa".to_owned(),
            url: String::new(),
            created_at: at(0),
            updated_at: at(0),
            size: SizeClass::M,
            disk_bytes: DISK_BYTES_DEFAULT,
            labels: Vec::new(),
            environment: BTreeMap::new(),
            url_settings: UrlSettings::default(),
            idle: IdlePolicy::default(),
            always_on: false,
            wake_at: wake_at.iter().map(|second| at(*second)).collect(),
            wake_every_ms: every_s.map(|seconds| seconds * 1000),
            wakes_done: None,
            request_id: None,
            from: None,
            deleted: false,
        }
    }

    #[test]
    fn the_next_wake_is_the_soonest_of_all() {
        assert_eq!(record(&[], None).next_wake(), None);
        assert_eq!(record(&[30, 90], None).next_wake(), Some(at(30)));
        assert_eq!(record(&[90], Some(60)).next_wake(), Some(at(60)));
        assert_eq!(record(&[], Some(0)).next_wake(), None);
    }

    #[test]
    fn wakes_that_were_missed_are_made_up_for_once() {
        let mut missed = record(&[10, 20, 500], Some(60));
        assert_eq!(missed.next_wake(), Some(at(10)));
        // The host comes back at 200: two times and three periods are past.
        missed.finish_wakes(at(200));
        assert_eq!(missed.next_wake(), Some(at(260)));
        missed.finish_wakes(at(260));
        missed.finish_wakes(at(200));
        assert_eq!((missed.next_wake(), missed.wakes_done), (Some(at(320)), Some(at(260))), "what is done stays done");
        missed.wake_every_ms = None;
        assert_eq!(missed.next_wake(), Some(at(500)));
        missed.finish_wakes(at(500));
        assert_eq!(missed.next_wake(), None);
    }
}
