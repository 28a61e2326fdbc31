//! The owner of one sprite: the only task that touches its VM, its volume handle and its state.
//!
//! ```text
//!  requests ──Command──▶ ┌──────────┐ ──step──▶ Vm (pure)
//!  guest events ───────▶ │  owner   │ ◀─Change──
//!  process end ────────▶ │  task    │ ──spawn──▶ change::make ──▶ (Parts, Outcome) ──▶ Event::Settled
//!  timers ─────────────▶ └──────────┘ ──watch──▶ SpriteStatus
//! ```
//!
//! | module | what |
//! |---|---|
//! | here | commands, and changes from their beginning to their end |
//! | [`requests`] | who needs the sprite awake |
//! | [`orders`] | who ordered a sleep, a restore, a restart |
//! | [`timers`] | wakes by the clock |
//! | [`watch`] | what the VM does by itself |
//! | [`status`] | what others see |
//!
//! # Invariants
//!
//! 1. While a change is under way the parts are with it; the task only remembers.
//! 2. Every reply channel is answered when its change settles, also when it fails.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use proto::{agent::GuestEvent, id::SpriteId, node::SpriteStatus, record::SpriteRecord};
use tokio::{
    sync::{mpsc, oneshot, watch as tell},
    task::JoinHandle,
    time::Instant,
};

use super::{
    Change, Depth, Event, Settled, State, Vm,
    change::{self, Outcome, Parts, chain},
};
use crate::{
    host::{Running, WakeError},
    preserve::Preserved,
    resources::Resources,
};

mod orders;
mod requests;
mod status;
mod timers;
mod watch;

pub use orders::{OrderError, SleepReport};
pub use requests::UseGuard;

use orders::SleepOrder;
use requests::{Uses, Waiting};
use status::push_event;
use watch::Watched;

/// Commands that may wait for one sprite; more and the caller waits.
pub(crate) const COMMANDS_MAX: usize = 256;
/// Numbers in the status are refreshed this often while something changes.
const STATUS_PERIOD: Duration = Duration::from_secs(2);

/// What others ask of a sprite's owner.
#[derive(Debug)]
pub(crate) enum Command {
    Use {
        reply: oneshot::Sender<Result<Running, WakeError>>,
    },
    Sleep {
        depth: Depth,
        reply: oneshot::Sender<Result<SleepReport, OrderError>>,
    },
    Restore {
        checkpoint: String,
        reply: oneshot::Sender<Result<(), OrderError>>,
    },
    Reboot {
        reply: oneshot::Sender<Result<(), OrderError>>,
    },
    Destroy {
        reply: oneshot::Sender<Result<(), OrderError>>,
    },
    /// The record in the bucket changed.
    Reload {
        record: Box<SpriteRecord>,
    },
    /// The volume has grown under the living VM.
    AnnounceDiskSize {
        size_bytes: u64,
        reply: oneshot::Sender<Result<(), String>>,
    },
    Guest(Box<GuestEvent>),
    ProcessEnded {
        pid: i32,
    },
    /// The session of this number with the guest has ended.
    AgentGone {
        session: u64,
    },
    /// The node agent is going away; the VM stays as it is.
    Leave {
        reply: oneshot::Sender<()>,
    },
}

/// Handle to a sprite's owner task.
#[derive(Clone, Debug)]
pub(crate) struct SpriteHandle {
    pub commands: mpsc::Sender<Command>,
    pub status: tell::Receiver<SpriteStatus>,
}

struct Task {
    resources: Arc<Resources>,
    vm: Vm,
    parts: Option<Parts>,
    under_way: Option<JoinHandle<(Parts, Outcome)>>,
    commands: mpsc::Receiver<Command>,
    /// For the watchers this task starts.
    own: mpsc::WeakSender<Command>,
    uses: Arc<Uses>,
    waiting: VecDeque<Waiting>,
    sleeping: Vec<SleepOrder>,
    /// Who waits for a restore or reboot, in order, and for the destroy.
    jobs: VecDeque<oneshot::Sender<Result<(), OrderError>>>,
    destroying: Vec<oneshot::Sender<Result<(), OrderError>>>,
    /// As it was read last; also while the parts are away.
    record: Option<SpriteRecord>,
    watched: Watched,
    /// A write of the guest found no space.
    out_of_space: bool,
    preserving: Option<JoinHandle<Preserved>>,
    /// The disk is being given up; nothing may be done with it before that has ended.
    releasing: Option<JoinHandle<()>>,
    detached_output_bytes: u64,
    status: tell::Sender<SpriteStatus>,
    next_wake: Option<Instant>,
    woke_by: &'static str,
}

/// Starts the owner of a sprite that is in `settled` with `parts`.
///
/// `event` is what people should know about how it got there.
pub(crate) fn spawn(
    resources: Arc<Resources>,
    parts: Parts,
    settled: Settled,
    reason: &str,
    event: Option<String>,
) -> SpriteHandle {
    let (sender, commands) = mpsc::channel(COMMANDS_MAX);
    let now = Instant::now();
    let record = parts.record.clone();
    let (idle, always_on) = record.as_ref().map_or_else(Default::default, |record| (record.idle, record.always_on));
    let mut first = SpriteStatus {
        sprite_id: parts.id.to_string(),
        reason: reason.to_owned(),
        vcpus: parts.size.vcpus(),
        memory_bytes: parts.size.memory_bytes(),
        ..Default::default()
    };
    if let Some(event) = event {
        push_event(&mut first, event);
    }
    let (status, watch) = tell::channel(first);
    let mut task = Task {
        resources,
        vm: Vm::new(settled, idle, always_on, now),
        parts: Some(parts),
        under_way: None,
        commands,
        own: sender.downgrade(),
        uses: Arc::default(),
        waiting: VecDeque::new(),
        sleeping: Vec::new(),
        jobs: VecDeque::new(),
        destroying: Vec::new(),
        record,
        watched: Watched::default(),
        out_of_space: false,
        preserving: None,
        releasing: None,
        detached_output_bytes: 0,
        status,
        next_wake: None,
        woke_by: "none",
    };
    task.plan_wake();
    task.watch_process(settled);
    task.publish();
    tokio::spawn(task.run());
    SpriteHandle { commands: sender, status: watch }
}

impl Task {
    async fn run(mut self) {
        self.step(Event::Tick);
        let mut refresh = tokio::time::interval(STATUS_PERIOD);
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let deadline = [self.vm.deadline(), self.next_wake].into_iter().flatten().min();
            let uses = Arc::clone(&self.uses);
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::Leave { reply }) => return self.leave(reply).await,
                    Some(command) => self.command(command).await,
                    None => return,
                },
                done = ended(&mut self.under_way) => self.settled(done).await,
                preserved = ended(&mut self.preserving) => self.preserved(preserved),
                () = uses.changed.notified() => self.released(),
                () = until(deadline) => self.timer(),
                _ = refresh.tick() => {
                    self.publish_numbers();
                    // The host's clock may have been set, or have stood still with the host.
                    self.plan_wake();
                    self.look_for_a_stop().await;
                }
            }
            if *self.vm.state() == State::Destroyed {
                self.publish();
                return;
            }
        }
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Use { reply } => self.begin_use(reply),
            Command::Sleep { depth, reply } => self.order_sleep(depth, reply),
            Command::Restore { checkpoint, reply } => self.order_job(Event::RestoreOrdered { checkpoint }, reply),
            Command::Reboot { reply } => self.order_job(Event::RebootOrdered, reply),
            Command::Destroy { reply } => {
                self.destroying.push(reply);
                self.step(Event::DestroyOrdered);
            }
            Command::Reload { record } => self.reload(*record),
            Command::AnnounceDiskSize { size_bytes, reply } => send(reply, self.announce_disk_size(size_bytes).await),
            Command::Guest(event) => self.guest(*event),
            Command::ProcessEnded { pid } => self.process_ended(pid).await,
            Command::AgentGone { session } => self.agent_gone(session).await,
            Command::Leave { .. } => unreachable!("handled by the loop"),
        }
    }

    /// Feeds one event to the state machine and begins what it asks for.
    fn step(&mut self, event: Event) -> bool {
        match self.vm.step(event, Instant::now()) {
            Ok(Some(change)) => {
                self.begin(change);
                true
            }
            Ok(None) => true,
            Err(refused) => {
                tracing::debug!(%refused, "event refused");
                false
            }
        }
    }

    fn begin(&mut self, change: Change) {
        let parts = self.parts.take().expect("parts are here while no change is under way");
        let why = self.why(&change);
        tracing::info!(sprite = %parts.id, ?change, why, "change begins");
        let resources = Arc::clone(&self.resources);
        // A wake during a push aborts the push first (ruling 2).
        let (preserving, releasing) = (self.preserving.take(), self.releasing.take());
        if preserving.is_some() && change.wakes() {
            self.finish_sleep(Depth::Suspended, |_| SleepReport::default());
        }
        self.under_way = Some(tokio::spawn(async move {
            if let Some(preserving) = preserving {
                preserving.abort();
                drop(preserving.await);
            }
            if let Some(releasing) = releasing {
                drop(releasing.await);
            }
            change::make(resources, parts, change, why).await
        }));
        self.publish();
    }

    fn why(&self, change: &Change) -> String {
        let idle = self.vm.last_active().elapsed().as_secs();
        match change {
            Change::Pause | Change::Suspend | Change::GoCold if !self.sleeping.is_empty() => {
                "put to sleep by order".into()
            }
            Change::Pause | Change::Suspend | Change::GoCold => format!("idle for {idle} s"),
            Change::Unpause
            | Change::Resume
            | Change::Boot
            | Change::Restore { .. }
            | Change::Reboot
            | Change::Destroy => String::new(),
        }
    }

    async fn settled(&mut self, done: Result<(Parts, Outcome), tokio::task::JoinError>) {
        let (mut parts, outcome) = match done {
            Ok(done) => done,
            Err(error) => {
                // A panic in a change is a bug of ours; the VM may still run, but nobody holds it any more. The next start of the node agent finds it.
                tracing::error!(%error, "a change of a sprite panicked");
                self.fail_everybody("internal error; see the node agent's log");
                return;
            }
        };
        tracing::info!(sprite = %parts.id, settled = ?outcome.settled, reason = outcome.reason, error = outcome.error, "change ended");
        // It may have been changed meanwhile.
        parts.record.clone_from(&self.record);
        self.parts = Some(parts);
        self.watch_process(outcome.settled);
        self.woke_by = outcome.resumed.unwrap_or("none");
        self.note(&outcome);
        let ended = if let State::Changing(change) = self.vm.state() { Some(change.clone()) } else { None };
        if outcome.no_room {
            self.refuse_waiting();
        }
        self.step(Event::Settled(outcome.settled));
        self.answer(ended.as_ref(), &outcome);
        self.publish();
    }

    fn answer(&mut self, ended: Option<&Change>, outcome: &Outcome) {
        if matches!(ended, Some(Change::Restore { .. } | Change::Reboot))
            && let Some(reply) = self.jobs.pop_front()
        {
            send(reply, outcome.error.clone().map_or(Ok(()), |error| Err(OrderError::Failed(error))));
        }
        match outcome.settled {
            Settled::Running if *self.vm.state() == State::Running => self.answer_waiting(),
            Settled::Running | Settled::Paused | Settled::Suspended | Settled::Cold => {}
            Settled::Failed => self.fail_everybody(&outcome.reason.clone()),
            Settled::Destroyed => {
                for reply in self.destroying.drain(..) {
                    send(reply, Ok(()));
                }
                self.fail_everybody("the sprite is destroyed");
            }
        }
        self.answer_orders(ended, outcome);
    }

    fn fail_everybody(&mut self, reason: &str) {
        let sprite = self.id();
        for waiting in self.waiting.drain(..) {
            send(waiting.reply, Err(WakeError::Failed { sprite, reason: reason.to_owned() }));
        }
        let failed = || OrderError::Failed(reason.to_owned());
        for reply in self.jobs.drain(..).chain(self.destroying.drain(..)) {
            send(reply, Err(failed()));
        }
        for order in self.sleeping.drain(..) {
            send(order.reply, Err(failed()));
        }
    }

    fn reload(&mut self, mut record: SpriteRecord) {
        if let Some(done) = self.record.as_ref().and_then(|known| known.wakes_done) {
            // It may have been read before that was written.
            record.finish_wakes(done);
        }
        let event = Event::PolicyChanged { idle: record.idle, always_on: record.always_on };
        if let Some(parts) = &mut self.parts {
            parts.record = Some(record.clone());
        }
        self.record = Some(record);
        self.plan_wake();
        self.step(event);
        self.publish();
    }

    async fn announce_disk_size(&self, size_bytes: u64) -> Result<(), String> {
        let process = self.parts.as_ref().and_then(|parts| parts.process.as_ref()).ok_or("it is not running")?;
        process.announce_disk_size(size_bytes).await.map_err(|error| chain(&error))
    }

    async fn leave(mut self, reply: oneshot::Sender<()>) {
        if let Some(under_way) = self.under_way.take()
            && let Ok((parts, _)) = under_way.await
        {
            self.parts = Some(parts);
        }
        if let Some(releasing) = self.releasing.take() {
            drop(releasing.await);
        }
        if let Some(volume) = self.parts.as_ref().and_then(|parts| parts.volume.clone()) {
            volume.close().await;
        }
        send(reply, ());
    }

    fn id(&self) -> SpriteId {
        self.parts.as_ref().map_or_else(|| parse_id(&self.status.borrow().sprite_id), |parts| parts.id)
    }
}

/// Waits for a task that may not be there; then for ever.
async fn ended<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    match task {
        Some(handle) => {
            let done = handle.await;
            *task = None;
            done
        }
        None => std::future::pending().await,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The other side may have gone away, which is its right.
fn send<T>(reply: oneshot::Sender<T>, value: T) {
    drop(reply.send(value));
}

fn parse_id(text: &str) -> SpriteId {
    text.parse().unwrap_or_else(|_| SpriteId::from_uuid(uuid::Uuid::nil()))
}

pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
