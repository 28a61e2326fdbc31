//! `sprite create`

use std::{hash::BuildHasher as _, time::Instant};

use clap::Args;
use serde_json::json;

use super::{Done, console};
use crate::{
    api::{Call, CallError, LONG_LIMIT},
    context::Context,
    failure::Failure,
    output,
    target::Target,
    units,
};

const NAME_RULE: &str = "a name has 1 to 48 characters: a-z, 0-9 and single hyphens, not at the ends";

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite create demo                                  and a shell in it
  sprite create demo --skip-console --size l          for scripts
  sprite create ci-7 --label ci --idle-timeout 5m --json
  sprite create bot --always-on                       never sleeps, restarted after a loss
  sprite create try --from demo@v3                    a copy of demo's disk as it was at checkpoint v3
  sprite create try --from demo                       as it is now: wakes demo and takes a checkpoint of it

A fork costs as much as any create, whatever is on its disk. It has ids and keys of its own and no checkpoints yet, and neither sees what the other
writes.")]
pub(crate) struct Arguments {
    /// Its name [default: a random one]
    name: Option<String>,
    /// Do not open a shell in it
    #[arg(long)]
    skip_console: bool,
    /// A label to find it by; may be repeated
    #[arg(long = "label", value_name = "LABEL")]
    labels: Vec<String>,
    /// s (1 CPU, 1 GiB), m (2, 2) or l (4, 4) [default: m, or that of the sprite it is forked from]
    #[arg(long, value_name = "s|m|l")]
    size: Option<String>,
    /// Begin with the disk of another sprite, at a checkpoint or as it is now
    #[arg(long, value_name = "SPRITE[@CHECKPOINT]", value_parser = fork_source)]
    from: Option<ForkSource>,
    /// Sleeps after this long without use, for example 10m, or `never` [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = units::duration_or_never)]
    idle_timeout: Option<String>,
    /// Never sleeps, and is started again after a loss
    #[arg(long)]
    always_on: bool,
    /// Print the new sprite as JSON; opens no shell
    #[arg(long)]
    json: bool,
}

/// What `--from` names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ForkSource {
    sprite: String,
    checkpoint: Option<String>,
}

fn fork_source(text: &str) -> Result<ForkSource, String> {
    let (sprite, checkpoint) = match text.split_once('@') {
        Some((sprite, checkpoint)) => (sprite, Some(checkpoint)),
        None => (text, None),
    };
    if sprite.is_empty() || checkpoint.is_some_and(str::is_empty) {
        return Err("say demo, or demo@v3".to_owned());
    }
    Ok(ForkSource { sprite: sprite.to_owned(), checkpoint: checkpoint.map(str::to_owned) })
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let api = context.api()?;
    let name = context.given(arguments.name)?.unwrap_or_else(random_name);
    let mut body = json!({ "name": name });
    if !arguments.labels.is_empty() {
        body["labels"] = json!(arguments.labels);
    }
    for (key, value) in [("size", arguments.size), ("idle_timeout", arguments.idle_timeout)] {
        if let Some(value) = value {
            body[key] = json!(value);
        }
    }
    if arguments.always_on {
        body["always_on"] = json!(true);
    }
    if let Some(ForkSource { sprite, checkpoint }) = &arguments.from {
        body["from"] = json!({ "sprite": sprite, "checkpoint": checkpoint });
    }
    let started = Instant::now();
    let call = Call::post(Target::sprites(), &body).within(LONG_LIMIT);
    let made = output::with_spinner(format!("creating {name}"), api.json(&call))
        .await
        .map_err(|error| explain(error, &name, arguments.from.as_ref()))?;
    let took = started.elapsed();
    if arguments.json {
        output::json(&made)?;
        return Ok(0);
    }
    let is_now = arguments.from.as_ref().is_some_and(|from| from.checkpoint.is_none());
    let from = match (made["from"]["sprite"].as_str(), made["from"]["checkpoint"].as_str()) {
        (Some(sprite), Some(checkpoint)) if is_now => format!(" from {sprite}@{checkpoint}, taken for it,"),
        (Some(sprite), Some(checkpoint)) => format!(" from {sprite}@{checkpoint}"),
        _ => String::new(),
    };
    output::answer(format!("✓ Created {name} sprite{from} in {}", units::took(took)))?;
    if arguments.skip_console || !output::is_interactive() {
        return Ok(0);
    }
    console::open(&api, &name).await
}

fn explain(error: CallError, name: &str, from: Option<&ForkSource>) -> Failure {
    let CallError::Refused(refused) = error else { return error.into() };
    let status = refused.status;
    let failure = Failure::from(refused);
    match status.as_u16() {
        // A server with more to say about it says so itself.
        409 if failure.advice.is_none() => Failure::new(format!("a sprite named {name:?} already exists"))
            .advise("take another name, or `sprite destroy` it first"),
        404 if from.is_some_and(|from| from.checkpoint.is_some()) && failure.advice.is_none() => {
            let sprite = from.map(|from| from.sprite.as_str()).unwrap_or_default();
            failure.advise(format!("`sprite checkpoint list -s {sprite}` shows those it has"))
        }
        400 | 422 if failure.advice.is_none() => failure.advise(NAME_RULE),
        _ => failure,
    }
}

/// Two words and a number: easy to say, and taken once in a million.
fn random_name() -> String {
    const FIRST: [&str; 16] = [
        "amber", "brisk", "calm", "dapper", "eager", "fleet", "gentle", "hardy", "ivory", "jolly", "keen", "lucid",
        "merry", "noble", "quick", "sunny",
    ];
    const SECOND: [&str; 16] = [
        "badger", "comet", "dune", "ember", "falcon", "grove", "heron", "island", "juniper", "kite", "lantern",
        "maple", "nutmeg", "otter", "pine", "raven",
    ];
    // Seeded by the system for each process.
    let random = std::hash::RandomState::new().hash_one(std::process::id()).to_le_bytes();
    let word = |words: &[&'static str; 16], byte: u8| words[usize::from(byte % 16)];
    format!(
        "{}-{}-{}",
        word(&FIRST, random[0]),
        word(&SECOND, random[1]),
        u32::from_le_bytes([random[2], random[3], random[4], 0]) % 10_000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_names_a_sprite_and_maybe_a_checkpoint() {
        let source = |sprite: &str, checkpoint: Option<&str>| {
            Ok(ForkSource { sprite: sprite.to_owned(), checkpoint: checkpoint.map(str::to_owned) })
        };
        assert_eq!(fork_source("demo"), source("demo", None));
        assert_eq!(fork_source("demo@v3"), source("demo", Some("v3")));
        assert!(fork_source("@v3").is_err() && fork_source("demo@").is_err());
    }

    #[test]
    fn random_names_are_names_and_differ() {
        let names: std::collections::BTreeSet<String> = (0..50).map(|_| random_name()).collect();
        assert!(names.len() > 40, "{names:?}");
        assert!(
            names.iter().all(|name| name.len() <= 48
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'))
        );
    }
}
