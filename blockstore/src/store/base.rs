//! Base images: imported once, then every new volume begins as a reference to their root.
//!
//! `v1/tmpl/<hash of the digest>/base` is the record that makes an import count; it is written last. An import killed half-way leaves packs that
//! nothing names; the next one writes its own, under another epoch.

use std::{fs::File, io, ops::Range, path::Path, sync::Arc};

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use super::{
    fetch::{Fetcher, blocking},
    frame::{CHUNK_BYTES, Frame, FrameKind, Sealer},
    head::{Origin, Root},
    memory::{data_extents, read_up_to},
    pack::{PackNames, PackWriter},
    push::{self, GROUP_CHUNKS, GROUPS_MAX},
    tree::{Change, DISK_BYTES_MAX, Edit},
    types::{BaseError, VolumeError},
};
use crate::bucket::RecordError;

/// Different frames of a filling: 16 MiB in the bucket, whatever it fills.
const FILLING_FRAMES: u64 = 256;

/// A base image in the bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseId {
    pub digest: String,
    pub size_bytes: u64,
    pub(super) root: Option<Root>,
}

fn origin_of(digest: &str) -> Origin {
    let mut id = [0; 16];
    id.copy_from_slice(&blake3::hash(digest.as_bytes()).as_bytes()[..16]);
    Origin::Base(id)
}

/// A raw disk image to be imported.
pub(super) struct Image<'a> {
    pub(super) path: &'a Path,
    pub(super) digest: &'a str,
    /// Bytes of the disk, in order, that get a content nobody reads where the image has none.
    pub(super) filled: &'a [Range<u64>],
}

pub(super) async fn ensure(
    fetcher: &Arc<Fetcher>,
    pack_bytes: usize,
    image: Image<'_>,
    progress: impl Fn(u64, u64) + Send + Sync,
) -> Result<BaseId, BaseError> {
    let digest = image.digest;
    let origin = origin_of(digest);
    let key = format!("{}/base", origin.prefix());
    if let Some(known) = fetcher.bucket.read_record::<BaseId>(&key).await.map_err(BaseError::Record)? {
        return Ok(known.value);
    }
    let names = PackNames::new(origin, u64::from(rand::random::<u32>()));
    let packs = PackWriter::new(Arc::clone(fetcher), names, pack_bytes);
    let (size_bytes, root) = import(fetcher, packs, &image, progress).await?;
    let base = BaseId { digest: digest.to_owned(), size_bytes, root };
    match fetcher.bucket.create_record(&key, base).await {
        Ok(created) => Ok(created.value),
        // Another host was quicker; its import is as good.
        Err(error @ (RecordError::Conflict { .. } | RecordError::Unknown { .. })) => {
            let there = fetcher.bucket.read_record::<BaseId>(&key).await.map_err(BaseError::Record)?;
            there.map(|there| there.value).ok_or(BaseError::Record(error))
        }
        Err(error) => Err(BaseError::Record(error)),
    }
}

async fn import(
    fetcher: &Fetcher,
    mut packs: PackWriter,
    image: &Image<'_>,
    progress: impl Fn(u64, u64) + Send + Sync,
) -> Result<(u64, Option<Root>), BaseError> {
    let path = image.path;
    let unreadable = |source| BaseError::Image { path: path.to_owned(), source };
    let file = Arc::new(File::open(path).map_err(unreadable)?);
    let size_bytes = file.metadata().map_err(unreadable)?.len();
    if !(4096..=DISK_BYTES_MAX).contains(&size_bytes) {
        return Err(BaseError::BadSize { path: path.to_owned(), size_bytes });
    }
    let listed = Arc::clone(&file);
    let extents = blocking(move || data_extents(&listed)).await.map_err(BaseError::Bucket)?.map_err(unreadable)?;
    let chunks = chunks_of(&extents);
    let total = chunks.len() as u64 * CHUNK_BYTES;
    let groups = chunks.chunks(GROUP_CHUNKS).map(<[u64]>::to_vec).collect::<Vec<_>>().into_iter().map(|group| {
        let file = Arc::clone(&file);
        blocking(move || seal_group(&file, &group))
    });
    let mut sealed = std::pin::pin!(stream::iter(groups).buffered(GROUPS_MAX));
    let (mut edits, mut done) = (Vec::new(), 0);
    while let Some(frames) = sealed.try_next().await.map_err(BaseError::Bucket)? {
        for (chunk, frame) in frames.map_err(unreadable)? {
            done += CHUNK_BYTES;
            if frame.kind != FrameKind::Zero {
                edits.push(push::edit(&mut packs, chunk, &frame, false).await.map_err(BaseError::Bucket)?);
            }
        }
        progress(done, total);
    }
    fill(&mut packs, image.filled, size_bytes, &mut edits).await?;
    let root = push::finish(fetcher, packs, None, edits).await.map_err(BaseError::Bucket)?;
    Ok((size_bytes, root))
}

/// Gives every whole chunk of `filled` that has no content, one of a few. `edits` are by chunk.
async fn fill(
    packs: &mut PackWriter,
    filled: &[Range<u64>],
    size_bytes: u64,
    edits: &mut Vec<Edit>,
) -> Result<(), BaseError> {
    if filled.is_empty() {
        return Ok(());
    }
    let mut changes = Vec::new();
    let mut bytes = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or_default()];
    for number in 0..FILLING_FRAMES {
        blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
        changes.push(push::edit(packs, number, &Sealer::new().seal(&bytes), false).await?.change);
    }
    let of_image = edits.len();
    let has_content =
        |edits: &[Edit], chunk| edits[..of_image].binary_search_by_key(&chunk, |edit| edit.chunks.start).is_ok();
    for range in filled {
        for chunk in range.start.div_ceil(CHUNK_BYTES)..range.end.min(size_bytes) / CHUNK_BYTES {
            if !has_content(edits, chunk) {
                let change: Change = changes[usize::try_from(chunk % FILLING_FRAMES).unwrap_or_default()];
                edits.push(Edit { chunks: chunk..chunk + 1, change });
            }
        }
    }
    Ok(())
}

/// Chunks that hold data, in order, each once.
fn chunks_of(extents: &[std::ops::Range<u64>]) -> Vec<u64> {
    let mut chunks: Vec<u64> =
        extents.iter().flat_map(|extent| extent.start / CHUNK_BYTES..extent.end.div_ceil(CHUNK_BYTES)).collect();
    chunks.dedup();
    chunks
}

fn seal_group(file: &File, group: &[u64]) -> io::Result<Vec<(u64, Frame)>> {
    let mut sealer = Sealer::new();
    let mut bytes = vec![0; usize::try_from(CHUNK_BYTES).map_err(io::Error::other)?];
    let mut frames = Vec::with_capacity(group.len());
    for &chunk in group {
        read_up_to(file, &mut bytes, chunk * CHUNK_BYTES)?;
        frames.push((chunk, sealer.seal(&bytes)));
    }
    Ok(frames)
}

impl BaseId {
    /// Whether a disk of that size can begin as this image.
    pub(super) fn fits(&self, disk_bytes: u64) -> bool {
        disk_bytes >= self.size_bytes && disk_bytes <= DISK_BYTES_MAX && disk_bytes.is_multiple_of(4096)
    }
}

impl From<VolumeError> for BaseError {
    fn from(error: VolumeError) -> Self {
        Self::Bucket(error)
    }
}
