//! An ordered map from byte ranges to where their content is.
//!
//! By bytes, not blocks: a write of any size and alignment is one insert, so there is no read-modify-write and no lock per block. Later inserts win;
//! what they cover of earlier ones is cut off.

use std::{collections::BTreeMap, ops::Range};

/// What an extent map holds for a range. `advance` gives the same thing further on.
pub(super) trait Value: Clone {
    fn advance(&self, bytes: u64) -> Self;
    /// Whether `next` continues this value after `len` bytes, so that both can be one extent.
    fn continues(&self, len: u64, next: &Self) -> bool;
}

#[derive(Clone, Debug)]
pub(super) struct ExtentMap<V> {
    /// By start: end and value. Never empty or overlapping.
    extents: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for ExtentMap<V> {
    fn default() -> Self {
        Self { extents: BTreeMap::new() }
    }
}

impl<V: Value> ExtentMap<V> {
    pub(super) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    pub(super) fn insert(&mut self, range: Range<u64>, value: V) {
        if range.is_empty() {
            return;
        }
        self.cut(&range);
        if let Some((&start, (end, before))) = self.extents.range_mut(..range.start).next_back()
            && *end == range.start
            && before.continues(range.start - start, &value)
        {
            *end = range.end;
            return;
        }
        self.extents.insert(range.start, (range.end, value));
    }

    /// Makes room for `range`.
    fn cut(&mut self, range: &Range<u64>) {
        if let Some((&start, (end, value))) = self.extents.range_mut(..range.start).next_back()
            && *end > range.start
        {
            let old_end = *end;
            *end = range.start;
            if old_end > range.end {
                let rest = value.advance(range.end - start);
                self.extents.insert(range.end, (old_end, rest));
            }
        }
        while let Some((&start, (end, _))) = self.extents.range(range.clone()).next() {
            let end = *end;
            let Some((_, value)) = self.extents.remove(&start) else { break };
            if end > range.end {
                self.extents.insert(range.end, (end, value.advance(range.end - start)));
            }
        }
    }

    /// What lies in `range`, in order, cut to it.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, V)> + '_ {
        let (first, last) = (range.start, range.end);
        let before = self.extents.range(..range.start).next_back().filter(move |(_, (end, _))| *end > range.start);
        let touching = before.into_iter().chain(self.extents.range(range.clone()));
        touching.filter(move |_| !range.is_empty()).map(move |(&start, (end, value))| {
            let from = start.max(first);
            (from..(*end).min(last), value.advance(from - start))
        })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Range<u64>, &V)> {
        self.extents.iter().map(|(&start, (end, value))| (start..*end, value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct At(u64);

    impl Value for At {
        fn advance(&self, bytes: u64) -> Self {
            Self(self.0 + bytes)
        }
        fn continues(&self, len: u64, next: &Self) -> bool {
            self.0 + len == next.0
        }
    }

    proptest! {
        #[test]
        fn equals_an_array(inserts in proptest::collection::vec((0..100u64, 1..40u64, 0..1000u64), 0..60), from in 0..140u64, len in 0..60u64) {
            let mut map = ExtentMap::default();
            let mut model = vec![None; 200];
            for (start, len, value) in inserts {
                map.insert(start..start + len, At(value));
                for i in 0..len {
                    model[usize::try_from(start + i).unwrap()] = Some(value + i);
                }
            }
            let mut seen = vec![None; 200];
            let mut last = from;
            for (range, value) in map.within(from..from + len) {
                prop_assert!(range.start >= last && range.end > range.start && range.end <= from + len);
                last = range.end;
                for (i, at) in range.enumerate() {
                    seen[usize::try_from(at).unwrap()] = Some(value.0 + u64::try_from(i).unwrap());
                }
            }
            for at in from..from + len {
                let at = usize::try_from(at).unwrap();
                prop_assert_eq!(seen[at], model[at], "at {}", at);
            }
        }
    }
}
