//! The REST API in the Sprites dialect, with what we add to it.
//!
//! | method and path | answer |
//! |---|---|
//! | `GET /healthz` | 200, no token needed |
//! | `GET /v1/organization` | `{organization:{slug, …}}` |
//! | `POST /v1/sprites` `{name, labels?, environment?, url_settings?, wait_for_capacity?, size?, disk_bytes?, idle_timeout?, always_on?, from?: {sprite, checkpoint?}}` | 201 sprite |
//! | `GET /v1/sprites?prefix&max_results&continuation_token` | 200 list; with `Accept: application/x-ndjson` an endless watch |
//! | `GET /v1/sprites/{name}` | 200 sprite |
//! | `PUT /v1/sprites/{name}` `{url_settings?, labels?, clear_labels?, idle_timeout?, always_on?, wake_at?, wake_every?}` | 200 sprite |
//! | `DELETE /v1/sprites/{name}` | 204 |
//! | `GET …/check`, `POST …/restart`, `POST …/upgrade` | 200 |
//! | `POST …/sleep` `{to?: paused\|suspended\|cold}` | 200 `{sprite, frozen_ms, local_ms, bucket_ms}` |
//! | `POST …/wake` | 200 `{sprite, was, resumed, reason, took_ms}`; with `{at?, every?}` sets timers as POST below: `{sprite}` |
//! | `GET\|PUT\|POST\|DELETE …/wake-timers` `{at?: [time or duration], every?: duration}` | 200 `{at, every}`, 204; POST keeps what it does not name; `every: "never"` removes both |
//! | `POST …/resize` `{disk_bytes}` | 200 sprite |
//! | `POST …/sync` | 200 `{watermark_at, generation, took_ms}`, when everything written before is in the bucket |
//! | `POST …/checkpoint` `{comment?, durable?}` | 200 NDJSON |
//! | `GET …/checkpoints` | 200 array, `Current` first |
//! | `GET\|DELETE …/checkpoints/{id}` | 200 checkpoint, 204 |
//! | `POST …/checkpoints/{id}/restore` | 200 NDJSON |
//!
//! Unknown fields and query keys are ignored, unknown routes are a 404 in JSON. What moves a sprite's bytes (`exec`, `proxy`, `fs`, …) the
//! edge sends to the sprite's node.

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{HeaderName, HeaderValue, Method, Request, StatusCode, header, request::Parts},
    response::Response,
};
use http_body_util::LengthLimitError;
use percent_encoding::percent_decode_str;
use proto::paths::DIALECT_VERSION;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{refusal::Refusal, service::Service, tokens::Caller};

mod checkpoints;
mod life;
mod ndjson;
mod sprites;
mod watch;

pub(crate) use sprites::{read_token, size, token_after};

const VERSION_HEADER: HeaderName = HeaderName::from_static("sprite-version");
/// The largest body of a call here: an environment of 64 KiB in JSON, with room.
const BODY_BYTES_MAX: usize = 1 << 20;

/// One call by a known caller.
struct Call {
    service: Service,
    caller: Caller,
    parts: Parts,
}

impl Call {
    fn org(&self) -> &str {
        &self.caller.org
    }

    /// HEAD is a GET whose body the server leaves away.
    fn method(&self) -> Method {
        if self.parts.method == Method::HEAD { Method::GET } else { self.parts.method.clone() }
    }

    /// The first value of a query key, decoded.
    fn query(&self, key: &str) -> Option<String> {
        let query = self.parts.uri.query()?;
        let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let (_, value) = pairs.find(|(known, _)| *known == key)?;
        Some(decode(&value.replace('+', " ")))
    }

    fn accepts_ndjson(&self) -> bool {
        let mut accepts = self.parts.headers.get_all(header::ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
        accepts.any(|accept| accept.contains("application/x-ndjson"))
    }
}

/// The body as JSON, whatever its content type; nothing is `{}`.
async fn read_json<T: DeserializeOwned>(body: Body) -> Result<T, Refusal> {
    let bytes: Bytes = match axum::body::to_bytes(body, BODY_BYTES_MAX).await {
        Ok(bytes) => bytes,
        Err(error) if is_too_large(&error) => return Err(Refusal::TooLarge { max_bytes: BODY_BYTES_MAX }),
        Err(error) => return Err(Refusal::Malformed(format!("the request's body broke off: {error}"))),
    };
    let bytes = if bytes.iter().all(u8::is_ascii_whitespace) { Bytes::from_static(b"{}") } else { bytes };
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(Refusal::Malformed("the request's body is not a JSON object".to_owned()));
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| Refusal::Malformed(format!("the request's body is not the JSON expected here: {error}")))
}

fn is_too_large(error: &axum::Error) -> bool {
    use std::error::Error as _;
    error.source().is_some_and(|source| source.is::<LengthLimitError>())
}

/// Answers every request that is not gRPC.
pub(crate) async fn answer(State(service): State<Service>, request: Request<Body>) -> Response {
    let mut response = route(service, request).await.unwrap_or_else(Refusal::into_response);
    response.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(DIALECT_VERSION));
    response
}

async fn route(service: Service, request: Request<Body>) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    if path == "/healthz" {
        return Ok(json_response(StatusCode::OK, &json!({ "status": "ok", "version": proto::VERSION })));
    }
    let authorizations = parts.headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes);
    let caller = service.authenticate(proto::token::bearer(authorizations)).await?;
    let segments: Vec<String> = path.trim_matches('/').split('/').map(decode).collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let call = Call { service, caller, parts };
    match (&call.method(), segments.as_slice()) {
        (&Method::GET, ["v1", "organization"]) => sprites::organization(&call).await,
        (&Method::POST, ["v1", "sprites"]) => sprites::create(&call, body).await,
        (&Method::GET, ["v1", "sprites"]) if call.accepts_ndjson() => watch::open(&call).await,
        (&Method::GET, ["v1", "sprites"]) => sprites::list(&call).await,
        (_, ["v1", "sprites", name, rest @ ..]) if !name.is_empty() => of_sprite(&call, body, name, rest).await,
        _ => Err(no_route(&call.parts)),
    }
}

async fn of_sprite(call: &Call, body: Body, name: &str, rest: &[&str]) -> Result<Response, Refusal> {
    match (&call.method(), rest) {
        (&Method::GET, []) => sprites::get(call, name).await,
        (&Method::PUT | &Method::PATCH, []) => sprites::update(call, body, name).await,
        (&Method::DELETE, []) => sprites::destroy(call, name).await,
        (&Method::GET, ["check"]) => life::check(call, name).await,
        (&Method::POST, ["restart"]) => life::restart(call, name).await,
        (&Method::POST, ["upgrade"]) => life::upgrade(call, name).await,
        (&Method::POST, ["sleep"]) => life::sleep(call, body, name).await,
        (&Method::POST, ["wake"]) => life::wake(call, body, name).await,
        (&Method::GET, ["wake-timers"]) => life::wake_timers(call, name).await,
        (&Method::PUT | &Method::POST, ["wake-timers"]) => life::set_wake_timers(call, body, name).await,
        (&Method::DELETE, ["wake-timers"]) => life::clear_wake_timers(call, name).await,
        (&Method::POST, ["resize"]) => life::resize(call, body, name).await,
        (&Method::POST, ["sync"]) => life::sync(call, name).await,
        (&Method::POST, ["checkpoint"]) => checkpoints::create(call, body, name).await,
        (&Method::GET, ["checkpoints"]) => checkpoints::list(call, name).await,
        (&Method::GET, ["checkpoints", id]) => checkpoints::get(call, name, id).await,
        (&Method::DELETE, ["checkpoints", id]) => checkpoints::delete(call, name, id).await,
        (&Method::POST, ["checkpoints", id, "restore"]) => checkpoints::restore(call, name, id).await,
        _ => Err(no_route(&call.parts)),
    }
}

fn no_route(parts: &Parts) -> Refusal {
    Refusal::NoRoute { method: parts.method.to_string(), path: parts.uri.path().to_owned() }
}

fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn json_response(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn no_content() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}
