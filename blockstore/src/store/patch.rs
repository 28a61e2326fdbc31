//! What was written to a volume, as bytes: one more write makes another volume, with the same base, equal to it.
//!
//! ```text
//!  Volume::track_writes ──▶ Tracked (ranges) ── Volume::written ──▶ Patch (bytes, in memory or a file) ── Volume::apply ──▶ another volume
//! ```
//! For the few megabytes that starting an environment writes: a [`Patch`] is held in memory.
//!
//! File of a patch, little-endian: `SPRPATC1`, then pieces of `offset u64, length u32, kind u8 (0 hole, 1 data), bytes if data`, then the CRC32C of
//! everything before it.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Most a patch may hold; more is not what this is for.
pub const PATCH_BYTES_MAX: u64 = 64 << 20;
/// One read or write of a volume.
const PIECE_BYTES: usize = 1 << 20;
const MAGIC: &[u8; 8] = b"SPRPATC1";
const PIECE_HEAD_BYTES: usize = 13;
const CRC_BYTES: usize = 4;

/// Ranges of a volume that were written or trimmed since it is watched.
#[derive(Debug, Default)]
pub(super) struct Tracked(Mutex<BTreeMap<u64, u64>>);

impl Tracked {
    pub(super) fn add(&self, mut range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // All that touch it, from the last one backwards.
        while let Some((&start, &end)) = ranges.range(..=range.end).next_back()
            && end >= range.start
        {
            ranges.remove(&start);
            range = start.min(range.start)..end.max(range.end);
        }
        ranges.insert(range.start, range.end);
    }

    /// In order, apart from each other, each at most [`PIECE_BYTES`] long.
    pub(super) fn pieces(&self) -> Vec<Range<u64>> {
        let ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = |(&start, &end): (&u64, &u64)| {
            (start..end).step_by(PIECE_BYTES).map(move |at| at..end.min(at + PIECE_BYTES as u64))
        };
        ranges.iter().flat_map(cut).collect()
    }
}

/// Content of some ranges of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patch {
    pub(super) pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) len: u32,
    /// `None`: a hole.
    pub(super) bytes: Option<Bytes>,
}

impl Patch {
    /// Bytes it holds; holes cost none.
    pub fn data_bytes(&self) -> u64 {
        self.pieces.iter().filter_map(|piece| piece.bytes.as_ref()).map(|bytes| bytes.len() as u64).sum()
    }

    /// As a file.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::from(&MAGIC[..]);
        for Piece { offset, len, bytes } in &self.pieces {
            out.put_u64_le(*offset);
            out.put_u32_le(*len);
            out.put_u8(u8::from(bytes.is_some()));
            out.put_slice(bytes.as_deref().unwrap_or_default());
        }
        let crc = crc32c::crc32c(&out);
        out.put_u32_le(crc);
        out.freeze()
    }

    /// The content of such a file.
    ///
    /// # Errors
    ///
    /// `InvalidData`: it is damaged, or none of ours.
    pub fn decode(file: Bytes) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("not a patch: {what}"));
        let end = file.len().checked_sub(CRC_BYTES).ok_or_else(|| invalid("too short"))?;
        let mut rest = file.slice(..end);
        if crc32c::crc32c(&rest) != file.slice(end..).get_u32_le() {
            return Err(invalid("its checksum does not fit"));
        }
        if rest.len() < MAGIC.len() || rest.split_to(MAGIC.len()) != MAGIC[..] {
            return Err(invalid("it begins with something else"));
        }
        let mut pieces = Vec::new();
        while rest.has_remaining() {
            if rest.len() < PIECE_HEAD_BYTES {
                return Err(invalid("it ends within a piece"));
            }
            let (offset, len, kind) = (rest.get_u64_le(), rest.get_u32_le(), rest.get_u8());
            let bytes = match (kind, usize::try_from(len)) {
                (0, _) => None,
                (1, Ok(len)) if len <= rest.len() => Some(rest.split_to(len)),
                _ => return Err(invalid("a piece is longer than the file, or of an unknown kind")),
            };
            pieces.push(Piece { offset, len, bytes });
        }
        Ok(Self { pieces })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tracked_ranges_are_those_of_an_array(added in proptest::collection::vec((0..300u64, 0..40u64), 0..40)) {
            let (tracked, mut model) = (Tracked::default(), vec![false; 400]);
            for (start, len) in added {
                tracked.add(start..start + len);
                (start..start + len).for_each(|at| model[usize::try_from(at).unwrap()] = true);
            }
            let mut seen = vec![false; 400];
            let mut last = None;
            for range in tracked.pieces() {
                prop_assert!(last < Some(range.start) && !range.is_empty());
                last = Some(range.end);
                range.for_each(|at| seen[usize::try_from(at).unwrap()] = true);
            }
            prop_assert_eq!(seen, model);
        }

        #[test]
        fn a_damaged_file_is_refused(at in 0..60usize, with in 1..=255u8) {
            let patch = Patch {
                pieces: vec![
                    Piece { offset: 4096, len: 5, bytes: Some(Bytes::from_static(b"hello")) },
                    Piece { offset: 1 << 40, len: 1 << 20, bytes: None },
                ],
            };
            let file = patch.encode();
            prop_assert_eq!(Patch::decode(file.clone()).unwrap(), patch);
            let mut damaged = file.to_vec();
            let at = at % damaged.len();
            damaged[at] ^= with;
            prop_assert!(Patch::decode(damaged.into()).is_err());
            prop_assert!(Patch::decode(file.slice(..at)).is_err());
        }
    }

    #[test]
    fn long_ranges_are_cut_in_pieces() {
        let tracked = Tracked::default();
        const PIECE: u64 = PIECE_BYTES as u64;
        tracked.add(0..PIECE * 2 + 1);
        assert_eq!(tracked.pieces(), [0..PIECE, PIECE..PIECE * 2, PIECE * 2..PIECE * 2 + 1]);
    }
}
