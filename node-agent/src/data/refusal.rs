//! Requests that are not served, in the dialect's shape or as a page for people.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::Response,
};
use proto::paths::SPRITE_ERROR_HEADER;
use serde_json::json;
use tonic::Code;

use crate::{agent::CallError, host::WakeError};

const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("5");

/// Why a request gets no other answer, and what to do.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    /// Entry of `docs/errors.md`, if it has one.
    code: Option<&'static str>,
    /// The dialect's `error`: a known text or a short code.
    error: String,
    message: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, error: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status, code: None, error: error.into(), message: message.into() }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad request", message)
    }

    pub(super) fn no_route(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not found", format!("this server has no {path}"))
    }

    pub(super) fn session_not_found(session: &str) -> Self {
        let error = format!("session not found: {session}");
        Self::new(StatusCode::NOT_FOUND, error, "it has ended, or never was; list the sessions to see the living ones")
    }

    pub(super) fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// A call that the agent refused. `session` is the one it was about.
    pub(super) fn of_call(error: &CallError, session: Option<&str>) -> Self {
        let status = match (error.code(), session) {
            (Code::NotFound, Some(session)) => return Self::session_not_found(session),
            (Code::NotFound, None) => StatusCode::NOT_FOUND,
            (Code::FailedPrecondition, _) => StatusCode::GONE,
            (Code::InvalidArgument, _) => StatusCode::BAD_REQUEST,
            (Code::ResourceExhausted, _) => StatusCode::TOO_MANY_REQUESTS,
            (Code::Unavailable | Code::Cancelled, _) => StatusCode::SERVICE_UNAVAILABLE,
            (Code::DeadlineExceeded, _) => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, "the sprite refused", error.message())
    }

    /// An agent that says nothing.
    pub(super) fn silent() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "the sprite does not answer", "its agent is busy or stuck; try again")
    }

    /// The VM ended before it answered.
    pub(super) fn interrupted() -> Self {
        let message = "It was put to sleep, restarted or restored before it answered. The request may have had an effect: look before you repeat it.";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the sprite was stopped", message).with_code("SPR-W04")
    }

    /// As JSON, which every client of the dialect can read, also on a refused handshake.
    pub(super) fn into_json(self) -> Response {
        let mut body = json!({ "error": self.error, "message": self.message });
        if let Some(code) = self.code {
            body["code"] = json!(code);
        }
        self.respond("application/json", body.to_string())
    }

    /// As a page for a browser, as JSON for everybody else.
    pub(super) fn into_page(self, headers: &HeaderMap) -> Response {
        let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
        if !accept.contains("text/html") {
            return self.into_json();
        }
        let (title, message) = (escape(&self.error), escape(&self.message));
        let code = self.code.unwrap_or_default();
        let page = format!(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n\
             <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:15vh auto;padding:0 1em}}code{{background:#eee;padding:0 .3em}}</style>\n\
             <h1>{title}</h1>\n<p>{message}</p>\n<p><small>{code}</small></p>\n</html>\n"
        );
        self.respond("text/html; charset=utf-8", page)
    }

    fn respond(self, kind: &'static str, body: String) -> Response {
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Some(code) = self.code {
            headers.insert(HeaderName::from_static(SPRITE_ERROR_HEADER), HeaderValue::from_static(code));
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER_S);
        }
        response
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.error, self.message)
    }
}

impl From<WakeError> for Refusal {
    fn from(error: WakeError) -> Self {
        let (status, code, text) = match &error {
            WakeError::NotHere(_) => (StatusCode::NOT_FOUND, "SPR-N01", "sprite not found"),
            WakeError::NoCapacity(_) => (StatusCode::SERVICE_UNAVAILABLE, "SPR-W01", "no capacity"),
            WakeError::Failed { .. } => (StatusCode::SERVICE_UNAVAILABLE, "SPR-W02", "the sprite does not start"),
            WakeError::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "SPR-W03", "the sprite did not wake in time"),
        };
        Self::new(status, text, error.to_string()).with_code(code)
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
