//! API tokens: `org-slug/org-id/token-id/token-value`, the dialect's four parts. The bucket keeps a hash of the value only.
//!
//! ```text
//!  v1/orgs/<slug>          {id}                                   made with the first token
//!  v1/tokens/<token-id>    {org, org_id, hash, description, …}     hash = blake3(value); values have 256 random bits, so no salt
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use blockstore::bucket::{Bucket, RecordError};
use jiff::Timestamp;
use proto::token::{TokenParts, is_slug};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

/// A revoked token works this much longer.
const VALID_FRESH: Duration = Duration::from_secs(10);
/// A token minted elsewhere is refused this long at most, once it was tried too early.
const INVALID_FRESH: Duration = Duration::from_millis(500);
/// Tokens remembered. When full, all are asked for again.
const REMEMBERED_MAX: usize = 10_000;

/// Whom a token belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) org: Arc<str>,
    pub(crate) token_id: Arc<str>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct OrgEntry {
    id: Uuid,
    created_at: Timestamp,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct TokenEntry {
    org: String,
    org_id: Uuid,
    /// Hexadecimal.
    hash: String,
    #[serde(default)]
    description: String,
    created_at: Timestamp,
    #[serde(default)]
    revoked: bool,
}

/// A token could not be minted.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    #[error("organisation {0:?} is not 1 to 63 lower-case letters, digits and hyphens")]
    BadOrg(String),
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// The tokens of a cluster. Clones share what they remember.
#[derive(Clone, Debug)]
pub struct Tokens(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bucket: Bucket,
    /// By keyed hash: neither our memory nor the time of a look-up gives a token away.
    remembered: Mutex<HashMap<blake3::Hash, (Option<Caller>, Instant)>>,
    key: [u8; 32],
}

impl Tokens {
    pub fn new(bucket: Bucket) -> Self {
        Self(Arc::new(Inner { bucket, remembered: Mutex::default(), key: rand::random() }))
    }

    /// Makes a token of `org`, and the organisation if there is none. The text is shown once; only its hash is kept.
    pub async fn mint(&self, org: &str, description: &str) -> Result<String, MintError> {
        if !is_slug(org) {
            return Err(MintError::BadOrg(org.to_owned()));
        }
        let org_id = self.org_id(org).await?;
        let token_id = Uuid::now_v7().simple().to_string();
        let value = URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
        let entry = TokenEntry {
            org: org.to_owned(),
            org_id,
            hash: blake3::hash(value.as_bytes()).to_hex().to_string(),
            description: description.to_owned(),
            created_at: Timestamp::now(),
            revoked: false,
        };
        self.0.bucket.create_record(&token_key(&token_id), entry).await?;
        Ok(format!("{org}/{}/{token_id}/{value}", org_id.simple()))
    }

    /// Whether the token is valid now.
    pub async fn is_valid(&self, token: &str) -> Result<bool, RecordError> {
        Ok(self.authenticate(token).await?.is_some())
    }

    async fn org_id(&self, org: &str) -> Result<Uuid, RecordError> {
        let key = format!("v1/orgs/{org}");
        if let Some(record) = self.0.bucket.read_record::<OrgEntry>(&key).await? {
            return Ok(record.value.id);
        }
        let entry = OrgEntry { id: Uuid::now_v7(), created_at: Timestamp::now() };
        match self.0.bucket.create_record(&key, entry).await {
            Ok(record) => Ok(record.value.id),
            Err(RecordError::Conflict { .. }) => match self.0.bucket.read_record::<OrgEntry>(&key).await? {
                Some(record) => Ok(record.value.id),
                None => Err(RecordError::Gone { key }),
            },
            Err(error) => Err(error),
        }
    }

    /// Whose token it is; `None` when it is not valid.
    pub(crate) async fn authenticate(&self, token: &str) -> Result<Option<Caller>, RecordError> {
        let Some(parts) = TokenParts::parse(token) else { return Ok(None) };
        let key = blake3::keyed_hash(&self.0.key, token.as_bytes());
        if let Some(known) = self.remembered(&key) {
            return Ok(known);
        }
        let record = self.0.bucket.read_record::<TokenEntry>(&token_key(parts.token_id)).await?;
        let caller = record
            .map(|record| record.value)
            .filter(|entry| matches(&parts, entry))
            .map(|entry| Caller { org: entry.org.into(), token_id: parts.token_id.into() });
        self.remember(key, caller.clone());
        Ok(caller)
    }

    fn remembered(&self, key: &blake3::Hash) -> Option<Option<Caller>> {
        let remembered = self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.get(key).filter(|(_, until)| Instant::now() < *until).map(|(caller, _)| caller.clone())
    }

    fn remember(&self, key: blake3::Hash, caller: Option<Caller>) {
        let now = Instant::now();
        let mut remembered = self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= REMEMBERED_MAX {
            remembered.retain(|_, (_, until)| now < *until);
        }
        if remembered.len() >= REMEMBERED_MAX {
            remembered.clear();
        }
        let fresh = if caller.is_some() { VALID_FRESH } else { INVALID_FRESH };
        remembered.insert(key, (caller, now + fresh));
    }
}

/// Whether `entry` is that of exactly this token.
fn matches(parts: &TokenParts<'_>, entry: &TokenEntry) -> bool {
    let Ok(hash) = blake3::Hash::from_hex(&entry.hash) else { return false };
    // Hashes compare in constant time.
    let is_value = blake3::hash(parts.value.as_bytes()) == hash;
    is_value && !entry.revoked && entry.org == parts.org && entry.org_id == parts.org_id
}

fn token_key(token_id: &str) -> String {
    format!("v1/tokens/{token_id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_whole_token_opens() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("dir:{}", folder.path().join("b").display());
        let tokens = Tokens::new(Bucket::open(&url).await.unwrap());
        let token = tokens.mint("local", "first").await.unwrap();
        let second = tokens.mint("local", "second").await.unwrap();
        assert_eq!(token.split('/').count(), 4);
        assert_eq!(token.split('/').nth(1), second.split('/').nth(1), "one organisation, one id");
        // As another coordinator sees it.
        let tokens = Tokens::new(Bucket::open(&url).await.unwrap());
        for _ in 0..2 {
            assert_eq!(&*tokens.authenticate(&token).await.unwrap().unwrap().org, "local");
        }
        let parts: Vec<&str> = token.split('/').collect();
        let with = |at: usize, text: &str| {
            let mut parts = parts.clone();
            parts[at] = text;
            parts.join("/")
        };
        let other = second.split('/').nth(3).unwrap();
        for wrong in [
            String::new(),
            "x".to_owned(),
            with(0, "others"),
            with(1, &Uuid::nil().simple().to_string()),
            with(2, "../../x"),
            with(3, other),
            with(3, ""),
            format!("{token}/x"),
            "wrong/org/token/value".to_owned(),
            "a".repeat(10_000),
        ] {
            assert_eq!(tokens.authenticate(&wrong).await.unwrap(), None, "{wrong}");
        }
        let object = tokens.0.bucket.get(&token_key(parts[2])).await.unwrap().unwrap();
        assert!(!String::from_utf8_lossy(&object.bytes).contains(parts[3]), "the value is kept nowhere");
        assert!(matches!(tokens.mint("No Slug", "").await, Err(MintError::BadOrg(_))));
    }
}
