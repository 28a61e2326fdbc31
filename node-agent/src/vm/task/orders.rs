//! Orders to sleep, restore and restart: who gave them, and what they are told.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};

use super::{
    super::{
        Change, Depth, Event, Refused, Settled, State,
        change::{Image, Outcome},
    },
    Task, send,
    status::push_event,
};
use crate::preserve::{self, Preserved};

/// Times of a sleep, by ruling 14.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SleepReport {
    pub frozen: Duration,
    /// From the order until memory and state were on the host's disk; zero when it was woken before.
    pub local: Duration,
    /// From the order until disk and memory were in the bucket; zero when that was not asked for or not possible.
    pub bucket: Duration,
    /// It was asleep as ordered, and something has woken it since.
    pub woken: bool,
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
    #[error("the host is shutting down")]
    ShuttingDown,
}

/// A sleep that somebody waits for.
pub(super) struct SleepOrder {
    depth: Depth,
    begun: Instant,
    frozen: Duration,
    pub(super) reply: oneshot::Sender<Result<SleepReport, OrderError>>,
}

impl Task {
    pub(super) fn order_sleep(&mut self, depth: Depth, reply: oneshot::Sender<Result<SleepReport, OrderError>>) {
        if self.vm.depth() >= Some(depth) {
            return send(reply, Ok(SleepReport::default()));
        }
        self.sleeping.push(SleepOrder { depth, begun: Instant::now(), frozen: Duration::ZERO, reply });
        self.step(Event::SleepOrdered(depth));
    }

    pub(super) fn order_job(&mut self, event: Event, reply: oneshot::Sender<Result<(), OrderError>>) {
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

    /// Tells those who ordered a sleep how it went. What sleeps in files only is preserved first, unless it is woken at once.
    pub(super) fn answer_orders(&mut self, ended: Option<&Change>, outcome: &Outcome) {
        if ended.is_some_and(|change| change.missed(outcome.settled)) {
            let why = outcome.error.clone().unwrap_or_else(|| outcome.reason.clone());
            for order in self.sleeping.drain(..) {
                send(order.reply, Err(OrderError::Failed(why.clone())));
            }
        }
        for order in &mut self.sleeping {
            order.frozen = outcome.frozen.unwrap_or(order.frozen);
        }
        let elapsed = |order: &SleepOrder| order.begun.elapsed();
        match outcome.settled {
            Settled::Paused => {
                self.finish_sleep(Depth::Paused, |order| SleepReport { local: elapsed(order), ..Default::default() });
            }
            Settled::Suspended => {
                let at_rest = *self.vm.state() == State::Suspended;
                let preserving = at_rest && !outcome.no_room && self.begin_preserving();
                // Cold fulfils the order as well.
                let goes_on = *self.vm.state() == State::Changing(Change::GoCold);
                if !preserving && !goes_on {
                    self.finish_sleep(Depth::Suspended, |_| SleepReport::default());
                }
            }
            Settled::Cold => self.finish_sleep(Depth::Cold, |order| SleepReport {
                local: elapsed(order),
                bucket: elapsed(order),
                ..Default::default()
            }),
            Settled::Running | Settled::Failed | Settled::Destroyed => {}
        }
    }

    /// Answers the orders that are fulfilled at `reached`; deeper ones go on waiting. `report` says the times but for the freeze.
    pub(super) fn finish_sleep(&mut self, reached: Depth, report: impl Fn(&SleepOrder) -> SleepReport) {
        let woken = matches!(self.vm.state(), State::Changing(change) if change.wakes());
        let (done, waiting): (Vec<_>, Vec<_>) = self.sleeping.drain(..).partition(|order| order.depth <= reached);
        self.sleeping = waiting;
        for order in done {
            let report = SleepReport { frozen: order.frozen, woken, ..report(&order) };
            send(order.reply, Ok(report));
        }
    }

    /// Says whether there is something to preserve.
    fn begin_preserving(&mut self) -> bool {
        let Some(parts) = &self.parts else { return false };
        let (Some(Image::Local(image)), Some(volume)) = (parts.image.clone(), parts.volume.clone()) else {
            return false;
        };
        let resources = Arc::clone(&self.resources);
        self.preserving = Some(tokio::spawn(preserve::preserve(resources, image, volume)));
        true
    }

    pub(super) fn preserved(&mut self, preserved: Result<Preserved, tokio::task::JoinError>) {
        let Ok(preserved) = preserved else { return };
        if preserved.bucket.is_some() {
            let volume = self.parts.as_mut().and_then(|parts| parts.volume.take());
            self.releasing = volume.map(|volume| tokio::spawn(preserve::give_up(volume)));
        }
        self.finish_sleep(Depth::Suspended, |order| {
            let before = order.begun.elapsed().saturating_sub(preserved.total);
            SleepReport {
                local: before + preserved.local,
                bucket: preserved.bucket.map_or(Duration::ZERO, |bucket| before + bucket),
                not_preserved: preserved.error.clone(),
                ..Default::default()
            }
        });
        if let Some(error) = preserved.error {
            self.status.send_modify(|status| push_event(status, format!("its memory is not safe everywhere: {error}")));
        }
        self.publish();
    }
}
