//! `sprite sleep` and `sprite wake`

use std::time::Instant;

use clap::Args;
use jiff::Zoned;
use serde_json::{Value, json};

use super::Done;
use crate::{
    api::{Call, LONG_LIMIT},
    context::Context,
    failure::Failure,
    output,
    sprite::{Sprite, about},
    target::Target,
    units::{self, took},
};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite sleep demo               memory and processes are kept in files
  sprite sleep demo --cold        only the disk is kept
  sprite sleep demo --paused      memory stays in RAM, for the quickest wake

Any request wakes it: exec, console, HTTP, `sprite wake`.")]
pub(crate) struct Sleep {
    /// The sprite
    name: Option<String>,
    /// Keep only the disk
    #[arg(long, conflicts_with = "paused")]
    cold: bool,
    /// Stop the processors, keep memory in RAM
    #[arg(long)]
    paused: bool,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite wake demo
  sprite wake demo --at 07:30                 the next time it is 07:30 here
  sprite wake demo --at 2026-12-31T23:00:00Z --at +2h
  sprite wake demo --every 1h
  sprite wake demo --every never              forgets its timers")]
pub(crate) struct Wake {
    /// The sprite
    name: Option<String>,
    /// Wake it then instead of now; may be repeated
    #[arg(long, value_name = "TIME")]
    at: Vec<String>,
    /// Wake it so often, for example 1h; `never` forgets all its timers
    #[arg(long, value_name = "DURATION", value_parser = units::duration_or_never)]
    every: Option<String>,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn sleep(context: &Context, arguments: Sleep) -> Done {
    let name = context.sprite(arguments.name.as_deref())?;
    let to = match (arguments.cold, arguments.paused) {
        (true, _) => "cold",
        (_, true) => "paused",
        (false, false) => "suspended",
    };
    let call = Call::post(Target::sprite(&name).then("sleep"), &json!({ "to": to })).within(LONG_LIMIT);
    let started = Instant::now();
    let answer =
        output::with_spinner(format!("{name} falls asleep"), context.api()?.json(&call)).await.map_err(about(&name))?;
    say(answer, arguments.json, |sprite| {
        let frozen = sprite.0["frozen_ms"].as_u64().map(|ms| format!(", frozen in {ms} ms")).unwrap_or_default();
        let after = took(started.elapsed());
        if sprite.0["woken"] == true {
            return format!("✓ {name} slept after {after}{frozen}; a request has woken it since");
        }
        format!("✓ {name} sleeps: {} after {after}{frozen}", shown(sprite, to))
    })
}

pub(crate) async fn wake(context: &Context, arguments: Wake) -> Done {
    let name = context.sprite(arguments.name.as_deref())?;
    let api = context.api()?;
    if !arguments.at.is_empty() || arguments.every.is_some() {
        let now = Zoned::now();
        let at = arguments.at.iter().map(|text| units::time_to_come(text, &now).map(|time| time.to_string()));
        let at = at.collect::<Result<Vec<_>, _>>().map_err(|error| Failure::usage(format!("--at: {error}")))?;
        let every = arguments.every.filter(|every| every != "never").unwrap_or_default();
        let answer = api
            .json(&Call::post(Target::sprite(&name).then("wake"), &json!({ "at": at, "every": every })))
            .await
            .map_err(about(&name))?;
        return say(answer, arguments.json, |_| match (at.as_slice(), every.as_str()) {
            ([], "") => format!("✓ {name} is not woken by a timer any more"),
            (at, every) => {
                let times =
                    at.iter().map(|at| format!("at {at}")).chain((!every.is_empty()).then(|| format!("every {every}")));
                format!("✓ {name} will be woken {}", times.collect::<Vec<_>>().join(", "))
            }
        });
    }
    let call = Call::post(Target::sprite(&name).then("wake"), &json!({})).within(LONG_LIMIT);
    let started = Instant::now();
    let answer = output::with_spinner(format!("waking {name}"), api.json(&call)).await.map_err(about(&name))?;
    say(answer, arguments.json, |sprite| {
        let from = match sprite.text("resumed") {
            "" => String::new(),
            from => format!(" (from {from})"),
        };
        format!("✓ {name} is {} after {}{from}", shown(sprite, "awake"), took(started.elapsed()))
    })
}

/// The sprite's state, whether the answer is the sprite or has it in it.
fn shown(answer: &Sprite, otherwise: &str) -> String {
    let inner = Sprite(answer.0["sprite"].clone());
    let status = [answer.status(), inner.status()].into_iter().find(|status| !status.is_empty());
    status.unwrap_or_else(|| otherwise.to_owned())
}

fn say(answer: Value, json: bool, line: impl FnOnce(&Sprite) -> String) -> Done {
    if json {
        output::json(&answer)?;
    } else {
        output::answer(line(&Sprite(answer)))?;
    }
    Ok(0)
}
