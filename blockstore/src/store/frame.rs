//! One chunk as it is stored: compressed if that helps, with the hash its parent names.

use bytes::Bytes;

/// Unit of compression, hashing and the manifest. The knee between amplification and compression (blockstore.md §6.2).
pub(super) const CHUNK_BYTES: u64 = 64 << 10;
const CHUNK: usize = 64 << 10;
/// Stored raw unless compression saves this share.
const WORTH_PERCENT: usize = 95;
const ZSTD_LEVEL: i32 = 1;

/// First half of blake3 of the stored bytes.
pub(super) type FrameHash = [u8; 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameKind {
    /// Zeros, nothing stored. Where absence means something else than zeros: in memory images.
    Zero,
    Raw,
    Zstd,
    // 3 is kept for patches: a bitmap of blocks over another frame.
}

impl FrameKind {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Raw => 1,
            Self::Zstd => 2,
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Zero),
            1 => Some(Self::Raw),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A chunk ready to be stored.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: FrameKind,
    pub(super) bytes: Vec<u8>,
    pub(super) hash: FrameHash,
}

/// Compresses chunks. One per thread: it keeps a compressor's memory.
pub(super) struct Sealer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Sealer {
    pub(super) fn new() -> Self {
        // Without a compressor (no memory for one) chunks are stored raw.
        Self { zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL).ok() }
    }

    pub(super) fn seal(&mut self, chunk: &[u8]) -> Frame {
        if is_zero(chunk) {
            return Frame { kind: FrameKind::Zero, bytes: Vec::new(), hash: FrameHash::default() };
        }
        let packed = self.zstd.as_mut().and_then(|zstd| zstd.compress(chunk).ok());
        let (kind, bytes) = match packed {
            Some(packed) if packed.len() * 100 <= chunk.len() * WORTH_PERCENT => (FrameKind::Zstd, packed),
            _ => (FrameKind::Raw, chunk.to_vec()),
        };
        let hash = frame_hash(&bytes);
        Frame { kind, bytes, hash }
    }
}

pub(super) fn frame_hash(stored: &[u8]) -> FrameHash {
    let mut half = FrameHash::default();
    half.copy_from_slice(&blake3::hash(stored).as_bytes()[..16]);
    half
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // In words, so that the compiler makes vectors of it.
    let (head, words, tail) = (bytes.len() % 16, bytes.chunks_exact(16), bytes.chunks_exact(16).remainder());
    debug_assert_eq!(head, tail.len());
    words.into_iter().all(|word| u128::from_ne_bytes(word.try_into().unwrap_or([1; 16])) == 0)
        && tail.iter().all(|byte| *byte == 0)
}

/// The chunk in stored bytes whose hash was checked. `None` if they are no chunk all the same.
pub(super) fn open(kind: FrameKind, stored: Bytes) -> Option<Bytes> {
    let chunk = match kind {
        FrameKind::Zero => zero_chunk(),
        FrameKind::Raw => stored,
        FrameKind::Zstd => zstd::bulk::decompress(&stored, CHUNK).ok()?.into(),
    };
    (chunk.len() == CHUNK).then_some(chunk)
}

pub(super) fn zero_chunk() -> Bytes {
    static ZEROS: [u8; CHUNK] = [0; CHUNK];
    Bytes::from_static(&ZEROS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_come_back() {
        let mut sealer = Sealer::new();
        let text = b"sprite".iter().copied().cycle().take(CHUNK).collect::<Vec<_>>();
        let noise: Vec<u8> = (0..CHUNK).map(|_| rand::random()).collect();
        for (chunk, kind) in [(vec![0; CHUNK], FrameKind::Zero), (text, FrameKind::Zstd), (noise, FrameKind::Raw)] {
            let frame = sealer.seal(&chunk);
            assert_eq!(frame.kind, kind);
            assert_eq!(open(kind, frame.bytes.into()).unwrap(), chunk);
        }
        assert!(open(FrameKind::Raw, Bytes::from_static(b"short")).is_none());
        assert!(!is_zero(&[0, 0, 1]) && is_zero(&[0; 33]) && !is_zero(&[&[0; 16][..], &[0, 4]].concat()));
    }
}
