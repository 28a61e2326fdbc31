//! What the VM does by itself: its process ends, its guest goes silent, its disk fills up, its programs are active.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::agent::{Activity, EnvironmentState, GuestEvent, guest_event};
use tokio::sync::mpsc;

use super::{
    super::{
        Event, Settled, State,
        change::{self, chain},
    },
    Command, Task,
    status::push_event,
    unix_ms,
};
use crate::{pid::Process, process::ProcessNote};

/// An environment that ended is started again; between attempts that fail these pauses. Afterwards a restart or a restore does it.
const ENVIRONMENT_RETRIES: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(10), Duration::from_secs(30)];

/// QEMU answers in a millisecond. One that does not is looked at again later.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// What has a watcher already. Every change of state comes by here, and a second watcher of the same thing would answer the guest twice.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Watched {
    process: Option<ProcessNote>,
    session: Option<u64>,
}

impl Task {
    /// Tells this task when the process or the control channel ends, and what the guest reports.
    ///
    /// What ended while a change was under way was told in vain, so it is watched once more.
    pub(super) fn watch_process(&mut self, settled: Settled) {
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

    pub(super) fn guest(&mut self, event: GuestEvent) {
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
            for pause in ENVIRONMENT_RETRIES {
                match change::start_environment(&agent).await {
                    Ok(()) => return,
                    Err(_) if agent.is_closed() => return,
                    Err(error) => tracing::warn!(error = chain(&error), "the environment does not start again"),
                }
                tokio::time::sleep(pause).await;
            }
        });
    }

    pub(super) async fn process_ended(&mut self, pid: i32) {
        if !self.owns(pid) {
            return;
        }
        tracing::warn!(sprite = %self.id(), pid, "QEMU ended by itself");
        self.drop_process("its VM ended by itself: the guest was shut down, crashed, or QEMU was killed").await;
    }

    /// The control channel broke although QEMU lives: a new connection, or the VM is of no use.
    pub(super) async fn agent_gone(&mut self, session: u64) {
        let Some(process) = self.parts.as_mut().and_then(|parts| parts.process.as_mut()) else { return };
        if process.agent.number() != session || *self.vm.state() != State::Running {
            return;
        }
        match process.reconnect().await {
            Ok(()) => {
                let running = process.agent.hello().environment() == EnvironmentState::Started;
                self.watch_process(Settled::Running);
                // It ended while nobody was there to be told.
                if !running {
                    self.restart_environment();
                }
            }
            Err(error) => {
                tracing::warn!(sprite = %self.id(), error = chain(&error), "the guest agent does not come back");
                self.drop_process("the agent inside its VM does not answer any more").await;
            }
        }
    }

    /// QEMU stops a VM whose write found no space (ruling 17). Letting it run tries the write again; nothing is lost meanwhile.
    pub(super) async fn look_for_a_stop(&mut self) {
        if *self.vm.state() != State::Running {
            return;
        }
        let Some(process) = self.parts.as_ref().and_then(|parts| parts.process.as_ref()) else { return };
        // The owner waits meanwhile, and with it whoever wants the sprite.
        let Ok(state) = tokio::time::timeout(LOOK_LIMIT, process.qmp.run_state()).await else {
            tracing::warn!(sprite = %self.id(), "QEMU does not answer within {LOOK_LIMIT:?}");
            return;
        };
        let stopped = match state {
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
}

async fn watch_end(process: Arc<Process>, own: mpsc::Sender<Command>) {
    process.ended().await;
    // The owner may be gone; then nobody cares.
    drop(own.send(Command::ProcessEnded { pid: process.pid() }).await);
}
