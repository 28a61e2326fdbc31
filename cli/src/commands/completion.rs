//! `sprite completion`

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Done;
use crate::output;

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  source <(sprite completion bash)
  sprite completion zsh > ~/.zfunc/_sprite
  sprite completion fish > ~/.config/fish/completions/sprite.fish")]
pub(crate) struct Arguments {
    /// Which shell
    shell: Shell,
}

pub(crate) fn run<C: CommandFactory>(arguments: &Arguments) -> Done {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut C::command(), "sprite", &mut script);
    output::raw(&script)?;
    Ok(0)
}
