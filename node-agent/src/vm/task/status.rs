//! What others see of the sprite.

use std::time::SystemTime;

use proto::node::SpriteStatus;

use super::{
    super::{
        State,
        change::{Outcome, Parts},
    },
    Task, unix_ms,
};

/// Events kept in the status.
const EVENTS_KEPT: usize = 16;

impl Task {
    pub(super) fn note(&self, outcome: &Outcome) {
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

    pub(super) fn publish(&self) {
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
    pub(super) fn publish_numbers(&self) {
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

pub(super) fn push_event(status: &mut SpriteStatus, event: String) {
    status.events.push(format!("{} {event}", jiff::Timestamp::now().round(jiff::Unit::Second).unwrap_or_default()));
    let surplus = status.events.len().saturating_sub(EVENTS_KEPT);
    status.events.drain(..surplus);
}
