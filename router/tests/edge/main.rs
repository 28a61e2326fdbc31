//! The edge as a client sees it: over TLS, with fakes behind it.

mod access;
mod bytes;
mod ends;
mod odd;
mod wake;
mod world;
