//! A page of the manifest: 128 slots at most, most of them empty. Bytes and back, no I/O.
//!
//! ```text
//!  magic (4)  level (1)  entries (1)  origins (1)  flags (1)
//!  origins:       kind (1)  id (16)  epoch (8)                          where packs lie; entries name them by index
//!  leaf entry:    slot  origin  kind  0  len  seq  offset  hash/16      32 bytes
//!  inner entry:   slot  origin  0     0  len  seq  offset  chunks  hash/32   52 bytes
//! ```
//! Each page has its own table of origins, so that a page can be shared between trees of any lineage (forks, base images) as it is.

use bytes::{Buf, BufMut};

use super::{
    frame::{FrameHash, FrameKind},
    head::{Origin, PackId, Place},
};

pub(super) const SLOTS: u64 = 128;
const MAGIC: &[u8; 4] = b"SPG1";
/// Level of the root: 128^4 chunks of 64 KiB are 16 TiB.
pub(super) const ROOT_LEVEL: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) slot: u8,
    pub(super) kind: FrameKind,
    pub(super) place: Place,
    pub(super) hash: FrameHash,
}

/// A child page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Child {
    pub(super) slot: u8,
    pub(super) place: Place,
    pub(super) hash: [u8; 32],
    /// Chunks below it.
    pub(super) chunks: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Page {
    /// By slot, as the children below.
    Leaves(Vec<Leaf>),
    Children {
        level: u8,
        children: Vec<Child>,
    },
}

impl Page {
    pub(super) fn leaf(&self, slot: u8) -> Option<usize> {
        match self {
            Self::Leaves(leaves) => leaves.binary_search_by_key(&slot, |leaf| leaf.slot).ok(),
            Self::Children { .. } => None,
        }
    }

    pub(super) fn child(&self, slot: u8) -> Option<&Child> {
        match self {
            Self::Leaves(_) => None,
            Self::Children { children, .. } => {
                children.binary_search_by_key(&slot, |child| child.slot).ok().map(|index| &children[index])
            }
        }
    }

    pub(super) fn level(&self) -> u8 {
        match self {
            Self::Leaves(_) => 0,
            Self::Children { level, .. } => *level,
        }
    }

    pub(super) fn chunks(&self) -> u64 {
        match self {
            Self::Leaves(leaves) => leaves.len() as u64,
            Self::Children { children, .. } => children.iter().map(|child| u64::from(child.chunks)).sum(),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut origins: Vec<(Origin, u64)> = Vec::new();
        let mut body = Vec::new();
        let mut reference = |body: &mut Vec<u8>, slot: u8, kind: u8, place: &Place| {
            let wanted = (place.pack.origin, place.pack.epoch);
            let index = origins.iter().position(|known| *known == wanted).unwrap_or_else(|| {
                origins.push(wanted);
                origins.len() - 1
            });
            body.put_slice(&[slot, small(index), kind, 0]);
            body.put_u32_le(place.len);
            body.put_u32_le(place.pack.seq);
            body.put_u32_le(place.offset);
        };
        let count = match self {
            Self::Leaves(leaves) => {
                for leaf in leaves {
                    reference(&mut body, leaf.slot, leaf.kind.code(), &leaf.place);
                    body.put_slice(&leaf.hash);
                }
                leaves.len()
            }
            Self::Children { children, .. } => {
                for child in children {
                    reference(&mut body, child.slot, 0, &child.place);
                    body.put_u32_le(child.chunks);
                    body.put_slice(&child.hash);
                }
                children.len()
            }
        };
        let mut bytes = Vec::with_capacity(8 + origins.len() * 25 + body.len());
        bytes.put_slice(MAGIC);
        bytes.put_slice(&[self.level(), small(count), small(origins.len()), 0]);
        for (origin, epoch) in origins {
            let (kind, id) = origin.code();
            bytes.put_u8(kind);
            bytes.put_slice(&id);
            bytes.put_u64_le(epoch);
        }
        bytes.extend_from_slice(&body);
        bytes
    }

    /// `None` if these bytes are no page. Its hash was right, so then we or an attacker with our keys wrote something else there.
    pub(super) fn decode(mut bytes: &[u8]) -> Option<Self> {
        if bytes.len() < 8 || &bytes[..4] != MAGIC {
            return None;
        }
        bytes.advance(4);
        let (level, count, origin_count, flags) = (bytes.get_u8(), bytes.get_u8(), bytes.get_u8(), bytes.get_u8());
        let entry_bytes = if level == 0 { 32 } else { 52 };
        let want = usize::from(origin_count) * 25 + usize::from(count) * entry_bytes;
        if level > ROOT_LEVEL || flags != 0 || u64::from(count) > SLOTS || bytes.len() != want {
            return None;
        }
        let mut origins = Vec::with_capacity(usize::from(origin_count));
        for _ in 0..origin_count {
            let kind = bytes.get_u8();
            let id = array(&mut bytes);
            origins.push((Origin::from_code(kind, id)?, bytes.get_u64_le()));
        }
        let mut last = None;
        let mut reference = |bytes: &mut &[u8]| {
            let [slot, origin, kind, _] = array(bytes);
            let &(origin, epoch) = origins.get(usize::from(origin))?;
            let (len, seq, offset) = (bytes.get_u32_le(), bytes.get_u32_le(), bytes.get_u32_le());
            let in_order = u64::from(slot) < SLOTS && last.replace(slot).is_none_or(|last| last < slot);
            in_order.then_some((slot, kind, Place { pack: PackId { origin, epoch, seq }, offset, len }))
        };
        if level == 0 {
            let mut leaves = Vec::with_capacity(usize::from(count));
            for _ in 0..count {
                let (slot, kind, place) = reference(&mut bytes)?;
                leaves.push(Leaf { slot, kind: FrameKind::from_code(kind)?, place, hash: array(&mut bytes) });
            }
            return Some(Self::Leaves(leaves));
        }
        let mut children = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            let (slot, _, place) = reference(&mut bytes)?;
            let chunks = bytes.get_u32_le();
            children.push(Child { slot, place, chunks, hash: array(&mut bytes) });
        }
        Some(Self::Children { level, children })
    }
}

fn small(number: usize) -> u8 {
    u8::try_from(number).expect("a page has at most 128 entries and origins")
}

fn array<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let mut out = [0; N];
    bytes.copy_to_slice(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_and_nonsense_does_not() {
        let place = |seq, epoch| {
            let pack = PackId { origin: Origin::Volume([1; 16]), epoch, seq };
            Place { pack, offset: 64 + seq, len: 10 }
        };
        let leaf =
            |slot: u8| Leaf { slot, kind: FrameKind::Zstd, place: place(9, u64::from(slot) % 3), hash: [slot; 16] };
        let leaves = Page::Leaves((0..128).map(leaf).collect());
        let child = |slot: u8| Child { slot, place: place(u32::from(slot), 7), hash: [slot; 32], chunks: 5 };
        let children = Page::Children { level: 2, children: [3, 90].map(child).to_vec() };
        for page in [leaves, children] {
            let bytes = page.encode();
            assert_eq!(Page::decode(&bytes), Some(page));
            assert_eq!(Page::decode(&bytes[..bytes.len() - 1]), None);
            for at in [0, 4, 5, 6, 7, 8] {
                let mut broken = bytes.clone();
                broken[at] ^= 0x80;
                assert_eq!(Page::decode(&broken), None, "byte {at}");
            }
        }
    }
}
