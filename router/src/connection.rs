//! One connection from outside: TLS handshake, HTTP/1.1 or HTTP/2 by ALPN, its limits and its end.
//!
//! ```text
//!  accepted ─▶ handshake ─▶ serving ─▶ draining ─▶ closed
//!                │ 10 s        │ idle or edge stops    │ edge's deadline
//!                ▼             ▼ silent for 15 min     ▼
//!              closed        closed                 cut off
//! ```

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::TcpStream,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    activity::{Activity, Watched},
    bare::Explained,
    body::Body,
    edge::{Edge, HEAD_BYTES_MAX, Peer},
};

const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// For a whole request head; also how long HTTP/1.1 waits for the next one.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// HTTP/2 without a stream for this long is closed.
const IDLE_MAX: Duration = Duration::from_secs(120);
/// A request on which nothing moves for this long is given up. The dialect's streams send something each minute.
const SILENCE_MAX: Duration = Duration::from_secs(15 * 60);
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

const H2_STREAMS_MAX: u32 = 100;
const H2_STREAM_WINDOW_BYTES: u32 = 64 << 10;
const H2_CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
/// As `HEAD_BYTES_MAX`, and what HTTP/2 counts for each header beside.
const H2_HEADER_LIST_BYTES_MAX: u32 = 264 << 10;
const H2_SEND_BUFFER_BYTES_MAX: usize = 256 << 10;
const H2_PING_INTERVAL: Duration = Duration::from_secs(20);
const H2_PING_DEADLINE: Duration = Duration::from_secs(20);

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) edge: Edge,
    pub(crate) tls: TlsAcceptor,
    /// Cancelled: finish what is in flight, take nothing new.
    pub(crate) drain: CancellationToken,
}

/// Serves one connection to its end. `permit` is held until its socket is closed, also after an upgrade.
pub(crate) async fn serve<P: Unpin + Send + 'static>(
    shared: Arc<Shared>,
    stream: TcpStream,
    from: SocketAddr,
    permit: P,
) {
    let port = stream.local_addr().map_or(0, |address| address.port());
    let handshake = timeout(HANDSHAKE_DEADLINE, shared.tls.accept(stream));
    let stream = tokio::select! {
        stream = handshake => stream,
        () = shared.drain.cancelled() => return,
    };
    let stream = match stream {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%from, "TLS handshake failed: {error}"),
        Err(_elapsed) => return tracing::debug!(%from, "TLS handshake took too long"),
    };
    let session = stream.get_ref().1;
    let is_h2 = session.alpn_protocol() == Some(b"h2");
    let sni = session.server_name().map(str::to_owned);
    let peer = Arc::new(Peer { ip: from.ip(), port, sni });
    let activity = Activity::begin();
    let stream = Watched::new(stream, Arc::clone(&activity), permit);
    let drain = shared.drain.clone();
    let answer = service_fn(answers(shared, peer, Arc::clone(&activity)));
    let ended = if is_h2 {
        let connection = http2_rules().serve_connection(TokioIo::new(stream), answer);
        drive(connection, http2::Connection::graceful_shutdown, &activity, &drain).await
    } else {
        let stream = Explained::new(stream, Arc::clone(&activity));
        let connection = http1_rules().serve_connection(TokioIo::new(stream), answer).with_upgrades();
        drive(connection, http1::UpgradeableConnection::graceful_shutdown, &activity, &drain).await
    };
    if let Err(error) = ended {
        tracing::debug!(%from, "connection ended: {error}");
    }
}

/// The function that hyper calls for each request.
fn answers(
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    activity: Arc<Activity>,
) -> impl Fn(Request<Incoming>) -> futures_util::future::BoxFuture<'static, Result<Response<Body>, Infallible>> {
    move |request| {
        let (shared, peer, in_flight) = (Arc::clone(&shared), Arc::clone(&peer), activity.request());
        Box::pin(async move { Ok(shared.edge.answer(request, &peer, in_flight).await) })
    }
}

fn http1_rules() -> http1::Builder {
    let mut rules = http1::Builder::new();
    rules.timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE).max_buf_size(HEAD_BYTES_MAX);
    rules
}

fn http2_rules() -> http2::Builder<TokioExecutor> {
    let mut rules = http2::Builder::new(TokioExecutor::new());
    rules
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(H2_SEND_BUFFER_BYTES_MAX)
        .max_header_list_size(H2_HEADER_LIST_BYTES_MAX)
        .keep_alive_interval(H2_PING_INTERVAL)
        .keep_alive_timeout(H2_PING_DEADLINE);
    rules
}

/// Runs the connection, and asks it to end when it is idle or the edge stops.
async fn drive<C: Future<Output = hyper::Result<()>>>(
    connection: C,
    finish: fn(Pin<&mut C>),
    activity: &Activity,
    drain: &CancellationToken,
) -> hyper::Result<()> {
    let mut connection = pin!(connection);
    let mut check = interval(CHECK_INTERVAL);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut draining = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = drain.cancelled(), if !draining => {
                draining = true;
                finish(connection.as_mut());
            }
            _ = check.tick() => {
                if activity.silent_for() > SILENCE_MAX {
                    return Ok(());
                }
                if !draining && activity.idle_for() > IDLE_MAX {
                    draining = true;
                    finish(connection.as_mut());
                }
            }
        }
    }
}
