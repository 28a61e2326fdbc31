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
  sprite wake demo --every never              forgets its timers

What is not named stays: --every keeps the times of an earlier --at, and the other way round.")]
pub(crate) struct Wake {
    /// The sprite
    name: Option<String>,
    /// Wake it then instead of now; may be repeated
    #[arg(long, value_name = "TIME")]
    at: Vec<String>,
    /// Wake it again and again, this far apart, for example 1h; `never` forgets all its timers
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
    let answer = output::with_spinner(format!("putting {name} to sleep"), context.api()?.json(&call))
        .await
        .map_err(about(&name))?;
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
        let every = arguments.every.as_deref();
        let call = Call::post(Target::sprite(&name).then("wake"), &timers(&at, every));
        let answer = api.json(&call).await.map_err(about(&name))?;
        return say(answer, arguments.json, |_| {
            let every = every.filter(|every| *every != "never").map(|every| format!("every {every}"));
            let times: Vec<_> = at.iter().map(|at| format!("at {at}")).chain(every).collect();
            if times.is_empty() {
                format!("✓ {name} is not woken by a timer any more")
            } else {
                format!("✓ {name} will be woken {}", times.join(", "))
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

/// Only what the user named: what is absent stays as it is.
fn timers(at: &[String], every: Option<&str>) -> Value {
    let mut body = json!({});
    if !at.is_empty() {
        body["at"] = json!(at);
    }
    if let Some(every) = every {
        body["every"] = json!(every);
    }
    body
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_that_is_not_named_is_not_sent() {
        let at = ["2030-01-01T00:00:00Z".to_owned()];
        assert_eq!(timers(&[], Some("1h")), json!({ "every": "1h" }));
        assert_eq!(timers(&at, None), json!({ "at": at }));
        assert_eq!(timers(&[], Some("never")), json!({ "every": "never" }));
    }
}
