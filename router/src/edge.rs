//! What happens to one request: which host, who may, where to.
//!
//! ```text
//!  host ─┬─ API ─┬─ internal gRPC ─▶ 404
//!        │       ├─ exec, fs, proxy … ─▶ token ─▶ route ─▶ node        (the coordinator is not on the way of the bytes)
//!        │       └─ anything else ─▶ coordinator, which checks the token itself
//!        ├─ <name>-<oid>.… ─▶ route ─▶ public, or a token of its organisation ─▶ node
//!        └─ other ─▶ 421
//! ```
//!
//! # Invariants
//!
//! 1. *Nothing wakes before it is allowed.* Routes are asked for without waking; only a request that has passed the check reaches a node.
//! 2. *Headers are cleaned before anything is sent anywhere*, so that `x-sprite-id` and `x-sprite-port` are always ours.
//! 3. A token of the platform never reaches a program in a sprite, public or not, nor a node.

use std::{net::IpAddr, sync::Arc};

use http::{HeaderValue, Request, Response, StatusCode, header, request::Parts};
use http_body_util::BodyExt;
use hyper::{body::Incoming, upgrade::OnUpgrade};
use proto::id::SpriteName;
use tokio::time::{Duration, Instant};

use crate::{
    access_log::Record,
    activity::InFlight,
    address::NodeAddress,
    body::Body,
    control::{Coordinators, Route, SpriteKey},
    delivery::{Delivery, Target, to_origin_form},
    headers::{self, Client},
    host::{self, HostKind, Hosts, SpriteHost},
    parking::Parking,
    path::{self, ApiPath, DataCall},
    refuse::{Form, Refusal},
    tunnel::Tunnels,
    upstream::{self, Protocol, SendError},
};

/// Before a request is refused, a route older than this is asked for again: it may just have been made public.
const REFUSE_BY_ROUTE_AGE_MAX: Duration = Duration::from_millis(100);

/// Of all headers together; beside them there may be a target of 64 KiB, where argv and environment of an exec stand.
pub(crate) const HEAD_BYTES_MAX: usize = 256 << 10;

pub(crate) struct Edge {
    hosts: Hosts,
    coordinator: NodeAddress,
    coordinators: Coordinators,
    parking: Arc<Parking>,
    pub(crate) tunnels: Tunnels,
}

/// Who is at the other end of a connection, and what they asked TLS for.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) ip: IpAddr,
    /// The port of ours that they came to.
    pub(crate) port: u16,
    pub(crate) sni: Option<String>,
}

/// A request with clean headers, ready for its next hop.
struct Prepared {
    head: Parts,
    body: Body,
    /// The client's side of a protocol switch, if it asked for one.
    switch: Option<OnUpgrade>,
}

/// The head of an answer and what belongs to it.
struct Answer {
    response: Response<Incoming>,
    switch: Option<OnUpgrade>,
}

impl Edge {
    pub(crate) fn new(hosts: Hosts, coordinator: NodeAddress) -> Self {
        Self {
            hosts,
            coordinators: Coordinators::at(&coordinator),
            coordinator,
            parking: Arc::default(),
            tunnels: Tunnels::default(),
        }
    }

    pub(crate) async fn answer(&self, request: Request<Incoming>, peer: &Peer, in_flight: InFlight) -> Response<Body> {
        let request_id = headers::given_request_id(request.headers()).unwrap_or_else(new_request_id);
        let host = host::requested_host(request.uri(), request.headers());
        let host_text = host.as_deref().unwrap_or_default();
        let mut record = Record::begin(&request, host_text, peer.ip, request_id.clone(), in_flight);
        let form = form_for(&request);
        let answer = match host {
            Ok(host) => self.route(request, &host, peer, &mut record).await,
            Err(error) => {
                tracing::debug!("refused: {error}");
                Err(Refusal::BadHost)
            }
        };
        match answer {
            Ok(answer) => self.finish(answer, record),
            Err(refusal) => {
                let mut response = refusal.answer(form);
                response.headers_mut().insert(headers::REQUEST_ID, request_id);
                record.answered(response.status(), response.headers());
                record.follow(response)
            }
        }
    }

    async fn route(
        &self,
        request: Request<Incoming>,
        host: &str,
        peer: &Peer,
        record: &mut Record,
    ) -> Result<Answer, Refusal> {
        if request.method() == http::Method::CONNECT {
            return Err(Refusal::Connect);
        }
        if headers::bytes(request.headers()) > HEAD_BYTES_MAX {
            return Err(Refusal::HeadersTooLarge);
        }
        let kind = self.hosts.classify(host);
        if peer.sni.as_ref().is_some_and(|sni| !self.hosts.may_share(sni, &kind)) {
            return Err(Refusal::WrongConnection);
        }
        let is_grpc = request.version() == http::Version::HTTP_2 && headers::is_grpc(request.headers());
        let path = path::split(request.uri().path());
        let prepared = prepare(request, host, peer, &record.request_id)?;
        match (kind, path) {
            (HostKind::Api, ApiPath::Internal) => Err(Refusal::InternalCall),
            (HostKind::Api, ApiPath::Control) => self.to_coordinator(prepared, is_grpc).await,
            (HostKind::Api, ApiPath::Data { name, call }) => self.to_sprite(prepared, &name, call, record).await,
            (HostKind::Sprite(sprite), _) => self.to_port(prepared, sprite, record).await,
            (HostKind::NoSprite, _) => Err(Refusal::NoSuchSprite),
            (HostKind::Foreign, _) => Err(Refusal::ForeignHost),
        }
    }

    async fn to_coordinator(&self, mut prepared: Prepared, is_grpc: bool) -> Result<Answer, Refusal> {
        let protocol = if is_grpc { Protocol::Http2 } else { Protocol::Http1 };
        if is_grpc {
            prepared.head.version = http::Version::HTTP_2;
            prepared.head.uri = absolute(&prepared.head)?;
            prepared.head.headers.remove(header::HOST);
        }
        let request = Request::from_parts(prepared.head, prepared.body);
        match upstream::send(&self.coordinator, request, protocol).await {
            Ok(response) => Ok(Answer { response, switch: prepared.switch }),
            Err(error) => {
                tracing::warn!(
                    "{error}: {}",
                    std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default()
                );
                Err(match error {
                    SendError::Unreachable { .. } => Refusal::CoordinatorUnreachable,
                    SendError::Broke { .. } => Refusal::CoordinatorBroke,
                })
            }
        }
    }

    /// A call of the dialect that moves a sprite's bytes.
    async fn to_sprite(
        &self,
        mut prepared: Prepared,
        name: &str,
        call: DataCall,
        record: &mut Record,
    ) -> Result<Answer, Refusal> {
        let token = headers::bearer(&prepared.head.headers).ok_or(Refusal::ApiUnauthorized)?;
        let org =
            self.coordinators.organisation(token).await.map_err(|_logged_there| Refusal::CoordinatorUnreachable)?;
        let org = org.ok_or(Refusal::ApiUnauthorized)?.to_string();
        let name = name.parse::<SpriteName>().map_err(|_no_sprite_has_it| Refusal::NoSuchSprite)?.to_string();
        let key = SpriteKey::Name { org, name };
        let route = self.find(&key, None).await?;
        prepared.head.headers.remove(header::AUTHORIZATION);
        let protocol = match call {
            DataCall::Exec if prepared.switch.is_none() && prepared.head.method == http::Method::POST => {
                Protocol::Http1Chunks
            }
            DataCall::Exec | DataCall::Other => Protocol::Http1,
        };
        self.deliver(prepared, key, route, Target::Call(protocol), record).await
    }

    /// A request for a program in a sprite.
    async fn to_port(
        &self,
        mut prepared: Prepared,
        sprite: SpriteHost,
        record: &mut Record,
    ) -> Result<Answer, Refusal> {
        let asked_at = Instant::now();
        let key = SpriteKey::Label(sprite.label);
        let mut route = self.find(&key, None).await?;
        if !self.may_open(&route, &prepared.head).await? {
            let recent = asked_at.checked_sub(REFUSE_BY_ROUTE_AGE_MAX).unwrap_or(asked_at);
            route = self.find(&key, Some(recent)).await?;
            if !self.may_open(&route, &prepared.head).await? {
                return Err(Refusal::UrlUnauthorized);
            }
        }
        if route.public {
            // The same command line that opens a private sprite is used for a public one, too.
            headers::remove_platform_tokens(&mut prepared.head.headers);
        } else {
            prepared.head.headers.remove(header::AUTHORIZATION);
        }
        let target = Target::Port(sprite.port.map(std::num::NonZeroU16::get));
        self.deliver(prepared, key, route, target, record).await
    }

    async fn may_open(&self, route: &Route, head: &Parts) -> Result<bool, Refusal> {
        if route.public {
            return Ok(true);
        }
        let Some(token) = headers::bearer(&head.headers) else {
            return Ok(false);
        };
        let org =
            self.coordinators.organisation(token).await.map_err(|_logged_there| Refusal::CoordinatorUnreachable)?;
        Ok(org.is_some_and(|org| *org == *route.org))
    }

    async fn find(&self, key: &SpriteKey, not_before: Option<Instant>) -> Result<Arc<Route>, Refusal> {
        let route =
            self.coordinators.route(key, not_before).await.map_err(|_logged_there| Refusal::CoordinatorUnreachable)?;
        route.ok_or(Refusal::NoSuchSprite)
    }

    async fn deliver(
        &self,
        prepared: Prepared,
        key: SpriteKey,
        route: Arc<Route>,
        target: Target,
        record: &mut Record,
    ) -> Result<Answer, Refusal> {
        record.sprite = Some(route.id);
        let Prepared { head, body, switch } = prepared;
        let delivery = Delivery { key, target, head, body };
        let response = delivery.run(route, &self.coordinators, &self.parking).await?;
        Ok(Answer { response, switch })
    }

    /// Gives the answer to the client, or joins the two sides after a switch.
    fn finish(&self, answer: Answer, mut record: Record) -> Response<Body> {
        let Answer { mut response, switch } = answer;
        let protocol = response.headers().get(header::UPGRADE).cloned();
        let behind = hyper::upgrade::on(&mut response);
        let version = response.version();
        headers::clean_response(response.headers_mut(), version, &record.request_id);
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            record.answered(response.status(), response.headers());
            return record.follow(response.map(|body| body.map_err(Into::into).boxed_unsync()));
        }
        let (Some(client), Some(protocol)) = (switch, protocol) else {
            // Nobody asked for it: what follows on that connection is not HTTP.
            let mut response = Refusal::NodeBroke.answer(Form::Json);
            response.headers_mut().insert(headers::REQUEST_ID, record.request_id.clone());
            record.answered(response.status(), response.headers());
            return record.follow(response);
        };
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(header::UPGRADE, protocol);
        record.answered(response.status(), response.headers());
        self.tunnels.open(client, behind, record);
        response.map(|_empty| crate::body::empty())
    }
}

fn prepare(
    mut request: Request<Incoming>,
    host: &str,
    peer: &Peer,
    request_id: &HeaderValue,
) -> Result<Prepared, Refusal> {
    let protocol = headers::upgrade(request.version(), request.method(), request.headers());
    let on_upgrade = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    let client = Client { ip: peer.ip, host, port: peer.port, version: head.version, request_id };
    headers::clean_request(&mut head.headers, &client);
    to_origin_form(&mut head)?;
    if let Some(protocol) = protocol {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(header::UPGRADE, protocol);
    }
    Ok(Prepared { head, body: body.map_err(Into::into).boxed_unsync(), switch: on_upgrade })
}

/// HTTP/2 wants scheme and authority in the target.
fn absolute(head: &Parts) -> Result<http::Uri, Refusal> {
    let host = head.headers.get(header::HOST).and_then(|host| host.to_str().ok()).ok_or(Refusal::BadHost)?;
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    http::Uri::builder()
        .scheme("http")
        .authority(host)
        .path_and_query(path)
        .build()
        .map_err(|_invalid| Refusal::Malformed)
}

fn form_for(request: &Request<Incoming>) -> Form {
    if headers::is_grpc(request.headers()) {
        Form::Grpc
    } else if headers::wants_html(request.headers()) {
        Form::Html
    } else {
        Form::Json
    }
}

fn new_request_id() -> HeaderValue {
    HeaderValue::from_str(&uuid::Uuid::now_v7().to_string()).expect("a uuid is hexadecimal digits and hyphens")
}
