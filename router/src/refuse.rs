//! Every answer that the edge gives by itself, and its code. The same table, with causes and advice, is `docs/errors.md`.
//!
//! A refusal has three forms: as JSON in the dialect's shape, as a page for a person with a browser, or as a gRPC status.

use http::{HeaderValue, Response, StatusCode, header};
use proto::paths::{DIALECT_VERSION, SPRITE_ERROR_HEADER};
use tonic::Code;

use crate::body::{self, Body};

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
    CoordinatorBroke,
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
    grpc: Code,
}

/// In the order of [`Refusal`], so that the variant is the index.
const FACTS: [(Refusal, Facts); 20] = [
    (
        Refusal::NoSuchSprite,
        Facts {
            code: "SPR-R01",
            status: StatusCode::NOT_FOUND,
            error: "sprite not found",
            message: "There is no sprite of that name. `sprite list` shows yours and their URLs.",
            grpc: Code::NotFound,
        },
    ),
    (
        Refusal::ForeignHost,
        Facts {
            code: "SPR-R02",
            status: StatusCode::MISDIRECTED_REQUEST,
            error: "host not served here",
            message: "This edge serves the API's host and the sprites' domain, not the host of this request. Check the URL.",
            grpc: Code::NotFound,
        },
    ),
    (
        Refusal::WrongConnection,
        Facts {
            code: "SPR-R03",
            status: StatusCode::MISDIRECTED_REQUEST,
            error: "wrong connection",
            message: "The connection was opened for another host. Open a new one.",
            grpc: Code::Unavailable,
        },
    ),
    (
        Refusal::Moving,
        Facts {
            code: "SPR-R04",
            status: StatusCode::SERVICE_UNAVAILABLE,
            error: "sprite is moving",
            message: "The sprite is changing hosts. Try again in a second.",
            grpc: Code::Unavailable,
        },
    ),
    (
        Refusal::InternalCall,
        Facts {
            code: "SPR-R05",
            status: StatusCode::NOT_FOUND,
            error: "not found",
            message: "This gRPC service is not public. The public one is sprites.v1.Sprites.",
            grpc: Code::Unimplemented,
        },
    ),
    (
        Refusal::ApiUnauthorized,
        Facts {
            code: "SPR-A01",
            status: StatusCode::UNAUTHORIZED,
            error: "authentication failed",
            message: "Send `Authorization: Bearer <token>` with a valid token. `./dev env` prints the local one.",
            grpc: Code::Unauthenticated,
        },
    ),
    (
        Refusal::UrlUnauthorized,
        Facts {
            code: "SPR-A02",
            status: StatusCode::UNAUTHORIZED,
            error: "unauthorized",
            message: "This sprite's URL is private. Send `Authorization: Bearer <token>` with a token of its organisation, or open it to everybody with `sprite url --public`.",
            grpc: Code::Unauthenticated,
        },
    ),
    (
        Refusal::BadHost,
        Facts {
            code: "SPR-B01",
            status: StatusCode::BAD_REQUEST,
            error: "bad host",
            message: "The request must name one host, the same in its first line and its Host header.",
            grpc: Code::InvalidArgument,
        },
    ),
    (
        Refusal::Connect,
        Facts {
            code: "SPR-B02",
            status: StatusCode::METHOD_NOT_ALLOWED,
            error: "CONNECT is not served",
            message: "This is not a forward proxy. To reach a port of a sprite use `sprite proxy`.",
            grpc: Code::Unimplemented,
        },
    ),
    (
        Refusal::HeadersTooLarge,
        Facts {
            code: "SPR-B03",
            status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            error: "request header too large",
            message: "At most 100 headers and 256 KiB in all. Send large data in the body.",
            grpc: Code::InvalidArgument,
        },
    ),
    (
        Refusal::TargetTooLong,
        Facts {
            code: "SPR-B04",
            status: StatusCode::URI_TOO_LONG,
            error: "request target too long",
            message: "Path and query together may have 65534 bytes. Send large data in the body.",
            grpc: Code::InvalidArgument,
        },
    ),
    (
        Refusal::Malformed,
        Facts {
            code: "SPR-B05",
            status: StatusCode::BAD_REQUEST,
            error: "malformed request",
            message: "This is not well-formed HTTP.",
            grpc: Code::InvalidArgument,
        },
    ),
    (
        Refusal::NodeUnreachable,
        Facts {
            code: "SPR-U01",
            status: StatusCode::SERVICE_UNAVAILABLE,
            error: "host unreachable",
            message: "The sprite's host does not answer. Its disk is safe; try again soon.",
            grpc: Code::Unavailable,
        },
    ),
    (
        Refusal::NodeBroke,
        Facts {
            code: "SPR-U02",
            status: StatusCode::BAD_GATEWAY,
            error: "connection to the host broke",
            message: "The sprite's host broke off before it answered. The request may or may not have reached the sprite.",
            grpc: Code::Unavailable,
        },
    ),
    (
        Refusal::WakeTimeout,
        Facts {
            code: "SPR-U03",
            status: StatusCode::GATEWAY_TIMEOUT,
            error: "wake timed out",
            message: "The sprite did not wake within 60 seconds. `sprite info` says why.",
            grpc: Code::DeadlineExceeded,
        },
    ),
    (
        Refusal::AnswerTimeout,
        Facts {
            code: "SPR-U04",
            status: StatusCode::GATEWAY_TIMEOUT,
            error: "answer timed out",
            message: "The sprite is awake but did not begin to answer within 5 minutes.",
            grpc: Code::DeadlineExceeded,
        },
    ),
    (
        Refusal::CoordinatorUnreachable,
        Facts {
            code: "SPR-U05",
            status: StatusCode::SERVICE_UNAVAILABLE,
            error: "control plane unreachable",
            message: "No coordinator answers. Sprites that are awake stay reachable; try again soon.",
            grpc: Code::Unavailable,
        },
    ),
    (
        Refusal::WakeRefused,
        Facts {
            code: "SPR-U06",
            status: StatusCode::SERVICE_UNAVAILABLE,
            error: "sprite cannot be woken",
            message: "No host takes the sprite now. `sprite info` says why.",
            grpc: Code::Unavailable,
        },
    ),
    (
        Refusal::CoordinatorBroke,
        Facts {
            code: "SPR-U07",
            status: StatusCode::BAD_GATEWAY,
            error: "connection to the control plane broke",
            message: "The coordinator broke off before it answered. The call may or may not have had an effect; look before you repeat it.",
            grpc: Code::Unavailable,
        },
    ),
    (
        Refusal::TooManyWaiting,
        Facts {
            code: "SPR-L01",
            status: StatusCode::SERVICE_UNAVAILABLE,
            error: "too many requests wait for this sprite to wake",
            message: "At most 128 requests wait for one sprite. Try again in a second.",
            grpc: Code::ResourceExhausted,
        },
    ),
];

const _: () = {
    let mut at = 0;
    while at < FACTS.len() {
        assert!(FACTS[at].0 as usize == at, "the table is not in the order of the variants");
        at += 1;
    }
    assert!(Refusal::TooManyWaiting as usize + 1 == FACTS.len(), "a variant has no line in the table");
};

impl Refusal {
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

    fn facts(self) -> &'static Facts {
        &FACTS[self as usize].1
    }

    pub(crate) fn answer(self, form: Form) -> Response<Body> {
        let facts = self.facts();
        let mut response = match form {
            Form::Json => typed("application/json", self.json().into()),
            Form::Html => typed("text/html; charset=utf-8", page(facts).into()),
            Form::Grpc => grpc(facts),
        };
        // A gRPC client reads the status from its headers; only calls that do not exist for it keep their HTTP status.
        if form != Form::Grpc || self == Self::InternalCall {
            *response.status_mut() = facts.status;
        }
        let headers = response.headers_mut();
        headers.insert(SPRITE_ERROR_HEADER, HeaderValue::from_static(facts.code));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert("sprite-version", HeaderValue::from_static(DIALECT_VERSION));
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

    /// The host's codes, with the statuses it gives them.
    const OF_A_HOST: [(&str, &str); 8] = [
        ("SPR-N01", "404"),
        ("SPR-P01", "502"),
        ("SPR-P02", "502, 504"),
        ("SPR-P03", "502"),
        ("SPR-W01", "503"),
        ("SPR-W02", "503"),
        ("SPR-W03", "504"),
        ("SPR-W04", "503"),
    ];

    #[test]
    fn every_code_is_documented_exactly_once() {
        let documented = include_str!("../../docs/errors.md");
        let of_us = FACTS.iter().map(|(_, facts)| (facts.code, facts.status.as_str()));
        let mut rows = 0;
        for (code, status) in of_us.chain(OF_A_HOST) {
            let row = format!("| `{code}` | {status} | ");
            assert_eq!(documented.matches(&row).count(), 1, "rows of docs/errors.md that begin with {row:?}");
            assert_eq!(documented.matches(&format!("| `{code}` |")).count(), 1, "{code} has one status");
            rows += 1;
        }
        assert_eq!(documented.matches("\n| `SPR-").count(), rows, "docs/errors.md has a code that nobody gives");
    }

    #[test]
    fn the_hosts_codes_are_those_its_source_gives() {
        let source = concat!(
            include_str!("../../node-agent/src/data/refusal.rs"),
            include_str!("../../node-agent/src/data/url.rs")
        );
        for (code, _) in OF_A_HOST {
            assert!(source.contains(&format!("\"{code}\"")), "a host does not give {code} any more");
        }
        let given: HashSet<&str> = source.split('"').filter(|text| text.starts_with("SPR-")).collect();
        assert_eq!(given.len(), OF_A_HOST.len(), "{given:?}");
    }

    #[test]
    fn browsers_get_a_page_that_says_what_to_do() {
        let html = page(Refusal::UrlUnauthorized.facts());
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
