//! The registry: which sprite a name means, and which name a URL label means.
//!
//! ```text
//!                claim                    settle
//!  (none), free ──────▶ pending(since) ──────────▶ claimed(id) ──free──▶ free
//!                          │  ▲ renew
//!                          └──── nobody renewed it for 60 s: whoever looks resolves it ──▶ claimed, if its `rec` exists; else free
//! ```
//!
//! # Invariants
//!
//! 1. The object changes by compare-and-swap and is never deleted, so two creates of a name cannot both win.
//! 2. `since` is the claim's identity: the record made under it has it as `created_at`. A record whose name object says neither its id nor
//!    its `since` belongs to a claim that was lost, and is nobody's.
//! 3. A label belongs to one pair of organisation and name for ever (ruling 24).

use std::time::Duration;

use blockstore::bucket::{Bucket, Record, RecordError};
use jiff::Timestamp;
use proto::id::{SpriteId, SpriteName};
use serde::{Deserialize, Serialize};

use crate::refusal::Refusal;

/// A claim that nobody renewed for this long may be resolved by anybody (ruling 1).
pub(crate) const PENDING_MAX: Duration = Duration::from_secs(60);
/// How often a create that takes long says that it is still at it.
pub(crate) const RENEW_PERIOD: Duration = Duration::from_secs(15);
/// Characters of an oid, the last part of a URL label.
const OID_LEN: usize = 6;
/// Oids tried until one makes the label ours. Each is taken by somebody else with a chance of one in two billion.
const OID_ATTEMPTS: u32 = 16;
/// Lost races until we give up; each means that somebody else got on.
const RACES_MAX: u32 = 16;

/// What a name object says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub(crate) enum NameEntry {
    Free { since: Timestamp },
    Pending { since: Timestamp, renewed: Timestamp },
    Claimed { id: SpriteId, since: Timestamp },
}

impl NameEntry {
    /// A claim that its maker has given up, as far as one can tell.
    pub(crate) fn is_abandoned(&self, now: Timestamp) -> bool {
        match self {
            Self::Pending { renewed, .. } => now.duration_since(*renewed).unsigned_abs() > PENDING_MAX,
            Self::Free { .. } | Self::Claimed { .. } => false,
        }
    }
}

/// A name that this create holds, pending.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) since: Timestamp,
    record: Record<NameEntry>,
}

/// Outcome of [`Names::claim`].
#[derive(Debug)]
pub(crate) enum Claimed {
    Ours(Claim),
    /// Somebody else's; the object as it was read.
    Taken(Record<NameEntry>),
}

/// What a label object says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LabelEntry {
    pub(crate) org: String,
    pub(crate) name: SpriteName,
}

#[derive(Clone, Debug)]
pub(crate) struct Names {
    bucket: Bucket,
}

impl Names {
    pub(crate) fn new(bucket: Bucket) -> Self {
        Self { bucket }
    }

    pub(crate) async fn read(&self, org: &str, name: &SpriteName) -> Result<Option<Record<NameEntry>>, RecordError> {
        self.bucket.read_record(&name_key(org, name)).await
    }

    /// Takes the name if it is free.
    pub(crate) async fn claim(&self, org: &str, name: &SpriteName) -> Result<Claimed, RecordError> {
        let mut raced = None;
        for _ in 0..RACES_MAX {
            let now = now();
            let pending = NameEntry::Pending { since: now, renewed: now };
            let written = match self.read(org, name).await? {
                None => self.bucket.create_record(&name_key(org, name), pending).await,
                Some(record) => match record.value {
                    NameEntry::Free { .. } => self.bucket.update_record(&record, pending).await,
                    NameEntry::Pending { .. } | NameEntry::Claimed { .. } => return Ok(Claimed::Taken(record)),
                },
            };
            match written {
                Ok(record) => return Ok(Claimed::Ours(Claim { since: now, record })),
                Err(error @ RecordError::Conflict { .. }) => raced = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(raced.unwrap_or(RecordError::Unknown { key: name_key(org, name), source: None }))
    }

    /// Says that the create goes on.
    pub(crate) async fn renew(&self, claim: &mut Claim) -> Result<(), RecordError> {
        let entry = NameEntry::Pending { since: claim.since, renewed: now() };
        claim.record = self.bucket.update_record(&claim.record, entry).await?;
        Ok(())
    }

    /// The name means `id` from now on.
    ///
    /// # Errors
    ///
    /// A conflict means that the claim was resolved by somebody else: the sprite must be freed.
    pub(crate) async fn settle(&self, claim: &Claim, id: SpriteId) -> Result<(), RecordError> {
        match self.bucket.update_record(&claim.record, NameEntry::Claimed { id, since: claim.since }).await {
            Ok(_) => Ok(()),
            // Somebody found the record first and settled the same.
            Err(error @ RecordError::Conflict { .. }) => {
                let now = self.bucket.read_record::<NameEntry>(&claim.record.key).await?;
                match now.map(|record| record.value) {
                    Some(NameEntry::Claimed { id: claimed, .. }) if claimed == id => Ok(()),
                    _ => Err(error),
                }
            }
            // Written, and changed since: a destroy was quick.
            Err(RecordError::Superseded { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Gives up a claim under which nothing was made.
    pub(crate) async fn release(&self, claim: Claim) -> Result<(), RecordError> {
        self.replace(&claim.record, NameEntry::Free { since: now() }).await
    }

    /// Replaces exactly what was read; losing the race is fine.
    pub(crate) async fn replace(&self, record: &Record<NameEntry>, entry: NameEntry) -> Result<(), RecordError> {
        match self.bucket.update_record(record, entry).await {
            Ok(_) | Err(RecordError::Conflict { .. } | RecordError::Superseded { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Frees the name if it means `id`. Idempotent.
    pub(crate) async fn free(
        &self,
        org: &str,
        name: &SpriteName,
        id: SpriteId,
        born: Timestamp,
    ) -> Result<(), RecordError> {
        for _ in 0..RACES_MAX {
            let Some(record) = self.read(org, name).await? else { return Ok(()) };
            let is_its = match record.value {
                NameEntry::Claimed { id: claimed, .. } => claimed == id,
                NameEntry::Pending { since, .. } => since == born,
                NameEntry::Free { .. } => false,
            };
            if !is_its {
                return Ok(());
            }
            match self.bucket.update_record(&record, NameEntry::Free { since: now() }).await {
                Ok(_) | Err(RecordError::Superseded { .. }) => return Ok(()),
                Err(RecordError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(RecordError::Conflict { key: name_key(org, name) })
    }

    /// Makes `<name>-<oid>` a label of this organisation's name and returns the oid. The same for the same name, always.
    pub(crate) async fn claim_label(&self, org: &str, name: &SpriteName) -> Result<String, Refusal> {
        let mine = LabelEntry { org: org.to_owned(), name: name.clone() };
        for attempt in 0..OID_ATTEMPTS {
            let oid = oid(org, attempt);
            let key = label_key(&format!("{name}-{oid}"));
            match self.bucket.create_record(&key, mine.clone()).await {
                Ok(_) | Err(RecordError::Superseded { .. }) => return Ok(oid),
                Err(RecordError::Conflict { .. }) => {
                    let theirs = self.bucket.read_record::<LabelEntry>(&key).await?;
                    if theirs.is_some_and(|record| record.value == mine) {
                        return Ok(oid);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::Failed(format!("all {OID_ATTEMPTS} URL labels for {name} belong to others; use another name")))
    }

    /// Whose label that is.
    pub(crate) async fn label(&self, label: &str) -> Result<Option<LabelEntry>, RecordError> {
        // A text that is not a label cannot be a key either, so nobody has it.
        if label.split_once('/').is_some() || label.rsplit_once('-').is_none_or(|(_, oid)| oid.len() != OID_LEN) {
            return Ok(None);
        }
        match self.bucket.read_record::<LabelEntry>(&label_key(label)).await {
            Ok(record) => Ok(record.map(|record| record.value)),
            Err(RecordError::Bucket(blockstore::bucket::BucketError::InvalidKey { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Microseconds are what survives every place that a time is written in.
pub(crate) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

fn name_key(org: &str, name: &SpriteName) -> String {
    format!("v1/names/{org}/{name}")
}

fn label_key(label: &str) -> String {
    format!("v1/labels/{label}")
}

/// Six characters that tell organisations apart.
fn oid(org: &str, attempt: u32) -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let digest = blake3::hash(format!("oid/{attempt}/{org}").as_bytes());
    // 36^6 divides nothing; over 16 bits a letter is off by less than one in a thousand.
    let letter =
        |pair: &[u8]| char::from(ALPHABET[usize::from(u16::from_le_bytes([pair[0], pair[1]])) % ALPHABET.len()]);
    digest.as_bytes().chunks_exact(2).take(OID_LEN).map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn names(folder: &tempfile::TempDir) -> Names {
        Names::new(Bucket::open(&format!("dir:{}", folder.path().join("b").display())).await.unwrap())
    }

    fn ours(claimed: Claimed) -> Claim {
        match claimed {
            Claimed::Ours(claim) => claim,
            Claimed::Taken(record) => panic!("taken: {:?}", record.value),
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_many_who_want_a_name_one_gets_it() {
        let folder = tempfile::tempdir().unwrap();
        let names = names(&folder).await;
        let name: SpriteName = "demo".parse().unwrap();
        for round in 0..5 {
            let tries = (0..12).map(|_| {
                let (names, name) = (names.clone(), name.clone());
                tokio::spawn(async move { names.claim("local", &name).await })
            });
            let mut won = Vec::new();
            for attempt in tries.collect::<Vec<_>>() {
                if let Claimed::Ours(claim) = attempt.await.unwrap().unwrap() {
                    won.push(claim);
                }
            }
            assert_eq!(won.len(), 1, "round {round}");
            names.release(won.remove(0)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_name_is_freed_only_by_the_sprite_that_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let names = names(&folder).await;
        let name: SpriteName = "demo".parse().unwrap();
        let (first, second) = (SpriteId::generate(), SpriteId::generate());
        let mut claim = ours(names.claim("local", &name).await.unwrap());
        names.renew(&mut claim).await.unwrap();
        names.settle(&claim, first).await.unwrap();
        assert!(matches!(names.claim("local", &name).await.unwrap(), Claimed::Taken(_)));
        names.free("local", &name, second, now()).await.unwrap();
        assert!(matches!(names.claim("local", &name).await.unwrap(), Claimed::Taken(_)), "another id frees nothing");
        names.free("local", &name, first, claim.since).await.unwrap();
        names.free("local", &name, first, claim.since).await.unwrap();
        let again = ours(names.claim("local", &name).await.unwrap());
        assert!(
            matches!(names.settle(&claim, first).await, Err(RecordError::Conflict { .. })),
            "a lost claim settles nothing"
        );
        names.settle(&again, second).await.unwrap();
    }

    #[test]
    fn only_a_claim_that_nobody_renews_is_abandoned() {
        let at = |s: i64| Timestamp::from_second(1_700_000_000 + s).unwrap();
        let pending = NameEntry::Pending { since: at(0), renewed: at(100) };
        assert!(!pending.is_abandoned(at(160)));
        assert!(pending.is_abandoned(at(161)));
        assert!(!NameEntry::Claimed { id: SpriteId::generate(), since: at(0) }.is_abandoned(at(9999)));
    }

    #[tokio::test]
    async fn labels_are_unique_and_stay() {
        let folder = tempfile::tempdir().unwrap();
        let names = names(&folder).await;
        let name: SpriteName = "demo".parse().unwrap();
        let oid = names.claim_label("local", &name).await.unwrap();
        assert!(oid.len() == 6 && oid.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()), "{oid}");
        assert_eq!(names.claim_label("local", &name).await.unwrap(), oid);
        let entry = names.label(&format!("demo-{oid}")).await.unwrap().unwrap();
        assert_eq!((entry.org.as_str(), &entry.name), ("local", &name));
        // Another organisation whose first oid is taken gets its second.
        let stolen = LabelEntry { org: "local".into(), name: name.clone() };
        names.bucket.create_record(&label_key(&format!("demo-{}", super::oid("other", 0))), stolen).await.unwrap();
        assert_eq!(names.claim_label("other", &name).await.unwrap(), super::oid("other", 1));
        for nobody in ["", "demo", "demo-zzzzzz", "../x-aaaaaa", "a/b-aaaaaa", "é-aaaaaa"] {
            assert_eq!(names.label(nobody).await.unwrap(), None, "{nobody:?}");
        }
    }
}
