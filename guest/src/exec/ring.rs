//! What a session printed last, for a client that attaches later.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Which stream of the client output belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// Keeps the newest bytes, at most `limit` of them.
#[derive(Debug)]
pub(super) struct Ring {
    pieces: VecDeque<(Stream, Bytes)>,
    len: usize,
    limit: usize,
    /// Something older was dropped.
    cut: bool,
}

impl Ring {
    pub(super) fn new(limit: usize) -> Self {
        Self { pieces: VecDeque::new(), len: 0, limit, cut: false }
    }

    pub(super) fn push(&mut self, stream: Stream, data: &[u8]) {
        let data = if data.len() > self.limit {
            self.cut = true;
            &data[data.len() - self.limit..]
        } else {
            data
        };
        // A copy: the reader's buffer is larger than what was read, and would live as long as the ring.
        self.pieces.push_back((stream, Bytes::copy_from_slice(data)));
        self.len += data.len();
        while self.len > self.limit {
            let over = self.len - self.limit;
            let Some((_, oldest)) = self.pieces.front_mut() else { return };
            let dropped = over.min(oldest.len());
            drop(oldest.split_to(dropped));
            self.len -= dropped;
            self.cut = true;
            if oldest.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    /// Everything kept, in order, neighbours of one stream joined. A beginning that was cut starts at a line, so that no half escape sequence is sent.
    pub(super) fn replay(&self) -> Vec<(Stream, Bytes)> {
        let mut joined: Vec<(Stream, BytesMut)> = Vec::new();
        for (stream, data) in &self.pieces {
            match joined.last_mut() {
                Some((last, text)) if last == stream => text.extend_from_slice(data),
                _ => joined.push((*stream, BytesMut::from(data.as_ref()))),
            }
        }
        if self.cut
            && let Some((_, first)) = joined.first_mut()
            && let Some(newline) = first.iter().position(|byte| *byte == b'\n')
        {
            drop(first.split_to(newline + 1));
        }
        joined.into_iter().map(|(stream, text)| (stream, text.freeze())).filter(|(_, text)| !text.is_empty()).collect()
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
}
