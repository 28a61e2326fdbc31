//! `sprite list`

use clap::Args;
use http::header;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Done;
use crate::{
    api::{Api, Call},
    context::Context,
    failure::Failure,
    output,
    sprite::{self, Sprite},
    table::Table,
    target::Target,
    units::age,
};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite list
  sprite list --prefix ci-
  sprite list --json | jq -r '.[].name'
  sprite list -w                            prints changes until you stop it")]
pub(crate) struct Arguments {
    /// Only names that begin with it
    #[arg(long, default_value = "", hide_default_value = true)]
    prefix: String,
    /// Print every change as it happens
    #[arg(short, long)]
    watch: bool,
    /// Print JSON; with --watch one object per line
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let api = context.api()?;
    if arguments.watch {
        return watch(&api, &arguments).await;
    }
    let sprites = sprite::list(&api, &arguments.prefix).await?;
    if arguments.json {
        output::json(&json!(sprites.into_iter().map(|sprite| sprite.0).collect::<Vec<_>>()))?;
    } else if sprites.is_empty() {
        output::note("no sprites; `sprite create NAME` makes one");
    } else {
        output::answer(table(&sprites, Timestamp::now()))?;
    }
    Ok(0)
}

fn table(sprites: &[Sprite], now: Timestamp) -> Table {
    let mut table = Table::new(&["NAME", "STATUS", "AGE", "SIZE", "URL"]);
    for sprite in sprites {
        let age = sprite.time("created_at").map(|created| age(created, now)).unwrap_or_default();
        let public = if sprite.is_public() { "  (public)" } else { "" };
        table.row([
            sprite.text("name").to_owned(),
            sprite.status(),
            age,
            sprite.size(),
            format!("{}{public}", sprite.text("url")),
        ]);
    }
    table
}

async fn watch(api: &Api, arguments: &Arguments) -> Done {
    let mut target = Target::sprites();
    if !arguments.prefix.is_empty() {
        target = target.with("prefix", &arguments.prefix);
    }
    let mut lines = api.lines(&Call::get(target).header(header::ACCEPT, "application/x-ndjson")).await?;
    while let Some(event) = lines.next().await? {
        if event["type"] == "heartbeat" || event["name"].as_str().is_none_or(str::is_empty) {
            continue;
        }
        if arguments.json {
            output::answer(&event)?;
        } else {
            output::answer(line(&event))?;
        }
    }
    Err(Failure::new("the server ended the stream of changes")
        .advise("start again; the first lines are the present states"))
}

/// `14:05:09  demo  warm (suspended): idle`
fn line(event: &Value) -> String {
    let sprite = Sprite(event.clone());
    let time = sprite.time("timestamp").unwrap_or_else(Timestamp::now);
    let clock = time.to_zoned(jiff::tz::TimeZone::system()).strftime("%H:%M:%S").to_string();
    let reason = match sprite.text("reason") {
        "" => String::new(),
        reason => format!(": {reason}"),
    };
    format!("{clock}  {}  {}{reason}", sprite.text("name"), sprite.status())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sprite_is_a_line() {
        let sprites = [Sprite(json!({
            "name": "demo", "status": "running", "created_at": "2026-01-01T00:00:00.000Z", "size": "m", "disk_bytes": 100_u64 << 30, "url": "https://demo"
        }))];
        let shown = table(&sprites, "2026-01-01T03:00:00Z".parse().unwrap()).to_string();
        assert_eq!(shown.lines().count(), 2);
        assert_eq!(
            shown.lines().last().unwrap().split_whitespace().collect::<Vec<_>>(),
            ["demo", "running", "3h", "m,", "100", "GiB", "https://demo"]
        );
    }
}
