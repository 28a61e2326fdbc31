//! Requests that need the sprite awake: they wait for it, hold it awake, and let go.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{
    super::{Event, State},
    Task, send,
};
use crate::host::{Running, WakeError};

/// Requests that may wait for one wake; more are refused.
const WAITING_MAX: usize = 1024;

/// Counts requests that ended without their having to wait for the owner.
#[derive(Debug, Default)]
pub(super) struct Uses {
    ended: AtomicU32,
    pub(super) changed: Notify,
}

/// Holds a sprite awake while it lives.
#[derive(Debug)]
pub struct UseGuard(Arc<Uses>);

impl Drop for UseGuard {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
        self.0.changed.notify_one();
    }
}

/// A request that waits for the sprite to answer.
pub(super) struct Waiting {
    pub(super) reply: oneshot::Sender<Result<Running, WakeError>>,
    /// Goes to the request, or releases its use when it is refused.
    guard: UseGuard,
}

impl Task {
    pub(super) fn begin_use(&mut self, reply: oneshot::Sender<Result<Running, WakeError>>) {
        let sprite = self.id();
        if self.waiting.len() >= WAITING_MAX {
            return send(reply, Err(WakeError::NoCapacity(sprite)));
        }
        let was_running = *self.vm.state() == State::Running;
        if self.vm.step(Event::Used, Instant::now()).map(|change| change.map(|change| self.begin(change))).is_err() {
            return send(reply, Err(WakeError::NotHere(sprite)));
        }
        self.waiting.push_back(Waiting { reply, guard: UseGuard(Arc::clone(&self.uses)) });
        if was_running && *self.vm.state() == State::Running {
            self.woke_by = "none";
            self.answer_waiting();
        }
    }

    pub(super) fn answer_waiting(&mut self) {
        let Some(process) = self.parts.as_ref().and_then(|parts| parts.process.as_ref()) else { return };
        for Waiting { reply, guard } in self.waiting.drain(..) {
            let running = Running {
                agent: process.agent.clone(),
                net: Arc::clone(&process.net),
                ended: process.ended.clone(),
                was: self.woke_by,
                guard,
            };
            // A caller that is gone drops its guard here, which releases the use.
            send(reply, Ok(running));
        }
    }

    pub(super) fn refuse_waiting(&mut self) {
        let sprite = self.id();
        for waiting in self.waiting.drain(..) {
            send(waiting.reply, Err(WakeError::NoCapacity(sprite)));
        }
    }

    pub(super) fn released(&mut self) {
        for _ in 0..self.uses.ended.swap(0, Ordering::Relaxed) {
            self.step(Event::Released);
        }
    }
}
