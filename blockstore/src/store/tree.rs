//! The manifest: a tree of pages from chunk numbers to frames. Persistent: an update writes new pages along its paths and shares all others.

use std::{collections::HashSet, ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::{
    fetch::Fetcher,
    frame::{CHUNK_BYTES, FrameHash, FrameKind},
    head::{PackId, Place, Root},
    pack::PackWriter,
    page::{Child, Leaf, Page, ROOT_LEVEL, SLOTS},
    types::VolumeError,
};

/// Largest disk: what a tree of four levels holds.
pub(super) const DISK_BYTES_MAX: u64 = SLOTS * SLOTS * SLOTS * SLOTS * CHUNK_BYTES;
/// Leaf pages that one question about a range may load.
const LEAF_PAGES_MAX: usize = 64;

/// A change of the tree.
#[derive(Clone, Debug)]
pub(super) struct Edit {
    /// One chunk, unless they are cleared.
    pub(super) chunks: Range<u64>,
    pub(super) change: Change,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Set(Entry),
    Clear,
    /// The same stored bytes are elsewhere now, unless the entry has changed meanwhile.
    Move {
        from: Place,
        to: Place,
    },
    /// Nothing. Its pages are looked at, whether they have to leave their packs.
    Keep,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) kind: FrameKind,
    pub(super) place: Place,
    pub(super) hash: FrameHash,
}

/// Chunks under one slot of a page of this level.
fn span(level: u8) -> u64 {
    SLOTS.pow(u32::from(level))
}

fn slot_of(chunk: u64, level: u8) -> u8 {
    u8::try_from(chunk / span(level) % SLOTS).expect("below 128")
}

/// The leaf page that covers `chunk`, if any chunk near it holds data.
async fn leaf_page(fetcher: &Fetcher, root: Option<Root>, chunk: u64) -> Result<Option<Arc<Page>>, VolumeError> {
    let Some(root) = root else { return Ok(None) };
    let mut page = fetcher.page(root.place, root.hash).await?;
    while page.level() > 0 {
        let Some(&Child { place, hash, .. }) = page.child(slot_of(chunk, page.level())) else { return Ok(None) };
        page = fetcher.page(place, hash).await?;
    }
    Ok(Some(page))
}

/// Content of one chunk; `None` where the tree has no entry.
pub(super) async fn chunk(fetcher: &Fetcher, root: Option<Root>, chunk: u64) -> Result<Option<Bytes>, VolumeError> {
    let Some(page) = leaf_page(fetcher, root, chunk).await? else { return Ok(None) };
    let Page::Leaves(leaves) = &*page else { return Ok(None) };
    let Some(index) = page.leaf(slot_of(chunk, 0)) else { return Ok(None) };
    fetcher.chunk(leaves, index).await.map(Some)
}

/// Which chunks of `range` have entries, as runs, up to where the answer ends (the whole range, or what [`LEAF_PAGES_MAX`] pages covered).
pub(super) async fn runs(
    fetcher: &Fetcher,
    root: Option<Root>,
    range: Range<u64>,
) -> Result<(Vec<Range<u64>>, u64), VolumeError> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    let mut pages = 0;
    while at < range.end && pages < LEAF_PAGES_MAX {
        let Some(root) = root else { return Ok((found, range.end)) };
        let mut page = fetcher.page(root.place, root.hash).await?;
        // Down to the leaf of `at`, or past the subtree that is absent.
        let absent = loop {
            let level = page.level();
            if level == 0 {
                break None;
            }
            match page.child(slot_of(at, level)) {
                Some(&Child { place, hash, .. }) => page = fetcher.page(place, hash).await?,
                None => break Some(span(level)),
            }
        };
        let Some(absent) = absent else {
            pages += 1;
            let first = at - at % SLOTS;
            let Page::Leaves(leaves) = &*page else { break };
            for leaf in leaves {
                let chunk = first + u64::from(leaf.slot);
                if chunk < at || chunk >= range.end {
                    continue;
                }
                match found.last_mut() {
                    Some(last) if last.end == chunk => last.end += 1,
                    _ => found.push(chunk..chunk + 1),
                }
            }
            at = first + SLOTS;
            continue;
        };
        at = (at / absent + 1) * absent;
    }
    Ok((found, at.min(range.end)))
}

/// Every entry, in order, to `each`. For copying whole trees out.
pub(super) async fn entries(
    fetcher: &Fetcher,
    root: Option<Root>,
) -> Result<Vec<(u64, Arc<Page>, usize)>, VolumeError> {
    let mut all = Vec::new();
    let Some(root) = root else { return Ok(all) };
    let mut stack = vec![(root.place, root.hash, 0)];
    while let Some((place, hash, first)) = stack.pop() {
        let page = fetcher.page(place, hash).await?;
        match &*page {
            Page::Leaves(leaves) => {
                all.extend(
                    leaves.iter().enumerate().map(|(i, leaf)| (first + u64::from(leaf.slot), Arc::clone(&page), i)),
                );
            }
            Page::Children { .. } => {
                let from = stack.len();
                stack.extend(below(&page, first));
                stack[from..].reverse();
            }
        }
    }
    Ok(all)
}

/// The pages that `page` names, with the first chunk of each, if `page` itself begins with the chunk `first`.
pub(super) fn below(page: &Page, first: u64) -> impl Iterator<Item = (Place, [u8; 32], u64)> {
    let (level, children) = match page {
        Page::Leaves(_) => (0, [].as_slice()),
        Page::Children { level, children } => (*level, children.as_slice()),
    };
    children.iter().map(move |child| (child.place, child.hash, first + u64::from(child.slot) * span(level)))
}

/// Applies `edits`, in order and without overlaps, to the tree under `root`. New pages go to `packs`, and so do pages on the way that lie in the packs
/// `leaving`.
pub(super) async fn update(
    fetcher: &Fetcher,
    packs: &mut PackWriter,
    root: Option<Root>,
    edits: &[Edit],
    leaving: &HashSet<PackId>,
) -> Result<Option<Root>, VolumeError> {
    if edits.is_empty() {
        return Ok(root);
    }
    let old = root.map(|root| Child { slot: 0, place: root.place, hash: root.hash, chunks: 0 });
    let mut update = Update { fetcher, packs, leaving };
    let new = update.page(ROOT_LEVEL, 0, old, edits).await?;
    Ok(new.map(|(child, chunks)| Root { place: child.place, hash: child.hash, chunks }))
}

struct Update<'a> {
    fetcher: &'a Fetcher,
    packs: &'a mut PackWriter,
    leaving: &'a HashSet<PackId>,
}

/// A written page as its parent names it, and the chunks below.
type Written = (Child, u64);

impl Update<'_> {
    /// Rewrites the page that covers the chunks from `first` on; `None` if nothing is left in it.
    fn page<'b>(
        &'b mut self,
        level: u8,
        first: u64,
        old: Option<Child>,
        edits: &'b [Edit],
    ) -> BoxFuture<'b, Result<Option<Written>, VolumeError>> {
        Box::pin(async move {
            let before = match &old {
                Some(child) => Some(self.fetcher.page(child.place, child.hash).await?),
                None => None,
            };
            let after = if level == 0 {
                edit_leaves(before.as_deref(), first, edits)
            } else {
                self.children(level, first, before.as_deref(), edits).await?
            };
            let chunks = after.chunks();
            if chunks == 0 {
                return Ok(None);
            }
            if let (Some(before), Some(child)) = (&before, old)
                && **before == after
                && !self.leaving.contains(&child.place.pack)
            {
                return Ok(Some((child, chunks)));
            }
            let bytes = after.encode();
            let hash = *blake3::hash(&bytes).as_bytes();
            let place = self.packs.add_page(level, &bytes).await?;
            self.fetcher.keep_page(hash, after);
            Ok(Some((Child { slot: 0, place, hash, chunks: 0 }, chunks)))
        })
    }

    async fn children(
        &mut self,
        level: u8,
        first: u64,
        before: Option<&Page>,
        edits: &[Edit],
    ) -> Result<Page, VolumeError> {
        let width = span(level);
        let mut children = Vec::new();
        for slot in 0..SLOTS {
            let start = first + slot * width;
            let slot = slot_of(start, level);
            let old = before.and_then(|page| page.child(slot)).copied();
            let touching = overlapping(edits, start..start + width);
            if touching.is_empty() {
                children.extend(old);
                continue;
            }
            let sets = |edit: &Edit| matches!(edit.change, Change::Set(_));
            let gone = |edit: &Edit| {
                matches!(edit.change, Change::Clear) && edit.chunks.start <= start && edit.chunks.end >= start + width
            };
            if touching.iter().any(gone) || (old.is_none() && !touching.iter().any(sets)) {
                continue;
            }
            if let Some((child, chunks)) = self.page(level - 1, start, old, touching).await? {
                let chunks = u32::try_from(chunks).expect("16 TiB are 2^28 chunks");
                children.push(Child { slot, chunks, ..child });
            }
        }
        Ok(Page::Children { level, children })
    }
}

/// The edits, of some in order, that touch `range`.
pub(super) fn overlapping(edits: &[Edit], range: Range<u64>) -> &[Edit] {
    let from = edits.partition_point(|edit| edit.chunks.end <= range.start);
    let to = edits.partition_point(|edit| edit.chunks.start < range.end);
    &edits[from..to.max(from)]
}

fn edit_leaves(before: Option<&Page>, first: u64, edits: &[Edit]) -> Page {
    let mut leaves: Vec<Leaf> = match before {
        Some(Page::Leaves(leaves)) => leaves.clone(),
        Some(Page::Children { .. }) | None => Vec::new(),
    };
    for edit in edits {
        let touched = |leaf: &Leaf| edit.chunks.contains(&(first + u64::from(leaf.slot)));
        match edit.change {
            Change::Set(Entry { kind, place, hash }) => {
                leaves.retain(|leaf| !touched(leaf));
                leaves.push(Leaf { slot: slot_of(edit.chunks.start, 0), kind, place, hash });
            }
            Change::Clear => leaves.retain(|leaf| !touched(leaf)),
            Change::Move { from, to } => {
                let moved = leaves.iter_mut().filter(|leaf| touched(leaf) && leaf.place == from);
                moved.for_each(|leaf| leaf.place = to);
            }
            Change::Keep => {}
        }
    }
    leaves.sort_unstable_by_key(|leaf| leaf.slot);
    Page::Leaves(leaves)
}
