//! Every answer that the edge gives by itself, and its code. The same table, with causes and advice, is `docs/errors.md`.
//!
//! A refusal is told three ways: as JSON in the dialect's shape, as a page for a person with a browser, or as a gRPC status.

use http::{HeaderValue, Response, StatusCode, header};
use proto::paths::SPRITE_ERROR_HEADER;

use crate::body::{self, Body};

/// As the node agent says it: clients attach by path from `0.0.1-rc30` on, and take what is older for another dialect.
const DIALECT_VERSION: HeaderValue = HeaderValue::from_static("0.1.0");

/// Sent by a node when it does not have the sprite it was asked for: the route was stale.
pub const NOT_HERE: &str = "SPR-N01";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    // Routing.
    NoSuchSprite,
    ForeignHost,
    WrongConnection,
    Moving,
    InternalCall,
    // Access.
    /// The API was called without a valid token.
    ApiUnauthorized,
    /// A private sprite's URL was opened without a token of its organisation.
    UrlUnauthorized,
    // The request itself.
    BadHost,
    Connect,
    HeadersTooLarge,
    TargetTooLong,
    Malformed,
    // Other processes.
    NodeUnreachable,
    NodeBroke,
    WakeTimeout,
    AnswerTimeout,
    CoordinatorUnreachable,
    WakeRefused,
    // Load.
    TooManyWaiting,
}

/// What the client can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Json,
    Html,
    Grpc,
}

/// One line of the table.
struct Facts {
    code: &'static str,
    status: StatusCode,
    /// The dialect's `error`, which clients match on.
    error: &'static str,
    message: &'static str,
    grpc: tonic::Code,
}

impl Refusal {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 19] = [
        Self::NoSuchSprite,
        Self::ForeignHost,
        Self::WrongConnection,
        Self::Moving,
        Self::InternalCall,
        Self::ApiUnauthorized,
        Self::UrlUnauthorized,
        Self::BadHost,
        Self::Connect,
        Self::HeadersTooLarge,
        Self::TargetTooLong,
        Self::Malformed,
        Self::NodeUnreachable,
        Self::NodeBroke,
        Self::WakeTimeout,
        Self::AnswerTimeout,
        Self::CoordinatorUnreachable,
        Self::WakeRefused,
        Self::TooManyWaiting,
    ];

    pub(crate) fn code(self) -> &'static str {
        self.facts().code
    }

    /// May the client simply try again soon?
    fn retry_after_s(self) -> Option<u16> {
        match self {
            Self::Moving | Self::NodeUnreachable | Self::CoordinatorUnreachable | Self::TooManyWaiting => Some(1),
            Self::WakeRefused => Some(5),
            _ => None,
        }
    }

    #[expect(clippy::too_many_lines, reason = "a table")]
    fn facts(self) -> Facts {
        let line = |code, status, error, message, grpc| Facts { code, status, error, message, grpc };
        match self {
            Self::NoSuchSprite => line(
                "SPR-R01",
                StatusCode::NOT_FOUND,
                "sprite not found",
                "There is no sprite of that name. `sprite list` shows yours and their URLs.",
                tonic::Code::NotFound,
            ),
            Self::ForeignHost => line(
                "SPR-R02",
                StatusCode::MISDIRECTED_REQUEST,
                "host not served here",
                "This edge serves the API's host and the sprites' domain, not the host of this request. Check the URL.",
                tonic::Code::NotFound,
            ),
            Self::WrongConnection => line(
                "SPR-R03",
                StatusCode::MISDIRECTED_REQUEST,
                "wrong connection",
                "The connection was opened for another host. Open a new one.",
                tonic::Code::Unavailable,
            ),
            Self::Moving => line(
                "SPR-R04",
                StatusCode::SERVICE_UNAVAILABLE,
                "sprite is moving",
                "The sprite is changing hosts. Try again in a second.",
                tonic::Code::Unavailable,
            ),
            Self::InternalCall => line(
                "SPR-R05",
                StatusCode::NOT_FOUND,
                "not found",
                "This gRPC service is not public. The public one is sprites.v1.Sprites.",
                tonic::Code::Unimplemented,
            ),
            Self::ApiUnauthorized => line(
                "SPR-A01",
                StatusCode::UNAUTHORIZED,
                "authentication failed",
                "Send `Authorization: Bearer <token>` with a valid token. `./dev env` prints the local one.",
                tonic::Code::Unauthenticated,
            ),
            Self::UrlUnauthorized => line(
                "SPR-A02",
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "This sprite's URL is private. Send `Authorization: Bearer <token>` with a token of its organisation, or open it to everybody with `sprite url --public`.",
                tonic::Code::Unauthenticated,
            ),
            Self::BadHost => line(
                "SPR-B01",
                StatusCode::BAD_REQUEST,
                "bad host",
                "The request must name one host, the same in its first line and its Host header.",
                tonic::Code::InvalidArgument,
            ),
            Self::Connect => line(
                "SPR-B02",
                StatusCode::METHOD_NOT_ALLOWED,
                "CONNECT is not served",
                "This is no forward proxy. To reach a port of a sprite use `sprite proxy`.",
                tonic::Code::Unimplemented,
            ),
            Self::HeadersTooLarge => line(
                "SPR-B03",
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "request header too large",
                "At most 100 headers and 256 KiB in all. Send large data in the body.",
                tonic::Code::InvalidArgument,
            ),
            Self::TargetTooLong => line(
                "SPR-B04",
                StatusCode::URI_TOO_LONG,
                "request target too long",
                "Path and query together may have 65534 bytes. Send large data in the body.",
                tonic::Code::InvalidArgument,
            ),
            Self::Malformed => line(
                "SPR-B05",
                StatusCode::BAD_REQUEST,
                "malformed request",
                "This is not well-formed HTTP.",
                tonic::Code::InvalidArgument,
            ),
            Self::NodeUnreachable => line(
                "SPR-U01",
                StatusCode::SERVICE_UNAVAILABLE,
                "host unreachable",
                "The sprite's host does not answer. Its disk is safe; try again soon.",
                tonic::Code::Unavailable,
            ),
            Self::NodeBroke => line(
                "SPR-U02",
                StatusCode::BAD_GATEWAY,
                "connection to the host broke",
                "The sprite's host broke off before it answered. The request may or may not have reached the sprite.",
                tonic::Code::Unavailable,
            ),
            Self::WakeTimeout => line(
                "SPR-U03",
                StatusCode::GATEWAY_TIMEOUT,
                "wake timed out",
                "The sprite did not wake within 60 seconds. `sprite info` says why.",
                tonic::Code::DeadlineExceeded,
            ),
            Self::AnswerTimeout => line(
                "SPR-U04",
                StatusCode::GATEWAY_TIMEOUT,
                "answer timed out",
                "The sprite is awake but did not begin to answer within 5 minutes.",
                tonic::Code::DeadlineExceeded,
            ),
            Self::CoordinatorUnreachable => line(
                "SPR-U05",
                StatusCode::SERVICE_UNAVAILABLE,
                "control plane unreachable",
                "No coordinator answers. Sprites that are awake stay reachable; try again soon.",
                tonic::Code::Unavailable,
            ),
            Self::WakeRefused => line(
                "SPR-U06",
                StatusCode::SERVICE_UNAVAILABLE,
                "sprite cannot be woken",
                "No host takes the sprite now. `sprite info` says why.",
                tonic::Code::Unavailable,
            ),
            Self::TooManyWaiting => line(
                "SPR-L01",
                StatusCode::SERVICE_UNAVAILABLE,
                "too many requests wait for this sprite to wake",
                "At most 128 requests wait for one sprite. Try again in a second.",
                tonic::Code::ResourceExhausted,
            ),
        }
    }

    pub(crate) fn answer(self, form: Form) -> Response<Body> {
        let facts = self.facts();
        let mut response = match form {
            Form::Json => typed("application/json", self.json().into()),
            Form::Html => typed("text/html; charset=utf-8", page(&facts).into()),
            Form::Grpc => grpc(&facts),
        };
        // A gRPC client reads the status from its headers; only calls that do not exist for it keep their HTTP status.
        if form != Form::Grpc || self == Self::InternalCall {
            *response.status_mut() = facts.status;
        }
        let headers = response.headers_mut();
        headers.insert(SPRITE_ERROR_HEADER, HeaderValue::from_static(facts.code));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert("sprite-version", DIALECT_VERSION);
        if let Some(seconds) = self.retry_after_s() {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if facts.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"sprites\""));
        }
        response
    }

    /// The body of the JSON form.
    pub(crate) fn json(self) -> String {
        let facts = self.facts();
        serde_json::json!({"error": facts.error, "message": facts.message, "code": facts.code}).to_string()
    }
}

fn typed(kind: &'static str, content: bytes::Bytes) -> Response<Body> {
    let mut response = Response::new(body::full(content));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// A trailers-only answer: status in the headers, no body.
fn grpc(facts: &Facts) -> Response<Body> {
    let mut response = Response::new(body::empty());
    let status = tonic::Status::new(facts.grpc, format!("{} ({})", facts.message, facts.code));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    status.add_header(headers).expect("our own messages are plain ASCII, which always fits into a header");
    response
}

fn page(facts: &Facts) -> String {
    let Facts { code, status, error, message, .. } = facts;
    let message = with_code_marks(message);
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{error}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:38rem;margin:15vh auto;padding:0 1rem;\
         color:#222;background:#fafafa}}code{{background:#eee;padding:.1em .3em;border-radius:3px}}small{{color:#777}}\
         @media(prefers-color-scheme:dark){{body{{color:#ddd;background:#161616}}code{{background:#333}}}}</style>\
         <h1>{error}</h1><p>{message}</p><p><small>{status} · {code}</small></p></html>\n"
    )
}

/// Escapes a text of ours for a page and sets what stands in backquotes as code.
fn with_code_marks(message: &str) -> String {
    let escaped = message.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let mut parts = escaped.split('`');
    let mut marked = parts.next().unwrap_or_default().to_owned();
    for (index, part) in parts.enumerate() {
        marked.push_str(if index % 2 == 0 { "<code>" } else { "</code>" });
        marked.push_str(part);
    }
    marked
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_code_is_unique_and_documented() {
        let documented = include_str!("../../docs/errors.md");
        let mut seen = HashSet::new();
        for refusal in Refusal::ALL {
            let facts = refusal.facts();
            assert!(seen.insert(facts.code), "{} is used twice", facts.code);
            let row = format!("| `{}` | {} | ", facts.code, facts.status.as_u16());
            assert!(documented.contains(&row), "docs/errors.md has no row {row:?}");
        }
        assert!(documented.contains(NOT_HERE));
    }

    #[test]
    fn browsers_get_a_page_that_says_what_to_do() {
        let html = page(&Refusal::UrlUnauthorized.facts());
        assert!(html.contains("<code>sprite url --public</code>"), "{html}");
        assert!(html.contains("<code>Authorization: Bearer &lt;token&gt;</code>"), "{html}");
    }

    #[test]
    fn grpc_clients_get_a_status_in_the_headers() {
        let answer = Refusal::NodeUnreachable.answer(Form::Grpc);
        assert_eq!(
            (answer.status(), &answer.headers()["grpc-status"]),
            (StatusCode::OK, &HeaderValue::from_static("14"))
        );
        assert_eq!(Refusal::InternalCall.answer(Form::Grpc).status(), StatusCode::NOT_FOUND);
    }
}
