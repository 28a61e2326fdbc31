//! Compaction: what trickle writers and overwrites leave behind in the bucket is gathered into fewer packs, and dead packs are deleted.
//!
//! ```text
//!  after so many pushes, beside the owner's loop:
//!    survey    list the volume's packs, walk the trees the head names ─▶ per pack: bytes in all, bytes alive, pinned or not
//!    sweep     delete the packs no tree names, once nobody reads an older root
//!    relocate  copy the live frames of small and mostly dead packs into a new pack, as they are stored
//!  with the next push, in the same CAS of the head:
//!    move      the tree names the copies, and its pages leave the old packs; those are dead now, and go with the next sweep
//! ```
//! All of it starts over from what the head and the bucket say, so it may be dropped at any point: a crash leaves orphans, which the next survey finds.
//!
//! # Why a dead pack stays dead
//!
//! A tree is made from a tree of the head: it names packs of that one, and new packs. So a pack that no tree of a *committed* head names, and that is not
//! new, will never be named again, by this owner or by any that comes after it. New are those numbered from [`Start::before`] on; an upload of memory that
//! is under way with lower numbers puts the survey off. A stale owner may therefore sweep too: what it finds dead is. Only packs of the volume itself are
//! looked at; base images are shared, and kept. A fork names packs of its parent: the parent's head pins what it began as, before there is a fork (`fork`).
//!
//! # Bounds
//!
//! A survey begins after [`Limits::survey_pushes`] pushes, or after one for each [`PAGES_PER_PUSH`] pages it last had to read if that is more. It moves
//! what fits into half a pack, the pages of the next push included, or one pack that is mostly dead. Trees of more than [`PAGES_MAX`] pages are too much
//! for this simple way: then nothing is done.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, future::join_all, stream};
use proto::id::SpriteId;
use tokio::task::JoinSet;
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

use super::{
    device::Device,
    fetch::Fetcher,
    fork,
    head::{Head, Origin, PackId, Place, Root},
    pack::PackWriter,
    page::{Leaf, Page},
    tree::{self, Change, Edit},
    types::{Limits, VolumeError},
};

/// Pages read for each push since the survey before.
const PAGES_PER_PUSH: usize = 16;
/// Pages one survey may read.
const PAGES_MAX: usize = 200_000;
/// Requests at a time: few, as pushes and reads go first.
const SIDE_BY_SIDE: usize = 8;
/// A pack below this share of a whole one is small.
const SMALL_SHARE: u64 = 16;
/// A pack with a smaller share of live bytes is mostly dead.
const LIVE_PERCENT: u64 = 50;
/// Fewer small packs are left as they are.
const PACKS_MIN: usize = 8;
/// What moving a frame costs besides its bytes: its leaf page is written again.
const LEAF_BYTES: u64 = 4096;
/// Longest wait for reads that began on an older root; then nothing is deleted this time.
const READERS_LIMIT: Duration = Duration::from_secs(30);

/// What the owner of a volume knows of its compaction. Dropped, it stops.
pub(super) struct Compaction {
    /// At most one.
    task: JoinSet<Result<Compacted, CompactError>>,
    moves: Option<Moves>,
    /// A survey was made, and the head does not count from it yet.
    surveyed: bool,
    /// Number of pushes after which the next survey begins.
    survey_at: u32,
    /// Pins of forks that do not exist, for the next push.
    gone_forks: Vec<SpriteId>,
}

/// What the next push takes along.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// By chunk.
    pub(super) edits: Vec<Edit>,
    pub(super) leaving: HashSet<PackId>,
}

/// Where the volume stood when a survey began: right after a commit, so the head is what the bucket has.
struct Start {
    head: Head,
    /// Packs of this epoch with this number or a higher one are new.
    before: u32,
    older_readers: Vec<TaskTracker>,
    /// Keeps what the head names under the hands of this survey.
    _reading: TaskTrackerToken,
}

/// What came of a survey.
struct Compacted {
    moves: Option<Moves>,
    /// Pushes until the next one is worth it.
    next_after: u32,
    gone_forks: Vec<SpriteId>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum CompactError {
    #[error("its trees have more than {0} pages")]
    TooManyPages(usize),
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

impl Compaction {
    pub(super) fn new(survey_pushes: u32) -> Self {
        Self { task: JoinSet::new(), moves: None, surveyed: false, survey_at: survey_pushes, gone_forks: Vec::new() }
    }

    /// For the next push.
    pub(super) fn moves(&self) -> Option<&Moves> {
        self.moves.as_ref()
    }

    /// Pins to be taken out of the head by the next push.
    pub(super) fn gone_forks(&self) -> &[SpriteId] {
        &self.gone_forks
    }

    /// What the head is to say with the next push, if it says `pushes` now.
    pub(super) fn count(&self, pushes: u32) -> u32 {
        if self.surveyed { 0 } else { pushes.saturating_add(1) }
    }

    /// A push is in the head, with the moves if there were any.
    pub(super) fn pushed(&mut self) {
        self.moves = None;
        self.surveyed = false;
        self.gone_forks.clear();
    }

    /// Something the moves touch is damaged: a push must not fail over what it need not touch.
    pub(super) fn give_up_moves(&mut self) {
        self.moves = None;
    }

    /// Ends what is under way; before the volume's packs are deleted.
    pub(super) async fn stop(&mut self) {
        self.task.shutdown().await;
    }

    /// Right after a push was committed as `head`: begins a survey if it is time.
    pub(super) fn begin_if_due(&mut self, device: &Arc<Device>, head: &Head) {
        let waiting = !self.task.is_empty() || self.surveyed;
        if waiting || head.pushes_since_survey < self.survey_at {
            return;
        }
        let start = {
            let core = device.core();
            // Read under the lock under which an upload is announced: one that is not announced yet takes higher numbers.
            let before = device.names.mark();
            if !core.uploads.is_empty() {
                return;
            }
            let (_, reading) = core.read_root();
            Start { head: head.clone(), before, older_readers: core.older_readers(), _reading: reading }
        };
        let device = Arc::clone(device);
        self.task.spawn(async move { compact(&device, &start).await });
    }

    pub(super) fn is_under_way(&self) -> bool {
        !self.task.is_empty()
    }

    /// Waits for the survey under way and takes what came of it. Cancel safe.
    pub(super) async fn ended(&mut self, device: &Device) {
        let Some(ended) = self.task.join_next().await else { return };
        let pushes = device.core().head.pushes_since_survey;
        let failed = match ended {
            Ok(Ok(Compacted { moves, next_after, gone_forks })) => {
                (self.moves, self.surveyed, self.survey_at, self.gone_forks) = (moves, true, next_after, gone_forks);
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        self.survey_at = pushes.saturating_add(device.limits.survey_pushes);
        tracing::warn!(volume = %device.id, error = failed, "not compacted; its packs stay for now");
    }
}

/// What a tree holds of one pack.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    live_bytes: u64,
    frames: u64,
}

/// Something in a tree that lies in a pack of the volume.
enum Item<'a> {
    /// With the first of the chunks below it.
    Page {
        first: u64,
        place: Place,
    },
    Frame {
        chunk: u64,
        leaf: &'a Leaf,
    },
}

impl Item<'_> {
    fn place(&self) -> Place {
        match self {
            Self::Page { place, .. } => *place,
            Self::Frame { leaf, .. } => leaf.place,
        }
    }
}

/// Surveys, sweeps and relocates, beside the owner's loop.
async fn compact(device: &Device, start: &Start) -> Result<Compacted, CompactError> {
    let survey = Survey::take(device, &start.head).await?;
    let dead: Vec<PackId> = survey.dead(device.names.epoch, start.before).collect();
    sweep(device, &dead, &start.older_readers).await?;
    let victims = survey.victims(&device.limits);
    let next_after = survey.next_after(&device.limits, victims.more);
    let moved = victims.packs.len();
    let moves = if moved == 0 { None } else { Some(relocate(device, start.head.root, victims.packs).await?) };
    if moved > 0 || !dead.is_empty() {
        tracing::debug!(volume = %device.id, packs = survey.packs.len(), deleted = dead.len(), moved, "compacted");
    }
    let gone_forks = fork::gone(&device.fetcher.bucket, &start.head.forks).await;
    Ok(Compacted { moves, next_after, gone_forks })
}

/// Deletes packs, once nobody reads a tree that may name them.
async fn sweep(device: &Device, dead: &[PackId], readers: &[TaskTracker]) -> Result<(), VolumeError> {
    if dead.is_empty() {
        return Ok(());
    }
    let gone = join_all(readers.iter().map(TaskTracker::wait));
    if tokio::time::timeout(READERS_LIMIT, gone).await.is_err() {
        tracing::debug!(volume = %device.id, "reads of an older root do not end; nothing is deleted now");
        return Ok(());
    }
    let deleted = dead.iter().copied().map(|pack| async move {
        device.fetcher.bucket.delete(&pack.key()).await.map_err(VolumeError::Bucket)?;
        device.fetcher.forget(pack).await
    });
    stream::iter(deleted).buffer_unordered(SIDE_BY_SIDE).try_collect().await
}

/// Copies the live frames of `leaving` into new packs. Their pages follow when the moves are made.
async fn relocate(device: &Device, root: Option<Root>, leaving: HashSet<PackId>) -> Result<Moves, CompactError> {
    let (mut frames, mut pages) = (Vec::new(), BTreeSet::new());
    walk(&device.fetcher, device.names.origin, root, |item| match item {
        item if !leaving.contains(&item.place().pack) => {}
        Item::Page { first, .. } => drop(pages.insert(first)),
        Item::Frame { chunk, leaf } => frames.push((chunk, *leaf)),
    })
    .await?;
    frames.sort_unstable_by_key(|(chunk, _)| *chunk);
    let mut packs = PackWriter::new(Arc::clone(&device.fetcher), device.names.clone(), device.limits.pack_bytes);
    let mut edits = Vec::with_capacity(frames.len() + pages.len());
    let stored = frames.into_iter().map(|(chunk, leaf)| async move {
        let bytes = device.fetcher.frame(&leaf).await?;
        Ok::<_, VolumeError>((chunk, leaf.place, bytes))
    });
    let mut stored = std::pin::pin!(stream::iter(stored).buffered(SIDE_BY_SIDE));
    while let Some((chunk, from, bytes)) = stored.try_next().await? {
        let to = packs.add_frame(chunk, &bytes).await?;
        pages.remove(&chunk);
        edits.push(Edit { chunks: chunk..chunk + 1, change: Change::Move { from, to } });
    }
    packs.finish().await?;
    edits.extend(pages.into_iter().map(|first| Edit { chunks: first..first + 1, change: Change::Keep }));
    edits.sort_unstable_by_key(|edit| edit.chunks.start);
    Ok(Moves { edits, leaving })
}

/// The packs of a volume: all there are, and what is alive in them.
struct Survey {
    packs: HashMap<PackId, u64>,
    held: HashMap<PackId, Held>,
    /// Named by a checkpoint or a memory image: moving what the disk has in them would free nothing.
    pinned: HashSet<PackId>,
    pages: usize,
}

struct Victims {
    packs: HashSet<PackId>,
    /// There are others, beyond the bound.
    more: bool,
}

impl Survey {
    async fn take(device: &Device, head: &Head) -> Result<Self, CompactError> {
        let (fetcher, origin) = (&*device.fetcher, device.names.origin);
        let listed = fetcher.bucket.list(&origin.packs()).await.map_err(VolumeError::Bucket)?;
        let packs = listed.iter().filter_map(|entry| Some((PackId::from_key(origin, &entry.key)?, entry.size_bytes)));
        let packs = packs.collect();
        let (mut held, mut pinned): (HashMap<PackId, Held>, HashSet<PackId>) = Default::default();
        let of_disk = walk(fetcher, origin, head.root, |item| {
            let of_pack = held.entry(item.place().pack).or_default();
            of_pack.live_bytes += u64::from(item.place().len);
            of_pack.frames += u64::from(matches!(item, Item::Frame { .. }));
        });
        let pages = of_disk.await?;
        let kept = walk(fetcher, origin, kept_roots(head), |item| {
            pinned.insert(item.place().pack);
        });
        let pages = pages + kept.await?;
        Ok(Self { packs, held, pinned, pages })
    }

    /// Packs that no tree names, and none ever will.
    fn dead(&self, epoch: u64, before: u32) -> impl Iterator<Item = PackId> {
        let is_old = move |pack: &PackId| (pack.epoch, pack.seq) < (epoch, before);
        let is_named = |pack: &PackId| self.held.contains_key(pack) || self.pinned.contains(pack);
        self.packs.keys().copied().filter(is_old).filter(move |pack| !is_named(pack))
    }

    /// What is worth moving: the packs with the least to move first.
    fn victims(&self, limits: &Limits) -> Victims {
        let pack_bytes = limits.pack_bytes as u64;
        let mut worth: Vec<(u64, PackId)> = Vec::new();
        let (mut small, mut dead_bytes) = (0, 0);
        for (pack, held) in &self.held {
            let Some(&bytes) = self.packs.get(pack) else { continue };
            let mostly_dead = held.live_bytes * 100 < bytes * LIVE_PERCENT;
            if self.pinned.contains(pack) || !(mostly_dead || bytes < pack_bytes / SMALL_SHARE) {
                continue;
            }
            small += 1;
            dead_bytes += bytes.saturating_sub(held.live_bytes);
            worth.push((held.live_bytes + held.frames * LEAF_BYTES, *pack));
        }
        if small < PACKS_MIN && dead_bytes < pack_bytes / 2 {
            return Victims { packs: HashSet::new(), more: false };
        }
        worth.sort_unstable();
        let (all, mut cost) = (worth.len(), 0);
        let packs: HashSet<PackId> = worth
            .into_iter()
            .enumerate()
            .take_while(|(index, (more, _))| {
                cost += more;
                *index == 0 || cost <= pack_bytes / 2
            })
            .map(|(_, (_, pack))| pack)
            .collect();
        let more = packs.len() < all;
        Victims { packs, more }
    }

    fn next_after(&self, limits: &Limits, more: bool) -> u32 {
        let by_pages = u32::try_from(self.pages / PAGES_PER_PUSH).unwrap_or(u32::MAX);
        let usual = if more { limits.survey_pushes / 4 } else { limits.survey_pushes };
        usual.max(by_pages).max(1)
    }
}

/// Roots the head keeps besides the disk's.
fn kept_roots(head: &Head) -> impl Iterator<Item = Root> {
    let checkpoints = head.checkpoints.iter().filter_map(|checkpoint| checkpoint.kept.as_ref()?.root);
    let memory = head.memory.iter().flat_map(|memory| [memory.root, memory.state_root]).flatten();
    let forks = head.forks.iter().filter_map(|fork| fork.root);
    checkpoints.chain(memory).chain(forks)
}

/// The packs of `origin` that are named anywhere under `roots`.
pub(super) async fn named(
    fetcher: &Fetcher,
    origin: Origin,
    roots: impl IntoIterator<Item = Root>,
) -> Result<HashSet<PackId>, CompactError> {
    let mut packs = HashSet::new();
    walk(fetcher, origin, roots, |item| {
        packs.insert(item.place().pack);
    })
    .await?;
    Ok(packs)
}

/// Shows `visit` everything under `roots` that lies in packs of `origin`, each page once. Returns the number of pages.
///
/// A page in a pack of another origin was there before the volume, and names nothing of it.
async fn walk(
    fetcher: &Fetcher,
    origin: Origin,
    roots: impl IntoIterator<Item = Root>,
    mut visit: impl FnMut(Item<'_>),
) -> Result<usize, CompactError> {
    // By place: equal pages may lie in several packs.
    let mut seen: HashSet<Place> = HashSet::new();
    let mut left: Vec<_> = roots.into_iter().map(|root| (root.place, root.hash, 0)).collect();
    while !left.is_empty() {
        let next = left.split_off(left.len().saturating_sub(SIDE_BY_SIDE));
        let own = next.into_iter().filter(|(place, ..)| place.pack.origin == origin && seen.insert(*place));
        let read = own.map(|(place, hash, first)| async move { Ok((place, first, fetcher.page(place, hash).await?)) });
        let pages: Vec<_> = stream::iter(read.collect::<Vec<_>>()).buffered(SIDE_BY_SIDE).collect().await;
        if seen.len() > PAGES_MAX {
            return Err(CompactError::TooManyPages(PAGES_MAX));
        }
        for page in pages {
            let (place, first, page): (_, _, Arc<Page>) = page.map_err(CompactError::Volume)?;
            visit(Item::Page { first, place });
            if let Page::Leaves(leaves) = &*page {
                let own = leaves.iter().filter(|leaf| leaf.place.pack.origin == origin);
                own.for_each(|leaf| visit(Item::Frame { chunk: first + u64::from(leaf.slot), leaf }));
            }
            left.extend(tree::below(&page, first));
        }
    }
    Ok(seen.len())
}
