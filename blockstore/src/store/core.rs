//! What a volume knows in RAM: which bytes are newer than the manifest and where, and how far the bucket is behind. No I/O.
//!
//! ```text
//!  newest   active layer     writes go here
//!           frozen layers    cut by pushes and checkpoints; the oldest is being pushed
//!  oldest   root             the manifest of what is in the bucket
//! ```
//! One mutex around it, held for map operations only. A freeze swaps a map for an empty one: O(1), whatever the disk's size.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

use super::{
    extent::{ExtentMap, Value},
    frame::CHUNK_BYTES,
    head::{Head, KeptCheckpoint, Root},
    segment::Segment,
    types::{Checkpoint, Limits, Lsn, VolumeStatus},
};

/// Frozen layers of one volume; a seal waits for a push when there are so many. Each costs every read a look-up.
pub(super) const LAYERS_MAX: usize = 64;
/// Bytes written into one layer.
const LAYER_BYTES_MAX: u64 = 256 << 20;
/// Longest delay of one write while a push lags (ruling 7).
const DELAY_MAX: Duration = Duration::from_millis(250);
/// Share of the journal's quota from which on writes are slowed down even if the bucket is away.
const NEARLY_FULL_PERCENT: u64 = 90;

/// Where bytes newer than the manifest are.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Journal { segment: Arc<Segment>, offset: u64 },
    Hole,
}

impl Value for Source {
    fn advance(&self, bytes: u64) -> Self {
        match self {
            Self::Journal { segment, offset } => Self::Journal { segment: Arc::clone(segment), offset: offset + bytes },
            Self::Hole => Self::Hole,
        }
    }

    fn continues(&self, len: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Hole, Self::Hole) => true,
            (Self::Journal { segment: a, offset }, Self::Journal { segment: b, offset: next }) => {
                Arc::ptr_eq(a, b) && offset + len == *next
            }
            (Self::Hole, Self::Journal { .. }) | (Self::Journal { .. }, Self::Hole) => false,
        }
    }
}

/// Changes since the last cut.
#[derive(Debug, Default)]
pub(super) struct Layer {
    pub(super) map: ExtentMap<Source>,
    /// Bytes written into it, overwrites included.
    pub(super) dirty_bytes: u64,
    /// When its first change came.
    pub(super) since: Option<(Instant, u64)>,
}

/// A layer that changes no more.
#[derive(Debug)]
pub(super) struct Frozen {
    pub(super) layer: Layer,
    /// Everything up to it is in this layer or below.
    pub(super) lsn: Lsn,
    pub(super) cut_unix_ms: u64,
    pub(super) size_bytes: u64,
    /// The checkpoint sealed with this cut.
    pub(super) checkpoint: Option<KeptCheckpoint>,
}

/// Where to read a part of a range.
#[derive(Clone, Debug)]
pub(super) enum Part {
    Newer(Source),
    /// In the manifest.
    Base,
}

/// How the volume stands towards its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Open,
    /// Operations wait for ever: whoever serves the volume is about to end, and the guest must not hear an error.
    Closed,
    /// Another host owns the volume.
    Fenced,
    /// The journal failed.
    Poisoned,
}

/// What a write has to do first.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pressure {
    None,
    Delay(Duration),
    /// Until a push has landed.
    Wait,
    NoSpace,
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) head: Arc<Head>,
    pub(super) mode: Mode,
    pub(super) active: Layer,
    pub(super) frozen: VecDeque<Arc<Frozen>>,
    pub(super) root: Option<Root>,
    /// Who reads the tree under `root`; compaction deletes nothing under their hands.
    readers: TaskTracker,
    /// The same for earlier roots.
    older_readers: Vec<TaskTracker>,
    /// Uploads of packs that no head names yet, besides the owner's pushes.
    pub(super) uploads: TaskTracker,
    /// Of the newest write in the active layer.
    pub(super) lsn: Lsn,
    pub(super) next_checkpoint: u32,
    pub(super) current_base: Option<u32>,
    /// The journal's current file.
    pub(super) current: Option<Arc<Segment>>,
    pub(super) journal_bytes: u64,
    pub(super) bucket_away: bool,
    pub(super) size_bytes: u64,
}

pub(super) fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Layer {
    pub(super) fn insert(&mut self, range: Range<u64>, source: Source) {
        if self.since.is_none() {
            self.since = Some((Instant::now(), now_unix_ms()));
        }
        if matches!(source, Source::Journal { .. }) {
            self.dirty_bytes += range.end - range.start;
        }
        self.map.insert(range, source);
    }
}

impl Core {
    pub(super) fn new(head: Head) -> Self {
        Self {
            mode: Mode::Open,
            active: Layer::default(),
            frozen: VecDeque::new(),
            root: head.root,
            readers: TaskTracker::new(),
            older_readers: Vec::new(),
            uploads: TaskTracker::new(),
            lsn: head.lsn,
            next_checkpoint: head.next_checkpoint,
            current_base: head.current_base,
            current: None,
            journal_bytes: 0,
            bucket_away: false,
            size_bytes: head.size_bytes,
            head: Arc::new(head),
        }
    }

    /// A change that is in the log now.
    pub(super) fn insert(&mut self, lsn: Lsn, range: Range<u64>, source: Source) {
        debug_assert!(lsn > self.lsn, "{lsn} after {}", self.lsn);
        self.lsn = lsn;
        self.active.insert(range, source);
    }

    /// Cuts here. Without changes since the last cut nothing happens, unless a checkpoint is to be kept.
    pub(super) fn freeze(&mut self, checkpoint: Option<KeptCheckpoint>) {
        if self.active.map.is_empty() && checkpoint.is_none() && self.lsn == self.cut_lsn() {
            return;
        }
        let layer = std::mem::take(&mut self.active);
        let cut_unix_ms = now_unix_ms();
        if let Some(checkpoint) = &checkpoint {
            self.next_checkpoint = self.next_checkpoint.max(checkpoint.number + 1);
            self.current_base = Some(checkpoint.number);
        }
        let frozen = Frozen { layer, lsn: self.lsn, cut_unix_ms, size_bytes: self.size_bytes, checkpoint };
        self.frozen.push_back(Arc::new(frozen));
    }

    /// Cuts a layer that has become large while pushes wait, so that a push that fails has not that much to repeat.
    pub(super) fn bound_layer(&mut self) {
        if self.active.dirty_bytes >= LAYER_BYTES_MAX && self.frozen.len() < LAYERS_MAX / 2 {
            self.freeze(None);
        }
    }

    fn cut_lsn(&self) -> Lsn {
        self.frozen.back().map_or(self.head.lsn, |frozen| frozen.lsn)
    }

    /// Whether the bucket has everything.
    pub(super) fn is_pushed(&self) -> bool {
        self.frozen.is_empty() && self.active.map.is_empty() && self.lsn == self.head.lsn
    }

    /// Takes the root that the head has now.
    pub(super) fn move_to(&mut self, root: Option<Root>) {
        self.root = root;
        let older = std::mem::take(&mut self.readers);
        older.close();
        self.older_readers.push(older);
        self.older_readers.retain(|readers| !readers.is_empty());
    }

    /// The root to read from, and a token to be held while doing so.
    pub(super) fn read_root(&self) -> (Option<Root>, TaskTrackerToken) {
        (self.root, self.readers.token())
    }

    /// Whether anybody, a survey for one, reads a tree.
    #[cfg(test)]
    pub(super) fn is_read(&self) -> bool {
        self.older_readers.iter().chain([&self.readers]).any(|readers| !readers.is_empty())
    }

    pub(super) fn older_readers(&self) -> Vec<TaskTracker> {
        self.older_readers.clone()
    }

    /// Cuts `range` into parts by where they are read, in order.
    pub(super) fn resolve(&self, range: Range<u64>) -> Vec<(Range<u64>, Part)> {
        let mut parts = Vec::new();
        let mut left = vec![range];
        let frozen = self.frozen.iter().rev().map(|frozen| &frozen.layer);
        for layer in std::iter::once(&self.active).chain(frozen) {
            if left.is_empty() {
                break;
            }
            if layer.map.is_empty() {
                continue;
            }
            let mut below = Vec::with_capacity(left.len());
            for gap in left {
                let mut at = gap.start;
                for (covered, source) in layer.map.within(gap.clone()) {
                    if covered.start > at {
                        below.push(at..covered.start);
                    }
                    at = covered.end;
                    parts.push((covered, Part::Newer(source)));
                }
                if at < gap.end {
                    below.push(at..gap.end);
                }
            }
            left = below;
        }
        parts.extend(left.into_iter().map(|range| (range, Part::Base)));
        parts.sort_unstable_by_key(|(range, _)| range.start);
        parts
    }

    fn dirty_bytes(&self) -> u64 {
        self.active.dirty_bytes + self.frozen.iter().map(|frozen| frozen.layer.dirty_bytes).sum::<u64>()
    }

    fn oldest(&self) -> Option<(Instant, u64)> {
        self.frozen.iter().map(|frozen| &frozen.layer).chain([&self.active]).find_map(|layer| layer.since)
    }

    /// When the next push has to begin; `None` if there is nothing to push.
    pub(super) fn push_due(&self, limits: &Limits, now: Instant) -> Option<Instant> {
        if !self.frozen.is_empty() || self.active.dirty_bytes >= limits.push_bytes {
            return Some(now);
        }
        self.active.since.map(|(since, _)| since + limits.push_age)
    }

    pub(super) fn pressure(&self, limits: &Limits, now: Instant) -> Pressure {
        // Room for what is being written when the limit is looked at.
        let quota = limits.journal_bytes.saturating_sub(limits.segment_bytes);
        if self.journal_bytes >= quota {
            return if self.bucket_away { Pressure::NoSpace } else { Pressure::Wait };
        }
        if self.journal_bytes >= quota / 100 * NEARLY_FULL_PERCENT {
            return Pressure::Delay(DELAY_MAX);
        }
        let age = self.oldest().map_or(Duration::ZERO, |(since, _)| now.saturating_duration_since(since));
        let over = age.saturating_sub(limits.delay_age);
        if self.bucket_away || over.is_zero() {
            return Pressure::None;
        }
        Pressure::Delay(over.mul_f64(0.05).min(DELAY_MAX))
    }

    pub(super) fn status(&self) -> VolumeStatus {
        let unpushed_bytes = self.dirty_bytes();
        let kept = self.root.map_or(0, |root| root.chunks * CHUNK_BYTES);
        VolumeStatus {
            lsn: self.lsn,
            pushed_lsn: self.head.lsn,
            watermark_unix_ms: self.oldest().map_or_else(now_unix_ms, |(_, unix_ms)| unix_ms),
            used_bytes: (kept + unpushed_bytes).min(self.size_bytes),
            unpushed_bytes,
            journal_bytes: self.journal_bytes,
            epoch: self.head.epoch,
            generation: self.head.generation,
            bucket_away: self.bucket_away,
        }
    }

    /// All checkpoints, the oldest first: those in the head, then those sealed since.
    pub(super) fn checkpoints(&self) -> Vec<Checkpoint> {
        let sealed = self.frozen.iter().filter_map(|frozen| frozen.checkpoint.as_ref());
        let kept = self.head.checkpoints.iter();
        let unknown = sealed.filter(|sealed| self.head.checkpoint(sealed.number).is_none());
        kept.chain(unknown).map(|checkpoint| checkpoint.shown(self.current_base)).collect()
    }
}
