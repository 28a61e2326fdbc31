//! A small S3 server for development and tests: one binary, honest conditional writes, and faults on demand.
//!
//! ```text
//!  TCP ─▶ server   answers late, fails before or after applying, drops the answer      (HTTP level)
//!           └▶ s3s  signatures, XML, routing
//!                └▶ api     the operations; ignores conditions, 409, short bodies      (S3 level)
//!                      └▶ store   objects in memory or in a folder; one lock per key
//! ```
//!
//! # Invariants
//!
//! 1. Conditions and the write they guard happen under one lock of the key; readers take it too, so a body never comes with the ETag of
//!    another one. Servers without the second half pass a race of writers and still lose updates of a counter.
//! 2. An ETag is the MD5 of the content, as on S3: equal bodies have equal ETags, so clients that rely on more are caught here.
//! 3. Faults come from one seeded generator. They may be changed while the server runs ([`Server::set_faults`]).
//!
//! # Not here
//!
//! Multipart uploads, versions, ACLs, TLS. It is made for a developer's machine: an answer of a fsynced write is true, scale is not a goal.

mod api;
mod faults;
mod server;
mod store;

use std::{net::SocketAddr, path::PathBuf};

pub use faults::{BadRate, Faults, Rate};
pub use server::{ServeError, Server, serve};
pub use store::OpenStoreError;

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct Config {
    /// Port 0 picks a free one.
    pub listen: SocketAddr,
    /// Where objects are kept; `None` keeps them in memory.
    pub root: Option<PathBuf>,
    /// Buckets that exist from the start.
    pub buckets: Vec<String>,
    pub access_key: String,
    pub secret_key: String,
    pub faults: Faults,
    /// Seed of the generator that decides which request meets a fault.
    pub seed: u64,
}

impl Default for Config {
    /// A server for a test: a free port of the loopback, in memory, bucket `test`, keys `test` and `testtest`.
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            root: None,
            buckets: vec!["test".to_owned()],
            access_key: "test".to_owned(),
            secret_key: "testtest".to_owned(),
            faults: Faults::default(),
            seed: 1,
        }
    }
}
