//! Query strings and durations as the dialect's clients write them.

use std::{collections::HashMap, time::Duration};

use percent_encoding::percent_decode_str;
use proto::agent::{ExecStart, TerminalSize};

/// A terminal of a client that does not say how large it is.
const ROWS_DEFAULT: u32 = 24;
const COLS_DEFAULT: u32 = 80;
/// How long a command without a terminal goes on after its client has gone.
const AFTER_DISCONNECT_DEFAULT: Duration = Duration::from_secs(10);
/// In [`ExecStart`]: for ever.
const FOR_EVER_MS: i64 = -1;

/// Decoded `key=value` pairs, in order. Unknown keys are kept and ignored.
#[derive(Clone, Debug, Default)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    pub(super) fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(key, value)| (decode(key), decode(value)))
                .collect(),
        )
    }

    pub(super) fn push(&mut self, key: &str, value: String) {
        self.0.push((key.to_owned(), value));
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.get(key).map(|value| matches!(value, "true" | "1"))
    }

    /// The command to run.
    ///
    /// # Errors
    ///
    /// What is wrong with the query, in words.
    pub(super) fn exec_start(&self) -> Result<ExecStart, String> {
        let tty = self.flag("tty").unwrap_or(false);
        let mut env = HashMap::new();
        for pair in self.all("env") {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("env {pair:?} is not NAME=VALUE"))?;
            env.insert(key.to_owned(), value.to_owned());
        }
        let path = self.get("path").unwrap_or_default().to_owned();
        let mut argv: Vec<String> = self.all("cmd").map(str::to_owned).collect();
        if argv.is_empty() && !path.is_empty() {
            argv.push(path.clone());
        }
        Ok(ExecStart {
            argv,
            path,
            dir: self.get("dir").unwrap_or_default().to_owned(),
            env,
            tty,
            size: tty.then(|| self.terminal_size().unwrap_or(TerminalSize { rows: ROWS_DEFAULT, cols: COLS_DEFAULT })),
            stdin: self.flag("stdin").unwrap_or(tty),
            max_run_after_disconnect_ms: self.max_run_after_disconnect_ms(tty)?,
            user: String::new(),
        })
    }

    pub(super) fn terminal_size(&self) -> Option<TerminalSize> {
        let number = |key: &str| self.get(key)?.parse().ok().filter(|number| *number > 0);
        Some(TerminalSize { rows: number("rows")?, cols: number("cols")? })
    }

    /// `0` means for ever, and so does saying nothing about a terminal.
    fn max_run_after_disconnect_ms(&self, tty: bool) -> Result<i64, String> {
        let limit = match self.get("max_run_after_disconnect") {
            None if tty => return Ok(FOR_EVER_MS),
            None => AFTER_DISCONNECT_DEFAULT,
            Some(text) => go_duration(text)
                .ok_or_else(|| format!("max_run_after_disconnect {text:?} is not a duration such as 10s"))?,
        };
        if limit.is_zero() { Ok(FOR_EVER_MS) } else { Ok(i64::try_from(limit.as_millis()).unwrap_or(i64::MAX)) }
    }
}

/// A path segment.
pub(super) fn decode_segment(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn decode(text: &str) -> String {
    decode_segment(&text.replace('+', " "))
}

/// `10s`, `1m30s`, `1.5h`, `500ms`; a bare number is seconds.
pub(super) fn go_duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit_end =
            rest[digits..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(rest.len(), |at| digits + at);
        let seconds = match &rest[digits..unit_end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let count: f64 = rest[..digits].parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(count * seconds).ok()?)?;
        rest = &rest[unit_end..];
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_query_of_a_real_client_becomes_a_command() {
        let text =
            "cmd=sh&cmd=-c&cmd=echo+%22a%26b%22&path=sh&env=A=1=2&env=B=&dir=%2Ftmp&stdin=true&cc=true&tty=false";
        let start = Query::parse(text).exec_start().unwrap();
        assert_eq!(start.argv, ["sh", "-c", "echo \"a&b\""]);
        assert_eq!(start.env["A"], "1=2");
        assert_eq!(start.env["B"], "");
        assert_eq!((start.dir.as_str(), start.stdin, start.tty, start.size), ("/tmp", true, false, None));
        assert_eq!(start.max_run_after_disconnect_ms, 10_000);
    }

    #[test]
    fn a_terminal_has_stdin_a_size_and_no_end() {
        let start = Query::parse("cmd=bash&tty=true").exec_start().unwrap();
        assert!(start.stdin && start.tty);
        assert_eq!(start.size, Some(TerminalSize { rows: 24, cols: 80 }));
        assert_eq!(start.max_run_after_disconnect_ms, -1);
        let start =
            Query::parse("cmd=bash&tty=true&rows=50&cols=132&max_run_after_disconnect=1m30s").exec_start().unwrap();
        assert_eq!(start.size, Some(TerminalSize { rows: 50, cols: 132 }));
        assert_eq!(start.max_run_after_disconnect_ms, 90_000);
    }

    #[test]
    fn nonsense_is_named() {
        assert!(Query::parse("cmd=a&env=NOVALUE").exec_start().unwrap_err().contains("NOVALUE"));
        assert!(Query::parse("cmd=a&max_run_after_disconnect=soon").exec_start().unwrap_err().contains("soon"));
    }

    #[test]
    fn durations_are_go_durations() {
        let ms = |text: &str| go_duration(text).map(|duration| duration.as_millis());
        assert_eq!(ms("0s"), Some(0));
        assert_eq!(ms("0"), Some(0));
        assert_eq!(ms("2.0s"), Some(2000));
        assert_eq!(ms("1h2m3s4ms"), Some(3_723_004));
        for bad in ["", "s", "10", "-1s", "1d", "1s2"] {
            assert_eq!(ms(bad), if bad == "10" { Some(10_000) } else { None }, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_without_harm(text in ".{0,200}") {
            drop(Query::parse(&text).exec_start());
            let _duration = go_duration(&text);
        }
    }
}
