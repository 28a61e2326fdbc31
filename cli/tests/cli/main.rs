//! The `sprite` binary against a server of the tests' own, which speaks the dialect and does what its "commands" say.

#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how a test fails")]

mod answers;
mod exec;
mod fake;
mod proxy;
mod run;
mod terminal;
