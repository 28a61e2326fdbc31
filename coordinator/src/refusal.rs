//! Every refusal of the API: one table that says it in REST's words and in gRPC's.
//!
//! The `error` texts are the dialect's where it has one, because clients match on them; the `message` says what to do.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use blockstore::bucket::{BucketError, RecordError, Retry};
use proto::id::BadName;
use serde_json::{Value, json};
use tonic::{Code, Status};

const RETRY_AFTER_S: u64 = 5;

/// Why a call is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("authentication failed")]
    Unauthenticated,
    #[error("there is no sprite {name:?}; `sprite list` shows yours")]
    NotFound { name: String },
    #[error("the sprite has no checkpoint {id:?}; `sprite checkpoint list` shows those it has")]
    CheckpointNotFound { id: String },
    #[error("there is nothing at {method} {path}")]
    NoRoute { method: String, path: String },
    #[error("a sprite named {name:?} already exists; use another name, or destroy that one first")]
    NameTaken { name: String },
    #[error("a sprite {name:?} is being made or destroyed right now; try again, or use another name")]
    NameBusy { name: String },
    #[error(transparent)]
    BadName(#[from] BadName),
    /// A field has a value it cannot have.
    #[error("{0}")]
    Invalid(String),
    /// The request as such cannot be read.
    #[error("{0}")]
    Malformed(String),
    #[error("the request's body is larger than {max_bytes} bytes")]
    TooLarge { max_bytes: usize },
    #[error("the organisation has {current} sprites, as many as it may have; destroy some first")]
    TooManySprites { current: usize, max: usize },
    #[error("{0}")]
    NoCapacity(String),
    /// The sprite's state does not allow it, or somebody else was faster.
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    Deadline(String),
    /// A sprite that was to be woken did not start; the next request tries again.
    #[error("{0}")]
    NotStarted(String),
    /// The bucket or a host is away; nothing is lost.
    #[error("{0}")]
    Unavailable(String),
    #[error("{0}")]
    Failed(String),
}

struct Facts {
    status: StatusCode,
    code: Code,
    error: String,
}

impl Refusal {
    fn facts(&self) -> Facts {
        let line = |status, code, error: &str| Facts { status, code, error: error.to_owned() };
        match self {
            Self::Unauthenticated => line(StatusCode::UNAUTHORIZED, Code::Unauthenticated, "authentication failed"),
            Self::NotFound { .. } => line(StatusCode::NOT_FOUND, Code::NotFound, "sprite not found"),
            Self::CheckpointNotFound { id } => {
                line(StatusCode::NOT_FOUND, Code::NotFound, &format!("checkpoint not found: {id}"))
            }
            Self::NoRoute { .. } => line(StatusCode::NOT_FOUND, Code::Unimplemented, "not found"),
            Self::NameTaken { .. } => line(StatusCode::CONFLICT, Code::AlreadyExists, "sprite already exists"),
            Self::NameBusy { .. } => line(StatusCode::CONFLICT, Code::AlreadyExists, "sprite name is busy"),
            Self::BadName(BadName::Empty) => {
                line(StatusCode::UNPROCESSABLE_ENTITY, Code::InvalidArgument, "name is required")
            }
            Self::BadName(_) => line(StatusCode::UNPROCESSABLE_ENTITY, Code::InvalidArgument, "invalid name"),
            Self::Invalid(_) => line(StatusCode::UNPROCESSABLE_ENTITY, Code::InvalidArgument, "invalid request"),
            Self::Malformed(_) => line(StatusCode::BAD_REQUEST, Code::InvalidArgument, "bad request"),
            Self::TooLarge { .. } => line(StatusCode::PAYLOAD_TOO_LARGE, Code::InvalidArgument, "request too large"),
            Self::TooManySprites { .. } => {
                line(StatusCode::TOO_MANY_REQUESTS, Code::ResourceExhausted, "concurrent_sprite_limit_exceeded")
            }
            Self::NoCapacity(_) => line(StatusCode::SERVICE_UNAVAILABLE, Code::ResourceExhausted, "no capacity"),
            Self::Conflict(_) => line(StatusCode::CONFLICT, Code::FailedPrecondition, "conflict"),
            Self::Deadline(_) => line(StatusCode::GATEWAY_TIMEOUT, Code::DeadlineExceeded, "not done in time"),
            Self::NotStarted(_) => line(StatusCode::SERVICE_UNAVAILABLE, Code::Aborted, "sprite did not start"),
            Self::Unavailable(_) => line(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable, "temporarily unavailable"),
            Self::Failed(_) => line(StatusCode::INTERNAL_SERVER_ERROR, Code::Internal, "failed"),
        }
    }

    fn advice(&self) -> String {
        match self {
            Self::Unauthenticated => {
                "send `Authorization: Bearer <token>` with a valid token; `./dev env` prints the local one".to_owned()
            }
            other => other.to_string(),
        }
    }

    /// In the dialect's shape.
    pub(crate) fn to_json(&self) -> Value {
        let mut body = json!({ "error": self.facts().error, "message": self.advice() });
        if let Self::TooManySprites { current, max } = self {
            body["current_count"] = (*current).into();
            body["limit"] = (*max).into();
        }
        body
    }

    pub(crate) fn into_response(self) -> Response {
        let facts = self.facts();
        if facts.status.is_server_error() {
            tracing::warn!(status = facts.status.as_u16(), "{}: {self}", facts.error);
        }
        let mut response = Response::new(Body::from(self.to_json().to_string()));
        *response.status_mut() = facts.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match facts.status {
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER_S.into());
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let Facts { code, error, .. } = refusal.facts();
        Self::new(code, format!("{error}: {}", refusal.advice()))
    }
}

impl From<BucketError> for Refusal {
    fn from(error: BucketError) -> Self {
        match error.retry() {
            Retry::Soon | Retry::AfterOperator => Self::Unavailable(chain(&error)),
            Retry::Never => Self::Failed(chain(&error)),
        }
    }
}

impl From<RecordError> for Refusal {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Bucket(error) => error.into(),
            RecordError::Unknown { .. } => Self::Unavailable(chain(&error)),
            RecordError::Conflict { .. } | RecordError::Gone { .. } | RecordError::Superseded { .. } => {
                Self::Conflict(format!("{error}; look again and repeat the call"))
            }
            RecordError::Malformed { .. } | RecordError::Unwritable { .. } => Self::Failed(chain(&error)),
        }
    }
}

/// A refusal of the node agent, about a sprite that the registry knows.
impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let text = status.message().to_owned();
        match status.code() {
            Code::InvalidArgument | Code::OutOfRange => Self::Invalid(text),
            Code::ResourceExhausted => Self::NoCapacity(text),
            Code::FailedPrecondition | Code::AlreadyExists => Self::Conflict(text),
            Code::Aborted => Self::NotStarted(text),
            Code::DeadlineExceeded => Self::Deadline(text),
            Code::Cancelled => Self::Deadline(format!("the host did not answer in time: {text}")),
            Code::NotFound => Self::Unavailable(format!("the sprite's host does not have it at the moment: {text}")),
            Code::Unavailable => Self::Unavailable(format!("the sprite's host says: {text}")),
            _ => Self::Failed(text),
        }
    }
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_one_thing_said_twice() {
        let check = |refusal: Refusal, status: u16, error: &str, code: Code| {
            let body = refusal.to_json();
            assert_eq!(body["error"], error);
            assert!(body["message"].as_str().is_some_and(|message| message.len() > 10), "{body}");
            assert_eq!(refusal.facts().status.as_u16(), status, "{error}");
            assert_eq!(Status::from(refusal).code(), code, "{error}");
        };
        let name = || "x".to_owned();
        check(Refusal::Unauthenticated, 401, "authentication failed", Code::Unauthenticated);
        check(Refusal::NotFound { name: name() }, 404, "sprite not found", Code::NotFound);
        check(Refusal::NameTaken { name: name() }, 409, "sprite already exists", Code::AlreadyExists);
        check(BadName::Empty.into(), 422, "name is required", Code::InvalidArgument);
        check(Refusal::NoCapacity("the host is full".into()), 503, "no capacity", Code::ResourceExhausted);
        check(Status::aborted("QEMU ended at once").into(), 503, "sprite did not start", Code::Aborted);
        let limit = Refusal::TooManySprites { current: 7, max: 7 };
        assert_eq!((limit.to_json()["current_count"].as_u64(), limit.to_json()["limit"].as_u64()), (Some(7), Some(7)));
        check(limit, 429, "concurrent_sprite_limit_exceeded", Code::ResourceExhausted);
    }
}
