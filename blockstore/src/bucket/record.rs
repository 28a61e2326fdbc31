//! Records: small JSON objects that change by compare-and-swap, with an answer one can trust.
//!
//! A store that applied a write and lost its answer makes a plain client see "somebody else won" or a timeout, although its own bytes are
//! stored. So every record carries, beside its value, `fmt`, a random `nonce`, and `past`: the nonces of the values it replaced, newest
//! first. Whatever the store answered, one read then tells what happened:
//!
//! ```text
//!  read back                                   meaning
//!  nonce is mine                               won                                → Ok
//!  mine is in `past`                           won, and replaced since            → Superseded
//!  nonce is still the one I replace, absent    not applied (yet)                  → again, same bytes, at most ATTEMPTS
//!  the one I replace is in `past`              somebody else won; mine never can  → Conflict
//!  neither, or no answer                       cannot tell                        → Unknown
//! ```
//!
//! Writing the same bytes again is safe: the condition holds for at most one of the copies, and equal nonces mean equal values. The nonce
//! also keeps a value from coming back under an old ETag, which on S3 is a digest of the content.

use std::time::Duration;

use bytes::Bytes;
use object_store::{ObjectStore, PutMode, PutOptions, UpdateVersion};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{Bucket, BucketError, Op, Retry, Tag, TagDialect, tag_of};

/// Format of the envelope. A reader refuses a newer one instead of guessing.
pub const RECORD_FMT: u64 = 1;
/// Writes of the same bytes until a caller hears [`RecordError::Unknown`].
const ATTEMPTS: u32 = 4;
/// Between two attempts, times their number. Short: a lease may hang on it.
const BACKOFF: Duration = Duration::from_millis(100);
/// Nonces of predecessors kept in a record. So many others may win before a lost answer becomes [`RecordError::Unknown`].
const PAST_MAX: usize = 16;
/// Characters kept of each: 64 bits tell so few apart.
const PAST_NONCE_CHARS: usize = 16;
/// Largest record. Heads are about 500 bytes; this stops a runaway `environment`.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

/// One version of a record: the value, and what is needed to replace exactly this version.
#[derive(Clone, Debug)]
pub struct Record<T> {
    pub key: String,
    pub value: T,
    pub tag: Tag,
    nonce: String,
    past: Vec<String>,
}

/// A record could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Nothing was written: another version is there. Read, decide again, write again.
    #[error("record {key:?} was changed by somebody else")]
    Conflict { key: String },
    /// Nothing was written: the record to replace is gone.
    #[error("record {key:?} is gone")]
    Gone { key: String },
    /// The value was written, and replaced by somebody else since.
    #[error("record {key:?} was written, and then changed by somebody else")]
    Superseded { key: String },
    /// The value may have been written, or may yet be. Read the record before doing anything that depends on it.
    #[error("cannot tell whether record {key:?} was written; read it before going on")]
    Unknown {
        key: String,
        #[source]
        source: Option<BucketError>,
    },
    /// The object is there but is no record of this type and format.
    #[error("record {key:?} cannot be understood: {reason}")]
    Malformed {
        key: String,
        reason: String,
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The value does not make a record; nothing was written.
    #[error("the value for record {key:?} cannot be written: {reason}")]
    Unwritable { key: String, reason: String },
    /// Nothing was read or written.
    #[error(transparent)]
    Bucket(#[from] BucketError),
}

impl RecordError {
    /// What to do with the *same call*. A conflict is never solved by repeating it: read first.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Conflict { .. } | Self::Gone { .. } | Self::Superseded { .. } => Retry::Never,
            Self::Unknown { .. } | Self::Malformed { .. } | Self::Unwritable { .. } => Retry::Never,
            Self::Bucket(error) => error.retry(),
        }
    }
}

/// What a write replaces.
enum Condition<'a> {
    Absent,
    Version { tag: &'a Tag, nonce: &'a str },
}

/// What is stored under a key, as far as deciding a write needs it.
struct Stored {
    tag: Tag,
    envelope: Envelope,
}

struct Envelope {
    nonce: String,
    past: Vec<String>,
    value: Value,
}

enum Verdict {
    Won(Tag),
    NotYet,
    Lost(RecordError),
}

impl Bucket {
    /// Reads a record; `None` if there is none.
    pub async fn read_record<T: DeserializeOwned>(&self, key: &str) -> Result<Option<Record<T>>, RecordError> {
        let Some(Stored { tag, envelope }) = self.read_stored(key).await? else { return Ok(None) };
        let Envelope { nonce, past, value } = envelope;
        match serde_json::from_value(value) {
            Ok(value) => Ok(Some(Record { key: key.to_owned(), value, tag, nonce, past })),
            Err(source) => Err(malformed(key, "its fields are not those expected", Some(source))),
        }
    }

    /// Writes a record that must not exist yet.
    ///
    /// # Errors
    ///
    /// [`RecordError::Conflict`] if it exists; see there which errors leave the outcome open.
    pub async fn create_record<T: Serialize>(&self, key: &str, value: T) -> Result<Record<T>, RecordError> {
        self.write_record(key, value, Condition::Absent, Vec::new()).await
    }

    /// Replaces exactly the version `old`.
    ///
    /// # Errors
    ///
    /// [`RecordError::Conflict`] if another version is there, [`RecordError::Gone`] if none is; see there which errors leave the outcome
    /// open.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropping the future leaves the outcome open, as [`RecordError::Unknown`].
    pub async fn update_record<T: Serialize, Old>(
        &self,
        old: &Record<Old>,
        value: T,
    ) -> Result<Record<T>, RecordError> {
        let mut past = Vec::with_capacity(PAST_MAX);
        past.push(short(&old.nonce).to_owned());
        past.extend(old.past.iter().take(PAST_MAX - 1).cloned());
        self.write_record(&old.key, value, Condition::Version { tag: &old.tag, nonce: &old.nonce }, past).await
    }

    async fn write_record<T: Serialize>(
        &self,
        key: &str,
        value: T,
        condition: Condition<'_>,
        past: Vec<String>,
    ) -> Result<Record<T>, RecordError> {
        let nonce = Uuid::new_v4().simple().to_string();
        let body = encode(key, &value, &nonce, &past)?;
        let mut failure = None;
        for attempt in 1..=ATTEMPTS {
            match self.put_if(key, body.clone(), &condition).await {
                Ok(Some(tag)) => return Ok(Record { key: key.to_owned(), value, tag, nonce, past }),
                // Written, but the store names no tag: the read below does.
                Ok(None) => {}
                Err(error) if never_sent(&error) => return Err(error.into()),
                Err(error) => failure = Some(error),
            }
            match self.read_stored(key).await {
                Ok(stored) => match judge(key, stored, &nonce, &condition) {
                    Verdict::Won(tag) => return Ok(Record { key: key.to_owned(), value, tag, nonce, past }),
                    Verdict::Lost(error) => return Err(error),
                    Verdict::NotYet => {}
                },
                Err(RecordError::Bucket(error)) => failure = Some(error),
                // Something that is no record took the place of the one to replace: ours is not there.
                Err(error) => return Err(error),
            }
            if attempt < ATTEMPTS {
                tracing::debug!(key, attempt, ?failure, "record not written yet");
                tokio::time::sleep(BACKOFF * attempt).await;
            }
        }
        match failure {
            // Refused each time by a store that answers: it did not write.
            Some(error) if error.retry() == Retry::AfterOperator => Err(error.into()),
            source => Err(RecordError::Unknown { key: key.to_owned(), source }),
        }
    }

    async fn put_if(&self, key: &str, body: Bytes, condition: &Condition<'_>) -> Result<Option<Tag>, BucketError> {
        let mode = match condition {
            Condition::Absent => PutMode::Create,
            Condition::Version { tag, .. } => {
                PutMode::Update(UpdateVersion { e_tag: Some(self.spell(tag)), version: None })
            }
        };
        let path = self.path(key)?;
        let options = PutOptions { mode, ..PutOptions::default() };
        match self.inner.records.put_opts(&path, body.into(), options).await {
            Ok(done) => Ok(done.e_tag.as_deref().filter(|tag| !tag.is_empty()).map(|tag| tag_of(Some(tag)))),
            Err(source) => Err(BucketError::store(Op::Put, key, source)),
        }
    }

    /// The tag as the store wants it back.
    fn spell(&self, tag: &Tag) -> String {
        match self.inner.dialect {
            TagDialect::Verbatim => tag.0.clone(),
            TagDialect::Unquoted => tag.0.trim_matches('"').to_owned(),
        }
    }

    async fn read_stored(&self, key: &str) -> Result<Option<Stored>, RecordError> {
        let Some(object) = self.get_from(&self.inner.records, key).await? else { return Ok(None) };
        Ok(Some(Stored { tag: object.tag, envelope: decode(key, &object.bytes)? }))
    }
}

fn judge(key: &str, stored: Option<Stored>, mine: &str, condition: &Condition<'_>) -> Verdict {
    let key = || key.to_owned();
    let Some(Stored { tag, envelope }) = stored else {
        return match condition {
            Condition::Absent => Verdict::NotYet,
            Condition::Version { .. } => Verdict::Lost(RecordError::Gone { key: key() }),
        };
    };
    let Envelope { nonce, past, .. } = envelope;
    if nonce == mine {
        return Verdict::Won(tag);
    }
    if past.iter().any(|past| past == short(mine)) {
        return Verdict::Lost(RecordError::Superseded { key: key() });
    }
    let full = past.len() >= PAST_MAX;
    let conflict = Verdict::Lost(RecordError::Conflict { key: key() });
    let unknown = Verdict::Lost(RecordError::Unknown { key: key(), source: None });
    match condition {
        Condition::Version { nonce: replaced, .. } if nonce == *replaced => Verdict::NotYet,
        // The whole history is there and mine is not in it.
        Condition::Absent if !full => conflict,
        Condition::Version { nonce: replaced, .. } if past.iter().any(|past| past == short(replaced)) => conflict,
        Condition::Absent | Condition::Version { .. } => unknown,
    }
}

/// How a nonce stands in `past`. A foreign one may be shorter, or no ASCII.
fn short(nonce: &str) -> &str {
    nonce.get(..PAST_NONCE_CHARS).unwrap_or(nonce)
}

/// Whether the write was refused before anything left this host.
fn never_sent(error: &BucketError) -> bool {
    matches!(error, BucketError::InvalidKey { .. })
}

fn encode<T: Serialize>(key: &str, value: &T, nonce: &str, past: &[String]) -> Result<Bytes, RecordError> {
    let unwritable = |reason: String| RecordError::Unwritable { key: key.to_owned(), reason };
    let mut fields = match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) => return Err(unwritable("it is not a JSON object".to_owned())),
        Err(source) => return Err(unwritable(source.to_string())),
    };
    fields.insert("fmt".to_owned(), RECORD_FMT.into());
    fields.insert("nonce".to_owned(), nonce.into());
    if !past.is_empty() {
        fields.insert("past".to_owned(), past.into());
    }
    let body = serde_json::to_vec(&fields).map_err(|source| unwritable(source.to_string()))?;
    if body.len() > RECORD_BYTES_MAX {
        return Err(unwritable(format!("{} bytes are more than {RECORD_BYTES_MAX}", body.len())));
    }
    Ok(body.into())
}

/// Parses the envelope. The fields stay in the value, so a type may show them; one that denies unknown fields must name all three.
fn decode(key: &str, body: &[u8]) -> Result<Envelope, RecordError> {
    if body.len() > RECORD_BYTES_MAX {
        return Err(malformed(key, "it is too large for a record", None));
    }
    let fields: Map<String, Value> =
        serde_json::from_slice(body).map_err(|source| malformed(key, "it is not a JSON object", Some(source)))?;
    match fields.get("fmt").and_then(Value::as_u64) {
        Some(RECORD_FMT) => {}
        Some(fmt) => {
            return Err(malformed(key, &format!("format {fmt} is newer than {RECORD_FMT}; upgrade this host"), None));
        }
        None => return Err(malformed(key, "it has no format", None)),
    }
    let Some(nonce) = fields.get("nonce").and_then(Value::as_str).map(ToOwned::to_owned) else {
        return Err(malformed(key, "it has no nonce", None));
    };
    let past = match fields.get("past") {
        None => Vec::new(),
        Some(Value::Array(past)) => past.iter().filter_map(Value::as_str).map(ToOwned::to_owned).collect(),
        Some(_) => return Err(malformed(key, "its past is no list", None)),
    };
    Ok(Envelope { nonce, past, value: Value::Object(fields) })
}

fn malformed(key: &str, reason: &str, source: Option<serde_json::Error>) -> RecordError {
    RecordError::Malformed { key: key.to_owned(), reason: reason.to_owned(), source }
}
