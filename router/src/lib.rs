//! The edge: TLS, host names, authentication before a wake, and the way to the process that answers.
//!
//! ```text
//!  client ══TLS══▶ listener ─▶ connection ─▶ edge ─┬─▶ coordinator's socket      REST, public gRPC
//!                                              │   └─▶ delivery ─▶ node's socket  exec, fs, proxy; HTTP to a sprite's port
//!                                              └─ asks coordinators (control, answers): whose token, where is the sprite
//! ```
//!
//! | module | what | pure |
//! |---|---|---|
//! | [`mod@host`], [`mod@path`], [`mod@headers`] | who a request is for; what it may say | yes |
//! | [`refuse`] | every answer of our own, with its code | yes |
//! | [`answers`], [`control`] | what coordinators said, and for how long it counts | |
//! | [`parking`] | how many requests may wait for a wake | yes |
//! | [`edge`], [`delivery`], [`tunnel`] | one request, from its head to its last byte | |
//! | [`upstream`], [`chunk_gate`] | one exchange with another process of ours | |
//! | [`listener`], [`connection`], [`activity`], [`tls`], [`bare`] | the sockets to the outside | |
//! | [`ca`] | the local certificate authority | |
//!
//! # Invariants
//!
//! 1. The edge writes nothing to the bucket and keeps nothing that it could not ask again.
//! 2. With all coordinators gone, sprites whose route is known stay reachable (ruling 26).
//! 3. Bodies are never collected: what passes through is bounded by socket buffers and one frame in each direction.
//!
//! # Tasks
//!
//! One per listener, one per connection, one per connection to another process, one per tunnel. They share no channel; the only shared state is
//! behind short locks in `answers`, `parking` and `listener`.
//!
//! # Not here
//!
//! Public certificates, login by browser, custom domains, anycast, pools to hosts over the network: later issues.

mod access_log;
mod activity;
mod address;
mod answers;
mod bare;
mod body;
pub mod ca;
mod chunk_gate;
mod connection;
mod control;
mod delivery;
mod edge;
mod headers;
mod host;
mod listener;
mod parking;
mod path;
mod refuse;
mod tls;
mod tunnel;
mod upstream;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, time::timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use crate::{
    address::{BadAddress, NodeAddress},
    tls::TlsError,
};
use crate::{ca::ServerIdentity, connection::Shared, edge::Edge, host::Hosts, listener::Gate};

/// How long what is in flight may take to finish when the edge stops.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(4);

/// What an edge needs to know.
pub struct Config {
    /// Where TLS connections are taken. Port 0 lets the kernel choose.
    pub listen: Vec<SocketAddr>,
    pub identity: ServerIdentity,
    /// Host names of the API.
    pub api_hosts: Vec<String>,
    /// Sprites are at `<name>-<oid>.<sprite_domain>`.
    pub sprite_domain: String,
    pub coordinator: NodeAddress,
}

/// Why an edge did not start. Nothing is left open.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("listening on {address} failed")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the edge has no address to listen on")]
    NoAddress,
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// An edge with open sockets.
pub struct Router {
    listeners: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
}

impl Router {
    /// Opens the sockets. Clients can connect from now on; they are answered once [`run`](Self::run) is called.
    ///
    /// Coordinator and nodes need not be there yet. Must be called inside a Tokio runtime.
    pub fn bind(config: Config) -> Result<Self, BindError> {
        let hosts = Hosts::new(&config.api_hosts, &config.sprite_domain);
        let tls = TlsAcceptor::from(tls::server_config(config.identity, hosts.clone())?);
        let open = |address: &SocketAddr| {
            listener::bind(*address).map_err(|source| BindError::Listen { address: *address, source })
        };
        let listeners = config.listen.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        if listeners.is_empty() {
            return Err(BindError::NoAddress);
        }
        // Where the kernel really put them.
        let addresses = listeners
            .iter()
            .zip(&config.listen)
            .map(|(listener, asked)| listener.local_addr().unwrap_or(*asked))
            .collect();
        let edge = Edge::new(hosts, config.coordinator);
        let shared = Arc::new(Shared { edge, tls, drain: CancellationToken::new() });
        Ok(Self { listeners, addresses, shared })
    }

    /// Where TLS connections are taken, in the order of [`Config::listen`].
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Serves until `stop` is cancelled. Then nothing new is taken, tunnels are cut, requests in flight get [`DRAIN_DEADLINE`] to finish.
    pub async fn run(self, stop: CancellationToken) {
        let (gate, tasks) = (Arc::new(Gate::default()), TaskTracker::new());
        let cut_off = CancellationToken::new();
        let mut accepting = tokio::task::JoinSet::new();
        for listener in self.listeners {
            let (tasks, shared) = (tasks.clone(), Arc::clone(&self.shared));
            let cut_off = cut_off.clone();
            accepting.spawn(listener::accept(
                listener,
                Arc::clone(&gate),
                stop.clone(),
                move |stream, from, admission| {
                    let serving = connection::serve(Arc::clone(&shared), stream, from, admission);
                    tasks.spawn(cut_off.clone().run_until_cancelled_owned(serving));
                },
            ));
        }
        while accepting.join_next().await.is_some() {}
        self.shared.drain.cancel();
        self.shared.edge.tunnels.close().await;
        tasks.close();
        if timeout(DRAIN_DEADLINE, tasks.wait()).await.is_err() {
            tracing::warn!(open = tasks.len(), "requests did not finish in time; cut off");
            cut_off.cancel();
            tasks.wait().await;
        }
    }
}
