//! Durations as the API writes and reads them: Go's syntax, `30s`, `1h30m`, `500ms`.

use std::time::Duration;

/// Units from large to small, each in milliseconds.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Reads `10s`, `1m30s`, `1.5h`, `500ms`; a bare number is seconds. `None` when it is something else.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return Duration::try_from_secs_f64(text.parse().ok()?).ok();
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(number_end);
        let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let (_, unit_ms) = UNITS.iter().find(|(known, _)| *known == unit)?;
        let unit_s = Duration::from_millis(*unit_ms).as_secs_f64();
        let count: f64 = number.parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(count * unit_s).ok()?)?;
        rest = after;
    }
    (!text.is_empty()).then_some(total)
}

/// The shortest form that reads back as the same number of milliseconds.
pub(crate) fn format_ms(mut ms: u64) -> String {
    if ms == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for (unit, unit_ms) in UNITS {
        if ms >= unit_ms {
            text.push_str(&format!("{}{unit}", ms / unit_ms));
            ms %= unit_ms;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_gos() {
        let check = |text: &str, ms: Option<u128>| assert_eq!(parse(text).map(|d| d.as_millis()), ms, "{text:?}");
        check("30s", Some(30_000));
        check("1h30m", Some(5_400_000));
        check("1.5h", Some(5_400_000));
        check("500ms", Some(500));
        check("2", Some(2000));
        check("0s", Some(0));
        for bad in ["", "s", "-1s", "1d", "1s2", "never", "1e9h", "1.2.3s", ".", "∞"] {
            check(bad, None);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(ms in 0u64..1 << 40) {
            prop_assert_eq!(parse(&format_ms(ms)), Some(Duration::from_millis(ms)));
        }

        #[test]
        fn any_text_is_read_without_harm(text in ".{0,60}") {
            let _duration = parse(&text);
        }
    }
}
