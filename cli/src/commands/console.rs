//! `sprite console`

use clap::Args;

use super::Done;
use crate::{
    api::Api,
    context::Context,
    failure::Failure,
    output,
    session::{Session, with_terminal},
    target::Target,
};

/// Whoever detaches comes back to it by `sprite attach`.
const SHELL: [&str; 2] = ["bash", "-l"];

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite console demo
  sprite c -s demo

Ctrl-\\ detaches: the shell goes on, `sprite attach` brings you back. Ctrl-D or `exit` ends it.")]
pub(crate) struct Arguments {
    /// The sprite
    name: Option<String>,
    /// For compatibility: ports are not forwarded by themselves, see `sprite proxy`
    #[arg(long, hide = true)]
    no_port_forward: bool,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let sprite = context.sprite(arguments.name.as_deref())?;
    if !output::is_interactive() {
        return Err(Failure::usage("a console needs a terminal").advise("`sprite exec -- COMMAND` needs none"));
    }
    open(&context.api()?, &sprite).await
}

/// A login shell in the user's terminal.
pub(super) async fn open(api: &Api, sprite: &str) -> Done {
    let mut target = Target::sprite(sprite).then("exec");
    for word in SHELL {
        target = target.with("cmd", word);
    }
    target = with_terminal(target.with("path", SHELL[0]).with("stdin", "true").with("detachable", "true"), &[]);
    Session::open(api, sprite, &target).await?.run().await
}
