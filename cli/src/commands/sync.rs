//! `sprite sync`

use clap::Args;
use jiff::{Timestamp, tz::TimeZone};
use serde_json::json;

use super::Done;
use crate::{
    api::{Call, LONG_LIMIT},
    context::Context,
    output,
    sprite::about,
    target::Target,
};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite sync demo                     before something that must outlive the host
  sprite sync -s demo --json | jq -r .generation

A host pushes what its sprites write within seconds; this waits for it. It does not wake the sprite. Another generation than before says that its
history was rolled back since: by a restore, or because a host was lost.")]
pub(crate) struct Arguments {
    /// The sprite
    name: Option<String>,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let name = context.sprite(arguments.name.as_deref())?;
    let call = Call::post(Target::sprite(&name).then("sync"), &json!({})).within(LONG_LIMIT);
    let answer = output::with_spinner(format!("pushing what {name} wrote"), context.api()?.json(&call))
        .await
        .map_err(about(&name))?;
    if arguments.json {
        output::json(&answer)?;
        return Ok(0);
    }
    let pushed = answer["watermark_at"].as_str().and_then(|text| text.parse::<Timestamp>().ok());
    let pushed = pushed.map(|time| time.to_zoned(TimeZone::system()).strftime("%F %H:%M:%S").to_string());
    let pushed = pushed.map(|time| format!("; the last of it was pushed at {time}")).unwrap_or_default();
    output::answer(format!("✓ everything {name} wrote is in the bucket{pushed}"))?;
    Ok(0)
}
