//! `sprite resize`

use clap::Args;
use serde_json::json;

use super::Done;
use crate::{
    api::{Call, LONG_LIMIT},
    context::Context,
    failure::Failure,
    output,
    sprite::about,
    target::Target,
    units::{self, show_bytes},
};

const MIB: u64 = 1 << 20;

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite resize demo --disk 200G

A disk can only grow. It costs what is written on it, not what it could hold. The sprite is woken and goes on meanwhile.")]
pub(crate) struct Arguments {
    /// The sprite
    name: Option<String>,
    /// The new size of its disk, for example 200G or 1T
    #[arg(long, value_name = "SIZE", value_parser = units::size_bytes)]
    disk: u64,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let name = context.sprite(arguments.name.as_deref())?;
    if !arguments.disk.is_multiple_of(MIB) || arguments.disk == 0 {
        return Err(
            Failure::usage(format!("{} bytes are not whole mebibytes", arguments.disk)).advise("for example 200G")
        );
    }
    let call =
        Call::post(Target::sprite(&name).then("resize"), &json!({ "disk_bytes": arguments.disk })).within(LONG_LIMIT);
    output::with_spinner(format!("growing {name}'s disk"), context.api()?.json(&call)).await.map_err(about(&name))?;
    output::answer(format!("✓ {name} has a disk of {}", show_bytes(arguments.disk)))?;
    Ok(0)
}
