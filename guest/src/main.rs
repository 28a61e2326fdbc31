//! The one program inside a VM: PID 1 of the machine, PID 1 of the user's environment, and `sprite-env` for the programs there.
//!
//! ```text
//!  host ──virtio-serial──▶ channel ──▶ agent ──┬─ environment   mounts, namespaces, start and stop
//!                                             ├─ exec          commands and their sessions
//!                                             ├─ life          who the sprite is, and that its environment knows
//!                                             ├─ freeze, identity, net, ports, tunnel
//!                                             └─ api           /.sprite/api.sock, for sprite-env ──▶ watch ──▶ host
//! ```
//! What it is depends on how it is called: as `/init` by the kernel, as `sprite-init` by itself, else as `sprite-env`.
//!
//! Nothing that runs in the environment is trusted, and nothing in PID 1 needs the user's userland to be sane.

mod agent;
mod api;
mod cgroup;
mod channel;
mod cli;
mod environment;
mod exec;
mod freeze;
mod identity;
mod init;
mod life;
mod log;
mod net;
mod port;
mod ports;
mod reaper;
mod spawn;
mod sys;
mod tasks;
mod tunnel;
mod watch;

use log::log;

fn main() -> std::process::ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if name == environment::INIT_NAME {
        environment::init::run()
    }
    if std::process::id() == 1 {
        init::run()
    }
    cli::run(arguments)
}
