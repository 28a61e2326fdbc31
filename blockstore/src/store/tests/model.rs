//! Random histories of a volume against an array of bytes.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Write {
        offset: u64,
        len: u64,
        seed: u64,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Read {
        offset: u64,
        len: u64,
    },
    Flush,
    Push,
    Seal,
    Restore {
        which: usize,
    },
    Delete {
        which: usize,
    },
    /// `kill -9`, or a power failure that keeps a share of the unsynced tail.
    Crash {
        power: Option<f64>,
    },
    /// Everything to the bucket, the local folder deleted.
    Move,
    /// The local folder is lost without a release.
    LoseHost,
    Reopen,
}

/// Largest record in a segment of [`small_limits`].
const RECORD: usize = 64 << 10;
const SIZE: u64 = 5 * 65536 + 8192;

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SIZE, prop_oneof![1..5000u64, 1..200_000u64]).prop_map(|(at, len)| (at, len.min(SIZE - at)));
    let aligned = || (0..SIZE / 4096, 1..20u64).prop_map(|(at, len)| (at * 4096, (len * 4096).min(SIZE - at * 4096)));
    prop_oneof![
        6 => (range(), any::<u64>()).prop_map(|((offset, len), seed)| Step::Write { offset, len, seed }),
        6 => (aligned(), any::<u64>()).prop_map(|((offset, len), seed)| Step::Write { offset, len, seed }),
        2 => range().prop_map(|(offset, len)| Step::Zero { offset, len }),
        2 => aligned().prop_map(|(offset, len)| Step::Zero { offset, len }),
        3 => range().prop_map(|(offset, len)| Step::Read { offset, len }),
        3 => Just(Step::Flush),
        3 => Just(Step::Push),
        2 => Just(Step::Seal),
        1 => any::<usize>().prop_map(|which| Step::Restore { which }),
        1 => any::<usize>().prop_map(|which| Step::Delete { which }),
        2 => proptest::option::of(0.0..1.0f64).prop_map(|power| Step::Crash { power }),
        1 => Just(Step::Move),
        1 => Just(Step::LoseHost),
        1 => Just(Step::Reopen),
    ]
}

struct Model {
    /// Every state since the last one that must survive.
    states: Vec<Vec<u8>>,
    /// Index of the newest state that must survive a power failure, and the loss of the host.
    synced: usize,
    pushed: usize,
    checkpoints: Vec<(String, Vec<u8>)>,
    base: Option<String>,
    sealed: u32,
}

impl Model {
    fn now(&self) -> &Vec<u8> {
        self.states.last().unwrap()
    }

    fn change(&mut self, change: impl FnOnce(&mut [u8])) {
        let mut next = self.now().clone();
        change(&mut next);
        self.states.push(next);
    }

    fn all_synced(&mut self) {
        self.synced = self.states.len() - 1;
    }

    fn all_pushed(&mut self) {
        self.all_synced();
        self.pushed = self.synced;
    }

    /// The volume is found with this content, and must be in a state at or after `floor`.
    fn found(&mut self, content: Vec<u8>, floor: usize) {
        let at = self.states.iter().rposition(|state| *state == content);
        assert!(at.is_some_and(|at| at >= floor), "found state {at:?}, {floor} must have survived");
        self.states.truncate(at.unwrap() + 1);
        // Recovery syncs what it keeps.
        self.all_synced();
    }
}

/// Steps with more than one outcome.
impl Model {
    async fn restore(&mut self, volume: &Volume, which: usize) {
        let Some((id, content)) = self.checkpoints.get(which % self.checkpoints.len().max(1)).cloned() else {
            assert!(matches!(volume.restore("v1").await, Err(CheckpointError::Unknown { .. })));
            return;
        };
        volume.restore(&id).await.unwrap();
        self.states = vec![content];
        self.base = Some(id);
        self.all_pushed();
    }

    async fn delete(&mut self, volume: &Volume, which: usize) {
        let Some(at) = which.checked_rem(self.checkpoints.len()) else { return };
        let id = self.checkpoints[at].0.clone();
        let deleted = volume.delete_checkpoint(&id).await;
        if self.base.as_ref() == Some(&id) {
            assert!(matches!(deleted, Err(CheckpointError::CurrentBase { .. })));
        } else {
            deleted.unwrap();
            self.checkpoints.remove(at);
        }
    }
}

async fn run(steps: Vec<Step>, by_itself: bool) {
    // By itself the volume pushes all the time, else only when told.
    let push_age = Duration::from_millis(if by_itself { 1 } else { 1 << 40 });
    let limits = Limits { push_bytes: 1 << 40, push_age, ..small_limits() };
    let mut site = Site::new(limits).await;
    let mut volume = site.volume(SIZE).await;
    let id = volume.id();
    let zeros = vec![0; usize::try_from(SIZE).unwrap()];
    let mut model = Model { states: vec![zeros], synced: 0, pushed: 0, checkpoints: vec![], base: None, sealed: 0 };
    for step in steps {
        let index = |at: u64| usize::try_from(at).unwrap();
        match step {
            Step::Write { offset, len, seed } => {
                let bytes = noise(seed, index(len));
                write(&volume, offset, &bytes).await;
                // A power failure may keep the first records of a large write.
                for (part, at) in bytes.chunks(RECORD).zip((index(offset)..).step_by(RECORD)) {
                    model.change(|now| now[at..at + part.len()].copy_from_slice(part));
                }
            }
            Step::Zero { offset, len } => {
                volume.zero(offset, u32::try_from(len).unwrap()).await.unwrap();
                model.change(|now| now[index(offset)..][..index(len)].fill(0));
            }
            Step::Read { offset, len } => {
                assert!(read(&volume, offset, len).await == model.now()[index(offset)..][..index(len)]);
            }
            Step::Flush => {
                volume.flush().await.unwrap();
                model.all_synced();
            }
            Step::Push => {
                volume.push().await.unwrap();
                model.all_pushed();
            }
            Step::Seal => {
                let sealed = volume.seal_checkpoint(meta("model")).await.unwrap();
                model.sealed += 1;
                assert_eq!(sealed.id, format!("v{}", model.sealed));
                assert!(sealed.is_current_base);
                model.all_synced();
                model.checkpoints.push((sealed.id.clone(), model.now().clone()));
                model.base = Some(sealed.id);
                // Its push begins at once.
                volume.wait_durable(&model.checkpoints.last().unwrap().0).await.unwrap();
                model.all_pushed();
            }
            Step::Restore { which } => model.restore(&volume, which).await,
            Step::Delete { which } => model.delete(&volume, which).await,
            Step::Crash { power } => {
                site.crash(volume, power).await;
                volume = site.store().acquire(id).await.unwrap();
                let floor = if power.is_some() { model.synced } else { model.states.len() - 1 };
                model.found(read_all(&volume).await, floor);
            }
            Step::Move => {
                volume.release().await.unwrap();
                site.wipe();
                site.open().await;
                volume = site.store().acquire(id).await.unwrap();
                let floor = model.states.len() - 1;
                model.found(read_all(&volume).await, floor);
                model.all_pushed();
            }
            Step::LoseHost => {
                site.crash(volume, None).await;
                drop(site.store.take());
                site.wipe();
                site.open().await;
                volume = site.store().acquire(id).await.unwrap();
                let floor = model.pushed;
                model.found(read_all(&volume).await, floor);
                model.all_pushed();
            }
            Step::Reopen => {
                volume.close().await;
                drop(volume);
                site.open().await;
                volume = site.store().acquire(id).await.unwrap();
                let floor = model.states.len() - 1;
                model.found(read_all(&volume).await, floor);
            }
        }
        let listed: Vec<_> = volume.checkpoints().await.into_iter().map(|checkpoint| checkpoint.id).collect();
        let expected: Vec<_> = model.checkpoints.iter().map(|(id, _)| id.clone()).collect();
        assert_eq!(listed, expected);
    }
    assert!(read_all(&volume).await == *model.now());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_volume_is_an_array_of_bytes_with_checkpoints(steps in proptest::collection::vec(step(), 1..40), by_itself: bool) {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(async {
            tokio::time::timeout(Duration::from_secs(60), run(steps, by_itself)).await.expect("no step hangs");
        });
    }
}
