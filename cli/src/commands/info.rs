//! `sprite info`

use clap::Args;
use jiff::Timestamp;

use super::Done;
use crate::{context::Context, output, sprite};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite info demo
  sprite info -s demo --json | jq -r .status

It does not wake the sprite.")]
pub(crate) struct Arguments {
    /// The sprite
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let name = context.sprite(arguments.name.as_deref())?;
    let sprite = sprite::get(&context.api()?, &name).await?;
    if arguments.json {
        output::json(&sprite.0)?;
        return Ok(0);
    }
    let facts = sprite.facts(Timestamp::now());
    let width = facts.iter().map(|(fact, _)| fact.len()).max().unwrap_or(0);
    let lines: Vec<String> = facts.iter().map(|(fact, value)| format!("{fact:width$}   {value}")).collect();
    output::answer(lines.join("\n"))?;
    Ok(0)
}
