//! Durations, sizes and times as people write them and as we show them.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp, Zoned, civil};

/// A text that is not what its option wants.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadUnit {
    #[error("{0:?} is not a duration such as 30s, 5m or 1h30m")]
    Duration(String),
    #[error("{0:?} is not a size such as 200G or 1T")]
    Size(String),
    #[error("{0:?} is not a time such as 07:30, \"2026-12-31 07:30\", 2026-12-31T06:30:00Z or +2h")]
    Time(String),
    #[error("{0:?} is not NAME=VALUE")]
    Variable(String),
}

/// `30s`, `1h30m`, `1.5h`, `2d`: Go's syntax and days.
pub(crate) fn duration(text: &str) -> Result<Duration, BadUnit> {
    let bad = || BadUnit::Duration(text.to_owned());
    if text.is_empty() {
        return Err(bad());
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let end = rest[digits..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(rest.len(), |at| digits + at);
        let unit_s = match &rest[digits..end] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return Err(bad()),
        };
        let count: f64 = rest[..digits].parse().map_err(|_not_a_number| bad())?;
        let part = Duration::try_from_secs_f64(count * unit_s).map_err(|_too_large| bad())?;
        total = total.checked_add(part).ok_or_else(bad)?;
        rest = &rest[end..];
    }
    Ok(total)
}

/// As the API wants it: Go's syntax, which has no days.
pub(crate) fn go_duration(duration: Duration) -> String {
    match (duration.as_secs(), duration.subsec_millis()) {
        (seconds, 0) => format!("{seconds}s"),
        _ => format!("{}ms", duration.as_millis()),
    }
}

/// For `--idle-timeout` and `--every`: a duration, or `never`.
pub(crate) fn duration_or_never(text: &str) -> Result<String, BadUnit> {
    if text == "never" { Ok(text.to_owned()) } else { duration(text).map(go_duration) }
}

/// `200G`, `200GB`, `200GiB`, `1.5T`, or bytes; powers of 1024 like the disks themselves.
pub(crate) fn size_bytes(text: &str) -> Result<u64, BadUnit> {
    let bad = || BadUnit::Size(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (count, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(bad()),
    };
    if let Ok(count) = count.parse::<u64>() {
        return count.checked_mul(1 << shift).ok_or_else(bad);
    }
    // Half a terabyte; through MiB, so that nothing is cut off that anybody would miss.
    let count: f64 = count.parse().map_err(|_not_a_number| bad())?;
    let bytes = Duration::try_from_secs_f64(count).map_err(|_too_large| bad())?;
    let unit_bytes = 1_u64 << shift;
    let fraction = u64::from(bytes.subsec_millis()).checked_mul(unit_bytes).ok_or_else(bad)? / 1000;
    bytes.as_secs().checked_mul(unit_bytes).and_then(|whole| whole.checked_add(fraction)).ok_or_else(bad)
}

/// `1.4 GiB`
pub(crate) fn show_bytes(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let Some((shift, unit)) = units.into_iter().find(|(shift, _)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    let all_tenths = ((u128::from(bytes) * 10) + (1 << (shift - 1))) >> shift;
    let (whole, tenths) = (all_tenths / 10, all_tenths % 10);
    if tenths == 0 || whole >= 100 { format!("{whole} {unit}") } else { format!("{whole}.{tenths} {unit}") }
}

/// `12s`, `5m`, `3h`, `9d`: how long ago, one unit.
pub(crate) fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(since).as_secs().max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Seconds as `✓ … in 0.9s` shows them.
pub(crate) fn took(duration: Duration) -> String {
    format!("{:.1}s", duration.as_secs_f64())
}

/// A time to come: an instant, a local date and time, the next time the clock shows `07:30`, or `+2h`.
pub(crate) fn time_to_come(text: &str, now: &Zoned) -> Result<Timestamp, BadUnit> {
    let bad = || BadUnit::Time(text.to_owned());
    if let Some(later) = text.strip_prefix('+') {
        let later = duration(later).ok().and_then(|later| SignedDuration::try_from(later).ok()).ok_or_else(bad)?;
        return now.timestamp().checked_add(later).map_err(|_out_of_range| bad());
    }
    if let Ok(instant) = text.parse::<Timestamp>() {
        return Ok(instant);
    }
    if text.len() > "23:59:59".len() {
        let local: civil::DateTime = text.parse().map_err(|_not_a_time| bad())?;
        return local.to_zoned(now.time_zone().clone()).map(|zoned| zoned.timestamp()).map_err(|_out_of_range| bad());
    }
    let clock: civil::Time = text.parse().map_err(|_not_a_time| bad())?;
    let today = now.with().time(clock).build().map_err(|_out_of_range| bad())?;
    let next = if today > *now { Ok(today) } else { today.tomorrow().and_then(|day| day.with().time(clock).build()) };
    next.map(|zoned| zoned.timestamp()).map_err(|_out_of_range| bad())
}

/// `A=1,B=two`: a comma starts a new variable only where a name and `=` follow, and `\,` never does.
pub(crate) fn variables(text: &str) -> Result<Vec<(String, String)>, BadUnit> {
    const ESCAPED: char = '\u{0}';
    let text = text.replace("\\,", &ESCAPED.to_string());
    let mut found: Vec<(String, String)> = Vec::new();
    for piece in text.split(',') {
        let piece = piece.replace(ESCAPED, ",");
        match (piece.split_once('='), found.last_mut()) {
            (Some((name, value)), _) if is_variable_name(name) => found.push((name.to_owned(), value.to_owned())),
            (_, Some((_, value))) => {
                value.push(',');
                value.push_str(&piece);
            }
            (_, None) => return Err(BadUnit::Variable(piece)),
        }
    }
    Ok(found)
}

fn is_variable_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_gos_and_days() {
        let ms = |text: &str| duration(text).map(|duration| duration.as_millis()).ok();
        assert_eq!(ms("2s"), Some(2000));
        assert_eq!(ms("1h30m"), Some(5_400_000));
        assert_eq!(ms("1.5h"), Some(5_400_000));
        assert_eq!(ms("1d"), Some(86_400_000));
        assert_eq!(ms("250ms"), Some(250));
        for bad in ["", "5", "s", "-1s", "1s2", "1 h", "one", "99999999999999999999d", "1..2s", "٣s"] {
            assert_eq!(ms(bad), None, "{bad:?}");
        }
        assert_eq!(duration_or_never("never").unwrap(), "never");
        assert_eq!(duration_or_never("1d").unwrap(), "86400s");
        assert_eq!(duration_or_never("1.5s").unwrap(), "1500ms");
        assert!(duration_or_never("always").unwrap_err().to_string().contains("always"));
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for text in ["200G", "200g", "200GB", "200GiB", "200 G", "204800M"] {
            assert_eq!(size_bytes(text), Ok(200 << 30), "{text}");
        }
        assert_eq!(size_bytes("1.5T"), Ok(3 << 39));
        assert_eq!(size_bytes("4096"), Ok(4096));
        for bad in ["", "G", "ten", "-1G", "1X", "99999999T", "1.5.5G"] {
            assert!(size_bytes(bad).is_err(), "{bad:?}");
        }
        assert_eq!(show_bytes(100 << 30), "100 GiB");
        assert_eq!(show_bytes((1 << 30) + (1 << 29)), "1.5 GiB");
        assert_eq!(show_bytes(1_503_238_553), "1.4 GiB");
        assert_eq!(show_bytes(512), "512 B");
        assert_eq!(show_bytes(u64::MAX), "16777216 TiB");
    }

    #[test]
    fn ages_have_one_unit() {
        let age_of = |seconds: i64| age(Timestamp::UNIX_EPOCH, Timestamp::from_second(seconds).unwrap());
        assert_eq!([0, 119, 120, 7_199, 7_200, 172_800].map(age_of), ["0s", "119s", "2m", "119m", "2h", "2d"]);
        assert_eq!(age_of(-5), "0s", "a clock that differs from the server's");
    }

    #[test]
    fn times_to_come_are_instants_or_local() {
        let now: Zoned = "2026-01-02T08:00:00+01:00[+01:00]".parse().unwrap();
        let at = |text: &str| time_to_come(text, &now).map(|time| time.to_string());
        assert_eq!(at("2026-12-31T06:30:00Z").unwrap(), "2026-12-31T06:30:00Z");
        assert_eq!(at("2026-12-31 07:30").unwrap(), "2026-12-31T06:30:00Z");
        assert_eq!(at("09:15").unwrap(), "2026-01-02T08:15:00Z");
        assert_eq!(at("07:30").unwrap(), "2026-01-03T06:30:00Z", "today's has passed");
        assert_eq!(at("+2h").unwrap(), "2026-01-02T09:00:00Z");
        for bad in ["", "soon", "25:00", "+", "2026-13-01 00:00"] {
            assert!(at(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn variables_are_separated_by_commas_before_names() {
        let pairs = |text: &str| {
            variables(text)
                .map(|found| found.into_iter().map(|(name, value)| format!("{name}→{value}")).collect::<Vec<_>>())
        };
        assert_eq!(pairs("A=1,B=two").unwrap(), ["A→1", "B→two"]);
        assert_eq!(pairs("A=1,2,B=").unwrap(), ["A→1,2", "B→"]);
        assert_eq!(pairs("A=x=y").unwrap(), ["A→x=y"]);
        assert_eq!(pairs("A=1\\,B=2").unwrap(), ["A→1,B=2"]);
        assert_eq!(pairs("A=ünï 🎈").unwrap(), ["A→ünï 🎈"]);
        for bad in ["", "A", "1A=2", "=x"] {
            assert!(pairs(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in ".{0,60}") {
            drop((duration(&text), size_bytes(&text), variables(&text), time_to_come(&text, &Zoned::now())));
        }
    }
}
