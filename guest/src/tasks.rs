//! Tasks: holds by which programs inside keep their sprite awake. Pure; the caller says what time it is.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;
use serde_json::Value;

const EXPIRE_MAX: Duration = Duration::from_secs(3600);
const NAME_CHARS_MAX: usize = 128;
/// Living tasks at a time.
const TASKS_MAX: usize = 256;

/// What is wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TaskError {
    #[error("a task needs a name of at most {NAME_CHARS_MAX} characters, without a slash")]
    Name,
    #[error("expire has to be seconds or a duration such as \"5m\", more than nothing and at most an hour")]
    Expire,
    #[error("task exists: {0}")]
    Exists(String),
    #[error("there are {TASKS_MAX} tasks already; delete some")]
    TooMany,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Task {
    started_ms: u64,
    expires_ms: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Tasks(BTreeMap<String, Task>);

/// As the API shows it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Shown {
    pub name: String,
    pub started_at: String,
    pub expires_at: String,
}

impl Tasks {
    fn forget_expired(&mut self, now_ms: u64) {
        self.0.retain(|_, task| task.expires_ms > now_ms);
    }

    pub(crate) fn list(&mut self, now_ms: u64) -> Vec<Shown> {
        self.forget_expired(now_ms);
        self.0.iter().map(|(name, task)| task.shown(name)).collect()
    }

    pub(crate) fn get(&mut self, name: &str, now_ms: u64) -> Option<Shown> {
        self.forget_expired(now_ms);
        self.0.get(name).map(|task| task.shown(name))
    }

    /// A new task; one that lives already is an error.
    pub(crate) fn create(&mut self, name: &str, expire: &Value, now_ms: u64) -> Result<Shown, TaskError> {
        self.forget_expired(now_ms);
        if self.0.contains_key(name) {
            return Err(TaskError::Exists(name.to_owned()));
        }
        self.put(name, expire, now_ms)
    }

    /// A new task, or a new end for a living one.
    pub(crate) fn put(&mut self, name: &str, expire: &Value, now_ms: u64) -> Result<Shown, TaskError> {
        self.forget_expired(now_ms);
        if name.is_empty() || name.chars().count() > NAME_CHARS_MAX || name.contains('/') {
            return Err(TaskError::Name);
        }
        let expire = parse_expire(expire).ok_or(TaskError::Expire)?;
        if self.0.len() >= TASKS_MAX && !self.0.contains_key(name) {
            return Err(TaskError::TooMany);
        }
        let expires_ms = now_ms.saturating_add(u64::try_from(expire.as_millis()).unwrap_or(u64::MAX));
        let task = self.0.entry(name.to_owned()).or_insert(Task { started_ms: now_ms, expires_ms });
        task.expires_ms = expires_ms;
        Ok(task.shown(name))
    }

    /// Whether there was one.
    pub(crate) fn delete(&mut self, name: &str, now_ms: u64) -> bool {
        self.forget_expired(now_ms);
        self.0.remove(name).is_some()
    }

    /// The latest end of a living task; 0: there is none.
    pub(crate) fn until_ms(&self, now_ms: u64) -> u64 {
        self.0.values().map(|task| task.expires_ms).filter(|end| *end > now_ms).max().unwrap_or(0)
    }
}

impl Task {
    fn shown(self, name: &str) -> Shown {
        let time = |ms: u64| {
            let time = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
            time.unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
        };
        Shown { name: name.to_owned(), started_at: time(self.started_ms), expires_at: time(self.expires_ms) }
    }
}

/// Seconds, or a text such as `90s`, `5m`, `1h`, `1m30s`.
fn parse_expire(expire: &Value) -> Option<Duration> {
    let duration = match expire {
        Value::Number(seconds) => Duration::from_secs(seconds.as_u64()?),
        Value::String(text) => match text.parse() {
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_not_a_number) => parse_duration(text)?,
        },
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => return None,
    };
    (!duration.is_zero() && duration <= EXPIRE_MAX).then_some(duration)
}

fn parse_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|digits| *digits > 0)?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let count: u64 = rest[..digits].parse().ok()?;
        let unit_ms: u64 = match &rest[digits..unit_end] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        };
        total = total.checked_add(Duration::from_millis(count.checked_mul(unit_ms)?))?;
        rest = &rest[unit_end..];
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ends_are_seconds_or_durations_up_to_an_hour() {
        for (text, seconds) in
            [(json!(90), 90), (json!("90"), 90), (json!("5m"), 300), (json!("1m30s"), 90), (json!("1h"), 3600)]
        {
            assert_eq!(parse_expire(&text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for bad in [
            json!(0),
            json!(3601),
            json!("61m"),
            json!("2h"),
            json!(""),
            json!("m"),
            json!("1d"),
            json!(null),
            json!(-1),
            json!(1.5),
            json!("-5s"),
        ] {
            assert_eq!(parse_expire(&bad), None, "{bad}");
        }
    }

    #[test]
    fn a_task_lives_until_its_end() {
        let mut tasks = Tasks::default();
        let shown = tasks.create("build", &json!(10), 1_000).unwrap();
        assert_eq!(
            (shown.started_at.as_str(), shown.expires_at.as_str()),
            ("1970-01-01T00:00:01.000Z", "1970-01-01T00:00:11.000Z")
        );
        assert_eq!(tasks.create("build", &json!(10), 2_000), Err(TaskError::Exists("build".into())));
        assert_eq!(tasks.until_ms(2_000), 11_000);
        tasks.put("build", &json!("1m"), 3_000).unwrap();
        assert_eq!(tasks.until_ms(3_000), 63_000);
        assert_eq!(tasks.get("build", 3_000).unwrap().started_at, "1970-01-01T00:00:01.000Z");
        assert_eq!((tasks.until_ms(63_000), tasks.list(63_000)), (0, vec![]));
        tasks.create("build", &json!(10), 64_000).unwrap();
        assert!(tasks.delete("build", 64_000));
        assert!(!tasks.delete("build", 64_000));
    }

    #[test]
    fn there_is_a_bound_and_names_are_checked() {
        let mut tasks = Tasks::default();
        for n in 0..TASKS_MAX {
            tasks.create(&n.to_string(), &json!(10), 0).unwrap();
        }
        assert_eq!(tasks.put("one more", &json!(10), 0), Err(TaskError::TooMany));
        tasks.put("0", &json!(20), 0).unwrap();
        for bad in ["", "a/b", &"x".repeat(129)] {
            assert_eq!(Tasks::default().put(bad, &json!(1), 0), Err(TaskError::Name), "{bad:?}");
        }
    }
}
