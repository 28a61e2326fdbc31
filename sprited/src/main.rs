//! The one server binary: `sprited dev | node | coordinator | router | doctor | ca | status | token | volume`.
//!
//! ```text
//!  sprited dev ─┬─ bucket ── store ── node agent ── <run>/node.sock
//!               ├─ coordinator ──────────────────── <run>/coordinator.sock
//!               └─ router ───────────────────────── :8443 ──▶ both sockets
//! ```
//!
//! The parts of `dev` share a process and nothing else: they talk through the same sockets as they do apart. One file per subcommand;
//! `parts` starts each part, `data_dir` knows what lies where on disk.
//!
//! # Invariants
//!
//! 1. `jail` and `kvm-probe` are dispatched before any thread exists: the jail changes the process's namespaces, which is only sound in a
//!    single-threaded process.
//! 2. Logs go to stderr, answers to stdout: `sprited status --json | jq` works.

mod ca;
mod config;
mod coordinator_command;
mod data_dir;
mod dev;
mod doctor;
mod jail;
mod node_command;
mod parts;
mod ready;
mod router_command;
mod shutdown;
mod status;
mod token;
mod volume;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Settings;

#[derive(Parser)]
#[command(name = "sprited", version = proto::VERSION, about = "Durable Linux microVMs: the server", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A whole cluster in one process, on this machine.
    Dev(Settings),
    /// Only the node agent: runs sprites as microVMs.
    Node(node_command::NodeArguments),
    /// Only the coordinator: the API, on `<data>/run/coordinator.sock`.
    Coordinator(Settings),
    /// Only the router: the TLS edge in front of the other two.
    Router(Settings),
    /// Explains this host: what works, what does not, what to do about it.
    Doctor(doctor::DoctorArguments),
    /// The local certificate authority.
    Ca(ca::CaArguments),
    /// Says whether a cluster runs on this data folder, and where.
    Status(status::StatusArguments),
    /// Prints or mints API tokens.
    Token(token::TokenArguments),
    /// A sprite's disk in the bucket: inspect, verify, export.
    Volume(volume::VolumeArguments),
}

fn main() -> ExitCode {
    // Single-threaded until here and inside these two (invariant 1).
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(first) if first == "jail" => return jail::main(arguments),
        Some(first) if first == node_agent::kvm::PROBE_ARG => return node_agent::kvm::child_main(),
        Some(_) | None => {}
    }
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("SPRITED_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_env_filter(filter).init();
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sprited: {}", told(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes. Those that only repeat what was said already, as HTTP clients' do several times over, are left out.
fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        // No runtime: doctor probes by running child processes, the rest reads files.
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Ca(arguments) => ca::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Dev(settings) => serve(dev::run(settings.check()?)),
        Command::Node(arguments) => serve(node_command::run(arguments)),
        Command::Coordinator(settings) => serve(coordinator_command::run(settings.check()?)),
        Command::Router(settings) => serve(router_command::run(settings.check()?)),
        Command::Token(arguments) => serve(token::run(arguments)),
        Command::Volume(arguments) => runtime()?.block_on(volume::run(arguments)),
    }
}

fn serve(part: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(part)?;
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_that_repeat_what_was_said_are_left_out() {
        let error = anyhow::anyhow!("refused").context("PUT: refused").context("PUT: refused").context("no bucket");
        assert_eq!(told(&error), "no bucket: PUT: refused");
    }
}
