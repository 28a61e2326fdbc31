//! Memory images in the bucket: of a suspended VM, what differs from its golden snapshot.
//!
//! The disk is pushed first; then memory and device state are uploaded as trees of their own; then one CAS of the head names them, together with
//! the LSN they belong to (ruling 2). Dropping the future at any point leaves the head as it was, and orphans.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    unistd::{Whence, lseek},
};

use super::{
    device::Device,
    fetch::{Fetcher, blocking},
    frame::{CHUNK_BYTES, Frame, Sealer, is_zero},
    head::{KeptMemory, Root},
    pack::PackWriter,
    push::{self, GROUP_CHUNKS, GROUPS_MAX},
    tree,
    types::{Lsn, MemoryError, MemorySource, MemoryTarget},
};
use crate::store::page::Page;

/// Chunks fetched side by side for a wake.
const FETCHES_MAX: usize = 16;

/// Uploads the files of a suspended VM. What the head should say is returned.
pub(super) async fn upload(device: &Device, source: &MemorySource, lsn: Lsn) -> Result<KeptMemory, MemoryError> {
    let (state_root, state_bytes) = upload_file(device, &source.state_file, None).await?;
    let (root, memory_bytes) = upload_file(device, &source.memory_file, Some(&source.golden_file)).await?;
    let snapshot_key = source.snapshot_key.clone();
    Ok(KeptMemory { lsn, snapshot_key, root, memory_bytes, state_root, state_bytes })
}

async fn upload_file(device: &Device, path: &Path, below: Option<&Path>) -> Result<(Option<Root>, u64), MemoryError> {
    let open = |path: &Path| {
        File::open(path).map(Arc::new).map_err(|source| MemoryError::File { path: path.to_owned(), source })
    };
    let file = open(path)?;
    let golden = below.map(open).transpose()?;
    let bytes = file.metadata().map_err(|source| MemoryError::File { path: path.to_owned(), source })?.len();
    let keep_zeros = golden.is_some();
    let mut packs = PackWriter::new(Arc::clone(&device.fetcher), device.names.clone(), device.limits.pack_bytes);
    let group_bytes = GROUP_CHUNKS as u64 * CHUNK_BYTES;
    let groups = (0..bytes.div_ceil(group_bytes)).map(|group| {
        let (file, golden) = (Arc::clone(&file), golden.clone());
        blocking(move || seal_group(&file, golden.as_deref(), group * GROUP_CHUNKS as u64))
    });
    let mut sealed = std::pin::pin!(stream::iter(groups).buffered(GROUPS_MAX));
    let mut edits = Vec::new();
    while let Some(frames) = sealed.try_next().await? {
        let frames = frames.map_err(|source| MemoryError::File { path: path.to_owned(), source })?;
        for (chunk, frame) in frames {
            edits.push(push::edit(&mut packs, chunk, &frame, keep_zeros).await?);
        }
    }
    Ok((push::finish(&device.fetcher, packs, None, edits).await?, bytes))
}

fn seal_group(file: &File, golden: Option<&File>, first: u64) -> io::Result<Vec<(u64, Frame)>> {
    let chunk_len = usize::try_from(CHUNK_BYTES).map_err(io::Error::other)?;
    let len = GROUP_CHUNKS * chunk_len;
    let (mut new, mut old) = (vec![0; len], vec![0; len]);
    read_up_to(file, &mut new, first * CHUNK_BYTES)?;
    if let Some(golden) = golden {
        read_up_to(golden, &mut old, first * CHUNK_BYTES)?;
    }
    let mut sealer = Sealer::new();
    let chunks = (first..).zip(new.chunks(chunk_len).zip(old.chunks(chunk_len)));
    Ok(chunks.filter(|(_, (new, old))| new != old).map(|(chunk, (new, _))| (chunk, sealer.seal(new))).collect())
}

/// Fills `buffer` from the file; zeros behind its end.
pub(super) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer[filled..].fill(0);
    Ok(())
}

/// Makes the files of a VM. They appear under their names when complete, the state last.
pub(super) async fn fetch(
    fetcher: &Arc<Fetcher>,
    memory: &KeptMemory,
    target: &MemoryTarget,
) -> Result<(), MemoryError> {
    let unfinished = |path: &Path| path.with_extension("fetching");
    let memory_file = unfinished(&target.memory_file);
    let golden = target.golden_file.clone();
    let (copy_to, bytes) = (memory_file.clone(), memory.memory_bytes);
    in_file(&memory_file, move || copy_sparse(&golden, &copy_to, bytes)).await?;
    fill(fetcher, memory.root, &memory_file, memory.memory_bytes).await?;
    let state_file = unfinished(&target.state_file);
    let new = state_file.clone();
    in_file(&state_file, move || File::create(new).map(drop)).await?;
    fill(fetcher, memory.state_root, &state_file, memory.state_bytes).await?;
    for (from, to) in [(memory_file, target.memory_file.clone()), (state_file, target.state_file.clone())] {
        in_file(&to.clone(), move || std::fs::rename(from, to)).await?;
    }
    Ok(())
}

async fn in_file<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, MemoryError> {
    blocking(work).await?.map_err(|source| MemoryError::File { path: path.to_owned(), source })
}

/// Writes the tree's chunks into a file of `bytes` bytes.
async fn fill(fetcher: &Arc<Fetcher>, root: Option<Root>, path: &Path, bytes: u64) -> Result<(), MemoryError> {
    let open: PathBuf = path.to_owned();
    let file = in_file(path, move || {
        let file = File::options().read(true).write(true).open(open)?;
        file.set_len(bytes)?;
        Ok(Arc::new(file))
    })
    .await?;
    let entries = tree::entries(fetcher, root).await?;
    let writes = entries.into_iter().map(|(chunk, page, index)| {
        let file = Arc::clone(&file);
        async move {
            let Page::Leaves(leaves) = &*page else { return Ok(()) };
            let content = fetcher.chunk(leaves, index).await?;
            let at = chunk * CHUNK_BYTES;
            let len = usize::try_from(bytes.saturating_sub(at).min(CHUNK_BYTES)).unwrap_or(0);
            in_file(path, move || write_chunk(&file, &content[..len], at)).await
        }
    });
    stream::iter(writes).buffer_unordered(FETCHES_MAX).try_collect::<()>().await
}

fn write_chunk(file: &File, content: &[u8], at: u64) -> io::Result<()> {
    if is_zero(content) {
        let (at, len) =
            (i64::try_from(at).map_err(io::Error::other)?, i64::try_from(content.len()).map_err(io::Error::other)?);
        let punched = fallocate(
            file.as_fd(),
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            at,
            len,
        );
        if punched.is_ok() {
            return Ok(());
        }
    }
    file.write_all_at(content, at)
}

/// The parts of a file that hold data, in order.
pub(super) fn data_extents(file: &File) -> io::Result<Vec<std::ops::Range<u64>>> {
    let len = file.metadata()?.len();
    let mut extents = Vec::new();
    let mut at = 0;
    while at < len {
        let offset = i64::try_from(at).map_err(io::Error::other)?;
        let start = match lseek(file.as_fd(), offset, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::Error::ENXIO) => break,
            // No such thing on this file system.
            Err(nix::Error::EINVAL | nix::Error::EOPNOTSUPP) => return Ok(std::iter::once(at..len).collect()),
            Err(error) => return Err(error.into()),
        };
        let end = lseek(file.as_fd(), start, Whence::SeekHole)?;
        let number = |at: i64| u64::try_from(at).map_err(io::Error::other);
        at = number(end)?;
        extents.push(number(start)?..at.min(len));
    }
    Ok(extents)
}

fn copy_sparse(from: &Path, to: &Path, bytes: u64) -> io::Result<()> {
    let source = File::open(from)?;
    let target = File::create(to)?;
    target.set_len(bytes)?;
    let mut buffer = vec![0; 1 << 20];
    for extent in data_extents(&source)? {
        let (mut at, end) = (extent.start, extent.end.min(bytes));
        while at < end {
            let len = usize::try_from((end - at).min(buffer.len() as u64)).map_err(io::Error::other)?;
            read_up_to(&source, &mut buffer[..len], at)?;
            target.write_all_at(&buffer[..len], at)?;
            at += len as u64;
        }
    }
    Ok(())
}
