//! The owner of one sprite: the only task that touches its VM, its volume handle and its state.
//!
//! ```text
//!  requests ──Command──▶ ┌──────────┐ ──step──▶ Vm (pure)
//!  guest events ───────▶ │  owner   │ ◀─Change──
//!  process end ────────▶ │  task    │ ──spawn──▶ change::make ──▶ (Parts, Outcome) ──▶ Event::Settled
//!  timers ─────────────▶ └──────────┘ ──watch──▶ SpriteStatus
//! ```
//!
//! # Invariants
//!
//! 1. While a change is under way the parts are with it; the task only remembers.
//! 2. Every reply channel is answered when its change settles, also when it fails.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use proto::{
    agent::{Activity, GuestEvent, guest_event},
    id::SpriteId,
    node::SpriteStatus,
    record::SpriteRecord,
};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};

use super::{
    Change, Depth, Event, Refused, Settled, State, Vm,
    change::{self, Image, Outcome, Parts, chain},
};
use crate::{
    host::{Running, WakeError},
    pid::Process,
    preserve::{self, Preserved},
    process::ProcessNote,
    resources::Resources,
};

/// Commands that may wait for one sprite; more and the caller waits.
pub(crate) const COMMANDS_MAX: usize = 256;
/// Requests that may wait for one wake; more are refused.
const WAITING_MAX: usize = 1024;
/// Events kept in the status.
const EVENTS_KEPT: usize = 16;
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

/// Times of a sleep, by ruling 14.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SleepReport {
    pub frozen: Duration,
    /// From the order until memory and state were on the host's disk.
    pub local: Duration,
    /// From the order until disk and memory were in the bucket; zero when that was not asked for or not possible.
    pub bucket: Duration,
    /// Where its memory could not be brought. It sleeps all the same.
    pub not_preserved: Option<String>,
}

/// Why an order was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("{0}")]
    Failed(String),
    #[error("a request woke the sprite before it was asleep")]
    Interrupted,
    #[error("the host is shutting down")]
    ShuttingDown,
}

/// Handle to a sprite's owner task.
#[derive(Clone, Debug)]
pub(crate) struct SpriteHandle {
    pub commands: mpsc::Sender<Command>,
    pub status: watch::Receiver<SpriteStatus>,
}

/// Counts requests that ended without their having to wait for the owner.
#[derive(Debug, Default)]
struct Uses {
    ended: AtomicU32,
    changed: Notify,
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

struct SleepOrder {
    depth: Depth,
    begun: Instant,
    frozen: Duration,
    reply: oneshot::Sender<Result<SleepReport, OrderError>>,
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
    waiting: VecDeque<oneshot::Sender<Result<Running, WakeError>>>,
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
    status: watch::Sender<SpriteStatus>,
    next_wake: Option<Instant>,
    woke_by: &'static str,
}

/// What has a watcher already. Every change of state comes by here, and a second watcher of the same thing would answer the guest twice.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    process: Option<ProcessNote>,
    session: Option<u64>,
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
    let (status, watch) = watch::channel(first);
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
        let was_job = matches!(self.vm.state(), State::Changing(Change::Restore { .. } | Change::Reboot));
        if outcome.no_room {
            self.refuse_waiting();
        }
        self.step(Event::Settled(outcome.settled));
        self.answer(&outcome, was_job);
        if outcome.settled == Settled::Suspended && !outcome.no_room {
            self.begin_preserving();
        }
        self.publish();
    }

    fn answer(&mut self, outcome: &Outcome, was_job: bool) {
        let failure = outcome.error.clone();
        if was_job && let Some(reply) = self.jobs.pop_front() {
            send(reply, failure.clone().map_or(Ok(()), |error| Err(OrderError::Failed(error))));
        }
        for order in &mut self.sleeping {
            order.frozen = outcome.frozen.unwrap_or(order.frozen);
        }
        match outcome.settled {
            Settled::Running => {
                self.answer_waiting();
                let interrupted = failure.map_or(OrderError::Interrupted, OrderError::Failed);
                for order in self.sleeping.drain(..) {
                    send(order.reply, Err(interrupted.clone()));
                }
            }
            Settled::Failed => self.fail_everybody(&outcome.reason.clone()),
            Settled::Paused | Settled::Cold => self.finish_sleep(outcome.settled, failure),
            Settled::Suspended => {
                if let Some(error) = failure {
                    for order in self.sleeping.drain(..) {
                        send(order.reply, Err(OrderError::Failed(error.clone())));
                    }
                }
            }
            Settled::Destroyed => {
                for reply in self.destroying.drain(..) {
                    send(reply, Ok(()));
                }
                self.fail_everybody("the sprite is destroyed");
            }
        }
    }

    /// Orders that are fulfilled by this state; deeper ones go on waiting.
    fn finish_sleep(&mut self, settled: Settled, failure: Option<String>) {
        let reached = if settled == Settled::Cold { Depth::Cold } else { Depth::Paused };
        let (done, waiting): (Vec<_>, Vec<_>) = self.sleeping.drain(..).partition(|order| order.depth <= reached);
        self.sleeping = waiting;
        for order in done {
            let elapsed = order.begun.elapsed();
            let bucket = if reached == Depth::Cold { elapsed } else { Duration::ZERO };
            let report = SleepReport { frozen: order.frozen, local: elapsed, bucket, not_preserved: None };
            send(order.reply, failure.clone().map_or(Ok(report), |error| Err(OrderError::Failed(error))));
        }
    }

    fn refuse_waiting(&mut self) {
        let sprite = self.id();
        for reply in self.waiting.drain(..) {
            send(reply, Err(WakeError::NoCapacity(sprite)));
        }
    }

    fn fail_everybody(&mut self, reason: &str) {
        let sprite = self.id();
        for reply in self.waiting.drain(..) {
            send(reply, Err(WakeError::Failed { sprite, reason: reason.to_owned() }));
        }
        let failed = || OrderError::Failed(reason.to_owned());
        for reply in self.jobs.drain(..).chain(self.destroying.drain(..)) {
            send(reply, Err(failed()));
        }
        for order in self.sleeping.drain(..) {
            send(order.reply, Err(failed()));
        }
    }

    fn begin_use(&mut self, reply: oneshot::Sender<Result<Running, WakeError>>) {
        let sprite = self.id();
        if self.waiting.len() >= WAITING_MAX {
            return send(reply, Err(WakeError::NoCapacity(sprite)));
        }
        let was_running = *self.vm.state() == State::Running;
        if self.vm.step(Event::Used, Instant::now()).map(|change| change.map(|change| self.begin(change))).is_err() {
            return send(reply, Err(WakeError::NotHere(sprite)));
        }
        self.waiting.push_back(reply);
        if was_running && *self.vm.state() == State::Running {
            self.woke_by = "none";
            self.answer_waiting();
        }
    }

    fn answer_waiting(&mut self) {
        let Some(process) = self.parts.as_ref().and_then(|parts| parts.process.as_ref()) else { return };
        for reply in self.waiting.drain(..) {
            let running = Running {
                agent: process.agent.clone(),
                net: Arc::clone(&process.net),
                was: self.woke_by,
                guard: UseGuard(Arc::clone(&self.uses)),
            };
            // A caller that is gone drops its guard here, which releases the use.
            send(reply, Ok(running));
        }
    }

    fn released(&mut self) {
        for _ in 0..self.uses.ended.swap(0, Ordering::Relaxed) {
            self.step(Event::Released);
        }
    }

    fn order_sleep(&mut self, depth: Depth, reply: oneshot::Sender<Result<SleepReport, OrderError>>) {
        if self.asleep_as_deep_as(depth) {
            return send(reply, Ok(SleepReport::default()));
        }
        self.sleeping.push(SleepOrder { depth, begun: Instant::now(), frozen: Duration::ZERO, reply });
        self.step(Event::SleepOrdered(depth));
    }

    fn asleep_as_deep_as(&self, depth: Depth) -> bool {
        match self.vm.state() {
            State::Paused => depth <= Depth::Paused,
            State::Suspended => depth <= Depth::Suspended,
            State::Cold | State::Failed => true,
            State::Creating | State::Running | State::Changing(_) | State::Destroyed => false,
        }
    }

    fn order_job(&mut self, event: Event, reply: oneshot::Sender<Result<(), OrderError>>) {
        match self.vm.step(event, Instant::now()) {
            Ok(change) => {
                self.jobs.push_back(reply);
                if let Some(change) = change {
                    self.begin(change);
                }
            }
            Err(refused) => send(reply, Err(refused.into())),
        }
    }

    fn reload(&mut self, record: SpriteRecord) {
        let event = Event::PolicyChanged { idle: record.idle, always_on: record.always_on };
        if let Some(parts) = &mut self.parts {
            parts.record = Some(record.clone());
        }
        self.record = Some(record);
        self.plan_wake();
        self.step(event);
        self.publish();
    }

    fn timer(&mut self) {
        if self.next_wake.is_some_and(|at| Instant::now() >= at) {
            self.step(Event::Used);
            self.step(Event::Released);
            self.plan_wake();
        }
        self.step(Event::Tick);
    }

    /// The next time the record says to wake; times that are past are over.
    fn plan_wake(&mut self) {
        self.next_wake = self.record.as_ref().and_then(|record| {
            let now = jiff::Timestamp::now();
            let once = record.wake_at.iter().copied().filter(|at| *at > now).min();
            let delay = once.and_then(|at| Duration::try_from(at.duration_since(now)).ok());
            let every = record.wake_every_ms.filter(|ms| *ms > 0).map(Duration::from_millis);
            [delay, every].into_iter().flatten().min().map(|delay| Instant::now() + delay)
        });
    }

    fn guest(&mut self, event: GuestEvent) {
        match event.event {
            Some(guest_event::Event::Activity(activity)) => self.activity(&activity),
            Some(guest_event::Event::Ended(ended)) => {
                let event = format!("its environment ended inside ({}) and is started again", ended.reason);
                tracing::info!(sprite = %self.id(), event);
                self.status.send_modify(|status| push_event(status, event));
                self.restart_environment();
            }
            // Requests of programs inside are answered by `inside`, not by the owner.
            Some(guest_event::Event::Request(_)) | None => {}
        }
    }

    fn activity(&mut self, activity: &Activity) {
        let now_ms = unix_ms(SystemTime::now());
        let busy = activity.attached_sessions > 0 || activity.tasks_until_unix_ms > now_ms;
        self.step(Event::Busy(busy));
        if activity.detached_output_bytes > self.detached_output_bytes {
            self.step(Event::Active);
        }
        self.detached_output_bytes = activity.detached_output_bytes;
    }

    fn restart_environment(&self) {
        let Some(agent) =
            self.parts.as_ref().and_then(|parts| parts.process.as_ref()).map(|process| process.agent.clone())
        else {
            return;
        };
        tokio::spawn(async move {
            if let Err(error) = change::start_environment(&agent).await {
                tracing::warn!(error = chain(&error), "the environment does not start again");
            }
        });
    }

    async fn announce_disk_size(&self, size_bytes: u64) -> Result<(), String> {
        let process = self.parts.as_ref().and_then(|parts| parts.process.as_ref()).ok_or("it is not running")?;
        process.announce_disk_size(size_bytes).await.map_err(|error| chain(&error))
    }

    async fn process_ended(&mut self, pid: i32) {
        if !self.owns(pid) {
            return;
        }
        tracing::warn!(sprite = %self.id(), pid, "QEMU ended by itself");
        self.drop_process("its VM ended by itself: the guest was shut down, crashed, or QEMU was killed").await;
    }

    /// The control channel broke although QEMU lives: a new connection, or the VM is of no use.
    async fn agent_gone(&mut self, session: u64) {
        let Some(process) = self.parts.as_mut().and_then(|parts| parts.process.as_mut()) else { return };
        if process.agent.number() != session || *self.vm.state() != State::Running {
            return;
        }
        match process.reconnect().await {
            Ok(()) => self.watch_process(Settled::Running),
            Err(error) => {
                tracing::warn!(sprite = %self.id(), error = chain(&error), "the guest agent does not come back");
                self.drop_process("the agent inside its VM does not answer any more").await;
            }
        }
    }

    /// QEMU stops a VM whose write found no space (ruling 17). Letting it run tries the write again; nothing is lost meanwhile.
    async fn look_for_a_stop(&mut self) {
        if *self.vm.state() != State::Running {
            return;
        }
        let Some(process) = self.parts.as_ref().and_then(|parts| parts.process.as_ref()) else { return };
        let stopped = match process.qmp.run_state().await {
            Ok(state) => state == "io-error",
            Err(error) => {
                tracing::warn!(sprite = %self.id(), error = chain(&error), "QEMU does not say how its VM is");
                return;
            }
        };
        if stopped && let Err(error) = process.qmp.cont().await {
            tracing::warn!(sprite = %self.id(), error = chain(&error), "a stopped VM does not go on");
        }
        if stopped == self.out_of_space {
            return;
        }
        self.out_of_space = stopped;
        let reason = if stopped {
            "stopped: this host has no space for its writes, or the bucket was away for too long; it goes on when there is space"
        } else {
            "goes on: there is space again"
        };
        tracing::warn!(sprite = %self.id(), reason);
        self.status.send_modify(|status| {
            reason.clone_into(&mut status.reason);
            push_event(status, reason.to_owned());
        });
    }

    fn owns(&self, pid: i32) -> bool {
        let process = self.parts.as_ref().and_then(|parts| parts.process.as_ref());
        process.is_some_and(|process| process.process.pid() == pid)
    }

    async fn drop_process(&mut self, reason: &str) {
        if let Some(parts) = &mut self.parts {
            change::end_process(parts).await;
        }
        let event = format!("memory lost: {reason}");
        self.status.send_modify(|status| {
            reason.clone_into(&mut status.reason);
            push_event(status, event);
        });
        self.step(Event::ProcessDied);
        self.fail_everybody(reason);
        self.publish();
    }

    /// Tells this task when the process or the control channel ends, and what the guest reports.
    ///
    /// What ended while a change was under way was told in vain, so it is watched once more.
    fn watch_process(&mut self, settled: Settled) {
        let Some(process) = self.parts.as_ref().and_then(|parts| parts.process.as_ref()) else { return };
        let Some(own) = self.own.upgrade() else { return };
        if self.watched.process != process.note.process || process.process.has_ended() {
            self.watched.process = process.note.process;
            tokio::spawn(watch_end(Arc::clone(&process.process), own.clone()));
        }
        let session = process.agent.number();
        let closed = process.agent.is_closed();
        // One that stands still and was never met is met when it runs again.
        if (closed && settled == Settled::Running) || (!closed && self.watched.session != Some(session)) {
            self.watched.session = Some(session);
            let (resources, sprite, agent) = (Arc::clone(&self.resources), process.note.sprite, process.agent.clone());
            tokio::spawn(async move {
                crate::inside::serve(&resources, sprite, agent, &own).await;
                // The owner may be gone; then nobody cares.
                drop(own.send(Command::AgentGone { session }).await);
            });
        }
    }

    fn begin_preserving(&mut self) {
        let Some(parts) = &self.parts else { return };
        let (Some(Image::Local(image)), Some(volume)) = (parts.image.clone(), parts.volume.clone()) else { return };
        let resources = Arc::clone(&self.resources);
        self.preserving = Some(tokio::spawn(preserve::preserve(resources, image, volume)));
    }

    fn preserved(&mut self, preserved: Result<Preserved, tokio::task::JoinError>) {
        let Ok(preserved) = preserved else { return };
        if preserved.bucket.is_some() {
            let volume = self.parts.as_mut().and_then(|parts| parts.volume.take());
            self.releasing = volume.map(|volume| tokio::spawn(preserve::give_up(volume)));
        }
        let (done, waiting): (Vec<_>, Vec<_>) =
            self.sleeping.drain(..).partition(|order| order.depth <= Depth::Suspended);
        self.sleeping = waiting;
        for order in done {
            let before = order.begun.elapsed().saturating_sub(preserved.total);
            let report = SleepReport {
                frozen: order.frozen,
                local: before + preserved.local,
                bucket: preserved.bucket.map_or(Duration::ZERO, |bucket| before + bucket),
                not_preserved: preserved.error.clone(),
            };
            send(order.reply, Ok(report));
        }
        if let Some(error) = preserved.error {
            self.status.send_modify(|status| push_event(status, format!("its memory is not safe everywhere: {error}")));
        }
        self.publish();
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

    fn note(&self, outcome: &Outcome) {
        self.status.send_modify(|status| {
            status.reason.clone_from(&outcome.reason);
            if let Some(resumed) = outcome.resumed {
                resumed.clone_into(&mut status.resumed);
            }
            if let Some(event) = &outcome.event {
                push_event(status, event.clone());
            }
        });
    }

    fn publish(&self) {
        let since = SystemTime::now() - self.vm.since().elapsed();
        let active = SystemTime::now() - self.vm.last_active().elapsed();
        self.status.send_modify(|status| {
            let state = self.vm.state().as_str();
            if status.state != state {
                status.since_unix_ms = unix_ms(since);
                match self.vm.state() {
                    State::Running => status.last_running_unix_ms = unix_ms(since),
                    State::Paused | State::Suspended => status.last_warming_unix_ms = unix_ms(since),
                    State::Creating | State::Cold | State::Changing(_) | State::Failed | State::Destroyed => {}
                }
                state.clone_into(&mut status.state);
            }
            status.last_active_unix_ms = unix_ms(active);
            if let Some(parts) = &self.parts {
                fill(status, parts);
            }
        });
    }

    /// Numbers move all the time; only a change of them is worth waking the watchers for.
    fn publish_numbers(&self) {
        let Some(parts) = &self.parts else { return };
        self.status.send_if_modified(|status| {
            let before = (status.used_bytes, status.unpushed_bytes, status.generation);
            fill(status, parts);
            before != (status.used_bytes, status.unpushed_bytes, status.generation)
        });
    }
}

fn fill(status: &mut SpriteStatus, parts: &Parts) {
    if let Some(record) = &parts.record {
        status.name = record.name.to_string();
        status.org.clone_from(&record.org);
        status.disk_bytes = record.disk_bytes;
    }
    status.qemu_pid = parts.process.as_ref().map_or(0, |process| process.process.pid().unsigned_abs());
    if let Some(volume) = &parts.volume {
        let numbers = volume.status();
        status.disk_bytes = volume.size_bytes();
        status.used_bytes = numbers.used_bytes;
        status.unpushed_bytes = numbers.unpushed_bytes;
        status.watermark_unix_ms = numbers.watermark_unix_ms;
        status.generation = numbers.generation.0;
        status.epoch = numbers.epoch.0;
    }
}

fn push_event(status: &mut SpriteStatus, event: String) {
    status.events.push(format!("{} {event}", jiff::Timestamp::now().round(jiff::Unit::Second).unwrap_or_default()));
    let surplus = status.events.len().saturating_sub(EVENTS_KEPT);
    status.events.drain(..surplus);
}

async fn watch_end(process: Arc<Process>, own: mpsc::Sender<Command>) {
    process.ended().await;
    // The owner may be gone; then nobody cares.
    drop(own.send(Command::ProcessEnded { pid: process.pid() }).await);
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
