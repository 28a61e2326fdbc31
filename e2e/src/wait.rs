//! Waiting for a state.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

const POLL_PAUSE: Duration = Duration::from_millis(100);

/// Polls until `state` gives a value. What it last said is in the failure.
///
/// # Panics
///
/// When the deadline passes.
#[track_caller]
pub fn eventually<T>(what: &str, deadline: Duration, mut state: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + deadline;
    loop {
        match state() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= end => {
                panic!("{what} did not happen within {deadline:?}; last seen: {last}")
            }
            Err(_) => pause(POLL_PAUSE),
        }
    }
}

/// For a time that is itself what is tested (dead for a minute), or between two looks at a state that nobody announces.
pub fn pause(duration: Duration) {
    let (_never_sends, receiver) = mpsc::sync_channel::<()>(0);
    match receiver.recv_timeout(duration) {
        Ok(()) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
    }
}
