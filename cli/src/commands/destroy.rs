//! `sprite destroy`

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use clap::Args;
use http::Method;

use super::Done;
use crate::{
    api::{Call, LONG_LIMIT},
    context::Context,
    failure::Failure,
    output,
    sprite::{self, about},
    target::Target,
};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite destroy demo             asks first
  sprite destroy demo --force

Its disk and its checkpoints are gone for ever.")]
pub(crate) struct Arguments {
    /// The sprite
    name: Option<String>,
    /// Do not ask
    #[arg(short, long, visible_alias = "yes")]
    force: bool,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let name = context.sprite(arguments.name.as_deref())?;
    let api = context.api()?;
    if !arguments.force {
        // Nobody should have to confirm what is not there.
        sprite::get(&api, &name).await?;
        confirm(&name)?;
    }
    let call = Call::new(Method::DELETE, Target::sprite(&name)).within(LONG_LIMIT);
    output::with_spinner(format!("destroying {name}"), api.json(&call)).await.map_err(about(&name))?;
    output::answer(format!("✓ Destroyed {name}"))?;
    Ok(0)
}

fn confirm(name: &str) -> Result<(), Failure> {
    let refuse =
        || Failure::usage(format!("{name} was not destroyed")).advise("type its name to confirm, or use --force");
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(refuse());
    }
    drop(write!(io::stderr(), "Destroy {name} with its disk and checkpoints, for ever? Type its name to confirm: "));
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(|error| Failure::new(format!("no answer: {error}")))?;
    if answer.trim() == name { Ok(()) } else { Err(refuse()) }
}
