//! Ids as newtypes: an organisation's slug cannot be passed for a sprite's name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A sprite, for ever: survives renames, restores and moves; never used again after a destroy. Also the id of its disk volume.
///
/// Text form `sprite-<uuid>` on the public API, the bare uuid in bucket keys.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SpriteId(Uuid);

impl SpriteId {
    /// A new id, sortable by time of creation (UUID v7).
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    pub const fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }

    pub const fn uuid(self) -> Uuid {
        self.0
    }

    /// What the public API shows.
    pub fn public(self) -> String {
        format!("sprite-{}", self.0)
    }
}

impl fmt::Display for SpriteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for SpriteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sprite-{}", self.0)
    }
}

/// The text is neither `sprite-<uuid>` nor a bare uuid.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a sprite id")]
pub struct BadSpriteId {
    text: String,
    #[source]
    source: uuid::Error,
}

impl FromStr for SpriteId {
    type Err = BadSpriteId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.strip_prefix("sprite-").unwrap_or(text);
        match Uuid::parse_str(bare) {
            Ok(uuid) => Ok(Self(uuid)),
            Err(source) => Err(BadSpriteId { text: text.to_owned(), source }),
        }
    }
}

/// Longest sprite name (ruling 24): the URL label `<name>-<oid>` has to fit into 63.
pub const NAME_LEN_MAX: usize = 48;

/// The name of a sprite: a lower-case DNS label of at most [`NAME_LEN_MAX`] characters without `--`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpriteName(String);

/// Why a text cannot name a sprite.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    #[error("name is required")]
    Empty,
    #[error("name is {len} characters long; at most {NAME_LEN_MAX} fit into its URL")]
    TooLong { len: usize },
    #[error("name {name:?} has the character {bad:?}; use lower-case letters, digits and single hyphens")]
    Character { name: String, bad: char },
    #[error("name {name:?} begins or ends with a hyphen, or has two in a row; use single hyphens inside")]
    Hyphens { name: String },
}

impl SpriteName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SpriteName {
    type Err = BadName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if name.is_empty() {
            return Err(BadName::Empty);
        }
        let len = name.chars().count();
        if len > NAME_LEN_MAX {
            return Err(BadName::TooLong { len });
        }
        if let Some(bad) = name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
            return Err(BadName::Character { name: name.to_owned(), bad });
        }
        if name.starts_with('-') || name.ends_with('-') || name.contains("--") {
            return Err(BadName::Hyphens { name: name.to_owned() });
        }
        Ok(Self(name.to_owned()))
    }
}

impl TryFrom<String> for SpriteName {
    type Error = BadName;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl From<SpriteName> for String {
    fn from(name: SpriteName) -> Self {
        name.0
    }
}

impl fmt::Display for SpriteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for SpriteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who may commit a sprite's head: rises with each change of owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// Position in a volume's write order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Lsn(pub u64);

/// Rises when a sprite's history forks or rolls back: restore, lost tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Generation(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, expected: Result<(), BadName>) {
        assert_eq!(name.parse::<SpriteName>().map(|_| ()), expected, "{name:?}");
    }

    #[test]
    fn names_are_lower_case_dns_labels() {
        check("demo", Ok(()));
        check("a-1-b", Ok(()));
        check(&"a".repeat(48), Ok(()));
        check("", Err(BadName::Empty));
        check(&"a".repeat(64), Err(BadName::TooLong { len: 64 }));
        check("Demo", Err(BadName::Character { name: "Demo".into(), bad: 'D' }));
        check("dé", Err(BadName::Character { name: "dé".into(), bad: 'é' }));
        check("a--b", Err(BadName::Hyphens { name: "a--b".into() }));
        check("-a", Err(BadName::Hyphens { name: "-a".into() }));
    }

    #[test]
    fn an_id_reads_back_in_both_forms() {
        let id = SpriteId::generate();
        assert_eq!(id.public().parse::<SpriteId>().unwrap(), id);
        assert_eq!(id.to_string().parse::<SpriteId>().unwrap(), id);
        assert!("sprite-x".parse::<SpriteId>().is_err());
    }
}
