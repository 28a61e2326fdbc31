//! Whole-system tests: real processes, real VMs, driven as a user drives them.
//!
//! ```text
//!  tests/system   one cluster for all tests, each with sprites of its own          ┐ Cluster ── sprited dev (own data folder, port,
//!  tests/faults   a cluster for each test, which kills, stops and empties it       ┘             instance) ── QEMU …
//! ```
//!
//! A test talks to the cluster through [`Cluster::sprite_command`] (the `sprite` binary), [`Cluster::curl`] and [`Cluster::api`] (curl), never
//! through our crates: what it cannot reach, a user cannot either.
//!
//! # Invariants
//!
//! 1. A developer's running cluster is not disturbed: data folder, port and instance are private.
//! 2. Nothing outlives the tests, however they end: `reaper.sh` holds the read end of a pipe, and when the test process is gone it stops
//!    `sprited`, ends what is left of this instance's VMs, and removes the folder.
//! 3. Every wait is for a state and has a deadline; every command has one too. A failure shows the command, both streams and sprited's log.
//!
//! # Where the binaries come from
//!
//! `SPRITES_BIN` and `SPRITES_IMAGE`, as `./dev test` sets them; without them the folder next to the test's own binary, and `./dev image`.

mod cluster;
mod command;
mod repository;
mod sprite;
mod terminal;
mod wait;

pub use cluster::{Cluster, Options, binary, image, repository};
pub use command::{Finished, bounded};
pub use repository::Repository;
pub use sprite::Sprite;
pub use terminal::Terminal;
pub use wait::{eventually, pause};

use std::time::Duration;

/// Long enough for anything a user does to one sprite, on two busy cores without hardware virtualisation.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(300);

/// `./dev soak` runs the tests at full size; CI has a fixed smaller one (ruling 32).
pub fn full_size() -> bool {
    std::env::var_os("SPRITES_TEST_SIZE").is_some_and(|size| size == "full")
}

/// Appends six random characters: tests run side by side, and names are never free at once.
pub fn unique(stem: &str) -> String {
    format!("{stem}-{}", random_text(6))
}

/// A port nobody listens on, below those the kernel gives to outgoing connections (32768 and up): a server that is stopped
/// and started again finds it free.
///
/// # Panics
/// If none of many is free.
pub fn free_port() -> u16 {
    const PORTS: std::ops::Range<u16> = 20_000..32_768;
    const TRIES: usize = 64;
    (0..TRIES)
        .map(|_| rand::random_range(PORTS))
        .find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

/// Lower-case letters and digits.
pub(crate) fn random_text(len: usize) -> String {
    const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    (0..len).map(|_| char::from(ALPHABET[rand::random_range(0..ALPHABET.len())])).collect()
}
