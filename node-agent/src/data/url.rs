//! The sprite's own URL: forwards a request to the web server inside.
//!
//! HTTP/1.1 to the guest, one connection for each request; bodies stream both ways. An upgrade (WebSocket) is answered with 101 only after the guest has.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, Version, header, uri::PathAndQuery},
    response::Response,
};
use http_body_util::BodyExt as _;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use proto::{
    id::SpriteId,
    paths::{SPRITE_ID_HEADER, SPRITE_PORT_HEADER},
};

use super::{
    Awake, Call, Wake,
    guest_stream::{self, DialError, GuestStream, Way},
    refusal::Refusal,
    say_wake,
};

/// Times that a sprite may be put to sleep under a request that waits for it.
const REACH_ATTEMPTS: u32 = 3;

/// Headers of one hop. `Connection` may name more.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

pub(super) async fn forward(call: Call, port: u16) -> Response {
    let headers = call.parts.headers.clone();
    match try_forward(call, port).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_page(&headers),
    }
}

async fn try_forward(call: Call, port: u16) -> Result<Response, Refusal> {
    let (awake, stream) = reach(call.wake.clone(), call.id, port).await?;
    let (mut sender, connection) = http1::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| awake.explain(broken(port, &error)))?;
    // Lives as long as the exchange, upgraded or not.
    tokio::spawn(connection.with_upgrades());

    let mut request = Request::from_parts(call.parts, call.body);
    let client = hyper::upgrade::on(&mut request);
    let upgrade = prepare(&mut request);
    let mut response = sender.send_request(request).await.map_err(|error| awake.explain(broken(port, &error)))?;
    // This hop's own: over HTTP/1.0 a body that is cut could not be told from one that is whole.
    *response.version_mut() = Version::HTTP_11;
    let was = awake.was;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS && upgrade.is_some() {
        let guest = hyper::upgrade::on(&mut response);
        tokio::spawn(splice(client, guest, awake));
        let mut answer = response.map(|_body| Body::empty());
        let to = answer.headers().get(header::UPGRADE).cloned();
        remove_hop_by_hop(answer.headers_mut());
        insert_upgrade(answer.headers_mut(), to);
        say_wake(answer.headers_mut(), was);
        return Ok(answer);
    }
    remove_hop_by_hop(response.headers_mut());
    say_wake(response.headers_mut(), was);
    // The sprite stays awake until the last byte of the body.
    Ok(response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _held = &awake;
            frame
        }))
    }))
}

/// Wakes the sprite and connects. One that is put to sleep in between is woken again: nothing has been sent yet.
async fn reach(wake: Wake, id: SpriteId, port: u16) -> Result<(Awake, Box<dyn GuestStream>), Refusal> {
    for _ in 0..REACH_ATTEMPTS {
        let awake = wake.up(id).await?;
        match guest_stream::dial(&awake, port, Way::Any).await {
            Ok(stream) => return Ok((awake, stream)),
            Err(DialError::Gone { .. }) => {}
            Err(error) => return Err(refuse_dial(&error)),
        }
    }
    Err(Refusal::interrupted())
}

/// Makes the request one for the guest. Returns the protocol it wants to change to.
fn prepare(request: &mut Request<Body>) -> Option<HeaderValue> {
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    // Over HTTP/2 the host stands in the target only.
    let authority = request.uri().authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
    *request.uri_mut() = Uri::from(path);
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    if let Some(authority) = authority {
        headers.entry(header::HOST).or_insert(authority);
    }
    let asks = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    let upgrade = headers.get(header::UPGRADE).filter(|_| asks).cloned();
    remove_hop_by_hop(headers);
    headers.remove(SPRITE_ID_HEADER);
    headers.remove(SPRITE_PORT_HEADER);
    // Answered by our own server as soon as the guest's connection takes the body.
    headers.remove(header::EXPECT);
    insert_upgrade(headers, upgrade.clone());
    upgrade
}

fn insert_upgrade(headers: &mut HeaderMap, to: Option<HeaderValue>) {
    if let Some(to) = to {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, to);
    }
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

async fn splice(client: hyper::upgrade::OnUpgrade, guest: hyper::upgrade::OnUpgrade, awake: Awake) {
    match tokio::try_join!(client, guest) {
        Ok((client, guest)) => {
            let (mut client, mut guest) = (TokioIo::new(client), TokioIo::new(guest));
            // Either side may break off; that is the other's end as well.
            drop(tokio::io::copy_bidirectional(&mut client, &mut guest).await);
        }
        Err(error) => tracing::debug!(%error, "an upgraded connection did not come about"),
    }
    drop(awake);
}

fn refuse_dial(error: &DialError) -> Refusal {
    let (status, code, text, message) = match error {
        DialError::Gone { .. } => return Refusal::interrupted(),
        DialError::NothingListens { port } => (
            StatusCode::BAD_GATEWAY,
            "SPR-P01",
            "nothing is listening",
            format!(
                "The sprite is awake, but nothing in it listens on port {port}. Start a web server there, for example: python3 -m http.server {port}"
            ),
        ),
        DialError::Silent { port } => (
            StatusCode::GATEWAY_TIMEOUT,
            "SPR-P02",
            "the sprite's web server does not answer",
            format!(
                "Port {port} of the sprite takes no connections; its server may hang. Look inside with `sprite console`."
            ),
        ),
        DialError::Network { port, source } => {
            (StatusCode::BAD_GATEWAY, "SPR-P02", "the sprite cannot be reached", format!("port {port}: {source}"))
        }
        DialError::Agent { port, source } => {
            (StatusCode::BAD_GATEWAY, "SPR-P02", "the sprite cannot be reached", format!("port {port}: {source}"))
        }
    };
    Refusal::new(status, text, message).with_code(code)
}

fn broken(port: u16, error: &hyper::Error) -> Refusal {
    let message =
        format!("The server on port {port} of the sprite broke the connection or does not speak HTTP: {error}");
    Refusal::new(StatusCode::BAD_GATEWAY, "bad answer from the sprite", message).with_code("SPR-P03")
}
