//! The sprite's life in this VM: who it is, and that its environment knows.
//!
//! ```text
//!  Golden ── Configure, with the host's entropy ──▶ Configured ── the environment runs ──▶ `due` is brought to its disk
//!    its environment may run already, without a name: a seed, of which new sprites are copies
//!                                                       ▲  │
//!                                                       └──┘ Configure again: another name, another resolver, a first life
//! ```
//!
//! # Invariants
//!
//! 1. *Begun is done.* A start, and what a configuration changes on the disk, run in tasks of their own: tonic drops a call when the host's session
//!    breaks off, and a half-started environment would be in the way of every later one until the VM ends.
//! 2. *A repeated call completes.* Its answer means that the identity is on the disk and `api.sock` is served, whoever began.
//! 3. A golden VM makes no ids and opens no sockets, also while its environment runs: all its copies would share them (ruling 21).

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto::agent::{ConfigureRequest, Network};
use tonic::Status;

use crate::{
    api::{self, Api},
    environment::{Environment, Phase, Started},
    identity::{self, Identity},
    log, sys,
    watch::Hub,
};

/// The parts that a start brings together.
#[derive(Debug)]
pub(crate) struct Life {
    environment: Arc<Environment>,
    hub: Arc<Hub>,
    state: Mutex<State>,
    /// As it was set last. Not set again: users may have changed something since.
    network: Mutex<Option<Network>>,
    /// Whether the environment that runs has everything a start gives it. Held while it is given.
    complete: tokio::sync::Mutex<bool>,
}

#[derive(Debug, Default)]
enum State {
    /// The host has not said who this is.
    #[default]
    Golden,
    Configured(Configured),
}

#[derive(Debug, Default)]
struct Configured {
    identity: Identity,
    due: Due,
    /// Which name the disk has, if any.
    written_name: Option<String>,
}

/// What of the identity the disk does not have yet; more includes less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    #[default]
    Nothing,
    /// Name and resolver.
    Files,
    /// All that must differ between sprites, at the beginning of a sprite's first life.
    Fresh,
}

/// What is to be done on the disk, for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Work {
    identity: Identity,
    due: Due,
    /// The name it had so far.
    old_name: Option<String>,
}

impl State {
    fn configure(&mut self, identity: Identity, fresh: bool) {
        let Configured { identity: before, due, written_name } = match std::mem::take(self) {
            Self::Golden => Configured::default(),
            Self::Configured(configured) => configured,
        };
        let moved = (&before.name, &before.dns) != (&identity.name, &identity.dns);
        let news = match (fresh, moved) {
            (true, _) => Due::Fresh,
            (false, true) => Due::Files,
            (false, false) => Due::Nothing,
        };
        *self = Self::Configured(Configured { identity, due: due.max(news), written_name });
    }

    /// Something of `due` is to be done (again).
    fn owe(&mut self, due: Due) {
        if let Self::Configured(configured) = self {
            configured.due = configured.due.max(due);
        }
    }

    fn take_work(&mut self) -> Option<Work> {
        let Self::Configured(Configured { identity, due, written_name }) = self else { return None };
        let due = std::mem::take(due);
        if due == Due::Nothing {
            return None;
        }
        let old_name = written_name.replace(identity.name.clone());
        Some(Work { identity: identity.clone(), due, old_name })
    }

    /// It was not done, or not all of it. The host may have said more since.
    fn give_back(&mut self, work: Work) {
        self.owe(work.due);
        if let Self::Configured(configured) = self {
            configured.written_name = work.old_name;
        }
    }
}

impl Life {
    pub(crate) fn new(environment: Arc<Environment>, hub: Arc<Hub>) -> Arc<Self> {
        let complete = tokio::sync::Mutex::new(false);
        Arc::new(Self { environment, hub, state: Mutex::default(), network: Mutex::default(), complete })
    }

    fn network(&self) -> MutexGuard<'_, Option<Network>> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empty in a golden VM.
    pub(crate) fn identity(&self) -> Identity {
        match &*self.state() {
            State::Golden => Identity::default(),
            State::Configured(configured) => configured.identity.clone(),
        }
    }

    /// Environment variables for commands.
    pub(crate) fn env(&self) -> BTreeMap<String, String> {
        self.identity().env
    }

    /// Takes what the host says of the sprite. Returns how far the clock was off, in ms.
    pub(crate) async fn configure(self: &Arc<Self>, request: ConfigureRequest) -> Result<i64, Status> {
        let machine = request.clone();
        let network = request.network.clone().filter(|network| self.network().as_ref() != Some(network));
        let new_network = network.clone();
        let off =
            tokio::task::spawn_blocking(move || identity::configure_machine(&machine, new_network.as_ref())).await;
        let off = off.map_err(|error| Status::internal(error.to_string()))?;
        let clock_was_off_ms = off.map_err(|error| Status::failed_precondition(error.to_string()))?;
        if network.is_some() {
            *self.network() = network;
        }
        if request.sprite_id.is_empty() {
            return Ok(clock_was_off_ms);
        }
        let fresh = request.fresh_identity;
        self.state().configure(request.into(), fresh);
        // One that starts meanwhile finds what is due itself.
        if self.environment.phase() == Phase::Started {
            let life = Arc::clone(self);
            detached(async move {
                let mut complete = life.complete.lock().await;
                life.complete(&mut complete).await
            })
            .await?;
        }
        Ok(clock_was_off_ms)
    }

    /// Starts the environment if there is none, and completes it.
    pub(crate) async fn start(self: &Arc<Self>) -> Result<Started, Status> {
        let life = Arc::clone(self);
        detached(async move { life.start_now().await }).await
    }

    async fn start_now(self: &Arc<Self>) -> Result<Started, Status> {
        let mut complete = self.complete.lock().await;
        let started = self.environment.start().await.map_err(|error| Status::failed_precondition(error.to_string()))?;
        if !started.already {
            *complete = false;
            self.state().owe(Due::Files);
        }
        self.complete(&mut complete).await?;
        Ok(started)
    }

    /// Gives the running environment what it lacks. One that has no name yet, which becomes a seed, gets nothing: its copies would share it.
    async fn complete(self: &Arc<Self>, complete: &mut bool) -> Result<(), Status> {
        if matches!(*self.state(), State::Golden) {
            return Ok(());
        }
        self.bring_identity().await?;
        if !*complete {
            let api = Api { hub: Arc::clone(&self.hub), life: Arc::clone(self) };
            api::start(api, &self.environment).await.map_err(unavailable)?;
            *complete = true;
        }
        Ok(())
    }

    /// Brings what is due to the disk of the running environment.
    async fn bring_identity(&self) -> Result<(), Status> {
        let Some(work) = self.state().take_work() else { return Ok(()) };
        let brought = self.bring(work.clone()).await;
        if brought.is_err() {
            self.state().give_back(work);
        }
        brought
    }

    /// What cannot be done on the disk is logged: users may have changed anything there.
    async fn bring(&self, work: Work) -> Result<(), Status> {
        let volume = self.environment.volume().map_err(unavailable)?;
        let Work { identity, due, old_name } = work;
        let fresh = due == Due::Fresh;
        let uuid = tokio::task::spawn_blocking(move || {
            if fresh && let Err(error) = identity::renew_filesystem_uuid(&volume) {
                log!("the file system keeps its UUID: {error}");
            }
            sys::ext4_uuid(&volume)
        });
        let written = self.environment.inside(move || identity::write_files(&identity, old_name.as_deref(), fresh));
        let (uuid, written) = tokio::join!(uuid, written);
        written.map_err(unavailable)?;
        let uuid = uuid.map_err(io::Error::other).flatten();
        let record = self.environment.inside(move || uuid.and_then(identity::write_device_record));
        if let Err(error) = record.await.map_err(unavailable)? {
            log!("no record of the disk: {error}");
        }
        Ok(())
    }
}

/// Runs `work` to its end, also when nobody waits for it any more.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    tokio::spawn(work).await.map_err(|error| Status::internal(format!("the agent's own task failed: {error}")))?
}

fn unavailable(error: impl std::fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Identity {
        Identity { name: name.into(), ..Identity::default() }
    }

    fn work(name: &str, due: Due, old_name: Option<&str>) -> Option<Work> {
        Some(Work { identity: named(name), due, old_name: old_name.map(str::to_owned) })
    }

    #[test]
    fn a_golden_vm_has_nothing_to_bring() {
        let mut state = State::default();
        state.owe(Due::Files);
        assert_eq!(state.take_work(), None);
    }

    #[test]
    fn a_first_life_is_brought_once() {
        let mut state = State::default();
        state.configure(named("demo"), true);
        state.owe(Due::Files);
        assert_eq!(state.take_work(), work("demo", Due::Fresh, None));
        assert_eq!(state.take_work(), None);
        state.configure(named("demo"), false);
        assert_eq!(state.take_work(), None, "nothing has changed");
    }

    #[test]
    fn a_sprite_of_the_pool_gets_only_a_name_when_it_is_named() {
        let mut state = State::default();
        state.configure(named("sprite"), true);
        assert_eq!(state.take_work(), work("sprite", Due::Fresh, None));
        state.configure(named("demo"), false);
        assert_eq!(state.take_work(), work("demo", Due::Files, Some("sprite")));
    }

    #[test]
    fn what_failed_stays_due_for_the_next_call() {
        let mut state = State::default();
        state.configure(named("demo"), true);
        let failed = state.take_work().unwrap();
        // The host comes back, does not know, and says less.
        state.configure(named("demo"), false);
        state.give_back(failed);
        assert_eq!(state.take_work(), work("demo", Due::Fresh, None));
    }

    #[test]
    fn a_name_that_did_not_reach_the_disk_leaves_the_old_one_known() {
        let mut state = State::default();
        state.configure(named("sprite"), true);
        assert!(state.take_work().is_some());
        state.configure(named("demo"), false);
        let failed = state.take_work().unwrap();
        state.give_back(failed);
        assert_eq!(
            state.take_work(),
            work("demo", Due::Files, Some("sprite")),
            "its /etc/hosts would keep the old name"
        );
    }

    #[tokio::test]
    async fn a_start_goes_on_when_its_caller_breaks_off() {
        let (go, may_go) = tokio::sync::oneshot::channel::<()>();
        let (done, is_done) = tokio::sync::oneshot::channel();
        let call = detached(async move {
            drop(may_go.await);
            assert!(done.send("completed").is_ok());
            Ok(())
        });
        // The call is dropped while it waits, as tonic does when the host's session ends.
        assert!(futures_util::poll!(Box::pin(call)).is_pending());
        drop(go);
        let done = tokio::time::timeout(crate::watch::tests::LIMIT, is_done).await;
        assert_eq!(done.expect("nobody runs the call any more"), Ok("completed"));
    }
}
