//! Freezing the file system for a checkpoint, never for longer than promised (ruling 16).
//!
//! ```text
//!  syncfs (≤ 2 rounds) ─▶ FIFREEZE on a thread ─┬─ in time ─▶ frozen ─▶ Thaw, or the timer
//!                                              └─ too late ─▶ "not frozen"; the thread thaws when its call returns
//! ```

use std::{
    fs::File,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use proto::agent::{FreezeReply, ThawReply};
use tokio::sync::oneshot;

use crate::{log, sys};

/// After a first round that took longer than this, much was dirty and more has become so meanwhile: a second one makes the pause short.
const SECOND_ROUND: Duration = Duration::from_millis(20);
/// Longest a freeze may be asked to last.
const FROZEN_MAX: Duration = Duration::from_secs(30);

/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Freezer(Arc<Mutex<Option<Frozen>>>);

#[derive(Debug)]
struct Frozen {
    volume: Arc<File>,
    /// When writers began to wait. Also tells one freeze from the next.
    since: Instant,
}

/// Why the file system is not frozen.
enum Missed {
    Late,
    Failed(io::Error),
}

impl Freezer {
    fn state(&self) -> MutexGuard<'_, Option<Frozen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.state().is_some()
    }

    /// Cancel safe: a freeze that nobody waits for is undone.
    pub(crate) async fn freeze(&self, volume: Arc<File>, limit: Duration, max_frozen: Duration) -> FreezeReply {
        let begun = Instant::now();
        let not = |reason: String, synced: Duration| FreezeReply {
            reason,
            sync_ms: millis(synced),
            ..FreezeReply::default()
        };
        if self.is_frozen() {
            return not("it is frozen already, for another checkpoint".into(), Duration::ZERO);
        }
        let rounds = {
            let volume = Arc::clone(&volume);
            tokio::task::spawn_blocking(move || sync_rounds(&volume, limit))
        };
        match rounds.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return not(format!("syncfs: {error}"), begun.elapsed()),
            Err(error) => return not(error.to_string(), begun.elapsed()),
        }
        let synced = begun.elapsed();
        match self.freeze_within(volume, limit, max_frozen.min(FROZEN_MAX)).await {
            Ok(took) => {
                FreezeReply { frozen: true, sync_ms: millis(synced), freeze_us: micros(took), ..FreezeReply::default() }
            }
            Err(Missed::Late) => not(format!("writers did not stand still within {} ms", limit.as_millis()), synced),
            Err(Missed::Failed(error)) => not(format!("FIFREEZE: {error}"), synced),
        }
    }

    async fn freeze_within(
        &self,
        volume: Arc<File>,
        limit: Duration,
        max_frozen: Duration,
    ) -> Result<Duration, Missed> {
        let (told, answer) = oneshot::channel();
        let own = self.clone();
        let thread =
            std::thread::Builder::new().name("freeze".into()).spawn(move || own.run(volume, limit, max_frozen, told));
        if let Err(error) = thread {
            return Err(Missed::Failed(error));
        }
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(Missed::Late),
        }
    }

    /// The thread of one freeze: until the file system is thawed again.
    fn run(
        &self,
        volume: Arc<File>,
        limit: Duration,
        max_frozen: Duration,
        told: oneshot::Sender<Result<Duration, Missed>>,
    ) {
        let since = Instant::now();
        if let Err(error) = sys::freeze(&*volume) {
            drop(told.send(Err(Missed::Failed(error))));
            return;
        }
        let took = since.elapsed();
        *self.state() = Some(Frozen { volume, since });
        if took >= limit || told.send(Ok(took)).is_err() {
            self.thaw_if(since);
            return;
        }
        let deadline = since + max_frozen;
        while Instant::now() < deadline && self.state().as_ref().is_some_and(|frozen| frozen.since == since) {
            std::thread::park_timeout(
                deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(50)),
            );
        }
        if self.thaw_if(since).is_some() {
            log!("the host did not thaw within {} ms; thawed", max_frozen.as_millis());
        }
    }

    fn thaw_if(&self, since: Instant) -> Option<Duration> {
        let mut state = self.state();
        state.take_if(|frozen| frozen.since == since).map(thaw)
    }

    /// Lets writers go on.
    pub(crate) fn thaw(&self) -> ThawReply {
        match self.state().take() {
            Some(frozen) => ThawReply { was_frozen: true, frozen_us: micros(thaw(frozen)) },
            None => ThawReply::default(),
        }
    }
}

fn thaw(frozen: Frozen) -> Duration {
    if let Err(error) = sys::thaw(&*frozen.volume) {
        // EINVAL: somebody inside has done it before us.
        log!("cannot thaw: {error}");
    }
    frozen.since.elapsed()
}

fn sync_rounds(volume: &File, limit: Duration) -> io::Result<()> {
    let begun = Instant::now();
    nix::unistd::syncfs(volume)?;
    let first = begun.elapsed();
    if first > SECOND_ROUND && first < limit * 10 {
        nix::unistd::syncfs(volume)?;
    }
    Ok(())
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_cannot_be_frozen_comes_with_its_reason() {
        let freezer = Freezer::default();
        // Nothing can be frozen through this one.
        let root = Arc::new(File::open("/proc/self").unwrap());
        let reply = freezer.freeze(root, Duration::from_millis(200), Duration::from_secs(2)).await;
        assert!(!reply.frozen);
        assert!(!reply.reason.is_empty());
        assert!(!freezer.thaw().was_frozen);
    }
}
