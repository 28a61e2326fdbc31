//! `sprite exec`

use clap::Args;

use super::{Done, http_exec};
use crate::{
    context::Context,
    failure::Failure,
    session::{Session, with_terminal},
    target::Target,
    units,
};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite exec -s demo -- uname -a
  sprite exec -s demo --dir /srv --env MODE=test,DEBUG=1 -- make check
  tar c src | sprite exec -s demo -- tar x -C /srv
  sprite exec -s demo --tty -- htop               Ctrl-\\ detaches, the command goes on

Output, errors and exit code are the command's own: 126 is not executable, 127 not found, 128+N killed by signal N.
The first Ctrl-C goes to the command, a second one within 2 s ends the client. A sleeping sprite is woken.")]
pub(crate) struct Arguments {
    /// Folder to run it in [default: the user's home]
    #[arg(long, value_name = "DIR")]
    dir: Option<String>,
    /// Variables for it, NAME=VALUE, several with commas; may be repeated
    #[arg(long, value_name = "NAME=VALUE,…")]
    env: Vec<String>,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Use one HTTP request instead of a WebSocket: no signals, no terminal
    #[arg(long, conflicts_with = "tty")]
    http_post: bool,
    /// For compatibility: ports are not forwarded by themselves, see `sprite proxy`
    #[arg(long, hide = true)]
    no_port_forward: bool,
    /// The command and its arguments; no shell in between
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let sprite = context.sprite(None)?;
    let mut variables = Vec::new();
    for text in &arguments.env {
        variables.extend(units::variables(text).map_err(|error| Failure::usage(format!("--env: {error}")))?);
    }
    let mut target = Target::sprite(&sprite).then("exec");
    for word in &arguments.command {
        target = target.with("cmd", word);
    }
    target = target.with("path", &arguments.command[0]).with("stdin", "true");
    if let Some(dir) = &arguments.dir {
        target = target.with("dir", dir);
    }
    for (name, value) in &variables {
        target = target.with("env", &format!("{name}={value}"));
    }
    let api = context.api()?;
    if arguments.http_post {
        return http_exec::run(&api, &sprite, target).await;
    }
    if arguments.tty {
        target = with_terminal(target, &variables);
    }
    Session::open(&api, &sprite, &target).await?.run().await
}
