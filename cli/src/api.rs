//! The API's client: one HTTP/1.1 connection per call, answers as JSON, as lines, or as a stream.
//!
//! Every wait has a bound: connecting ([`crate::connection`]), the head of the answer (the caller's `limit`), silence within a stream.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::{
    connection::{Dialer, Origin, Stream},
    failure::{Failure, chain},
    target::{TARGET_BYTES_MAX, Target},
};

/// Reads and small changes.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// What may involve a VM: create, sleep, wake, destroy, a handshake that wakes. Hosts without hardware virtualisation take long.
pub(crate) const LONG_LIMIT: Duration = Duration::from_secs(300);
/// Streams say something at least every 60 s.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// A list of 100 sprites has some 60 KiB.
const BODY_BYTES_MAX: usize = 64 << 20;
const LINE_BYTES_MAX: usize = 1 << 20;
/// Of an answer that is not in the API's form.
const FOREIGN_CHARS_SHOWN: usize = 300;
const USER_AGENT: &str = concat!("sprite-cli/", env!("CARGO_PKG_VERSION"));

#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub(crate) dialer: Dialer,
    token: String,
}

/// A call to make.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) limit: Duration,
}

impl Call {
    pub(crate) fn new(method: Method, target: Target) -> Self {
        Self { method, target, headers: HeaderMap::new(), body: Bytes::new(), limit: ANSWER_LIMIT }
    }

    pub(crate) fn get(target: Target) -> Self {
        Self::new(Method::GET, target)
    }

    pub(crate) fn post(target: Target, body: &Value) -> Self {
        Self::new(Method::POST, target).json(body)
    }

    #[must_use]
    pub(crate) fn json(mut self, body: &Value) -> Self {
        self.headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        Self { body: Bytes::from(body.to_string()), ..self }
    }

    #[must_use]
    pub(crate) fn header(mut self, name: header::HeaderName, value: &'static str) -> Self {
        self.headers.insert(name, header::HeaderValue::from_static(value));
        self
    }

    #[must_use]
    pub(crate) fn within(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }
}

/// An answer that is not a success, and in the API's form if the server could.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) error: String,
    pub(crate) message: String,
    pub(crate) retry_after: Option<Duration>,
}

/// Why a call has no result.
#[derive(Debug)]
pub(crate) enum CallError {
    Refused(Refused),
    /// No connection, a broken one, or nonsense on it.
    Failed(Failure),
}

impl From<Failure> for CallError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(refused) => refused.into(),
            CallError::Failed(failure) => failure,
        }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let Refused { status, error, message, .. } = refused;
        let failure = match (error.as_str(), message.as_str()) {
            ("", "") => Self::new(format!("the server answered {status}")),
            ("", text) | (text, "") => Self::new(text),
            // A code such as `concurrent_sprite_limit_exceeded` is for programs.
            (code, text) if !code.contains(' ') && code.contains('_') => Self::new(text),
            (text, advice) => Self::new(text).advise(advice),
        };
        if failure.advice.is_some() || status != StatusCode::UNAUTHORIZED {
            return failure;
        }
        failure.advise(
            "SPRITE_TOKEN or `sprite login` says who you are; `eval \"$(./dev env)\"` sets the local cluster's token",
        )
    }
}

impl Refused {
    pub(crate) fn new(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let retry_after = headers
            .get(header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let json: Value = serde_json::from_slice(body).unwrap_or_default();
        let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
        let (mut error, message) = (text("error"), text("message"));
        if let (true, Some(errors)) = (error.is_empty(), json["errors"].as_array()) {
            error = errors
                .iter()
                .map(|error| error.as_str().map_or_else(|| error.to_string(), str::to_owned))
                .collect::<Vec<_>>()
                .join("; ");
        }
        if error.is_empty() && message.is_empty() {
            let foreign: String = String::from_utf8_lossy(body).trim().chars().take(FOREIGN_CHARS_SHOWN).collect();
            error = if foreign.is_empty() { String::new() } else { format!("the server answered {status}: {foreign}") };
        }
        Self { status, error, message, retry_after }
    }
}

impl Api {
    pub(crate) fn new(origin: Origin, token: String) -> Result<Self, Failure> {
        // It goes into a header; a newline at its end is the usual accident.
        let token = token.trim().to_owned();
        if token.is_empty() || token.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err(Failure::usage("the token is empty or has characters that no token has")
                .advise("check SPRITE_TOKEN, or `sprite login`"));
        }
        Ok(Self { dialer: Dialer::new(origin)?, token })
    }

    /// A request with everything that every request has.
    pub(crate) fn request<B>(&self, call: &Call, body: B) -> Result<Request<B>, Failure> {
        let target = format!("{}{}", self.dialer.origin.prefix, call.target.as_str());
        if target.len() > TARGET_BYTES_MAX {
            return Err(Failure::usage(format!(
                "the command and its environment have {} bytes, at most {TARGET_BYTES_MAX} are possible",
                target.len()
            ))
            .advise("send what is large through stdin, or put it into a file first"));
        }
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(target)
            .header(header::HOST, &self.dialer.origin.authority)
            .header(header::USER_AGENT, USER_AGENT)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .body(body)
            .map_err(|error| Failure::usage(format!("{:?} cannot be requested: {error}", call.target.as_str())))?;
        for (name, value) in &call.headers {
            request.headers_mut().insert(name, value.clone());
        }
        Ok(request)
    }

    /// Sends a call; any status is an answer. The connection lives until the answer's body is read, or as its upgrade.
    pub(crate) async fn send(&self, call: &Call) -> Result<Response<Incoming>, Failure> {
        let request = self.request(call, Full::new(call.body.clone()))?;
        let stream = self.dialer.dial().await?;
        match tokio::time::timeout(call.limit, self.exchange(stream, request)).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(Failure::new(format!(
                "{} did not answer within {} s",
                self.dialer.origin.url,
                call.limit.as_secs()
            ))
            .advise("it may still do what it was asked; `sprite info` shows the state")),
        }
    }

    async fn exchange(&self, stream: Stream, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failure> {
        let handshake =
            hyper::client::conn::http1::Builder::new().max_buf_size(1 << 20).handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.broken(&error))?;
        // Ends with the answer's body; its error is the sender's or the body's too.
        tokio::spawn(async move { drop(connection.with_upgrades().await) });
        sender.send_request(request).await.map_err(|error| self.broken(&error))
    }

    pub(crate) fn broken(&self, error: &(dyn std::error::Error + 'static)) -> Failure {
        Failure::new(format!("the connection to {} broke: {}", self.dialer.origin.url, chain(error)))
            .advise("the call may or may not have had its effect; look before you repeat it")
    }

    /// A successful answer, or why there is none.
    pub(crate) async fn ask(&self, call: &Call) -> Result<Response<Incoming>, CallError> {
        let answer = self.send(call).await?;
        if answer.status().is_success() {
            Ok(answer)
        } else {
            Err(CallError::Refused(self.refusal(answer, call.limit).await?))
        }
    }

    pub(crate) async fn refusal(&self, answer: Response<Incoming>, limit: Duration) -> Result<Refused, Failure> {
        let (parts, body) = answer.into_parts();
        Ok(Refused::new(parts.status, &parts.headers, &self.whole(body, limit).await?))
    }

    /// Null for an empty body.
    pub(crate) async fn json(&self, call: &Call) -> Result<Value, CallError> {
        let answer = self.ask(call).await?;
        let body = self.whole(answer.into_body(), call.limit).await?;
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|error| {
            let url = &self.dialer.origin.url;
            CallError::Failed(
                Failure::new(format!("{url} did not answer with JSON: {error}"))
                    .advise("is it the API? check SPRITES_API_URL"),
            )
        })
    }

    async fn whole(&self, body: Incoming, limit: Duration) -> Result<Bytes, Failure> {
        match tokio::time::timeout(limit, Limited::new(body, BODY_BYTES_MAX).collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                Err(Failure::new(format!("the answer has more than {BODY_BYTES_MAX} bytes")))
            }
            Ok(Err(error)) => Err(self.broken(error.as_ref())),
            Err(_elapsed) => Err(Failure::new(format!("the answer was not complete within {} s", limit.as_secs()))),
        }
    }

    /// An answer of one JSON object per line.
    pub(crate) async fn lines(&self, call: &Call) -> Result<Lines, CallError> {
        let answer = self.ask(call).await?;
        Ok(Lines { body: answer.into_body(), buffer: BytesMut::new(), ended: false })
    }
}

/// More of a streamed answer; `None` at its end.
pub(crate) async fn next_piece(body: &mut Incoming) -> Result<Option<Bytes>, Failure> {
    match tokio::time::timeout(SILENCE_LIMIT, body.frame()).await {
        Ok(Some(Ok(frame))) => Ok(Some(frame.into_data().unwrap_or_default())),
        Ok(Some(Err(error))) => Err(Failure::new(format!("the answer broke off: {}", chain(&error)))),
        Ok(None) => Ok(None),
        Err(_elapsed) => Err(Failure::new(format!("the server was silent for {} s", SILENCE_LIMIT.as_secs()))),
    }
}

/// Objects of an NDJSON stream. Blank and malformed lines mean nothing.
#[derive(Debug)]
pub(crate) struct Lines {
    body: Incoming,
    buffer: BytesMut,
    ended: bool,
}

impl Lines {
    pub(crate) async fn next(&mut self) -> Result<Option<Value>, Failure> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                match serde_json::from_slice(&line) {
                    Ok(value) => return Ok(Some(value)),
                    Err(_blank_or_malformed) => continue,
                }
            }
            if self.ended {
                return Ok(serde_json::from_slice(&self.buffer.split()).ok());
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(Failure::new(format!("the server sent a line of more than {LINE_BYTES_MAX} bytes")));
            }
            match next_piece(&mut self.body).await? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None => self.ended = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(status: u16, body: &str) -> String {
        Failure::from(Refused::new(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), body.as_bytes()))
            .to_string()
    }

    #[test]
    fn refusals_are_shown_as_words_not_as_json() {
        assert_eq!(shown(404, r#"{"error":"sprite not found"}"#), "✗ sprite not found");
        assert_eq!(shown(503, r#"{"error":"no capacity","message":"free some"}"#), "✗ no capacity\n  free some");
        assert_eq!(shown(429, r#"{"error":"sprite_creation_rate_limited","message":"too many"}"#), "✗ too many");
        assert_eq!(shown(422, r#"{"errors":["name is too long","and odd"]}"#), "✗ name is too long; and odd");
        assert_eq!(
            shown(502, "<html>bad gateway</html>"),
            "✗ the server answered 502 Bad Gateway: <html>bad gateway</html>"
        );
        assert_eq!(shown(500, ""), "✗ the server answered 500 Internal Server Error");
        assert!(shown(401, r#"{"error":"authentication failed"}"#).contains("sprite login"));
    }
}
