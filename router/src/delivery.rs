//! Carries one request to the node of its sprite and brings back the head of the answer, whatever it takes: a wake, a stale route, a node that
//! restarts.
//!
//! ```text
//!  route ─▶ awake? ──no──▶ take a place among the parked (or SPR-L01)
//!             │                    │ WAKE_DEADLINE: is it awake now? no ─▶ SPR-U03
//!             ▼                    ▼
//!           send ─▶ answer ─▶ "not here"? ─▶ ask anew, send once more ─▶ still not: SPR-R04
//!             └─▶ no connection ─▶ ask anew; another node: send there; else SPR-U01
//! ```
//!
//! The node wakes the sprite and holds the request meanwhile. A request is sent a second time only if the first one was not served: it was not
//! sent, or the node said so and there was no body that is now lost.

use std::{pin::pin, sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode, header, request::Parts};
use http_body::Body as _;
use hyper::body::Incoming;
use proto::paths::{NOT_HERE, SPRITE_ERROR_HEADER, SPRITE_ID_HEADER, SPRITE_PORT_HEADER, SPRITE_WAKE_HEADER};
use tokio::time::{Instant, timeout};

use crate::{
    body::{self, Body},
    control::{Coordinators, Route, SpriteKey},
    parking::{Full, Parking},
    refuse::Refusal,
    upstream::{self, Protocol, SendError},
};

/// How long a sprite may take to wake.
const WAKE_DEADLINE: Duration = Duration::from_secs(60);
/// How long an awake program may take to begin its answer, counted from the request.
const HEAD_DEADLINE: Duration = Duration::from_secs(300);

/// A request that is ready to be sent, but for the sprite's id.
pub(crate) struct Delivery {
    pub(crate) key: SpriteKey,
    pub(crate) target: Target,
    pub(crate) head: Parts,
    pub(crate) body: Body,
}

/// What of the sprite the request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A call of the dialect, answered by the node agent.
    Call(Protocol),
    /// A port in the sprite; `None`: the one its URL reaches.
    Port(Option<u16>),
}

impl Delivery {
    pub(crate) async fn run(
        self,
        route: Arc<Route>,
        coordinators: &Coordinators,
        parking: &Arc<Parking>,
    ) -> Result<Response<Incoming>, Refusal> {
        let began_at = Instant::now();
        let place =
            if route.awake { None } else { Some(parking.enter(route.id).map_err(|Full| Refusal::TooManyWaiting)?) };
        let key = self.key.clone();
        let mut answer = pin!(self.send(Arc::clone(&route), coordinators));
        if let Ok(answer) = timeout(WAKE_DEADLINE, &mut answer).await {
            if !route.awake && answer.as_ref().is_ok_and(|answer| answer.headers().contains_key(SPRITE_WAKE_HEADER)) {
                coordinators.saw_awake(&key, &route);
            }
            return answer;
        }
        if !route.awake {
            // It may be awake by now and its program slow: that is not ours to cut short.
            let now = coordinators.route(&key, Some(began_at + WAKE_DEADLINE)).await;
            if !matches!(now, Ok(Some(route)) if route.awake) {
                return Err(Refusal::WakeTimeout);
            }
        }
        drop(place);
        timeout(HEAD_DEADLINE - WAKE_DEADLINE, answer).await.unwrap_or(Err(Refusal::AnswerTimeout))
    }

    async fn send(self, route: Arc<Route>, coordinators: &Coordinators) -> Result<Response<Incoming>, Refusal> {
        let repeatable = self.body.is_end_stream();
        let (key, head) = (&self.key, &self.head);
        let (failure, again) = match attempt(&route, self.target, head, self.body, coordinators, key).await? {
            Outcome::Answer(answer) => return Ok(answer),
            Outcome::NotHere if repeatable => (Refusal::Moving, Some(body::empty())),
            Outcome::NotHere => (Refusal::Moving, None),
            Outcome::NotSent(body) => (Refusal::NodeUnreachable, Some(body)),
        };
        // Also without a second attempt: the next request must not run into the same stale route.
        let fresh = coordinators.route(key, Some(Instant::now())).await;
        let fresh = fresh.map_err(|_logged_there| failure)?.ok_or(Refusal::NoSuchSprite)?;
        let elsewhere = fresh.node != route.node || fresh.id != route.id;
        let Some(body) = again.filter(|_| elsewhere || failure == Refusal::Moving) else {
            return Err(failure);
        };
        match attempt(&fresh, self.target, head, body, coordinators, key).await? {
            Outcome::Answer(answer) => Ok(answer),
            Outcome::NotHere => Err(Refusal::Moving),
            Outcome::NotSent(_) => Err(Refusal::NodeUnreachable),
        }
    }
}

enum Outcome {
    Answer(Response<Incoming>),
    /// The node does not have the sprite.
    NotHere,
    NotSent(Body),
}

async fn attempt(
    route: &Route,
    target: Target,
    head: &Parts,
    body: Body,
    coordinators: &Coordinators,
    key: &SpriteKey,
) -> Result<Outcome, Refusal> {
    let node = match &route.node {
        Some(node) => node.clone(),
        None => {
            let woken = coordinators.wake(key).await.map_err(|error| error.of_wake())?;
            woken.ok_or(Refusal::NoSuchSprite)?.node.clone().ok_or(Refusal::Moving)?
        }
    };
    let mut request = Request::from_parts(head.clone(), body);
    let id = HeaderValue::from_str(&route.id.to_string()).expect("an id is hexadecimal digits and hyphens");
    request.headers_mut().insert(SPRITE_ID_HEADER, id);
    let protocol = match target {
        Target::Call(protocol) => protocol,
        Target::Port(port) => {
            request.headers_mut().insert(SPRITE_PORT_HEADER, port.unwrap_or(route.http_port).into());
            Protocol::Http1
        }
    };
    match upstream::send(&node, request, protocol).await {
        Ok(answer) if is_not_here(&answer) => Ok(Outcome::NotHere),
        Ok(answer) => Ok(Outcome::Answer(answer)),
        Err(error) => {
            tracing::warn!(sprite = ?route.id, "{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default());
            match error {
                SendError::Unreachable { request, .. } => Ok(Outcome::NotSent(request.into_body())),
                SendError::Broke { .. } => Err(Refusal::NodeBroke),
            }
        }
    }
}

fn is_not_here(answer: &Response<Incoming>) -> bool {
    answer.status() == StatusCode::NOT_FOUND
        && answer.headers().get(SPRITE_ERROR_HEADER).is_some_and(|code| code == NOT_HERE)
}

/// Our own hop is HTTP/1.1 with the path alone in the first line; the host goes into its header.
pub(crate) fn to_origin_form(head: &mut Parts) -> Result<(), Refusal> {
    if let Some(authority) = head.uri.authority() {
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_invalid| Refusal::BadHost)?;
        head.headers.insert(header::HOST, host);
    }
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    head.uri = path.parse().map_err(|_invalid| Refusal::Malformed)?;
    head.version = http::Version::HTTP_11;
    // Extensions belong to the connection that the request came on.
    head.extensions.clear();
    Ok(())
}
