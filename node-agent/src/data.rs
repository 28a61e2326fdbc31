//! The node's data plane: requests for sprites of this host, over HTTP.
//!
//! ```text
//!  edge ── x-sprite-id, x-sprite-port ──▶ url      the sprite's own web server: over the tap, else through the agent
//!       └─ x-sprite-id ─────────────────▶ /v1/sprites/{name}/exec | proxy | control | ports/watch      the Sprites dialect
//! ```
//!
//! Requests come from the edge, which has authenticated them and set the headers of [`proto::paths`]; the name in the path is not looked at.
//!
//! # Invariants
//!
//! 1. Whatever a request waits for happens before its answer begins: a WebSocket gets 101 when the sprite is awake and the command runs, or a refusal
//!    with a JSON body. The wake is not visible but for its time (and a header).
//! 2. A sprite stays awake as long as a request for it is served, body and upgraded connection included. When its VM ends all the same (an order to
//!    sleep, a restart, a restore), every connection into it breaks at once: nothing hangs ([`Awake::is_gone`]).
//! 3. Nothing is buffered without bound: a client that does not read stops the guest's writer, a guest that does not read stops the client.
//! 4. A request with a sprite's id never reaches the control plane, whatever its path ([`in_front_of`]).

use std::{any::Any, fmt, io, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header, request::Parts},
    response::Response,
};
use futures_util::{FutureExt as _, future::BoxFuture};
use proto::{
    id::SpriteId,
    paths::{SPRITE_ID_HEADER, SPRITE_PORT_HEADER, SPRITE_WAKE_HEADER},
};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::{
    agent::{AgentClient, CallError},
    host::{Running, WakeError},
};

mod control;
mod exec;
mod exec_http;
mod frames;
mod guest_stream;
mod ports;
mod proxy;
mod query;
mod refusal;
mod session;
mod sessions;
#[cfg(test)]
mod tests;
mod url;
mod websocket;

use refusal::Refusal;

const DIALECT_VERSION: HeaderValue = HeaderValue::from_static(proto::paths::DIALECT_VERSION);
const VERSION_HEADER: HeaderName = HeaderName::from_static("sprite-version");

/// Connects to a port of the guest over its network.
pub type Dial = Arc<dyn Fn(u16) -> BoxFuture<'static, io::Result<TcpStream>> + Send + Sync>;

/// What the data plane needs of a sprite that answers.
pub struct Awake {
    pub agent: AgentClient,
    pub dial: Dial,
    /// Cancelled when the VM ends.
    pub ended: CancellationToken,
    /// How it was found: `none` (was running), `paused`, `memory`, `disk`.
    pub was: &'static str,
    /// Keeps the sprite awake until it is dropped.
    pub hold: Box<dyn Any + Send + Sync>,
}

impl From<Running> for Awake {
    fn from(running: Running) -> Self {
        let net = running.net;
        let dial: Dial = Arc::new(move |port| {
            let net = Arc::clone(&net);
            async move { net.connect(port).await }.boxed()
        });
        Self { agent: running.agent, dial, ended: running.ended, was: running.was, hold: Box::new(running.guard) }
    }
}

impl Awake {
    /// Whether this VM serves nobody any more. The next request wakes another.
    fn is_gone(&self) -> bool {
        self.ended.is_cancelled() || self.agent.is_closed()
    }

    /// Why a request was not answered: because the VM is gone, or else for the reason given.
    fn explain(&self, refusal: Refusal) -> Refusal {
        if self.is_gone() { Refusal::interrupted() } else { refusal }
    }
}

impl fmt::Debug for Awake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Awake").field("was", &self.was).finish_non_exhaustive()
    }
}

/// Wakes a sprite and holds it awake.
#[derive(Clone)]
struct Wake(Arc<dyn Fn(SpriteId) -> BoxFuture<'static, Result<Awake, WakeError>> + Send + Sync>);

impl Wake {
    async fn up(&self, id: SpriteId) -> Result<Awake, Refusal> {
        (self.0)(id).await.map_err(Refusal::from)
    }
}

/// The data plane over `wake`, which is `Host::running`.
pub fn router<W, F, A>(wake: W) -> Router
where
    W: Fn(SpriteId) -> F + Send + Sync + 'static,
    F: Future<Output = Result<A, WakeError>> + Send + 'static,
    A: Into<Awake> + 'static,
{
    let wake = Wake(Arc::new(move |id| wake(id).map(|woken| woken.map(Into::into)).boxed()));
    Router::new().fallback(move |request: Request<Body>| serve(wake.clone(), request))
}

/// Both planes on one socket: what names a sprite goes to `data`, everything else to `control`.
///
/// Not a merge of routes: the path of a request for a sprite's URL is chosen by strangers and must not select a control call.
pub fn in_front_of(control: Router, data: Router) -> Router {
    Router::new().fallback(move |request: Request<Body>| {
        let plane = if request.headers().contains_key(SPRITE_ID_HEADER) { data.clone() } else { control.clone() };
        plane.oneshot(request)
    })
}

/// How long the guest's agent may take for a call that does little.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The agent's answer, or a refusal when it gives none. `session` is the one the call is about.
async fn answer<T>(call: impl Future<Output = Result<T, CallError>>, session: Option<&str>) -> Result<T, Refusal> {
    match tokio::time::timeout(ANSWER_LIMIT, call).await {
        Ok(answer) => answer.map_err(|error| Refusal::of_call(&error, session)),
        Err(_elapsed) => Err(Refusal::silent()),
    }
}

/// One request for one sprite.
struct Call {
    wake: Wake,
    id: SpriteId,
    parts: Parts,
    body: Body,
}

impl Call {
    /// Does not borrow the call: its body cannot be shared between threads.
    fn wake(&self) -> impl Future<Output = Result<Awake, Refusal>> + Send + use<> {
        let (wake, id) = (self.wake.clone(), self.id);
        async move { wake.up(id).await }
    }

    fn query(&self) -> query::Query {
        query::Query::parse(self.parts.uri.query().unwrap_or_default())
    }

    fn is_upgrade(&self) -> bool {
        self.parts.headers.get(header::UPGRADE).is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
    }
}

async fn serve(wake: Wake, request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let id = parts.headers.get(SPRITE_ID_HEADER).and_then(|id| id.to_str().ok()).and_then(|id| id.parse().ok());
    let Some(id) = id else {
        return Refusal::bad_request("the request names no sprite (x-sprite-id)").into_json();
    };
    let port = parts.headers.get(SPRITE_PORT_HEADER).map(|port| port.to_str().ok().and_then(|port| port.parse().ok()));
    let call = Call { wake, id, parts, body };
    match port {
        None => dialect(call).await,
        Some(Some(port)) if port != 0 => url::forward(call, port).await,
        Some(_) => Refusal::bad_request("x-sprite-port is not a port").into_json(),
    }
}

/// The Sprites dialect.
async fn dialect(call: Call) -> Response {
    let method = call.parts.method.clone();
    let path = call.parts.uri.path().to_owned();
    let segments: Vec<String> = path.trim_matches('/').split('/').map(query::decode_segment).collect();
    let rest: Vec<&str> = segments.iter().skip(3).map(String::as_str).collect();
    let known = segments.len() > 3 && segments[0] == "v1" && segments[1] == "sprites";
    let result = match (&method, rest.as_slice()) {
        _ if !known => Err(Refusal::no_route(&path)),
        (&Method::GET, ["exec"]) if call.is_upgrade() => exec::create(call).await,
        (&Method::GET, ["exec"]) => sessions::list(call).await,
        // Clients read the version header only; that must not wake the sprite.
        (&Method::HEAD, ["exec"]) => Ok(Response::new(Body::empty())),
        (&Method::POST, ["exec"]) => exec_http::run(call).await,
        (&Method::GET, ["exec", session]) => exec::attach(call, (*session).to_owned()).await,
        (&Method::POST, ["exec", session, "kill"]) => sessions::kill(call, (*session).to_owned()).await,
        (&Method::GET, ["control"]) => control::open(call).await,
        (&Method::GET, ["proxy"]) => proxy::open(call).await,
        (&Method::GET, ["ports", "watch"]) => ports::watch(call).await,
        _ => Err(Refusal::no_route(&path)),
    };
    let mut response = result.unwrap_or_else(Refusal::into_json);
    response.headers_mut().insert(VERSION_HEADER, DIALECT_VERSION);
    response
}

fn say_wake(headers: &mut HeaderMap, was: &'static str) {
    headers.insert(SPRITE_WAKE_HEADER, HeaderValue::from_static(was));
}
