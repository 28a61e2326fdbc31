//! One request to one of our own processes: connect, send, take the head of the answer.
//!
//! Every request has a connection of its own. On a unix socket that costs some ten microseconds, and it buys much: no request can be lost on a
//! connection that its peer had just given up, no stream stands behind another, and a client that goes away is seen at once at the other end.
//! Hosts over the network will want a pool here.

use std::{io, time::Duration};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::UnixStream, time::timeout};

use crate::{
    address::NodeAddress,
    body::Body,
    chunk_gate::{CHUNK_BYTES_MAX, ChunkGate},
    edge::HEAD_BYTES_MAX,
};

/// A listener whose queue is full for this long is not serving anybody.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// A process that restarts is back within this; requests are held meanwhile rather than refused.
const CONNECT_PAUSES: [Duration; 4] =
    [Duration::from_millis(25), Duration::from_millis(100), Duration::from_millis(400), Duration::from_secs(1)];
/// How to speak to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    /// HTTP/1.1 whose chunks are messages: each arrives as one frame of the body.
    Http1Chunks,
    /// With prior knowledge, for gRPC and its trailers.
    Http2,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// Nothing was sent: `request` can go elsewhere.
    #[error("connecting to {address} failed")]
    Unreachable {
        address: NodeAddress,
        request: Box<Request<Body>>,
        #[source]
        source: io::Error,
    },
    /// The other side may have seen the request.
    #[error("the exchange with {address} broke off")]
    Broke {
        address: NodeAddress,
        #[source]
        source: hyper::Error,
    },
}

/// Sends `request` and returns the head of the answer; bodies go on behind. There is no deadline here but the one for connecting.
///
/// # Cancel safety
///
/// Dropping the future, or later the answer's body, closes the connection.
pub(crate) async fn send(
    address: &NodeAddress,
    request: Request<Body>,
    protocol: Protocol,
) -> Result<Response<Incoming>, SendError> {
    let stream = match connect(address).await {
        Ok(stream) => stream,
        Err(source) => {
            return Err(SendError::Unreachable { address: address.clone(), request: Box::new(request), source });
        }
    };
    let sent = match protocol {
        Protocol::Http1 => {
            let mut builder = http1::Builder::new();
            builder.max_buf_size(HEAD_BYTES_MAX);
            send_http1(&builder, stream, request).await
        }
        Protocol::Http1Chunks => {
            let mut builder = http1::Builder::new();
            // Room for a whole chunk: then what the gate lets through at once is read at once.
            builder.read_buf_exact_size(Some(CHUNK_BYTES_MAX + 2));
            send_http1(&builder, ChunkGate::new(stream), request).await
        }
        Protocol::Http2 => send_http2(stream, request).await,
    };
    sent.map_err(|source| SendError::Broke { address: address.clone(), source })
}

async fn send_http1<S>(builder: &http1::Builder, stream: S, request: Request<Body>) -> hyper::Result<Response<Incoming>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!("a connection to another part ended: {error}");
        }
    });
    sender.send_request(request).await
}

async fn send_http2(stream: UnixStream, request: Request<Body>) -> hyper::Result<Response<Incoming>> {
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("a connection to another part ended: {error}");
        }
    });
    sender.send_request(request).await
}

async fn connect(address: &NodeAddress) -> io::Result<UnixStream> {
    let NodeAddress::Unix(path) = address;
    let mut pauses = CONNECT_PAUSES.iter();
    loop {
        let error = match timeout(CONNECT_DEADLINE, UnixStream::connect(path)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error,
            Err(elapsed) => return Err(elapsed.into()),
        };
        match pauses.next() {
            Some(&pause) => tokio::time::sleep(pause).await,
            None => return Err(error),
        }
    }
}
