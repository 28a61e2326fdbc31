//! The life of one sprite on one host: a pure state machine.
//!
//! ```text
//!                 ┌──────── Used ────────┐        ┌──── Used ────┐
//!                 ▼                      │        ▼              │
//!  Creating ─▶ Running ──idle──▶ Paused ─┴─after─▶ Suspended ─after─▶ Cold
//!                 ▲ │                                  │               │
//!                 │ └── restore, reboot                └──── Used ─────┴──▶ Running   (memory, else disk)
//!                 └──────────────── Used ── Failed ◀── whatever could not be done
//!  any ── DestroyOrdered ──▶ Destroyed
//! ```
//!
//! [`Vm::step`] is the only place that assigns the state. It has no I/O, no clock and no tasks: the owner task (`vm::task`) feeds it events, performs
//! the one [`Change`] it asks for, and reports back where that ended ([`Event::Settled`]).
//!
//! # Invariants
//!
//! 1. At most one change is under way; while it is, wishes are remembered, not acted on.
//! 2. A sprite that is in use ends up running, or failed with a reason; it is never put to sleep by the idle policy.
//! 3. `Destroyed` is final.
//! 4. An order to sleep is carried out before any request is served: one that comes on the way down is held, and wakes the sprite from where the order
//!    ends. From then on the order holds until the next request; the idle policy never wakes anything, but may let it sleep deeper.
//! 5. An order whose change failed is over: whoever gave it is told, and nothing tries again by itself.

#![warn(clippy::wildcard_enum_match_arm)]

use std::time::Duration;

use proto::record::IdlePolicy;
use tokio::time::Instant;

pub(crate) mod change;
pub mod task;

/// A sprite that is always on and failed, or found no room, is started again after this, so that a VM that dies at once does not keep the host busy.
const ALWAYS_ON_RETRY: Duration = Duration::from_secs(10);

/// Where a sprite is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Being made, or waiting in the pool without a name.
    Creating,
    /// The guest answers.
    Running,
    /// vCPUs stopped, everything in RAM.
    Paused,
    /// Device state and memory in files, no process.
    Suspended,
    /// Only the disk.
    Cold,
    /// A change is under way.
    Changing(Change),
    /// The last change could not be done. The next request tries a boot from the disk.
    Failed,
    /// Gone for ever.
    Destroyed,
}

/// Work for the owner task; one at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Stop the vCPUs.
    Pause,
    /// Let them run again and set the clock right.
    Unpause,
    /// Write device state and memory to files and end the process. From `Running` or `Paused`.
    Suspend,
    /// Load the suspended image, once; if that cannot be done, boot from the disk.
    Resume,
    /// A fresh golden VM on the sprite's disk.
    Boot,
    /// Keep the disk only: flush it to the bucket, drop memory, give up ownership.
    GoCold,
    /// Put the disk back to a checkpoint, by ruling 15.
    Restore { checkpoint: String },
    /// End the VM and start a fresh one on the same disk.
    Reboot,
    /// End everything and free it.
    Destroy,
}

impl Change {
    /// Where a change to a deeper sleep ends if it succeeds.
    fn depth(&self) -> Option<Settled> {
        match self {
            Self::Pause => Some(Settled::Paused),
            Self::Suspend => Some(Settled::Suspended),
            Self::GoCold => Some(Settled::Cold),
            Self::Unpause | Self::Resume | Self::Boot | Self::Restore { .. } | Self::Reboot | Self::Destroy => None,
        }
    }

    /// Whether it was to put the sprite into a deeper sleep, and ended elsewhere.
    fn missed(&self, settled: Settled) -> bool {
        self.depth().is_some_and(|depth| depth != settled)
    }

    /// Whether the sprite is awake if it succeeds.
    fn wakes(&self) -> bool {
        match self {
            Self::Unpause | Self::Resume | Self::Boot | Self::Restore { .. } | Self::Reboot => true,
            Self::Pause | Self::Suspend | Self::GoCold | Self::Destroy => false,
        }
    }
}

/// How deep to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    Paused,
    Suspended,
    Cold,
}

/// A state in which nothing is under way: what a change can end in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    Running,
    Paused,
    Suspended,
    Cold,
    Failed,
    Destroyed,
}

/// What can happen to a sprite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request began and needs the sprite awake.
    Used,
    /// A request ended.
    Released,
    /// Something inside counts as activity (a connected session, a task) or no longer does.
    Busy(bool),
    /// Something inside showed activity this moment, such as output of a detached session.
    Active,
    /// Put to sleep by order. What is used from now on wakes it from there.
    SleepOrdered(Depth),
    RestoreOrdered {
        checkpoint: String,
    },
    RebootOrdered,
    DestroyOrdered,
    /// The policy in the record changed.
    PolicyChanged {
        idle: IdlePolicy,
        always_on: bool,
    },
    /// The change under way ended here.
    Settled(Settled),
    /// The VM's process went away by itself.
    ProcessDied,
    /// Time passed.
    Tick,
}

/// Why an event changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the sprite is destroyed")]
    Destroyed,
    #[error("another restore or restart is already waiting")]
    JobPending,
    #[error("no change was under way")]
    NothingUnderWay,
}

/// State of one sprite. See the module's diagram.
#[derive(Clone, Debug)]
pub struct Vm {
    state: State,
    since: Instant,
    /// Requests that hold the sprite awake now.
    uses: u32,
    busy: bool,
    last_active: Instant,
    /// An order that is being carried out, or holds.
    ordered: Option<Depth>,
    /// Someone waits for the sprite to answer.
    wanted: bool,
    job: Option<Change>,
    /// The last wake came to nothing: one that nobody waits for is not tried before.
    retry_at: Option<Instant>,
    destroy: bool,
    idle: IdlePolicy,
    always_on: bool,
}

impl Vm {
    pub fn new(settled: Settled, idle: IdlePolicy, always_on: bool, now: Instant) -> Self {
        Self {
            state: settled.into(),
            since: now,
            uses: 0,
            busy: false,
            last_active: now,
            ordered: None,
            wanted: false,
            job: None,
            retry_at: None,
            destroy: false,
            idle,
            always_on,
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Since when the state is what it is.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Last moment at which something used the sprite.
    pub fn last_active(&self) -> Instant {
        self.last_active
    }

    /// Whether requests or activity inside hold the sprite awake.
    pub fn in_use(&self) -> bool {
        self.uses > 0 || self.busy
    }

    /// How deep it sleeps. One that failed needs as much to wake as a cold one.
    pub fn depth(&self) -> Option<Depth> {
        match self.state {
            State::Creating | State::Running | State::Changing(_) => None,
            State::Paused => Some(Depth::Paused),
            State::Suspended => Some(Depth::Suspended),
            State::Cold | State::Failed | State::Destroyed => Some(Depth::Cold),
        }
    }

    /// The order that is still to be carried out.
    fn pending_order(&self) -> Option<Depth> {
        self.ordered.filter(|depth| self.depth() < Some(*depth))
    }

    /// Applies one event and returns the change to perform now, if any. `Refused` means that nothing changed.
    pub fn step(&mut self, event: Event, now: Instant) -> Result<Option<Change>, Refused> {
        if self.state == State::Destroyed {
            return match event {
                Event::Released | Event::Tick | Event::Busy(_) | Event::Active | Event::ProcessDied => Ok(None),
                Event::Used
                | Event::SleepOrdered(_)
                | Event::RestoreOrdered { .. }
                | Event::RebootOrdered
                | Event::DestroyOrdered
                | Event::PolicyChanged { .. }
                | Event::Settled(_) => Err(Refused::Destroyed),
            };
        }
        self.apply(event, now)?;
        let change = self.next_change(now);
        if let Some(change) = &change {
            self.enter(State::Changing(change.clone()), now);
        }
        Ok(change)
    }

    /// Records what the event means; decides nothing.
    fn apply(&mut self, event: Event, now: Instant) -> Result<(), Refused> {
        match event {
            Event::Used => {
                self.uses += 1;
                self.wanted = self.state != State::Running;
                if self.pending_order().is_none() {
                    self.ordered = None;
                }
                self.last_active = now;
            }
            Event::Released => {
                self.uses = self.uses.saturating_sub(1);
                self.last_active = now;
            }
            Event::Busy(busy) => {
                if self.busy || busy {
                    self.last_active = now;
                }
                self.busy = busy;
            }
            Event::Active => self.last_active = now,
            // A deeper sleep fulfils the order for a lighter one as well.
            Event::SleepOrdered(depth) => self.ordered = self.pending_order().max(Some(depth)),
            Event::RestoreOrdered { checkpoint } => self.take_job(Change::Restore { checkpoint })?,
            Event::RebootOrdered => self.take_job(Change::Reboot)?,
            Event::DestroyOrdered => self.destroy = true,
            Event::PolicyChanged { idle, always_on } => {
                self.idle = idle;
                self.always_on = always_on;
            }
            Event::Settled(settled) => self.settle(settled, now)?,
            Event::ProcessDied => self.process_died(now),
            Event::Tick => {}
        }
        Ok(())
    }

    fn take_job(&mut self, job: Change) -> Result<(), Refused> {
        if self.job.is_some() {
            return Err(Refused::JobPending);
        }
        self.job = Some(job);
        Ok(())
    }

    fn settle(&mut self, settled: Settled, now: Instant) -> Result<(), Refused> {
        let ended = match &self.state {
            State::Creating => None,
            State::Changing(change) => Some(change.clone()),
            State::Running | State::Paused | State::Suspended | State::Cold | State::Failed | State::Destroyed => {
                return Err(Refused::NothingUnderWay);
            }
        };
        self.enter(settled.into(), now);
        match settled {
            Settled::Running => {
                self.retry_at = None;
                self.last_active = now;
            }
            Settled::Failed | Settled::Suspended | Settled::Cold | Settled::Destroyed => self.busy = false,
            Settled::Paused => {}
        }
        if ended.as_ref().is_some_and(|change| change.missed(settled)) {
            self.ordered = None;
        }
        // Whoever waits is answered, unless an order comes first.
        if settled == Settled::Running && self.pending_order().is_none() {
            self.wanted = false;
        }
        // Whoever waited is told about the failure; only a new request tries again.
        let was_wake = matches!(ended, Some(Change::Boot | Change::Resume | Change::Unpause));
        if settled == Settled::Failed || (was_wake && settled != Settled::Running) {
            self.wanted = false;
            self.retry_at = Some(now + ALWAYS_ON_RETRY);
        }
        Ok(())
    }

    /// While a change is under way its performer notices by itself.
    fn process_died(&mut self, now: Instant) {
        match self.state {
            State::Running | State::Paused => {
                self.busy = false;
                self.retry_at = Some(now + ALWAYS_ON_RETRY);
                self.enter(State::Failed, now);
            }
            State::Creating
            | State::Suspended
            | State::Cold
            | State::Changing(_)
            | State::Failed
            | State::Destroyed => {}
        }
    }

    fn enter(&mut self, state: State, now: Instant) {
        self.state = state;
        self.since = now;
    }

    fn next_change(&mut self, now: Instant) -> Option<Change> {
        match self.state {
            State::Creating | State::Changing(_) | State::Destroyed => return None,
            State::Running | State::Paused | State::Suspended | State::Cold | State::Failed => {}
        }
        if self.destroy {
            return Some(Change::Destroy);
        }
        if let Some(job) = self.job.take() {
            return Some(job);
        }
        match self.pending_order() {
            Some(Depth::Paused) => return Some(Change::Pause),
            Some(Depth::Suspended) => return Some(Change::Suspend),
            Some(Depth::Cold) => return Some(Change::GoCold),
            None => {}
        }
        if self.awake_wanted(now)
            && let Some(wake) = self.wake()
        {
            self.ordered = None;
            return Some(wake);
        }
        let due = |deadline: Option<Instant>| deadline.is_some_and(|at| now >= at);
        match self.state {
            State::Running => due(self.pause_due()).then_some(Change::Pause),
            State::Paused => due(self.deeper_due()).then_some(Change::Suspend),
            State::Suspended => due(self.deeper_due()).then_some(Change::GoCold),
            State::Cold | State::Failed | State::Creating | State::Changing(_) | State::Destroyed => None,
        }
    }

    fn awake_wanted(&self, now: Instant) -> bool {
        let rested = self.retry_at.is_none_or(|at| now >= at);
        self.wanted || (self.always_on && self.ordered.is_none() && rested)
    }

    /// How it is woken from where it is.
    fn wake(&self) -> Option<Change> {
        match self.state {
            State::Paused => Some(Change::Unpause),
            State::Suspended => Some(Change::Resume),
            State::Cold | State::Failed => Some(Change::Boot),
            State::Creating | State::Running | State::Changing(_) | State::Destroyed => None,
        }
    }

    /// When the idle policy pauses a running sprite, if nothing happens until then.
    fn pause_due(&self) -> Option<Instant> {
        if self.in_use() || self.always_on {
            return None;
        }
        self.idle.pause_after_ms.map(|after_ms| self.last_active + Duration::from_millis(after_ms))
    }

    /// When the idle policy puts a sleeping sprite into the next deeper sleep. One that never sleeps by itself stays as deep as it was told.
    fn deeper_due(&self) -> Option<Instant> {
        self.idle.pause_after_ms?;
        let after_ms = match self.state {
            State::Paused => self.idle.suspend_after_ms,
            State::Suspended => self.idle.cold_after_ms,
            State::Creating | State::Running | State::Cold | State::Changing(_) | State::Failed | State::Destroyed => {
                return None;
            }
        };
        Some(self.since + Duration::from_millis(after_ms))
    }

    /// When [`Event::Tick`] can change something.
    pub fn deadline(&self) -> Option<Instant> {
        let retry = self.retry_at.filter(|_| self.always_on && self.ordered.is_none());
        match self.state {
            State::Running => self.pause_due(),
            State::Paused | State::Suspended => retry.into_iter().chain(self.deeper_due()).min(),
            State::Cold | State::Failed => retry,
            State::Creating | State::Changing(_) | State::Destroyed => None,
        }
    }
}

impl From<Settled> for State {
    fn from(settled: Settled) -> Self {
        match settled {
            Settled::Running => Self::Running,
            Settled::Paused => Self::Paused,
            Settled::Suspended => Self::Suspended,
            Settled::Cold => Self::Cold,
            Settled::Failed => Self::Failed,
            Settled::Destroyed => Self::Destroyed,
        }
    }
}

impl State {
    /// The name the API shows.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Cold => "cold",
            Self::Failed => "failed",
            Self::Destroyed => "destroyed",
            Self::Changing(change) => match change {
                Change::Pause | Change::Suspend | Change::GoCold | Change::Destroy => "running",
                Change::Unpause => "paused",
                Change::Resume => "suspended",
                Change::Boot | Change::Reboot => "cold",
                Change::Restore { .. } => "restoring",
            },
        }
    }
}

#[cfg(test)]
mod tests;
