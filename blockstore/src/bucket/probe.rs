//! The probe: does this store keep the promises everything else is built on?
//!
//! Many stores accept `If-Match` and `If-None-Match` and ignore them, or check them without a lock, so that several writers win. Two
//! owners of one sprite would be the result. So each open tries, on scratch objects: create, create again, update, stale update, update
//! of a missing object, ranges, listing, and races of [`RACERS`] writers. The first broken promise refuses the bucket. On the way it
//! learns how the store wants its ETags back ([`TagDialect`]).

use bytes::Bytes;
use futures_util::future::join_all;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion, path::Path as StorePath};
use uuid::Uuid;

use super::{Bucket, BucketError, Cause, RecordError, TagDialect};

/// Writers of one race. Stores that check without a lock let most of them win.
pub const RACERS: usize = 16;
/// Races of each kind.
pub const ROUNDS: usize = 5;

/// A promise that the store broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    #[error("it gives no ETags")]
    NoTags,
    #[error("an object just written could not be read back")]
    LostWrite,
    #[error("creating an object that exists succeeded (If-None-Match is ignored)")]
    CreateOverwrites,
    #[error("updating with an outdated ETag succeeded (If-Match is ignored)")]
    StaleUpdateAccepted,
    #[error("updating an object that does not exist succeeded")]
    MissingUpdateAccepted,
    #[error("updating with the current ETag is refused")]
    UpdateRefused,
    #[error("of {RACERS} writers that raced to create one object {winners} won")]
    CreateRace { winners: usize },
    #[error("of {RACERS} writers that raced to update one object {winners} won")]
    UpdateRace { winners: usize },
    #[error("a part of an object came back wrong")]
    WrongRange,
    #[error("an object just written is not in the listing")]
    StaleListing,
}

/// The bucket must not be used.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error(
        "{bucket} cannot hold sprites: {finding}. Two hosts could own one sprite. Use a store with atomic conditional writes: AWS S3, \
         Cloudflare R2, Ceph RGW, a current MinIO, our dev-s3, or dir:/path on one host"
    )]
    Broken { bucket: String, finding: Finding },
    #[error("cannot test {bucket}: check endpoint, bucket name, credentials and space")]
    Bucket {
        bucket: String,
        #[source]
        source: BucketError,
    },
    #[error("cannot test {bucket}")]
    Record {
        bucket: String,
        #[source]
        source: RecordError,
    },
}

/// Result of one conditional put, before any read-back: the probe tests exactly what the store says.
enum Raw {
    Done(String),
    Refused,
}

struct Probe<'a> {
    bucket: &'a Bucket,
    folder: String,
}

/// Tests the store and returns its dialect. Leaves nothing behind unless it is interrupted.
pub(super) async fn run(bucket: &Bucket) -> Result<TagDialect, ProbeError> {
    let probe = Probe { bucket, folder: format!("v1/probe/{}", Uuid::new_v4().simple()) };
    let result = probe.all().await;
    let swept = join_all(probe.keys().into_iter().map(|key| probe.sweep(key))).await;
    if let Some(error) = swept.into_iter().find_map(Result::err) {
        tracing::warn!(%error, folder = probe.folder, "scratch objects of the bucket's probe stay behind");
    }
    result
}

impl Probe<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    fn keys(&self) -> Vec<String> {
        let races = (0..ROUNDS).map(|round| format!("race-{round}"));
        races.chain(["one".to_owned(), "missing".to_owned()]).map(|name| self.key(&name)).collect()
    }

    /// Through the client that does not retry: a bucket that is away must not cost a minute more to say so.
    async fn sweep(&self, key: String) -> Result<(), BucketError> {
        let path = self.bucket.path(&key)?;
        match self.bucket.inner.records.delete(&path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(BucketError::store(super::Op::Delete, &key, source)),
        }
    }

    async fn all(&self) -> Result<TagDialect, ProbeError> {
        let dialect = self.conditions().await?;
        self.reading().await?;
        for round in 0..ROUNDS {
            self.race(&self.key(&format!("race-{round}")), dialect).await?;
        }
        Ok(dialect)
    }

    async fn conditions(&self) -> Result<TagDialect, ProbeError> {
        let key = self.key("one");
        let first = match self.put(&key, "first", PutMode::Create).await? {
            Raw::Done(tag) => tag,
            Raw::Refused => return Err(self.broken(Finding::LostWrite)),
        };
        if first.is_empty() {
            return Err(self.broken(Finding::NoTags));
        }
        if let Raw::Done(_) = self.put(&key, "again", PutMode::Create).await? {
            return Err(self.broken(Finding::CreateOverwrites));
        }
        let mut dialect = TagDialect::Verbatim;
        let mut updated = self.put(&key, "second", update(&first, dialect)).await?;
        if matches!(updated, Raw::Refused) {
            dialect = TagDialect::Unquoted;
            updated = self.put(&key, "second", update(&first, dialect)).await?;
        }
        if matches!(updated, Raw::Refused) {
            return Err(self.broken(Finding::UpdateRefused));
        }
        if let Raw::Done(_) = self.put(&key, "stale", update(&first, dialect)).await? {
            return Err(self.broken(Finding::StaleUpdateAccepted));
        }
        if let Raw::Done(_) = self.put(&self.key("missing"), "new", update(&first, dialect)).await? {
            return Err(self.broken(Finding::MissingUpdateAccepted));
        }
        Ok(dialect)
    }

    async fn reading(&self) -> Result<(), ProbeError> {
        let key = self.key("one");
        match self.bucket.get(&key).await.map_err(|source| self.unreachable(source))? {
            Some(object) if &object.bytes[..] == b"second" => {}
            _ => return Err(self.broken(Finding::LostWrite)),
        }
        let part = self.bucket.get_range(&key, 2..4).await.map_err(|source| self.unreachable(source))?;
        if &part[..] != b"co" {
            return Err(self.broken(Finding::WrongRange));
        }
        let listed = self.bucket.list(&self.folder).await.map_err(|source| self.unreachable(source))?;
        if listed.iter().any(|entry| entry.key == key) { Ok(()) } else { Err(self.broken(Finding::StaleListing)) }
    }

    async fn race(&self, key: &str, dialect: TagDialect) -> Result<(), ProbeError> {
        let winners = self.race_one(key, "create", &PutMode::Create).await?;
        let [tag] = &winners[..] else { return Err(self.broken(Finding::CreateRace { winners: winners.len() })) };
        let winners = self.race_one(key, "update", &update(tag, dialect)).await?;
        match winners.len() {
            1 => Ok(()),
            winners => Err(self.broken(Finding::UpdateRace { winners })),
        }
    }

    /// Lets [`RACERS`] writers try the same change with different bodies; returns the tags of those whose write is the one stored.
    async fn race_one(&self, key: &str, what: &str, mode: &PutMode) -> Result<Vec<String>, ProbeError> {
        let bodies: Vec<String> = (0..RACERS).map(|n| format!("{what} by racer {n}")).collect();
        let racers = bodies.iter().map(|body| self.put(key, body, mode.clone()));
        let mut winners = Vec::new();
        for result in join_all(racers).await {
            if let Raw::Done(tag) = result? {
                winners.push(tag);
            }
        }
        Ok(winners)
    }

    /// One conditional put. An unclear answer (timeout, 5xx, 409) is resolved by reading back, as records do.
    async fn put(&self, key: &str, body: &str, mode: PutMode) -> Result<Raw, ProbeError> {
        let store = &self.bucket.inner.records;
        let path = self.bucket.path(key).map_err(|source| self.unreachable(source))?;
        let options = PutOptions { mode, ..PutOptions::default() };
        match store.put_opts(&path, Bytes::copy_from_slice(body.as_bytes()).into(), options).await {
            Ok(done) => Ok(Raw::Done(done.e_tag.unwrap_or_default())),
            Err(object_store::Error::Precondition { .. } | object_store::Error::NotFound { .. }) => Ok(Raw::Refused),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(Raw::Refused),
            Err(error) => match stored(store.as_ref(), &path).await {
                Some((bytes, tag)) if bytes == body => Ok(Raw::Done(tag)),
                found => match BucketError::store(super::Op::Put, key, error) {
                    // No answer to the condition: a full bucket is not one that breaks promises.
                    error @ BucketError::Store { cause: Cause::NoSpace | Cause::ReadOnly, .. } => {
                        Err(self.unreachable(error))
                    }
                    error => {
                        if found.is_some() {
                            Ok(Raw::Refused)
                        } else {
                            Err(self.unreachable(error))
                        }
                    }
                },
            },
        }
    }

    fn broken(&self, finding: Finding) -> ProbeError {
        ProbeError::Broken { bucket: self.bucket.describe().to_owned(), finding }
    }

    fn unreachable(&self, source: BucketError) -> ProbeError {
        ProbeError::Bucket { bucket: self.bucket.describe().to_owned(), source }
    }
}

async fn stored(store: &dyn ObjectStore, path: &StorePath) -> Option<(Bytes, String)> {
    let result = store.get(path).await.ok()?;
    let tag = result.meta.e_tag.clone().unwrap_or_default();
    Some((result.bytes().await.ok()?, tag))
}

fn update(tag: &str, dialect: TagDialect) -> PutMode {
    let tag = match dialect {
        TagDialect::Verbatim => tag,
        TagDialect::Unquoted => tag.trim_matches('"'),
    };
    PutMode::Update(UpdateVersion { e_tag: Some(tag.to_owned()), version: None })
}
