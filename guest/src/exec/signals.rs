//! Signals as clients name them.

use nix::sys::signal::Signal;

/// `TERM`, `SIGTERM`, `sigterm`, `15`.
pub(super) fn parse(text: &str) -> Option<Signal> {
    if let Ok(number) = text.parse::<i32>() {
        return Signal::try_from(number).ok();
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    name.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_many_spellings() {
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(parse(text), Some(Signal::SIGTERM), "{text}");
        }
        assert_eq!(parse("INT"), Some(Signal::SIGINT));
        assert_eq!(parse("WINCH"), Some(Signal::SIGWINCH));
        for text in ["", "SIG", "NOSUCH", "0", "-9", "99", "SIGSIGTERM"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
