//! The control plane: names, records and tokens in the bucket, and the API over them. Stateless: any number may run on one bucket.
//!
//! ```text
//!  edge ──one unix socket──┬─ REST in the Sprites dialect   rest ────┐
//!                          ├─ sprites.v1.Sprites            grpc ────┼─▶ service ─┬─ names, records, tokens ─▶ bucket
//!                          └─ sprites.control.v1.Control    control ─┘            ├─ index (lists, watchers) ─▶ bucket, node's route stream
//!                                                                                 └─ node ─▶ the node agent's socket
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`service`] | what the API can do, once |
//! | [`names`] | which sprite a name means; claims that survive crashes |
//! | [`tokens`] | who calls |
//! | [`index`] | all sprites at once, for lists |
//! | [`mod@rest`], [`grpc`], [`control`] | the same functions in three languages |
//! | [`refusal`] | every error, said in two of them |
//!
//! # Invariants
//!
//! 1. What a coordinator holds in memory it can read again; killing one at any step loses nothing and blocks no name for more than a minute.
//! 2. A name means one sprite; a URL label means one name (`names`).
//! 3. The node agent writes a sprite's record first, as part of making it; after that the coordinator alone changes it.
//!
//! # Tasks
//!
//! One that follows the node's route stream, one that sweeps what crashes left; one for each change under way, which a caller that goes away
//! does not stop; one for each gRPC exec.
//!
//! # Not here
//!
//! Placement on many hosts, quotas by organisation, a token API: later issues.

mod control;
mod duration;
mod grpc;
mod index;
mod names;
mod node;
mod refusal;
mod rest;
mod service;
#[cfg(test)]
mod tests;
mod tokens;
mod view;
mod watch;

use std::{io, path::PathBuf};

use axum::Router;
use blockstore::bucket::{Bucket, RecordError};
use proto::{
    control::control_server::ControlServer,
    id::{SpriteId, SpriteName},
    public::sprites_server::SpritesServer,
};
use tokio::net::UnixListener;

use crate::{control::ControlService, grpc::SpritesService, node::Node, service::Service};

pub use tokens::{MintError, Tokens};

/// The sprite that a name means, for tools that read the bucket. Costs a request.
pub async fn sprite_of_name(bucket: &Bucket, org: &str, name: &SpriteName) -> Result<Option<SpriteId>, RecordError> {
    let entry = names::Names::new(bucket.clone()).read(org, name).await?;
    Ok(entry.and_then(|entry| match entry.value {
        names::NameEntry::Claimed { id, .. } => Some(id),
        names::NameEntry::Free { .. } | names::NameEntry::Pending { .. } => None,
    }))
}

/// The file of the public service among all descriptors; the internal ones are nobody's business.
const PUBLIC_PROTO: &str = "sprites.proto";
const PUBLIC_SERVICE: &str = "sprites.v1.Sprites";

/// What a coordinator needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    pub bucket: Bucket,
    /// Where the node agent listens; it need not be there yet.
    pub node_socket: PathBuf,
    /// Sprites are at `<name>-<oid>.<domain>`.
    pub domain: String,
    /// Of the edge; in URLs unless it is 443.
    pub port: u16,
}

/// Why a coordinator does not serve.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    #[error("the descriptors for gRPC reflection cannot be used")]
    Reflection(#[source] tonic_reflection::server::Error),
    #[error("the coordinator's socket failed")]
    Socket(#[source] io::Error),
}

/// Serves the API on `listener` until `shutdown`; endless answers end then, requests in flight finish.
pub async fn serve(
    config: Config,
    listener: UnixListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), CoordinatorError> {
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let service = Service::new(service::Parts {
        bucket: config.bucket,
        node: Node::at(config.node_socket),
        domain: config.domain,
        port: config.port,
        stop: stopped,
    });
    let app = app(service.clone()).await?;
    let background = tokio::spawn(service.background());
    let shutdown = async move {
        shutdown.await;
        stop.send_replace(true);
    };
    let served = axum::serve(listener, app).with_graceful_shutdown(shutdown).await;
    background.abort();
    served.map_err(CoordinatorError::Socket)
}

/// Waits until the coordinator ends; one that is gone has ended.
async fn stopped(stop: &mut tokio::sync::watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}

async fn app(service: Service) -> Result<Router, CoordinatorError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_service_status(PUBLIC_SERVICE, tonic_health::ServingStatus::Serving).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_file_descriptor_set(public_descriptors())
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let mut routes = tonic::service::Routes::builder();
    routes
        .add_service(SpritesServer::new(SpritesService { service: service.clone() }))
        .add_service(ControlServer::new(ControlService { service: service.clone() }))
        .add_service(health_service)
        .add_service(reflection().build_v1().map_err(CoordinatorError::Reflection)?)
        .add_service(reflection().build_v1alpha().map_err(CoordinatorError::Reflection)?);
    let grpc = routes.routes().into_axum_router();
    let rest = Router::new().fallback(rest::answer).with_state(service);
    Ok(Router::new().fallback(move |request: axum::extract::Request| {
        let plane = if is_grpc(&request) { grpc.clone() } else { rest.clone() };
        tower::ServiceExt::oneshot(plane, request)
    }))
}

fn is_grpc(request: &axum::extract::Request) -> bool {
    let kind = request.headers().get(axum::http::header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn public_descriptors() -> prost_types::FileDescriptorSet {
    let mut all: prost_types::FileDescriptorSet =
        prost::Message::decode(proto::DESCRIPTORS).expect("our own build script wrote them");
    all.file.retain(|file| file.name.as_deref() == Some(PUBLIC_PROTO));
    all
}
