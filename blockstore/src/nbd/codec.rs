//! The transmission phase of NBD as pure functions: requests from bytes, replies to bytes. No I/O, no clock; any input is safe.
//!
//! Names and numbers are those of the NBD project's `doc/proto.md`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Length of a request without payload.
pub const REQUEST_BYTES: usize = 28;
/// Largest payload of one READ or WRITE, as advertised.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Smallest unit of a request, as advertised. Smaller ones work too; a disk's sector is never smaller.
pub const BLOCK_BYTES_MIN: u32 = 512;
/// The unit in which the volume keeps its data. A larger value would only make clients inflate small requests.
pub const BLOCK_BYTES_PREFERRED: u32 = 4_096;
/// The id under which `base:allocation` is reported.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_OFFSET_HOLE: u16 = 2;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = (1 << 15) + 1;

/// Flags of a command.
pub mod command_flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
}

/// Flags of an export.
pub mod export_flag {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 2;
    pub const SEND_FLUSH: u16 = 4;
    pub const SEND_FUA: u16 = 8;
    pub const SEND_TRIM: u16 = 32;
    pub const SEND_WRITE_ZEROES: u16 = 64;
    pub const SEND_DF: u16 = 128;
    pub const CAN_MULTI_CONN: u16 = 256;
    pub const SEND_CACHE: u16 = 1_024;
    pub const SEND_FAST_ZERO: u16 = 2_048;
}

/// What a client may ask of an export's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    Unknown(u16),
}

impl Command {
    const fn from_wire(code: u16) -> Self {
        match code {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    pub const fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(code) => code,
        }
    }

    /// Whether the command may change the device.
    pub const fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }

    /// Flags that have a meaning for this command; others are the client's mistake.
    const fn flags_known(self) -> u16 {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
        // FUA is allowed, and ignored, where there is nothing to make durable.
        match self {
            Self::Read => DF | FUA,
            Self::WriteZeroes => FUA | NO_HOLE | FAST_ZERO,
            Self::BlockStatus => REQ_ONE | FUA,
            Self::Write | Self::Disconnect | Self::Flush | Self::Trim | Self::Cache | Self::Unknown(_) => FUA,
        }
    }
}

/// One request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: Command,
    /// The client's name for the request; opaque.
    pub cookie: u64,
    pub offset: u64,
    pub len_bytes: u32,
}

impl Request {
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// For clients and tests.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u32(REQUEST_MAGIC);
        out.put_u16(self.flags);
        out.put_u16(self.command.to_wire());
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        out.put_u32(self.len_bytes);
    }
}

/// Errors as the protocol spells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    Perm,
    Io,
    Invalid,
    NoSpace,
    NotSupported,
    ShutDown,
}

impl Errno {
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::NotSupported => 95,
            Self::ShutDown => 108,
        }
    }
}

/// The stream does not carry requests (any more): nothing after this point can be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("NBD request with magic {magic:#x}")]
pub struct LostFraming {
    pub magic: u32,
}

/// What the next bytes of the stream are.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A request; the payload is empty unless it is a WRITE.
    Request(Request, Bytes),
    /// A request to be answered with an error at once. The payload of a WRITE is skipped, not collected.
    Refused(Request, Errno),
    /// Nothing whole yet. At least so many more bytes are needed.
    Need(usize),
}

/// Cuts the client's byte stream into requests.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Of a refused payload, still to be skipped.
    skip_bytes: u64,
}

impl Decoder {
    /// Takes the next request off `input`. `check` judges it by its header, before its payload takes memory.
    pub fn next(
        &mut self,
        input: &mut BytesMut,
        check: impl FnOnce(&Request) -> Result<(), Errno>,
    ) -> Result<Decoded, LostFraming> {
        if self.skip_bytes > 0 {
            let here = usize::try_from(self.skip_bytes).unwrap_or(usize::MAX).min(input.len());
            input.advance(here);
            self.skip_bytes -= here as u64;
            if self.skip_bytes > 0 {
                return Ok(Decoded::Need(1));
            }
        }
        let Some(header) = input.first_chunk::<REQUEST_BYTES>() else {
            return Ok(Decoded::Need(REQUEST_BYTES - input.len()));
        };
        let request = parse(header)?;
        let payload_bytes = if request.command == Command::Write { request.len_bytes } else { 0 };
        if let Err(errno) = check(&request) {
            input.advance(REQUEST_BYTES);
            self.skip_bytes = u64::from(payload_bytes);
            return Ok(Decoded::Refused(request, errno));
        }
        let whole = REQUEST_BYTES + payload_bytes as usize;
        if input.len() < whole {
            return Ok(Decoded::Need(whole - input.len()));
        }
        input.advance(REQUEST_BYTES);
        Ok(Decoded::Request(request, input.split_to(whole - REQUEST_BYTES).freeze()))
    }
}

fn parse(mut header: &[u8]) -> Result<Request, LostFraming> {
    let magic = header.get_u32();
    if magic != REQUEST_MAGIC {
        return Err(LostFraming { magic });
    }
    Ok(Request {
        flags: header.get_u16(),
        command: Command::from_wire(header.get_u16()),
        cookie: header.get_u64(),
        offset: header.get_u64(),
        len_bytes: header.get_u32(),
    })
}

/// What the two sides agreed on in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    pub structured_replies: bool,
    /// `base:allocation` may be asked for.
    pub allocation: bool,
}

/// The facts of an export that decide whether a request is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub size_bytes: u64,
    pub read_only: bool,
}

impl Shape {
    /// Flags for the handshake.
    pub fn flags(&self, agreed: Agreed) -> u16 {
        use export_flag as f;
        let common = f::HAS_FLAGS | f::SEND_FLUSH | f::SEND_CACHE | f::CAN_MULTI_CONN;
        let structured = if agreed.structured_replies { f::SEND_DF } else { 0 };
        let changing = f::SEND_FUA | f::SEND_TRIM | f::SEND_WRITE_ZEROES | f::SEND_FAST_ZERO;
        common | structured | if self.read_only { f::READ_ONLY } else { changing }
    }

    /// Whether the device may be asked; otherwise the error to answer with.
    pub fn check(&self, request: &Request, agreed: Agreed) -> Result<(), Errno> {
        if let Command::Unknown(_) = request.command {
            return Err(Errno::Invalid);
        }
        if request.flags & !request.command.flags_known() != 0 {
            return Err(Errno::Invalid);
        }
        if self.read_only && request.command.changes() {
            return Err(Errno::Perm);
        }
        match request.command {
            Command::Flush | Command::Disconnect => return Ok(()),
            Command::BlockStatus if !agreed.allocation || request.len_bytes == 0 => return Err(Errno::Invalid),
            Command::Read | Command::Write if request.len_bytes > PAYLOAD_BYTES_MAX => return Err(Errno::Invalid),
            _ => {}
        }
        let end = request.offset.checked_add(u64::from(request.len_bytes));
        match end {
            Some(end) if end <= self.size_bytes => Ok(()),
            // The document asks for ENOSPC where data would have to go, EINVAL elsewhere.
            _ if request.command.changes() && request.command != Command::Trim => Err(Errno::NoSpace),
            _ => Err(Errno::Invalid),
        }
    }
}

/// State of a stretch of bytes in a BLOCK_STATUS reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    pub len_bytes: u32,
    /// Reads as zeros and takes no space; otherwise data.
    pub hole: bool,
}

/// The body of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Done,
    /// Data of a READ at `offset`.
    Data {
        offset: u64,
        bytes: Bytes,
    },
    /// So many zeros of a READ at `offset`. Only with structured replies.
    Hole {
        offset: u64,
        len_bytes: u32,
    },
    Status(Vec<StatusExtent>),
    Failed(Errno),
}

/// Appends a reply to `out`, except for the data of a READ, which is returned to be sent right after it without a copy.
pub fn encode_reply(agreed: Agreed, request: &Request, reply: Reply, out: &mut BytesMut) -> Bytes {
    // Without structured replies every answer is simple; with them a READ and a BLOCK_STATUS must be structured, others may be either.
    if !agreed.structured_replies {
        return encode_simple(request.cookie, reply, out);
    }
    match reply {
        Reply::Done if matches!(request.command, Command::Read | Command::BlockStatus) => {
            chunk(out, CHUNK_NONE, request.cookie, 0);
            Bytes::new()
        }
        Reply::Done => encode_simple(request.cookie, Reply::Done, out),
        Reply::Data { offset, bytes } => {
            chunk(out, CHUNK_OFFSET_DATA, request.cookie, 8 + bytes.len());
            out.put_u64(offset);
            bytes
        }
        Reply::Hole { offset, len_bytes } => {
            chunk(out, CHUNK_OFFSET_HOLE, request.cookie, 12);
            out.put_u64(offset);
            out.put_u32(len_bytes);
            Bytes::new()
        }
        Reply::Status(extents) => {
            chunk(out, CHUNK_BLOCK_STATUS, request.cookie, 4 + extents.len() * 8);
            out.put_u32(ALLOCATION_CONTEXT_ID);
            for extent in extents {
                out.put_u32(extent.len_bytes);
                // HOLE and ZERO.
                out.put_u32(if extent.hole { 3 } else { 0 });
            }
            Bytes::new()
        }
        Reply::Failed(errno) => {
            chunk(out, CHUNK_ERROR, request.cookie, 6);
            out.put_u32(errno.to_wire());
            // No message.
            out.put_u16(0);
            Bytes::new()
        }
    }
}

fn encode_simple(cookie: u64, reply: Reply, out: &mut BytesMut) -> Bytes {
    let (errno, payload) = match reply {
        Reply::Done | Reply::Status(_) => (0, Bytes::new()),
        Reply::Data { bytes, .. } => (0, bytes),
        // Whoever did not ask for structured replies gets the zeros themselves.
        Reply::Hole { len_bytes, .. } => (0, BytesMut::zeroed(len_bytes as usize).freeze()),
        Reply::Failed(errno) => (errno.to_wire(), Bytes::new()),
    };
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(errno);
    out.put_u64(cookie);
    payload
}

/// The header of the only, and so last, chunk of a reply.
fn chunk(out: &mut BytesMut, kind: u16, cookie: u64, len: usize) {
    out.put_u32(STRUCTURED_REPLY_MAGIC);
    out.put_u16(CHUNK_DONE);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(u32::try_from(len).expect("payloads and extent lists are far below 4 GiB"));
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn any_request() -> impl Strategy<Value = Request> {
        (any::<u16>(), 0_u16..10, any::<u64>(), any::<u64>(), 0_u32..5_000).prop_map(
            |(flags, command, cookie, offset, len_bytes)| {
                let command = Command::from_wire(command);
                Request { flags, command, cookie, offset, len_bytes }
            },
        )
    }

    /// What a connection does, with input that arrives in pieces.
    fn decode_all(pieces: &[&[u8]]) -> Result<Vec<Decoded>, LostFraming> {
        let fits = |request: &Request| match request.len_bytes {
            0..=PAYLOAD_BYTES_MAX => Ok(()),
            _ => Err(Errno::Invalid),
        };
        let (mut decoder, mut input, mut found) = (Decoder::default(), BytesMut::new(), Vec::new());
        for piece in pieces {
            input.extend_from_slice(piece);
            loop {
                match decoder.next(&mut input, fits)? {
                    Decoded::Need(bytes) => {
                        assert!(bytes > 0);
                        break;
                    }
                    other => found.push(other),
                }
            }
        }
        Ok(found)
    }

    proptest! {
        #[test]
        fn requests_survive_any_cutting_of_the_stream(requests in vec(any_request(), 1..8), cut in 1_usize..200) {
            let mut stream = BytesMut::new();
            let mut expected = Vec::new();
            for request in requests {
                request.encode(&mut stream);
                let payload = match request.command {
                    Command::Write => Bytes::from(vec![request.cookie.to_le_bytes()[0]; request.len_bytes as usize]),
                    _ => Bytes::new(),
                };
                stream.extend_from_slice(&payload);
                expected.push(Decoded::Request(request, payload));
            }
            let pieces: Vec<&[u8]> = stream.chunks(cut).collect();
            prop_assert_eq!(decode_all(&pieces).unwrap(), expected);
        }

        #[test]
        fn garbage_is_refused_or_understood_but_never_panics(garbage in vec(any::<u8>(), 0..400), aligned: bool) {
            let mut garbage = garbage;
            if aligned && garbage.len() > 4 {
                garbage[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            }
            drop(decode_all(&[&garbage]));
        }

        #[test]
        fn a_request_that_passes_the_check_lies_within_the_device(request in any_request(), size in any::<u64>(), read_only: bool) {
            let shape = Shape { size_bytes: size, read_only };
            let agreed = Agreed { structured_replies: true, allocation: true };
            if shape.check(&request, agreed).is_ok() && request.command != Command::Flush && request.command != Command::Disconnect {
                prop_assert!(request.offset.checked_add(request.len_bytes.into()).unwrap() <= size);
                prop_assert!(!(read_only && request.command.changes()));
            }
        }

        #[test]
        fn a_structured_reply_announces_exactly_the_bytes_that_follow(request in any_request(), len in 0_usize..2_000, kind in 0..5) {
            let reply = match kind {
                0 => Reply::Done,
                1 => Reply::Data { offset: 7, bytes: vec![1; len].into() },
                2 => Reply::Hole { offset: 7, len_bytes: u32::try_from(len).unwrap() },
                3 => Reply::Status(vec![StatusExtent { len_bytes: 1, hole: true }; len % 50 + 1]),
                _ => Reply::Failed(Errno::Io),
            };
            let mut out = BytesMut::new();
            let payload = encode_reply(Agreed { structured_replies: true, allocation: true }, &request, reply, &mut out);
            let total = out.len() + payload.len();
            match out.get_u32() {
                STRUCTURED_REPLY_MAGIC => {
                    let (_flags, _kind, cookie, len) = (out.get_u16(), out.get_u16(), out.get_u64(), out.get_u32());
                    prop_assert_eq!((cookie, 20 + len as usize), (request.cookie, total));
                }
                magic => prop_assert_eq!((magic, total), (SIMPLE_REPLY_MAGIC, 16)),
            }
        }
    }

    #[test]
    fn an_oversized_write_is_answered_and_its_payload_skipped() {
        let write = |len_bytes| Request { flags: 0, command: Command::Write, cookie: 1, offset: 0, len_bytes };
        let flush = Request { flags: 0, command: Command::Flush, cookie: 2, offset: 0, len_bytes: 0 };
        let (mut head, mut tail) = (BytesMut::new(), BytesMut::new());
        write(PAYLOAD_BYTES_MAX + 1).encode(&mut head);
        flush.encode(&mut tail);
        let junk = vec![0xee; 1 << 20];
        let mut pieces: Vec<&[u8]> = vec![&head];
        pieces.extend(std::iter::repeat_n(&junk[..], 32));
        pieces.extend([&junk[..1], &tail]);
        let found = decode_all(&pieces).unwrap();
        assert_eq!(
            found,
            [Decoded::Refused(write(PAYLOAD_BYTES_MAX + 1), Errno::Invalid), Decoded::Request(flush, Bytes::new())]
        );
    }
}
