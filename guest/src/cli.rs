//! `sprite-env`: what a sprite is and has, from inside. A small HTTP client of `/.sprite/api.sock` with words for people.

use std::{
    ffi::OsString,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    process::ExitCode,
};

use serde_json::{Value, json};

use crate::api;

const HELP: &str = "sprite-env: the sprite you are in, from inside

Usage: sprite-env <command>

  info                                  id, name, url and version of this sprite
  version                               version of the agent
  checkpoints list                      this sprite's checkpoints
  checkpoints get <id>                  one of them
  checkpoints create [--comment TEXT]   save the whole disk as it is now
  checkpoints restore <id>              bring the disk back to a checkpoint; every process here ends
  sync                                  wait until everything written so far is in the bucket, safe from this host
  tasks list                            what keeps this sprite awake
  tasks create <name> --expire 10m      keep it awake for this long, at most 1h
  tasks extend <name> --expire 10m      … from now on
  tasks delete <name>                   let it sleep
  curl [-X METHOD] [-d BODY] <path>     any request to /.sprite/api.sock

Examples:
  sprite-env checkpoints create --comment 'before the upgrade'
  sprite-env checkpoints restore v3
  sprite-env tasks create nightly-build --expire 45m
  sprite-env curl /v1/tasks
";

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error("{0}\nsprite-env help shows all commands")]
    Usage(String),
    #[error("cannot reach {socket}: {0}; this works only inside a sprite", socket = api::SOCKET)]
    Socket(#[source] io::Error),
    #[error("the answer cannot be understood: {0}")]
    Answer(String),
    #[error("{0}")]
    Refused(String),
}

pub(crate) fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<String> = arguments.map(|argument| argument.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut out = io::stdout().lock();
    match command(&words).and_then(|wish| perform(&wish, &mut out)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(io::stderr(), "sprite-env: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// What the words ask for.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    Say(String),
    Request { method: String, path: String, body: Option<Value>, show: Show },
}

/// How an answer is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Show {
    /// As it is.
    Raw,
    Json,
    /// Lines of JSON with `type` and `data`, as they come.
    Events,
    Checkpoints,
    Tasks,
}

fn command(words: &[&str]) -> Result<Wish, CliError> {
    let get = |path: &str, show| Ok(request("GET", path, None, show));
    match words {
        [] | ["help" | "--help" | "-h", ..] | [_, "help" | "--help" | "-h", ..] => Ok(Wish::Say(HELP.into())),
        ["info"] => get("/v1/info", Show::Json),
        ["version" | "--version" | "-V"] => Ok(Wish::Say(format!("{}\n", proto::VERSION))),
        ["curl", rest @ ..] => curl(rest),
        ["checkpoints" | "checkpoint", rest @ ..] => checkpoints(rest),
        ["sync"] | ["sync", "--json"] => Ok(request("POST", "/v1/sync", None, Show::Json)),
        ["sync", other, ..] => Err(CliError::Usage(format!("sync takes no arguments, not {other}"))),
        ["tasks" | "task", rest @ ..] => tasks(rest),
        [other, ..] => Err(CliError::Usage(format!("unknown command: {other}"))),
    }
}

fn request(method: &str, path: &str, body: Option<Value>, show: Show) -> Wish {
    Wish::Request { method: method.into(), path: path.into(), body, show }
}

fn checkpoints(words: &[&str]) -> Result<Wish, CliError> {
    match words {
        [] | ["list" | "ls", ..] => Ok(request("GET", "/v1/checkpoints", None, Show::Checkpoints)),
        ["get" | "info", id] => Ok(request("GET", &format!("/v1/checkpoints/{}", segment(id)?), None, Show::Json)),
        ["create", options @ ..] => {
            let comment = option(options, "--comment")?.unwrap_or_default();
            Ok(request("POST", "/v1/checkpoint", Some(json!({ "comment": comment })), Show::Events))
        }
        ["restore", id] => {
            Ok(request("POST", &format!("/v1/checkpoints/{}/restore", segment(id)?), None, Show::Events))
        }
        _ => Err(CliError::Usage("checkpoints list | get <id> | create [--comment TEXT] | restore <id>".into())),
    }
}

fn tasks(words: &[&str]) -> Result<Wish, CliError> {
    let expire = |options: &[&str]| -> Result<String, CliError> {
        option(options, "--expire")?
            .ok_or_else(|| CliError::Usage("--expire is missing, for example --expire 10m".into()))
    };
    match words {
        [] | ["list" | "ls"] => Ok(request("GET", "/v1/tasks", None, Show::Tasks)),
        ["get", name] => Ok(request("GET", &format!("/v1/tasks/{}", segment(name)?), None, Show::Json)),
        ["create", name, options @ ..] => {
            Ok(request("POST", "/v1/tasks", Some(json!({ "name": name, "expire": expire(options)? })), Show::Json))
        }
        ["extend" | "put", name, options @ ..] => {
            Ok(request("PUT", "/v1/tasks", Some(json!({ "name": name, "expire": expire(options)? })), Show::Json))
        }
        ["delete" | "rm", name] => Ok(request("DELETE", &format!("/v1/tasks/{}", segment(name)?), None, Show::Raw)),
        _ => Err(CliError::Usage(
            "tasks list | get <name> | create <name> --expire 10m | extend <name> --expire 10m | delete <name>".into(),
        )),
    }
}

fn curl(words: &[&str]) -> Result<Wish, CliError> {
    let (mut method, mut body, mut path) = (None, None, None);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| CliError::Usage(format!("{word} needs a value")));
        match *word {
            "-X" | "--request" => method = Some((*value()?).to_owned()),
            "-d" | "--data" => body = Some(Value::String((*value()?).to_owned())),
            // Accepted because people type them; they change nothing here.
            "-s" | "-S" | "-sS" | "-N" | "--silent" | "--no-buffer" => {}
            "-H" | "--header" => drop(value()?),
            option if option.starts_with('-') => return Err(CliError::Usage(format!("unknown option: {option}"))),
            target => {
                let target = target.strip_prefix("http://sprite").unwrap_or(target);
                path = Some(if target.starts_with('/') { target.to_owned() } else { format!("/{target}") });
            }
        }
    }
    let path = path.ok_or_else(|| CliError::Usage("curl needs a path, for example /v1/info".into()))?;
    if path.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(CliError::Usage(format!("{path:?} is not a path")));
    }
    let method = method.unwrap_or_else(|| if body.is_some() { "POST".into() } else { "GET".into() });
    if method.is_empty() || !method.chars().all(|c| c.is_ascii_alphabetic()) {
        return Err(CliError::Usage(format!("{method:?} is not an HTTP method")));
    }
    Ok(Wish::Request { method, path, body, show: Show::Raw })
}

/// The value of an option, written `--name value` or `--name=value`.
fn option(words: &[&str], name: &str) -> Result<Option<String>, CliError> {
    match words {
        [] => Ok(None),
        [key, value] if *key == name => Ok(Some((*value).to_owned())),
        [pair] if pair.starts_with(name) && pair[name.len()..].starts_with('=') => {
            Ok(Some(pair[name.len() + 1..].to_owned()))
        }
        [key] if *key == name => Err(CliError::Usage(format!("{name} needs a value"))),
        [other, ..] => Err(CliError::Usage(format!("unexpected: {other}"))),
    }
}

/// A word that becomes a part of a path.
fn segment(word: &str) -> Result<&str, CliError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !word.is_empty() && word.chars().all(plain) {
        Ok(word)
    } else {
        Err(CliError::Usage(format!("{word:?} is not a name")))
    }
}

fn perform(wish: &Wish, out: &mut impl io::Write) -> Result<(), CliError> {
    match wish {
        Wish::Say(text) => drop(out.write_all(text.as_bytes())),
        Wish::Request { method, path, body, show } => {
            let body = match body {
                None => String::new(),
                Some(Value::String(raw)) => raw.clone(),
                Some(value) => value.to_string(),
            };
            let (status, mut answer) = send(method, path, &body)?;
            if !(200..300).contains(&status) {
                let mut text = String::new();
                answer.read_to_string(&mut text).map_err(CliError::Socket)?;
                let told = serde_json::from_str::<Value>(&text)
                    .ok()
                    .and_then(|value| Some(value.get("error")?.as_str()?.to_owned()));
                return Err(CliError::Refused(told.unwrap_or_else(|| format!("status {status} {text}"))));
            }
            print(*show, answer, out)?;
        }
    }
    Ok(())
}

/// HTTP/1.0: the answer ends with the connection, so that nothing has to be decoded.
fn send(method: &str, path: &str, body: &str) -> Result<(u16, BufReader<UnixStream>), CliError> {
    let mut stream = UnixStream::connect(api::SOCKET).map_err(CliError::Socket)?;
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: sprite\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).map_err(CliError::Socket)?;
    let mut answer = BufReader::new(stream);
    let mut line = String::new();
    answer.read_line(&mut line).map_err(CliError::Socket)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| CliError::Answer(line.trim().to_owned()))?;
    loop {
        let mut header = String::new();
        let read = answer.read_line(&mut header).map_err(CliError::Socket)?;
        if read == 0 || header.trim().is_empty() {
            return Ok((status, answer));
        }
    }
}

fn print(show: Show, mut answer: BufReader<UnixStream>, out: &mut impl io::Write) -> Result<(), CliError> {
    if show == Show::Events {
        return print_events(answer, out);
    }
    let mut text = String::new();
    answer.read_to_string(&mut text).map_err(CliError::Socket)?;
    let parsed = || serde_json::from_str::<Value>(&text).map_err(|error| CliError::Answer(error.to_string()));
    // A reader that has gone (`| head`) needs nothing more.
    match show {
        Show::Raw | Show::Events => drop(out.write_all(text.as_bytes())),
        Show::Json => drop(writeln!(out, "{:#}", parsed()?)),
        Show::Checkpoints => drop(out.write_all(table(&parsed()?, &["id", "create_time", "comment"]).as_bytes())),
        Show::Tasks => {
            drop(out.write_all(table(&parsed()?["tasks"], &["name", "started_at", "expires_at"]).as_bytes()))
        }
    }
    Ok(())
}

fn print_events(answer: BufReader<UnixStream>, out: &mut impl io::Write) -> Result<(), CliError> {
    for line in answer.lines() {
        // A restore ends the connection, and this program with it.
        let Ok(line) = line else { return Ok(()) };
        let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
        let said = event["data"].as_str().or(event["error"].as_str()).unwrap_or_default();
        if event["type"] == "error" {
            return Err(CliError::Refused(said.to_owned()));
        }
        drop(writeln!(out, "{said}"));
        drop(out.flush());
    }
    Ok(())
}

fn table(rows: &Value, columns: &[&str]) -> String {
    let rows: Vec<Vec<String>> = rows.as_array().into_iter().flatten().map(|row| cells(row, columns)).collect();
    if rows.is_empty() {
        return "none\n".into();
    }
    let titles: Vec<String> = columns.iter().map(|column| column.to_uppercase().replace('_', " ")).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&titles).chain(&rows).collect();
    let widths: Vec<usize> =
        (0..columns.len()).map(|at| all.iter().map(|row| row[at].chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &&Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    all.iter().map(line).collect()
}

fn cells(row: &Value, columns: &[&str]) -> Vec<String> {
    columns.iter().map(|column| row[*column].as_str().unwrap_or_default().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_requests() {
        let created = command(&["checkpoints", "create", "--comment", "a b"]).unwrap();
        assert_eq!(created, request("POST", "/v1/checkpoint", Some(json!({ "comment": "a b" })), Show::Events));
        assert_eq!(command(&["checkpoints", "create", "--comment=a b"]).unwrap(), created);
        assert_eq!(
            command(&["checkpoints", "restore", "v1"]).unwrap(),
            request("POST", "/v1/checkpoints/v1/restore", None, Show::Events)
        );
        assert_eq!(
            command(&["tasks", "create", "x", "--expire", "5m"]).unwrap(),
            request("POST", "/v1/tasks", Some(json!({ "name": "x", "expire": "5m" })), Show::Json)
        );
        assert_eq!(command(&["curl", "-s", "v1/tasks"]).unwrap(), request("GET", "/v1/tasks", None, Show::Raw));
        assert_eq!(
            command(&["curl", "-d", "{}", "http://sprite/v1/tasks"]).unwrap(),
            request("POST", "/v1/tasks", Some(Value::String("{}".into())), Show::Raw)
        );
        assert!(matches!(command(&[]).unwrap(), Wish::Say(help) if help.contains("Examples")));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            &["fly"][..],
            &["checkpoints", "restore"],
            &["checkpoints", "restore", "../x"],
            &["checkpoints", "create", "--comment"],
            &["checkpoints", "create", "words"],
            &["tasks", "create", "x"],
            &["curl"],
            &["curl", "/a b"],
            &["curl", "-X", "G T", "/"],
            &["curl", "--upload", "/"],
        ] {
            assert!(matches!(command(bad), Err(CliError::Usage(_))), "{bad:?}");
        }
    }

    #[test]
    fn lists_are_tables() {
        let rows = json!([{ "id": "v1", "comment": "first" }, { "id": "v10", "comment": "" }]);
        assert_eq!(table(&rows, &["id", "comment"]), "ID   COMMENT\nv1   first\nv10\n");
        assert_eq!(table(&json!([]), &["id"]), "none\n");
    }
}
