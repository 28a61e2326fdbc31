//! How fast this host's time stamp counter runs. Without hardware virtualisation a guest's counter is the host's, and a guest that knows its rate has a
//! clock of nanoseconds; else its time moves in steps of 4 ms, and its tick never stops.

#![expect(unsafe_code, reason = "RDTSC")]

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};

use crate::files;

/// How long it is watched. The two readings at each end are at most some 100 ns apart, so the result is right to some 2 ppm.
const WATCHED: Duration = Duration::from_millis(100);
/// Readings of which the closest pair is used.
const TRIES: u32 = 16;
/// What is measured differs a little from time to time, and from host to host of the same kind; snapshots are kept apart by this.
const STEP_KHZ: u64 = 100;
/// A rate as near as this to the one this host has kept is the same: 77 ppm of 2.6 GHz, less than what time keeping in the guest corrects.
const SAME_KHZ: u32 = 200;

/// The rate, rounded to 100 kHz; `None` if the counter is not steady, or cannot be measured.
pub fn steady_khz() -> Option<u32> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    if !["constant_tsc", "nonstop_tsc"].iter().all(|flag| flags.split(' ').any(|found| found == *flag)) {
        return None;
    }
    let (ticks, time) = reading()?;
    let end = Instant::now() + WATCHED;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::park_timeout(left);
    }
    let (later_ticks, later) = reading()?;
    rounded_khz(later_ticks.checked_sub(ticks)?, later.checked_sub(time)?)
}

/// The rate that this host goes by: as it was measured the first time, and kept in the file `kept`, while it is about that. Every snapshot, and the memory of
/// every sprite that sleeps, belongs to one rate: it must not change because a rounded number lies near a boundary.
pub fn lasting_khz(kept: &Path) -> io::Result<Option<u32>> {
    let Some(measured) = steady_khz() else { return Ok(None) };
    let before = match std::fs::read(kept) {
        Ok(text) => String::from_utf8_lossy(&text).trim().parse().ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let khz = settled(before, measured);
    if before != Some(khz) {
        files::write_atomically(kept, format!("{khz}\n").as_bytes())?;
    }
    Ok(Some(khz))
}

fn settled(before: Option<u32>, measured: u32) -> u32 {
    before.filter(|before| before.abs_diff(measured) <= SAME_KHZ).unwrap_or(measured)
}

fn rounded_khz(ticks: u64, time: Duration) -> Option<u32> {
    let khz = u128::from(ticks).checked_mul(1_000_000)?.checked_div(time.as_nanos())?;
    let steps = (u64::try_from(khz).ok()? + STEP_KHZ / 2) / STEP_KHZ;
    u32::try_from(steps * STEP_KHZ).ok().filter(|khz| *khz > 0)
}

/// Counter and clock at the same time, as nearly as can be.
fn reading() -> Option<(u64, Duration)> {
    let mut best: Option<(u64, (u64, Duration))> = None;
    for _ in 0..TRIES {
        let before = counter();
        let time = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_RAW).ok()?);
        let apart = counter().checked_sub(before)?;
        if best.is_none_or(|(closest, _)| apart < closest) {
            best = Some((apart, (before + apart / 2, time)));
        }
    }
    best.map(|(_, reading)| reading)
}

fn counter() -> u64 {
    // SAFETY: every x86_64 has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_rounded() {
        assert_eq!(rounded_khz(210_000_480, Duration::from_millis(100)), Some(2_100_000));
        assert_eq!(rounded_khz(209_994_000, Duration::from_millis(100)), Some(2_099_900));
        assert_eq!(rounded_khz(1, Duration::ZERO), None);
        assert_eq!(rounded_khz(0, WATCHED), None);
    }

    #[test]
    fn a_rate_near_a_boundary_stays_what_it_was() {
        assert_eq!(settled(None, 2_100_000), 2_100_000);
        assert_eq!(settled(Some(2_100_100), 2_100_000), 2_100_100);
        assert_eq!(settled(Some(2_099_800), 2_100_000), 2_099_800);
        assert_eq!(settled(Some(2_600_000), 2_100_000), 2_100_000, "another machine");
    }

    #[test]
    fn the_first_measurement_lasts_and_a_damaged_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("tsc_khz");
        let Some(first) = lasting_khz(&kept).unwrap() else { return };
        std::fs::write(&kept, format!("{}\n", first + SAME_KHZ / 2)).unwrap();
        assert_eq!(lasting_khz(&kept).unwrap(), Some(first + SAME_KHZ / 2));
        std::fs::write(&kept, b"no number \xff").unwrap();
        let again = lasting_khz(&kept).unwrap().unwrap();
        assert_eq!(std::fs::read_to_string(&kept).unwrap(), format!("{again}\n"));
    }

    #[test]
    fn two_measurements_agree() {
        if let (Some(one), Some(two)) = (steady_khz(), steady_khz()) {
            assert!(one.abs_diff(two) <= 200, "{one} and {two}");
        }
    }
}
