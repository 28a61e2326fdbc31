//! `sprite sessions` and `sprite attach`

use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde_json::Value;

use super::Done;
use crate::{
    api::{Api, Call, LONG_LIMIT},
    context::Context,
    failure::Failure,
    output,
    session::Session,
    sprite::about,
    table::Table,
    target::Target,
    terminal,
    units::{self, age},
};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite sessions list -s demo
  sprite sessions attach 42 -s demo
  sprite sessions kill 42 -s demo --signal TERM --timeout 5s")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Show the running ones
    #[command(visible_alias = "ls")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Connect this terminal to one
    Attach(Attach),
    /// End one
    Kill {
        /// The session's id
        id: String,
        /// The signal it gets first
        #[arg(long, default_value = "TERM")]
        signal: String,
        /// How long it may take to end before it gets KILL
        #[arg(long, default_value = "10s", value_parser = units::duration)]
        timeout: std::time::Duration,
    },
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite attach 42 -s demo
  sprite attach htop -s demo      the session that runs it
  sprite attach -s demo           the only one

Ctrl-\\ detaches again.")]
pub(crate) struct Attach {
    /// The session's id, or what its command begins with
    session: Option<String>,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let sprite = context.sprite(None)?;
    let api = context.api()?;
    match arguments.command {
        Command::List { json } => list(&api, &sprite, json).await,
        Command::Attach(which) => attach_to(&api, &sprite, which).await,
        Command::Kill { id, signal, timeout } => {
            let target = Target::sprite(&sprite).then("exec").then(&id).then("kill");
            kill(&api, &sprite, target.with("signal", &signal).with("timeout", &units::go_duration(timeout))).await
        }
    }
}

pub(crate) async fn attach(context: &Context, which: Attach) -> Done {
    let sprite = context.sprite(None)?;
    attach_to(&context.api()?, &sprite, which).await
}

async fn sessions(api: &Api, sprite: &str) -> Result<Vec<Value>, Failure> {
    let call = Call::get(Target::sprite(sprite).then("exec")).within(LONG_LIMIT);
    let answer = output::with_spinner(format!("waking {sprite}"), api.json(&call)).await.map_err(about(sprite))?;
    Ok(answer["sessions"].as_array().cloned().unwrap_or_default())
}

async fn list(api: &Api, sprite: &str, json: bool) -> Done {
    let sessions = sessions(api, sprite).await?;
    if json {
        output::json(&Value::Array(sessions))?;
        return Ok(0);
    }
    if sessions.is_empty() {
        output::note(format!("no sessions in {sprite}"));
        return Ok(0);
    }
    let mut table = Table::new(&["ID", "AGE", "TERMINAL", "FOLDER", "COMMAND"]);
    for session in &sessions {
        let text = |key: &str| session[key].as_str().unwrap_or_default().to_owned();
        let age = text("created").parse().map(|created| age(created, Timestamp::now())).unwrap_or_default();
        let terminal = if session["tty"] == true { "yes" } else { "no" };
        table.row([text("id"), age, terminal.to_owned(), text("workdir"), text("command")]);
    }
    output::answer(table)?;
    Ok(0)
}

async fn attach_to(api: &Api, sprite: &str, which: Attach) -> Done {
    let id = match which.session {
        // An id is what servers make of it; what looks like none is looked up.
        Some(id) if id.bytes().all(|byte| byte.is_ascii_digit()) => id,
        wanted => choose(&sessions(api, sprite).await?, wanted.as_deref(), sprite)?,
    };
    let mut target = Target::sprite(sprite).then("exec").then(&id).with("stdin", "true");
    if let Some((rows, cols)) = terminal::size() {
        target = target.with("rows", &rows.to_string()).with("cols", &cols.to_string());
    }
    Session::open(api, sprite, &target).await?.run().await
}

fn choose(sessions: &[Value], wanted: Option<&str>, sprite: &str) -> Result<String, Failure> {
    let id = |session: &Value| session["id"].as_str().unwrap_or_default().to_owned();
    let fits = |session: &&Value| {
        let Some(wanted) = wanted else { return true };
        let command = session["command"].as_str().unwrap_or_default();
        let program = command.split(' ').next().unwrap_or_default();
        id(session) == wanted || command.starts_with(wanted) || program.rsplit('/').next() == Some(wanted)
    };
    let found: Vec<&Value> = sessions.iter().filter(fits).collect();
    let advice = format!("`sprite sessions list -s {sprite}` shows them");
    match (found.as_slice(), wanted) {
        ([one], _) => Ok(id(one)),
        ([], Some(wanted)) => Err(Failure::new(format!("session not found: {wanted}")).advise(advice)),
        ([], None) => Err(Failure::new(format!("no sessions in {sprite}")).advise("`sprite console` starts one")),
        (several, _) => Err(Failure::usage(format!("{} sessions could be meant", several.len())).advise(advice)),
    }
}

async fn kill(api: &Api, sprite: &str, target: Target) -> Done {
    let call = Call::new(http::Method::POST, target).within(LONG_LIMIT);
    let mut lines = api.lines(&call).await.map_err(about(sprite))?;
    while let Some(event) = lines.next().await? {
        let message = event["message"].as_str().unwrap_or_default();
        match event["type"].as_str() {
            Some("error") => return Err(Failure::new(message)),
            Some("complete") => {
                let code =
                    event["exit_code"].as_i64().map(|code| format!(" with exit code {code}")).unwrap_or_default();
                output::answer(format!("✓ ended{code}"))?;
                return Ok(0);
            }
            Some(_) | None if !message.is_empty() => output::note(message),
            Some(_) | None => {}
        }
    }
    Err(Failure::new("the server broke off before the session ended")
        .advise("`sprite sessions list` shows whether it is still there"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_session_is_found_by_id_or_command() {
        let sessions =
            [json!({"id": "7", "command": "/usr/bin/bash -l"}), json!({"id": "8", "command": "/usr/bin/htop"})];
        assert_eq!(choose(&sessions, Some("htop"), "s").unwrap(), "8");
        assert_eq!(choose(&sessions, Some("/usr/bin/bash"), "s").unwrap(), "7");
        assert_eq!(choose(&sessions[..1], None, "s").unwrap(), "7");
        assert_eq!(choose(&sessions, None, "s").unwrap_err().code, 2);
        assert!(choose(&sessions, Some("vim"), "s").unwrap_err().message.contains("not found"));
        assert!(choose(&[], None, "s").unwrap_err().message.contains("no sessions"));
    }
}
