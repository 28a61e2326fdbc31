//! The edge as a client sees it: over TLS, with fakes behind it.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod access;
mod bytes;
mod ends;
mod odd;
mod wake;
mod world;
