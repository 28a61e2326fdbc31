//! How much a session prints.

use std::time::{Duration, Instant};

/// Over which time bytes per second are counted, and for how long a session counts as active.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// Bytes per second over the last window.
#[derive(Debug, Default)]
pub(super) struct Rate {
    began: Option<Instant>,
    current: usize,
    last: usize,
}

impl Rate {
    fn roll(&mut self, now: Instant) -> Duration {
        let began = *self.began.get_or_insert(now);
        let age = now.duration_since(began);
        if age < RATE_WINDOW {
            return age;
        }
        self.last = if age < RATE_WINDOW * 2 { self.current } else { 0 };
        self.current = 0;
        self.began = Some(now);
        Duration::ZERO
    }

    pub(super) fn add(&mut self, now: Instant, bytes: usize) {
        self.roll(now);
        self.current += bytes;
    }

    pub(super) fn per_second(&mut self, now: Instant) -> f64 {
        let age = self.roll(now);
        let bytes = u32::try_from(self.last + self.current).unwrap_or(u32::MAX);
        f64::from(bytes) / (RATE_WINDOW + age).as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_forgets() {
        let begun = Instant::now();
        let mut rate = Rate::default();
        rate.add(begun, 5000);
        assert!((rate.per_second(begun) - 1000.0).abs() < 1.0);
        assert!(rate.per_second(begun + RATE_WINDOW * 3) < f64::EPSILON);
    }
}
