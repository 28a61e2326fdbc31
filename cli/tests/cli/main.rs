//! The `sprite` binary against a server of the tests' own, which speaks the dialect and does what its "commands" say.

mod answers;
mod exec;
mod fake;
mod proxy;
mod run;
mod terminal;
