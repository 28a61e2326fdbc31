//! `sprite use`

use std::env;

use clap::Args;

use super::Done;
use crate::{config::Folder, context::Context, failure::Failure, output, sprite};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite use demo         commands in this folder (and below) mean demo
  sprite use              which one is it?
  sprite use --unset")]
pub(crate) struct Arguments {
    /// The sprite for commands in this folder
    name: Option<String>,
    /// Forget the choice
    #[arg(long, conflicts_with = "name")]
    unset: bool,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let here =
        env::current_dir().map_err(|error| Failure::new(format!("the current folder is not usable: {error}")))?;
    if arguments.unset {
        if Folder::unset(&here)? {
            output::note("✓ this folder has no sprite of its own any more");
        } else {
            output::note("this folder had no sprite of its own");
        }
        return Ok(0);
    }
    let name = context.sprite(arguments.name.as_deref())?;
    if arguments.name.is_none() {
        output::answer(name)?;
        return Ok(0);
    }
    // A choice of nothing would fail later, somewhere else.
    let found = sprite::get(&context.api()?, &name).await?;
    let organization = Some(found.text("organization").to_owned()).filter(|org| !org.is_empty());
    let path = Folder { organization, sprite: name.clone() }.save(&here)?;
    output::note(format!("✓ commands in this folder mean {name} ({})", path.display()));
    Ok(0)
}
