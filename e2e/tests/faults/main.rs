//! What goes wrong with a host: `sprited` killed, stopped, its local state lost. Each test has a cluster of its own, one at a time: starting
//! one costs a boot, and two would only slow each other down.

mod bucket;
mod host;
mod memory;
mod process;
mod restart;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held by a test as long as its cluster runs.
pub(crate) fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
