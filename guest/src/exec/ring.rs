//! What a session printed last, for a client that attaches later.

use std::collections::VecDeque;

use bytes::Bytes;

/// Bounds what is kept of a command that changes between its streams with every byte.
const RUNS_MAX: usize = 1024;

/// Which stream of the client output belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// Keeps the newest bytes, at most `limit` of them and [`RUNS_MAX`] changes between streams: what it costs does not depend on how a command writes.
#[derive(Debug)]
pub(super) struct Ring {
    bytes: VecDeque<u8>,
    /// Whose the bytes are, and how many; neighbours differ, and none is empty.
    runs: VecDeque<(Stream, usize)>,
    limit: usize,
    /// Something older was dropped.
    cut: bool,
}

impl Ring {
    pub(super) fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), runs: VecDeque::new(), limit, cut: false }
    }

    pub(super) fn push(&mut self, stream: Stream, data: &[u8]) {
        let fits = &data[data.len().saturating_sub(self.limit)..];
        if fits.is_empty() {
            return;
        }
        self.cut |= fits.len() < data.len();
        self.drop_oldest((self.bytes.len() + fits.len()).saturating_sub(self.limit));
        self.bytes.extend(fits);
        match self.runs.back_mut() {
            Some((last, len)) if *last == stream => *len += fits.len(),
            _ => self.runs.push_back((stream, fits.len())),
        }
        if self.runs.len() > RUNS_MAX
            && let Some((_, len)) = self.runs.front()
        {
            self.drop_oldest(*len);
        }
    }

    fn drop_oldest(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        self.cut = true;
        self.bytes.drain(..count);
        let mut left = count;
        while let Some((_, len)) = self.runs.front_mut() {
            if *len > left {
                *len -= left;
                return;
            }
            left -= *len;
            self.runs.pop_front();
        }
    }

    /// Everything kept, in order. A beginning that was cut starts at a line, so that no half escape sequence is sent.
    pub(super) fn replay(&self) -> Vec<(Stream, Bytes)> {
        let mut bytes = self.bytes.iter().copied();
        let mut pieces: Vec<(Stream, Bytes)> =
            self.runs.iter().map(|(stream, len)| (*stream, bytes.by_ref().take(*len).collect())).collect();
        if self.cut
            && let Some((_, first)) = pieces.first_mut()
            && let Some(newline) = first.iter().position(|byte| *byte == b'\n')
        {
            drop(first.split_to(newline + 1));
        }
        pieces.retain(|(_, text)| !text.is_empty());
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_are_kept_in_order() {
        let mut ring = Ring::new(8);
        ring.push(Stream::Stdout, b"ab");
        ring.push(Stream::Stdout, b"cd");
        ring.push(Stream::Stderr, b"E");
        assert_eq!(ring.replay(), [(Stream::Stdout, Bytes::from("abcd")), (Stream::Stderr, Bytes::from("E"))]);
        ring.push(Stream::Stdout, b"x\nyz12");
        assert_eq!(
            ring.replay(),
            [(Stream::Stdout, "d".into()), (Stream::Stderr, "E".into()), (Stream::Stdout, "x\nyz12".into())]
        );
        ring.push(Stream::Stdout, b"0123456\n89abcdef");
        assert_eq!(ring.replay(), [(Stream::Stdout, Bytes::from("89abcdef"))], "no line begins in what is left");
        ring.push(Stream::Stdout, b"\nnew");
        assert_eq!(ring.replay(), [(Stream::Stdout, Bytes::from("new"))], "a cut beginning starts at a line");
    }

    #[test]
    fn nothing_is_kept_of_nothing() {
        let mut ring = Ring::new(4);
        ring.push(Stream::Stdout, b"");
        assert_eq!(ring.replay(), []);
    }

    #[test]
    fn how_a_command_writes_does_not_change_what_is_kept() {
        let mut ring = Ring::new(1000);
        for byte in (0..=u8::MAX).cycle().take(3000) {
            ring.push(Stream::Stdout, &[byte]);
        }
        assert_eq!((ring.bytes.len(), ring.runs.len()), (1000, 1));
        assert!(ring.bytes.capacity() <= 2 * ring.limit, "{}", ring.bytes.capacity());
    }

    #[test]
    fn a_command_that_changes_streams_all_the_time_is_bounded() {
        let mut ring = Ring::new(1 << 20);
        for _ in 0..3000 {
            ring.push(Stream::Stdout, b"out");
            ring.push(Stream::Stderr, b"er");
        }
        assert_eq!((ring.runs.len(), ring.bytes.len()), (RUNS_MAX, RUNS_MAX / 2 * 5));
        let replay = ring.replay();
        assert_eq!(replay.len(), RUNS_MAX, "a client's queue has a place for each");
        assert_eq!(replay.last(), Some(&(Stream::Stderr, "er".into())));
    }
}
