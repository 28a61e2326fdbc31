//! `sprite checkpoint` and `sprite restore`

use std::time::Instant;

use clap::{Args, Subcommand};
use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Done;
use crate::{
    api::{Api, Call, LONG_LIMIT},
    context::Context,
    events, output,
    sprite::about,
    table::Table,
    target::Target,
    units::{age, took},
};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite checkpoint create -s demo --comment \"before the upgrade\"
  sprite checkpoint list -s demo
  sprite checkpoint restore v1 -s demo          the same as: sprite restore v1 -s demo
  sprite checkpoint delete v1 -s demo

A checkpoint keeps the whole disk, taken live. It holds neither memory nor processes.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Keep the disk as it is now
    Create {
        /// What it is for
        #[arg(long, short = 'm', value_name = "TEXT")]
        comment: Option<String>,
        /// Wait until it is in the bucket, where no host's death reaches it
        #[arg(long)]
        durable: bool,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show them, newest first
    #[command(visible_alias = "ls")]
    List {
        /// For compatibility; the history of a checkpoint is not kept
        #[arg(long, value_name = "VERSION", hide = true)]
        history: Option<String>,
        /// For compatibility; nothing makes checkpoints by itself
        #[arg(long, hide = true)]
        include_auto: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one
    Info {
        /// For example v1
        version: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove one; its space is freed with the sprite
    #[command(visible_alias = "rm")]
    Delete {
        /// For example v1
        version: String,
    },
    /// Bring the disk back to one
    Restore(Restore),
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite restore v1 -s demo

The whole disk becomes what it was. Running commands end; name, id and URL stay. What was written since is lost unless you
make a checkpoint first.")]
pub(crate) struct Restore {
    /// For example v1
    version: String,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let sprite = context.sprite(None)?;
    let api = context.api()?;
    match arguments.command {
        Command::Create { comment, durable, json } => create(&api, &sprite, comment, durable, json).await,
        Command::List { json, history: _, include_auto: _ } => list(&api, &sprite, json).await,
        Command::Info { version, json } => info(&api, &sprite, &version, json).await,
        Command::Delete { version } => {
            let call = Call::new(Method::DELETE, one(&sprite, &version)).within(LONG_LIMIT);
            api.json(&call).await.map_err(about(&sprite))?;
            output::answer(format!("✓ Deleted checkpoint {version}"))?;
            Ok(0)
        }
        Command::Restore(which) => restore_to(&api, &sprite, which).await,
    }
}

pub(crate) async fn restore(context: &Context, which: Restore) -> Done {
    let sprite = context.sprite(None)?;
    restore_to(&context.api()?, &sprite, which).await
}

fn one(sprite: &str, version: &str) -> Target {
    Target::sprite(sprite).then("checkpoints").then(version)
}

async fn create(api: &Api, sprite: &str, comment: Option<String>, durable: bool, json: bool) -> Done {
    let mut body = json!({});
    if let Some(comment) = comment {
        body["comment"] = json!(comment);
    }
    if durable {
        body["durable"] = json!(true);
    }
    let call = Call::post(Target::sprite(sprite).then("checkpoint"), &body).within(LONG_LIMIT);
    let started = Instant::now();
    let done = events::follow(api, &call, "making a checkpoint", true).await.map_err(about(sprite))?;
    finish(&done, "Checkpoint created", started, json)
}

async fn restore_to(api: &Api, sprite: &str, which: Restore) -> Done {
    let call = Call::new(Method::POST, one(sprite, &which.version).then("restore")).within(LONG_LIMIT);
    let started = Instant::now();
    let done =
        events::follow(api, &call, &format!("restoring {}", which.version), true).await.map_err(about(sprite))?;
    finish(&done, &format!("Restored {}", which.version), started, which.json)
}

/// The server's own words, which have the checkpoint's id in them.
fn finish(done: &Value, otherwise: &str, started: Instant, json: bool) -> Done {
    if json {
        output::json(done)?;
        return Ok(0);
    }
    let said = done["data"].as_str().filter(|text| !text.is_empty()).unwrap_or(otherwise);
    let pause = done["pause_us"]
        .as_u64()
        .filter(|us| *us > 0)
        .map(|us| format!(", writes stood still for {}.{} ms", us / 1000, us % 1000 / 100));
    output::answer(format!("✓ {said} in {}{}", took(started.elapsed()), pause.unwrap_or_default()))?;
    Ok(0)
}

async fn list(api: &Api, sprite: &str, json: bool) -> Done {
    let found = api.json(&Call::get(Target::sprite(sprite).then("checkpoints"))).await.map_err(about(sprite))?;
    if json {
        output::json(&found)?;
        return Ok(0);
    }
    let found = found.as_array().map(Vec::as_slice).unwrap_or_default();
    if found.is_empty() {
        output::note(format!("no checkpoints of {sprite}; `sprite checkpoint create` makes one"));
        return Ok(0);
    }
    let mut table = Table::new(&["ID", "AGE", "STATE", "COMMENT"]);
    for checkpoint in found {
        let text = |key: &str| checkpoint[key].as_str().unwrap_or_default().to_owned();
        let age = text("create_time").parse().map(|created| age(created, Timestamp::now())).unwrap_or_default();
        table.row([text("id"), age, state(checkpoint), text("comment")]);
    }
    output::answer(table)?;
    Ok(0)
}

/// What is worth knowing about one besides its age.
fn state(checkpoint: &Value) -> String {
    let is = |key: &str| checkpoint[key] == true;
    let words = [
        (is("lost"), "lost"),
        (checkpoint["durable"] == false && !is("lost"), "not in the bucket yet"),
        (is("durable"), "in the bucket"),
        (is("is_current_base") || is("current"), "current base"),
        (checkpoint["consistency"] == "crash", "crash-consistent"),
        (checkpoint["health"].as_str().is_some_and(|health| !health.is_empty()), "damaged"),
    ];
    words.into_iter().filter(|(applies, _)| *applies).map(|(_, word)| word).collect::<Vec<_>>().join(", ")
}

async fn info(api: &Api, sprite: &str, version: &str, json: bool) -> Done {
    let checkpoint = api.json(&Call::get(one(sprite, version))).await.map_err(about(sprite))?;
    if json {
        output::json(&checkpoint)?;
        return Ok(0);
    }
    let mut table = Table::new(&["id", checkpoint["id"].as_str().unwrap_or(version)]);
    for (fact, key) in
        [("created", "create_time"), ("comment", "comment"), ("grew from", "source_id"), ("consistency", "consistency")]
    {
        if let Some(value) = checkpoint[key].as_str().filter(|value| !value.is_empty()) {
            table.row([fact.to_owned(), value.to_owned()]);
        }
    }
    let state = state(&checkpoint);
    if !state.is_empty() {
        table.row(["state".to_owned(), state]);
    }
    output::answer(table)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_says_where_it_is() {
        let check = |checkpoint: Value, expected: &str| assert_eq!(state(&checkpoint), expected, "{checkpoint}");
        check(json!({}), "");
        check(json!({"durable": true, "is_current_base": true}), "in the bucket, current base");
        check(json!({"durable": false}), "not in the bucket yet");
        check(json!({"durable": false, "lost": true}), "lost");
        check(
            json!({"durable": true, "consistency": "crash", "health": "mount_failed"}),
            "in the bucket, crash-consistent, damaged",
        );
    }
}
