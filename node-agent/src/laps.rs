//! Where the time of a longer work goes, for the log.

use std::{fmt, time::Instant};

/// A stopwatch with named laps. Shown as `memory 31 ms, network 12 ms, …`.
#[derive(Debug)]
pub(crate) struct Laps {
    last: Instant,
    done: Vec<(&'static str, u128)>,
}

impl Laps {
    pub(crate) fn begin() -> Self {
        Self { last: Instant::now(), done: Vec::new() }
    }

    /// What was done since the last lap.
    pub(crate) fn lap(&mut self, what: &'static str) {
        let now = Instant::now();
        self.done.push((what, (now - self.last).as_millis()));
        self.last = now;
    }
}

impl fmt::Display for Laps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (what, millis)) in self.done.iter().enumerate() {
            let separator = if number == 0 { "" } else { ", " };
            write!(f, "{separator}{what} {millis} ms")?;
        }
        Ok(())
    }
}
