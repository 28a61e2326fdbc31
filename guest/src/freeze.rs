//! Freezing the file system for a checkpoint, never for longer than promised (ruling 16).
//!
//! ```text
//!  syncfs (≤ 2 rounds) ─▶ FIFREEZE on a thread ─┬─ in time ─▶ frozen ─┬─ a bell ─▶ ring it: the host seals ─▶ thawed, told
//!                                              │                     └─ none ───▶ told ─▶ Thaw, or the timer
//!                                              └─ too late ─▶ "not frozen"; the thread thaws when its call returns
//! ```
//! The bell is a read of the disk past the page cache, of a length that the host has named: writers stand still for one request to the disk, and not for an
//! answer of ours and a call of the host, which have to find their way through a machine under load.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use nix::libc::O_DIRECT;

use proto::agent::{FreezeReply, ThawReply};
use tokio::sync::oneshot;

use crate::{log, sys};

/// After a first round that took longer than this, much was dirty and more has become so meanwhile: a second one makes the pause short.
const SECOND_ROUND: Duration = Duration::from_millis(20);
/// Longest a freeze may be asked to last.
const FROZEN_MAX: Duration = Duration::from_secs(30);
/// Longest read of a bell.
const BELL_BYTES_MAX: u32 = 64 << 10;
/// What a direct read wants its buffer to begin at a multiple of, on any disk.
const BUFFER_ALIGN: usize = 4096;

/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Freezer(Arc<Mutex<Option<Frozen>>>);

#[derive(Debug)]
struct Frozen {
    volume: Arc<File>,
    /// When writers began to wait. Also tells one freeze from the next.
    since: Instant,
}

/// How long things took.
struct Froze {
    freeze: Duration,
    /// Set if the bell was rung; then the file system is thawed again.
    frozen: Option<Duration>,
}

/// Why the file system is not frozen.
enum Missed {
    Late,
    Failed(io::Error),
    Bell(String),
}

/// A read that tells the host to seal.
#[derive(Debug)]
pub(crate) struct Bell {
    ring: mpsc::SyncSender<()>,
    rung: mpsc::Receiver<io::Result<()>>,
}

impl Bell {
    /// Makes everything ready for the read. It waits in a thread of its own: a disk that does not answer must not keep the file system frozen.
    pub(crate) fn new(disk: &Path, bytes: u32) -> io::Result<Self> {
        if bytes > BELL_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the bell is too long a read"));
        }
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let disk = File::options().read(true).custom_flags(O_DIRECT).open(disk)?;
        let (ring, asked) = mpsc::sync_channel(1);
        let (answer, rung) = mpsc::sync_channel(1);
        std::thread::Builder::new().name("bell".into()).spawn(move || {
            let mut buffer = vec![0; len + BUFFER_ALIGN];
            let from = buffer.as_ptr().align_offset(BUFFER_ALIGN);
            if asked.recv().is_ok() {
                // Fails only if nobody waits any more.
                drop(answer.send(disk.read_exact_at(&mut buffer[from..from + len], 0)));
            }
        })?;
        Ok(Self { ring, rung })
    }

    fn ring(&self, limit: Duration) -> Result<(), String> {
        self.ring.send(()).map_err(|error| error.to_string())?;
        match self.rung.recv_timeout(limit) {
            Ok(read) => read.map_err(|error| format!("cannot read the disk: {error}")),
            Err(error) => Err(format!("the disk does not answer: {error}")),
        }
    }
}

impl Freezer {
    fn state(&self) -> MutexGuard<'_, Option<Frozen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.state().is_some()
    }

    /// Cancel safe: a freeze that nobody waits for is undone.
    pub(crate) async fn freeze(
        &self,
        volume: Arc<File>,
        bell: Option<Bell>,
        limit: Duration,
        max_frozen: Duration,
    ) -> FreezeReply {
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
        match self.freeze_within(volume, bell, limit, max_frozen.min(FROZEN_MAX)).await {
            Ok(Froze { freeze, frozen }) => FreezeReply {
                frozen: true,
                sync_ms: millis(synced),
                freeze_us: micros(freeze),
                rung: frozen.is_some(),
                frozen_us: micros(frozen.unwrap_or_default()),
                ..FreezeReply::default()
            },
            Err(Missed::Late) => not(format!("writers did not stand still within {} ms", limit.as_millis()), synced),
            Err(Missed::Failed(error)) => not(format!("FIFREEZE: {error}"), synced),
            Err(Missed::Bell(reason)) => not(reason, synced),
        }
    }

    async fn freeze_within(
        &self,
        volume: Arc<File>,
        bell: Option<Bell>,
        limit: Duration,
        max_frozen: Duration,
    ) -> Result<Froze, Missed> {
        let (told, answer) = oneshot::channel();
        let own = self.clone();
        // With a bell the answer comes behind the thaw.
        let answer_limit = if bell.is_some() { limit + max_frozen } else { limit };
        let thread = std::thread::Builder::new()
            .name("freeze".into())
            .spawn(move || own.run(volume, bell, (limit, max_frozen), told));
        if let Err(error) = thread {
            return Err(Missed::Failed(error));
        }
        match tokio::time::timeout(answer_limit, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(Missed::Late),
        }
    }

    /// The thread of one freeze: until the file system is thawed again.
    fn run(
        &self,
        volume: Arc<File>,
        bell: Option<Bell>,
        (limit, max_frozen): (Duration, Duration),
        told: oneshot::Sender<Result<Froze, Missed>>,
    ) {
        let since = Instant::now();
        if let Err(error) = sys::freeze(&*volume) {
            drop(told.send(Err(Missed::Failed(error))));
            return;
        }
        let freeze = since.elapsed();
        *self.state() = Some(Frozen { volume, since });
        if freeze >= limit {
            self.thaw_if(since);
            drop(told.send(Err(Missed::Late)));
            return;
        }
        if let Some(bell) = bell {
            let rung = bell.ring(max_frozen);
            let result = match (rung, self.thaw_if(since)) {
                (Ok(()), Some(frozen)) => Ok(Froze { freeze, frozen: Some(frozen) }),
                (Ok(()), None) => Err(Missed::Bell("somebody thawed it meanwhile".into())),
                (Err(reason), _) => Err(Missed::Bell(reason)),
            };
            drop(told.send(result));
            return;
        }
        if told.send(Ok(Froze { freeze, frozen: None })).is_err() {
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
    // A freeze empties the journal, which takes longer than all the rest. So it is done before; then little is left.
    if let Err(error) = sys::empty_ext4_journal(volume) {
        log!("cannot empty the journal before the freeze: {error}");
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
        let reply = freezer.freeze(root, None, Duration::from_millis(200), Duration::from_secs(2)).await;
        assert!(!reply.frozen);
        assert!(!reply.reason.is_empty());
        assert!(!freezer.thaw().was_frozen);
    }

    #[test]
    fn a_bell_reads_directly_and_says_why_it_cannot() {
        // On a disk: a file system in memory may know no direct reads.
        let disk = Path::new("/var/tmp").join(format!("sprites-bell-{}", std::process::id()));
        std::fs::write(&disk, [1; 8192]).unwrap();
        let ring = |bytes| Bell::new(&disk, bytes).map(|bell| bell.ring(Duration::from_secs(5)));
        assert_eq!(ring(512 * 3).unwrap(), Ok(()));
        assert!(ring(16384).unwrap().unwrap_err().contains("cannot read the disk"));
        assert_eq!(ring(BELL_BYTES_MAX + 512).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        std::fs::remove_file(&disk).unwrap();
        assert!(Bell::new(&disk, 512).is_err());
    }
}
