//! Values that a user may set, and what is allowed.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;

use crate::{duration, refusal::Refusal};

const LABELS_MAX: usize = 64;
const LABEL_BYTES_MAX: usize = 256;
const REQUEST_ID_BYTES_MAX: usize = 128;
const ENVIRONMENT_BYTES_MAX: usize = 64 << 10;
const WAKE_TIMES_MAX: usize = 64;
/// A sprite that is woken more often never sleeps; then `--idle-timeout never` says so.
const WAKE_EVERY_MIN: Duration = Duration::from_secs(60);
/// Less would pause a sprite between two key strokes.
const IDLE_MIN: Duration = Duration::from_secs(1);
/// A year; more is `never`.
const PERIOD_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

pub(crate) type Environment = BTreeMap<String, String>;

/// How long a sprite may be unused before it is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdleTimeout {
    After(Duration),
    Never,
}

impl IdleTimeout {
    /// `30s`, `1h30m`, `never`.
    pub(crate) fn parse(text: &str) -> Result<Self, Refusal> {
        if text == "never" {
            return Ok(Self::Never);
        }
        match duration::parse(text) {
            Some(after) if (IDLE_MIN..=PERIOD_MAX).contains(&after) => Ok(Self::After(after)),
            _ => Err(Refusal::Invalid(format!(
                "idle_timeout {text:?} is not a duration from 1s to a year, such as 30s or 1h30m, or `never`"
            ))),
        }
    }

    pub(crate) fn pause_after_ms(self) -> Option<u64> {
        match self {
            Self::After(after) => Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
            Self::Never => None,
        }
    }
}

/// When a sprite is woken by itself. `None`: stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WakeTimers {
    pub(crate) at: Option<Vec<Timestamp>>,
    /// `Some(None)`: no longer.
    pub(crate) every_ms: Option<Option<u64>>,
}

impl WakeTimers {
    /// Neither times nor a period.
    pub(crate) const NONE: Self = Self { at: Some(Vec::new()), every_ms: Some(None) };

    /// `at`: RFC 3339 times, or durations from now; `every`: a duration, empty for none, `never` for no timers at all but those of `at`.
    pub(crate) fn parse(at: Option<&[String]>, every: Option<&str>, now: Timestamp) -> Result<Self, Refusal> {
        let at = at.map(|at| wake_times(at, now)).transpose()?;
        Ok(match every {
            None => Self { at, every_ms: None },
            Some("") => Self { at, every_ms: Some(None) },
            Some("never") => Self { at: at.or(Self::NONE.at), every_ms: Some(None) },
            Some(text) => Self { at, every_ms: Some(Some(wake_every_ms(text)?)) },
        })
    }
}

fn wake_times(texts: &[String], now: Timestamp) -> Result<Vec<Timestamp>, Refusal> {
    if texts.len() > WAKE_TIMES_MAX {
        return Err(Refusal::Invalid(format!("{} wake times are more than {WAKE_TIMES_MAX}", texts.len())));
    }
    let mut times = texts.iter().map(|text| wake_time(text, now)).collect::<Result<Vec<_>, _>>()?;
    times.sort_unstable();
    times.dedup();
    Ok(times)
}

fn wake_time(text: &str, now: Timestamp) -> Result<Timestamp, Refusal> {
    let wrong = |why: &str| Refusal::Invalid(format!("wake time {text:?} {why}"));
    let time = match text.parse::<Timestamp>() {
        Ok(time) => time,
        Err(_no_timestamp) => {
            let after = duration::parse(text)
                .filter(|after| *after <= PERIOD_MAX)
                .ok_or_else(|| wrong("is neither a time such as 2030-01-02T03:04:05Z nor a duration such as 90m"))?;
            now.checked_add(after).map_err(|_out_of_range| wrong("is too far away"))?
        }
    };
    if time <= now { Err(wrong("has passed")) } else { Ok(time) }
}

fn wake_every_ms(text: &str) -> Result<u64, Refusal> {
    match duration::parse(text) {
        Some(every) if (WAKE_EVERY_MIN..=PERIOD_MAX).contains(&every) => {
            Ok(u64::try_from(every.as_millis()).unwrap_or(u64::MAX))
        }
        _ => Err(Refusal::Invalid(format!(
            "wake period {text:?} is not a duration from 1m to a year, such as 1h, or `never`"
        ))),
    }
}

/// Labels are kept exactly as they are given.
pub(crate) fn labels(labels: Vec<String>) -> Result<Vec<String>, Refusal> {
    if labels.len() > LABELS_MAX {
        return Err(Refusal::Invalid(format!("{} labels are more than {LABELS_MAX}", labels.len())));
    }
    match labels.iter().find(|label| label.is_empty() || label.len() > LABEL_BYTES_MAX) {
        Some(label) => Err(Refusal::Invalid(format!("label {label:?} does not have 1 to {LABEL_BYTES_MAX} bytes"))),
        None => Ok(labels),
    }
}

/// Chosen by the caller; empty for none.
pub(crate) fn request_id(text: String) -> Result<Option<String>, Refusal> {
    if text.len() > REQUEST_ID_BYTES_MAX || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Refusal::Invalid(format!(
            "request_id {text:?} is not made of at most {REQUEST_ID_BYTES_MAX} visible ASCII characters; use a UUID"
        )));
    }
    Ok(Some(text).filter(|text| !text.is_empty()))
}

pub(crate) fn environment(environment: Environment) -> Result<Environment, Refusal> {
    let total: usize = environment.iter().map(|(name, value)| name.len() + value.len()).sum();
    if total > ENVIRONMENT_BYTES_MAX {
        return Err(Refusal::Invalid(format!(
            "an environment of {total} bytes is larger than {ENVIRONMENT_BYTES_MAX}"
        )));
    }
    let is_wrong =
        |(name, value): &(&String, &String)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
    match environment.iter().find(is_wrong) {
        Some((name, _)) => Err(Refusal::Invalid(format!("environment variable {name:?} has no valid name or value"))),
        None => Ok(environment),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_timeouts_are_durations_or_never() {
        let check = |text: &str, ms: Option<Option<u64>>| {
            assert_eq!(IdleTimeout::parse(text).ok().map(IdleTimeout::pause_after_ms), ms, "{text:?}");
        };
        check("30s", Some(Some(30_000)));
        check("1h30m", Some(Some(5_400_000)));
        check("never", Some(None));
        for bad in ["", "0s", "10ms", "soon", "-1s", "999999h"] {
            check(bad, None);
        }
    }

    #[test]
    fn wake_times_lie_ahead() {
        let now: Timestamp = "2030-01-01T00:00:00Z".parse().unwrap();
        let at = |text: &str| Some(WakeTimers::parse(Some(&[text.to_owned()]), None, now).ok()?.at?[0].to_string());
        assert_eq!(at("2030-01-01T08:00:00Z").as_deref(), Some("2030-01-01T08:00:00Z"));
        assert_eq!(at("90m").as_deref(), Some("2030-01-01T01:30:00Z"));
        for bad in ["2029-12-31T23:59:59Z", "0s", "yesterday", "", "99999999h"] {
            assert_eq!(at(bad), None, "{bad:?}");
        }
        let every = |text: &str| WakeTimers::parse(None, Some(text), now).ok().map(|timers| timers.every_ms);
        assert_eq!(every("1h"), Some(Some(Some(3_600_000))));
        assert_eq!(every(""), Some(Some(None)));
        assert_eq!(every("1s"), None);
        assert_eq!(WakeTimers::parse(None, Some("never"), now).unwrap(), WakeTimers::NONE);
    }

    #[test]
    fn request_ids_are_short_and_visible() {
        assert_eq!(request_id(String::new()).unwrap(), None);
        assert_eq!(request_id("0198a5f0-1".into()).unwrap().as_deref(), Some("0198a5f0-1"));
        for bad in ["a b", "é", "a\n", &"x".repeat(129)] {
            assert!(request_id(bad.into()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_would_break_a_record_or_an_exec_is_refused() {
        assert!(labels(vec!["a".into(), "ü/=b c".into()]).is_ok());
        assert!(labels(vec![String::new()]).is_err());
        assert!(labels(vec!["x".repeat(257)]).is_err());
        assert!(labels(vec!["x".into(); 65]).is_err());
        let one = |name: &str, value: &str| environment(Environment::from([(name.to_owned(), value.to_owned())]));
        assert!(one("A", "b=c").is_ok());
        assert!(one("", "b").is_err() && one("A=B", "c").is_err() && one("A", "\0").is_err());
        assert!(one("A", &"x".repeat(65 << 10)).is_err());
    }
}
