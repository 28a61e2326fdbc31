//! `sprite`: the command line for users, on the public API only.
//!
//! ```text
//!   commands/*  ── one file per subcommand ──▶ api (REST, NDJSON)      ──▶ connection (TCP, TLS)
//!                                          └─▶ session (exec, attach)  ──▶ websocket ──▶ api
//! ```
//!
//! # Invariants
//!
//! 1. stdout carries answers only; progress, notes and errors go to stderr. With `--json` the answer is one JSON value.
//! 2. Every wait has a named bound, every buffer too; only what a command in a sprite says next is waited for as long as the connection lives,
//!    which probes watch ([`connection`]). Whoever stops reading our output ends us without a panic.
//! 3. The terminal is given back on every way out ([`terminal`]).
//!
//! Exit codes: 0, 1 (refused or failed, with `✗` and advice on stderr), 2 (the command line is wrong); `exec`, `console` and `attach` have the command's own.

use clap::Parser;

mod api;
mod commands;
mod config;
mod connection;
mod context;
mod events;
mod failure;
mod frames;
mod output;
mod session;
mod sprite;
mod table;
mod target;
mod terminal;
mod units;
mod websocket;

use commands::Command;
use context::{Context, Globals};
use failure::{BROKEN_PIPE, Failure};

/// Disposable computers that keep everything
#[derive(Debug, Parser)]
#[command(
    name = "sprite",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  sprite create demo                              a computer, and a shell in it
  sprite exec -s demo -- uname -a
  sprite checkpoint create -s demo --comment \"before the experiment\"
  sprite restore v1 -s demo
  sprite sleep demo                               any request wakes it
  sprite use demo                                 no more -s in this folder

Environment:
  SPRITES_API_URL   the API, for example https://api.localhost:8443
  SPRITE_TOKEN      who you are; else what `sprite login` kept
  SPRITE_ORG        which of your organisations
  SSL_CERT_FILE     certificate authorities to trust instead of the system's

`sprite help COMMAND` has examples for each."
)]
struct CommandLine {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

fn main() {
    give_the_terminal_back_on_panic();
    let line = CommandLine::parse();
    let code = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(line)),
        Err(error) => Err(Failure::new(format!("cannot start: {error}"))),
    };
    let code = code.unwrap_or_else(|failure| {
        terminal::restore();
        if failure.code != BROKEN_PIPE {
            output::note(&failure);
        }
        failure.code
    });
    terminal::restore();
    // Not by returning: a thread may be reading stdin, which nothing can interrupt.
    std::process::exit(code.into());
}

async fn run(line: CommandLine) -> Result<u8, Failure> {
    commands::run::<CommandLine>(&Context::new(line.globals), line.command).await
}

fn give_the_terminal_back_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore();
        default(panic);
    }));
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples() {
        for command in CommandLine::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:"), "{}", command.get_name());
        }
    }
}
