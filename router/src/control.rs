//! The edge's questions to a coordinator, and what it remembers of the answers: whose token this is, and where a sprite runs.

use std::{path::PathBuf, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use proto::{
    control::{AuthenticateRequest, ResolveRequest, control_client::ControlClient},
    id::SpriteId,
};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    address::NodeAddress,
    answers::{Answers, Policy},
    refuse::Refusal,
};

/// For one question. A coordinator that is busy for longer is treated as away.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// A wake may take as long as a client would wait.
const WAKE_DEADLINE: Duration = Duration::from_secs(60);

/// `fresh_for`: a changed `sprite url` setting works after this long and the time of one answer, at the price of one question a second for each
/// busy sprite. `stale_for`: so old a setting still counts while no coordinator answers at all.
const ROUTES: Policy = Policy {
    fresh_for: Duration::from_secs(1),
    stale_for: Duration::from_secs(3600),
    absent_for: Duration::from_millis(500),
    capacity: 50_000,
};
/// Many who want the same sprite woken share one question; its answer counts as a route from then on.
const WAKES: Policy =
    Policy { fresh_for: Duration::ZERO, stale_for: Duration::ZERO, absent_for: Duration::ZERO, capacity: 1_000 };
/// A revoked token works for `fresh_for` more, and for `stale_for` while all coordinators are away.
const TOKENS: Policy = Policy {
    fresh_for: Duration::from_secs(10),
    stale_for: Duration::from_secs(600),
    absent_for: Duration::from_secs(1),
    capacity: 10_000,
};

/// No coordinator answered, or not usefully. Shared among all requests that asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no coordinator answered")]
pub(crate) struct Unavailable(#[source] Arc<Status>);

impl From<Status> for Unavailable {
    fn from(status: Status) -> Self {
        Self(Arc::new(status))
    }
}

impl Unavailable {
    /// What a request that waits for a wake is told.
    pub(crate) fn of_wake(&self) -> Refusal {
        match self.0.code() {
            Code::DeadlineExceeded => Refusal::WakeTimeout,
            // No connection, or a coordinator that is about to stop.
            Code::Unavailable | Code::Cancelled | Code::Unknown => Refusal::CoordinatorUnreachable,
            _ => Refusal::WakeRefused,
        }
    }
}

/// How a request names its sprite.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SpriteKey {
    Label(String),
    Name { org: String, name: String },
}

/// Where a sprite is and who may reach it.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) id: SpriteId,
    pub(crate) org: String,
    /// `None`: it sleeps and belongs to no host.
    pub(crate) node: Option<NodeAddress>,
    pub(crate) public: bool,
    /// Ran when we asked. A request to a sprite that does not is held while it wakes.
    pub(crate) awake: bool,
    pub(crate) http_port: u16,
    pub(crate) asked_at: Instant,
}

/// The coordinators, as this edge sees them.
pub(crate) struct Coordinators {
    client: ControlClient<Channel>,
    routes: Answers<SpriteKey, Arc<Route>>,
    wakes: Answers<SpriteKey, Arc<Route>>,
    tokens: Answers<blake3::Hash, Arc<str>>,
    /// Tokens are remembered only as keyed hashes: neither the memory of this process nor the time of a look-up gives one away.
    token_key: [u8; 32],
}

impl Coordinators {
    pub(crate) fn at(address: &NodeAddress) -> Self {
        let NodeAddress::Unix(path) = address;
        let path = path.clone();
        let connector = tower::service_fn(move |_: Uri| connect(path.clone()));
        let channel = Endpoint::from_static("http://coordinator").connect_with_connector_lazy(connector);
        Self {
            client: ControlClient::new(channel),
            routes: Answers::new(ROUTES),
            wakes: Answers::new(WAKES),
            tokens: Answers::new(TOKENS),
            token_key: rand::random(),
        }
    }

    /// The organisation that `token` belongs to; `None` when it is not valid.
    pub(crate) async fn organisation(&self, token: &str) -> Result<Option<Arc<str>>, Unavailable> {
        let key = blake3::keyed_hash(&self.token_key, token.as_bytes());
        let (mut client, token) = (self.client.clone(), token.to_owned());
        let ask = move || async move {
            let request = AuthenticateRequest { token };
            let reply = found(timeout(ANSWER_DEADLINE, client.authenticate(request)).await)?;
            Ok(reply.map(|reply| Arc::from(reply.org)))
        };
        self.tokens.get(&key, None, ask).await
    }

    /// Where the sprite is. With `not_before`, what was learned earlier does not count.
    pub(crate) async fn route(
        &self,
        key: &SpriteKey,
        not_before: Option<Instant>,
    ) -> Result<Option<Arc<Route>>, Unavailable> {
        let question = resolve(self.client.clone(), key.clone(), false, ANSWER_DEADLINE);
        self.routes.get(key, not_before, || question).await
    }

    /// Has the sprite woken on a host of the coordinator's choice, for one that no host owns.
    pub(crate) async fn wake(&self, key: &SpriteKey) -> Result<Option<Arc<Route>>, Unavailable> {
        let question = resolve(self.client.clone(), key.clone(), true, WAKE_DEADLINE);
        let woken = self.wakes.get(key, None, || question).await?;
        let asked_at = woken.as_ref().map_or_else(Instant::now, |route| route.asked_at);
        self.routes.learn(key, woken.clone(), asked_at);
        Ok(woken)
    }

    /// The sprite has just answered: those who come next need not be counted as waiting for a wake.
    pub(crate) fn saw_awake(&self, key: &SpriteKey, route: &Route) {
        self.routes.learn(key, Some(Arc::new(Route { awake: true, ..route.clone() })), route.asked_at);
    }
}

async fn resolve(
    mut client: ControlClient<Channel>,
    key: SpriteKey,
    wake: bool,
    deadline: Duration,
) -> Result<Option<Arc<Route>>, Unavailable> {
    let asked_at = Instant::now();
    let (label, org, name) = match key {
        SpriteKey::Label(label) => (label, String::new(), String::new()),
        SpriteKey::Name { org, name } => (String::new(), org, name),
    };
    let request = ResolveRequest { label, org, name, wake };
    let Some(reply) = found(timeout(deadline, client.resolve(request)).await)? else {
        return Ok(None);
    };
    let id = reply.sprite_id.parse().map_err(|error| Status::internal(format!("bad route: {error}")))?;
    let node = match reply.node.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|error| Status::internal(format!("bad route: {error}")))?),
    };
    let http_port = u16::try_from(reply.http_port).ok().filter(|&port| port != 0);
    Ok(Some(Arc::new(Route {
        id,
        org: reply.org,
        node,
        public: reply.public,
        awake: wake || reply.was == "running",
        http_port: http_port.unwrap_or(proto::paths::DEFAULT_HTTP_PORT),
        asked_at,
    })))
}

/// Sorts an answer into "this is it", "there is none" and "I do not know".
fn found<T>(
    answer: Result<Result<tonic::Response<T>, Status>, tokio::time::error::Elapsed>,
) -> Result<Option<T>, Unavailable> {
    match answer {
        Ok(Ok(reply)) => Ok(Some(reply.into_inner())),
        Ok(Err(status)) => match status.code() {
            Code::NotFound | Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument => Ok(None),
            _ => {
                tracing::warn!(code = ?status.code(), "a coordinator did not answer: {}", status.message());
                Err(status.into())
            }
        },
        Err(_elapsed) => Err(Status::deadline_exceeded("no answer in time").into()),
    }
}

async fn connect(path: PathBuf) -> std::io::Result<TokioIo<UnixStream>> {
    UnixStream::connect(path).await.map(TokioIo::new)
}
