//! A golden snapshot in the bucket: all hosts start from the same bytes, so that a memory image in the bucket, which holds only what differs from
//! them, means the same everywhere, also on a host that lost its files.
//!
//! ```text
//!  v1/golden/<key>/current     which one: id, sizes, digests     created once, by whoever was first
//!  v1/golden/<key>/<id>/<n>    pieces of the memory, zstd of (offset, length, bytes)…; the last one is the device state
//! ```

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path};

use blockstore::bucket::{Bucket, BucketError, RecordError};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{files, process::blocking};

/// Bytes of memory in one piece, before compression.
const PIECE_BYTES: usize = 32 << 20;
/// One run of bytes in a piece.
const RUN_BYTES: u64 = 1 << 20;
const RUN_HEAD_BYTES: usize = 12;
/// Enough for the largest size class twice over; more is no golden snapshot.
const PIECES_MAX: usize = 256;
/// Device state is about 100 KB.
const STATE_BYTES_MAX: usize = 16 << 20;
/// Quick: it is written once, by a host that wants to start.
const ZSTD_LEVEL: i32 = 1;

/// What `current` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shared {
    pub(super) id: String,
    memory_bytes: u64,
    /// BLAKE3 of each piece as it is in the bucket; the last is the state.
    pieces: Vec<String>,
}

/// Why a snapshot was not shared or found. The host can always boot one of its own.
#[derive(Debug, thiserror::Error)]
pub(super) enum ShareError {
    #[error("cannot read or write the record of the golden snapshot")]
    Record(#[from] RecordError),
    #[error("cannot use the bucket for the golden snapshot")]
    Bucket(#[from] BucketError),
    #[error("cannot read or write the golden snapshot's files")]
    Files(#[from] io::Error),
    #[error("piece {piece} of the golden snapshot in the bucket is {what}")]
    Damaged { piece: usize, what: &'static str },
}

fn record_key(key: &str) -> String {
    format!("v1/golden/{key}/current")
}

fn piece_key(key: &str, id: &str, piece: usize) -> String {
    format!("v1/golden/{key}/{id}/{piece}")
}

pub(super) async fn find(bucket: &Bucket, key: &str) -> Result<Option<Shared>, ShareError> {
    Ok(bucket.read_record::<Shared>(&record_key(key)).await?.map(|record| record.value))
}

/// Puts the snapshot in `folder` into the bucket, as `id`. If another host was first, its snapshot is returned instead.
pub(super) async fn publish(bucket: &Bucket, key: &str, id: &str, folder: &Path) -> Result<Shared, ShareError> {
    let (memory, state) = (folder.join("memory"), folder.join("state"));
    let (memory_bytes, pieces) = blocking(move || {
        let file = File::open(&memory)?;
        let mut pieces = pack(&file)?;
        pieces.push(zstd::bulk::compress(&std::fs::read(&state)?, ZSTD_LEVEL)?);
        Ok((file.metadata()?.len(), pieces))
    })
    .await?;
    let digests = pieces.iter().map(|piece| blake3::hash(piece).to_hex().to_string()).collect();
    for (piece, bytes) in pieces.into_iter().enumerate() {
        bucket.put(&piece_key(key, id, piece), Bytes::from(bytes)).await?;
    }
    let shared = Shared { id: id.to_owned(), memory_bytes, pieces: digests };
    match bucket.create_record(&record_key(key), shared).await {
        Ok(record) => Ok(record.value),
        Err(error) => find(bucket, key).await?.ok_or(ShareError::Record(error)),
    }
}

/// Makes `memory` and `state` in the empty folder `to`.
pub(super) async fn fetch(bucket: &Bucket, key: &str, shared: &Shared, to: &Path) -> Result<(), ShareError> {
    let Some(memory_pieces) = shared.pieces.len().checked_sub(1).filter(|pieces| *pieces <= PIECES_MAX) else {
        return Err(ShareError::Damaged { piece: shared.pieces.len(), what: "one too many or too few" });
    };
    let (path, bytes) = (to.join("memory"), shared.memory_bytes);
    blocking(move || File::create(path)?.set_len(bytes)).await?;
    for (piece, digest) in shared.pieces.iter().enumerate() {
        let object = bucket.get(&piece_key(key, &shared.id, piece)).await?;
        let bytes = object.ok_or(ShareError::Damaged { piece, what: "missing" })?.bytes;
        if blake3::hash(&bytes).to_hex().as_str() != digest {
            return Err(ShareError::Damaged { piece, what: "damaged" });
        }
        let to = to.to_owned();
        blocking(move || {
            if piece == memory_pieces {
                return std::fs::write(to.join("state"), zstd::bulk::decompress(&bytes, STATE_BYTES_MAX)?);
            }
            unpack(&bytes, &File::options().write(true).open(to.join("memory"))?)
        })
        .await?;
    }
    Ok(())
}

/// The file's data, compressed piece by piece.
fn pack(file: &File) -> io::Result<Vec<Vec<u8>>> {
    let mut pieces = Vec::new();
    let mut piece = Vec::new();
    files::for_each_extent(file, |start, end| {
        let mut at = start;
        while at < end {
            let len = (end - at).min(RUN_BYTES);
            let mut run = vec![0; usize::try_from(len).map_err(io::Error::other)?];
            file.read_exact_at(&mut run, at)?;
            piece.extend(at.to_le_bytes());
            piece.extend(u32::try_from(len).map_err(io::Error::other)?.to_le_bytes());
            piece.extend(run);
            at += len;
            if piece.len() >= PIECE_BYTES {
                pieces.push(zstd::bulk::compress(&piece, ZSTD_LEVEL)?);
                piece.clear();
            }
        }
        Ok(())
    })?;
    pieces.push(zstd::bulk::compress(&piece, ZSTD_LEVEL)?);
    Ok(pieces)
}

fn unpack(piece: &[u8], file: &File) -> io::Result<()> {
    let bytes_max = PIECE_BYTES + usize::try_from(RUN_BYTES).map_err(io::Error::other)? + RUN_HEAD_BYTES;
    let piece = zstd::bulk::decompress(piece, bytes_max)?;
    let short = || io::Error::new(io::ErrorKind::InvalidData, "a piece of memory ends in the middle of a run");
    let mut rest = piece.as_slice();
    while !rest.is_empty() {
        let (at, behind) = rest.split_first_chunk::<8>().ok_or_else(short)?;
        let (len, behind) = behind.split_first_chunk::<4>().ok_or_else(short)?;
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(io::Error::other)?;
        let (run, behind) = behind.split_at_checked(len).ok_or_else(short)?;
        file.write_all_at(run, u64::from_le_bytes(*at))?;
        rest = behind;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sparse memory of `bytes` bytes whose content depends on `seed`.
    fn snapshot(folder: &Path, seed: u8) {
        let memory = File::create(folder.join("memory")).unwrap();
        memory.set_len(256 << 20).unwrap();
        for at in [0, (5 << 20) + 4096, (70 << 20) - 1, (256 << 20) - 3] {
            memory.write_all_at(&[seed, 1, 2], at).unwrap();
        }
        let noise: Vec<u8> = (0..40_u32 << 20).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed).collect();
        memory.write_all_at(&noise, 100 << 20).unwrap();
        std::fs::write(folder.join("state"), [seed; 1000]).unwrap();
    }

    #[tokio::test]
    async fn the_first_snapshot_wins_and_is_the_same_everywhere() {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("bucket");
        std::fs::create_dir(&bucket).unwrap();
        let bucket = Bucket::open(&format!("dir:{}", bucket.display())).await.unwrap();
        let [one, two, got] = ["one", "two", "got"].map(|name| folder.path().join(name));
        for (place, seed) in [(&one, 7), (&two, 9)] {
            std::fs::create_dir(place).unwrap();
            snapshot(place, seed);
        }
        assert_eq!(find(&bucket, "key").await.unwrap(), None);
        let first = publish(&bucket, "key", "first", &one).await.unwrap();
        assert_eq!(publish(&bucket, "key", "second", &two).await.unwrap(), first, "the second takes the first's");
        assert_eq!(find(&bucket, "key").await.unwrap(), Some(first.clone()));

        std::fs::create_dir(&got).unwrap();
        fetch(&bucket, "key", &first, &got).await.unwrap();
        for name in ["memory", "state"] {
            assert!(std::fs::read(got.join(name)).unwrap() == std::fs::read(one.join(name)).unwrap(), "{name}");
        }
        bucket.put(&piece_key("key", "first", 1), Bytes::from_static(b"something else")).await.unwrap();
        assert!(matches!(
            fetch(&bucket, "key", &first, &got).await,
            Err(ShareError::Damaged { piece: 1, what: "damaged" })
        ));
        bucket.delete(&piece_key("key", "first", 1)).await.unwrap();
        assert!(matches!(
            fetch(&bucket, "key", &first, &got).await,
            Err(ShareError::Damaged { piece: 1, what: "missing" })
        ));
    }
}
