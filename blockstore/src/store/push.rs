//! From a frozen layer to packs and a new root.
//!
//! ```text
//!  extents ─▶ plan: per chunk what is new, per range what is gone
//!          ─▶ groups of chunks: what is not overwritten read from below ▸ compressed on blocking threads ▸ into packs, in order
//!          ─▶ changed pages into the last packs ─▶ all uploaded ─▶ root
//! ```

use std::{collections::HashSet, ops::Range, os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::{
    compact::Moves,
    core::{Frozen, Source},
    device::Device,
    extent::ExtentMap,
    fetch::{Fetcher, blocking},
    frame::{CHUNK_BYTES, Frame, FrameKind, Sealer},
    head::{PackId, Root},
    pack::PackWriter,
    tree::{self, Change, Edit, Entry},
    types::VolumeError,
};

/// Chunks read and compressed together: 4 MiB.
pub(super) const GROUP_CHUNKS: usize = 64;
/// Groups in work at a time.
pub(super) const GROUPS_MAX: usize = 2;
/// Chunks of one group fetched side by side.
const FETCHES_MAX: usize = 16;

/// What is new in one chunk.
#[derive(Debug)]
struct Patch {
    chunk: u64,
    /// Places within the chunk.
    pieces: Vec<(Range<usize>, Source)>,
}

impl Patch {
    fn is_whole(&self) -> bool {
        self.pieces.iter().map(|(range, _)| range.len()).sum::<usize>() == chunk_len()
    }
}

fn chunk_len() -> usize {
    usize::try_from(CHUNK_BYTES).expect("64 KiB fit")
}

/// Cuts a layer's extents into patches of chunks, and ranges of chunks that are zeros now.
fn plan(map: &ExtentMap<Source>) -> (Vec<Patch>, Vec<Edit>) {
    let (mut patches, mut gone): (Vec<Patch>, Vec<Edit>) = (Vec::new(), Vec::new());
    for (range, source) in map.iter() {
        let mut at = range.start;
        while at < range.end {
            let chunk = at / CHUNK_BYTES;
            let whole = at.is_multiple_of(CHUNK_BYTES).then_some(range.end / CHUNK_BYTES).filter(|end| *end > chunk);
            if let (Source::Hole, Some(end)) = (source, whole) {
                gone.push(Edit { chunks: chunk..end, change: Change::Clear });
                at = end * CHUNK_BYTES;
                continue;
            }
            let end = range.end.min((chunk + 1) * CHUNK_BYTES);
            let within = |at: u64| usize::try_from(at - chunk * CHUNK_BYTES).expect("within a chunk");
            let piece = (within(at)..within(end), super::extent::Value::advance(source, at - range.start));
            match patches.last_mut() {
                Some(last) if last.chunk == chunk => last.pieces.push(piece),
                _ => patches.push(Patch { chunk, pieces: vec![piece] }),
            }
            at = end;
        }
    }
    (patches, gone)
}

/// Uploads what `frozen` changes of the tree under `root`, and takes along what compaction has moved. Returns the new root when all of it is in the bucket.
pub(super) async fn upload(
    device: &Device,
    frozen: &Frozen,
    root: Option<Root>,
    moves: Option<&Moves>,
) -> Result<Option<Root>, VolumeError> {
    let (patches, mut edits) = plan(&frozen.layer.map);
    let mut packs = PackWriter::new(Arc::clone(&device.fetcher), device.names.clone(), device.limits.pack_bytes);
    let groups = groups(patches).map(|group| seal_group(&device.fetcher, root, group));
    let mut sealed = std::pin::pin!(stream::iter(groups).buffered(GROUPS_MAX));
    while let Some(frames) = sealed.try_next().await? {
        for (chunk, frame) in frames {
            edits.push(edit(&mut packs, chunk, &frame, false).await?);
        }
    }
    let Some(Moves { edits: moved, leaving }) = moves else {
        return finish(&device.fetcher, packs, root, edits).await;
    };
    edits.sort_unstable_by_key(|edit| edit.chunks.start);
    // What is new anyway need not be moved.
    let as_before: Vec<_> =
        moved.iter().filter(|edit| tree::overlapping(&edits, edit.chunks.clone()).is_empty()).cloned().collect();
    edits.extend(as_before);
    finish_leaving(&device.fetcher, packs, root, edits, leaving).await
}

fn groups(patches: Vec<Patch>) -> impl Iterator<Item = Vec<Patch>> {
    let mut patches = patches.into_iter();
    std::iter::from_fn(move || {
        let group: Vec<_> = patches.by_ref().take(GROUP_CHUNKS).collect();
        (!group.is_empty()).then_some(group)
    })
}

/// Stores a frame; returns the change of the tree. Zeros need an entry only where absence means something else.
pub(super) async fn edit(
    packs: &mut PackWriter,
    chunk: u64,
    frame: &Frame,
    keep_zeros: bool,
) -> Result<Edit, VolumeError> {
    let chunks = chunk..chunk + 1;
    if frame.kind == FrameKind::Zero && !keep_zeros {
        return Ok(Edit { chunks, change: Change::Clear });
    }
    let place = packs.add_frame(chunk, &frame.bytes).await?;
    Ok(Edit { chunks, change: Change::Set(Entry { kind: frame.kind, place, hash: frame.hash }) })
}

/// Writes the pages and waits for all packs.
pub(super) async fn finish(
    fetcher: &Fetcher,
    packs: PackWriter,
    root: Option<Root>,
    edits: Vec<Edit>,
) -> Result<Option<Root>, VolumeError> {
    finish_leaving(fetcher, packs, root, edits, &HashSet::new()).await
}

async fn finish_leaving(
    fetcher: &Fetcher,
    mut packs: PackWriter,
    root: Option<Root>,
    mut edits: Vec<Edit>,
    leaving: &HashSet<PackId>,
) -> Result<Option<Root>, VolumeError> {
    edits.sort_unstable_by_key(|edit| edit.chunks.start);
    let root = tree::update(fetcher, &mut packs, root, &edits, leaving).await?;
    packs.finish().await?;
    Ok(root)
}

async fn seal_group(
    fetcher: &Fetcher,
    root: Option<Root>,
    group: Vec<Patch>,
) -> Result<Vec<(u64, Frame)>, VolumeError> {
    let below = group.into_iter().map(|patch| async move {
        let old = if patch.is_whole() { None } else { tree::chunk(fetcher, root, patch.chunk).await? };
        Ok::<_, VolumeError>((patch, old))
    });
    let below: Vec<(Patch, Option<Bytes>)> = stream::iter(below).buffered(FETCHES_MAX).try_collect().await?;
    let sealed = blocking(move || {
        let mut sealer = Sealer::new();
        let mut frames = Vec::with_capacity(below.len());
        for (patch, old) in below {
            let mut bytes = old.map_or_else(|| vec![0; chunk_len()], |old| old.to_vec());
            for (place, source) in patch.pieces {
                match source {
                    Source::Hole => bytes[place].fill(0),
                    Source::Journal { segment, offset } => segment.file.read_exact_at(&mut bytes[place], offset)?,
                }
            }
            frames.push((patch.chunk, sealer.seal(&bytes)));
        }
        Ok(frames)
    });
    sealed.await?.map_err(VolumeError::Local)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trim_of_the_whole_disk_is_one_edit() {
        let mut map = ExtentMap::default();
        map.insert(0..100 << 30, Source::Hole);
        let (patches, gone) = plan(&map);
        assert_eq!((patches.len(), gone.len()), (0, 1));
        assert_eq!(gone[0].chunks, 0..1_638_400);
        map.insert(100..200, Source::Hole);
        map.insert(CHUNK_BYTES * 3 - 1..CHUNK_BYTES * 3 + 1, Source::Hole);
        let (patches, gone) = plan(&map);
        let chunks: u64 = gone.iter().map(|edit| edit.chunks.end - edit.chunks.start).sum();
        assert_eq!(chunks + patches.len() as u64, 1_638_400);
        assert!(patches.iter().all(Patch::is_whole));
    }
}
