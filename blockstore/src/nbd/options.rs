//! The handshake of NBD (fixed newstyle) as pure functions: options from bytes, replies to bytes. No I/O; any input is safe.

use bytes::{Buf, BufMut, BytesMut};

use super::codec::{ALLOCATION_CONTEXT_ID, Agreed, BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX, Shape};

const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// FIXED_NEWSTYLE and NO_ZEROES, of both sides.
const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
pub const CLIENT_FLAGS_BYTES: usize = 4;
pub const OPTION_HEADER_BYTES: usize = 16;
/// Longest data of an option that is looked at. The document limits names to 4 KiB; a longer option is refused and skipped.
pub const OPTION_DATA_BYTES_MAX: u32 = 16 << 10;
/// Longest export name.
pub const NAME_BYTES_MAX: usize = 4_096;
/// The one meta context we have.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_BLOCK_SIZE: u16 = 3;

/// Why the handshake ends without a connection. Nothing can be answered any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    #[error("client flags {0:#x}: not fixed newstyle, or unknown")]
    ClientFlags(u32),
    #[error("option with magic {0:#x}")]
    Magic(u64),
}

/// What the server says first.
pub fn encode_greeting(out: &mut BytesMut) {
    out.put_u64(GREETING_MAGIC);
    out.put_u64(OPTION_MAGIC);
    out.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
}

/// Returns whether EXPORT_NAME is answered without its 124 zeros.
pub fn parse_client_flags(flags: [u8; CLIENT_FLAGS_BYTES]) -> Result<bool, HandshakeError> {
    let flags = u32::from_be_bytes(flags);
    let (fixed, no_zeroes) = (u32::from(FLAG_FIXED_NEWSTYLE), u32::from(FLAG_NO_ZEROES));
    if flags & fixed == 0 || flags & !(fixed | no_zeroes) != 0 {
        return Err(HandshakeError::ClientFlags(flags));
    }
    Ok(flags & no_zeroes != 0)
}

/// The fixed start of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    pub code: u32,
    pub data_len_bytes: u32,
}

impl OptionHeader {
    pub fn parse(header: [u8; OPTION_HEADER_BYTES]) -> Result<Self, HandshakeError> {
        let mut header = &header[..];
        match header.get_u64() {
            OPTION_MAGIC => Ok(Self { code: header.get_u32(), data_len_bytes: header.get_u32() }),
            magic => Err(HandshakeError::Magic(magic)),
        }
    }

    /// For clients and tests.
    pub fn encode(self, out: &mut BytesMut) {
        out.put_u64(OPTION_MAGIC);
        out.put_u32(self.code);
        out.put_u32(self.data_len_bytes);
    }
}

/// Which of the two ways to ask for an export's facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Tell me.
    Info,
    /// Tell me, and begin.
    Go,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextVerb {
    List,
    Set,
}

/// What a client wants, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOption {
    /// The old way in, without any way to say no.
    ExportName(String),
    Abort,
    List,
    Describe {
        ask: Ask,
        name: String,
        wants_name: bool,
    },
    StructuredReply,
    MetaContext {
        verb: ContextVerb,
        name: String,
        allocation: bool,
    },
}

/// An option is refused; the handshake goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Unsupported,
    Invalid,
    UnknownExport,
    TooBig,
}

impl Refusal {
    const fn to_wire(self) -> u32 {
        (1 << 31)
            + match self {
                Self::Unsupported => 1,
                Self::Invalid => 3,
                Self::UnknownExport => 6,
                Self::TooBig => 9,
            }
    }
}

impl ClientOption {
    pub fn parse(code: u32, mut data: &[u8]) -> Result<Self, Refusal> {
        let no_data = |option| if data.is_empty() { Ok(option) } else { Err(Refusal::Invalid) };
        match code {
            1 => name_of(data).map(Self::ExportName),
            2 => Ok(Self::Abort),
            3 => no_data(Self::List),
            6 | 7 => {
                let name = take_name(&mut data)?;
                let count = take_u16(&mut data)?;
                if data.len() != usize::from(count) * 2 {
                    return Err(Refusal::Invalid);
                }
                let wants_name = data.chunks_exact(2).any(|info| info == INFO_NAME.to_be_bytes());
                let ask = if code == 6 { Ask::Info } else { Ask::Go };
                Ok(Self::Describe { ask, name, wants_name })
            }
            8 => no_data(Self::StructuredReply),
            9 | 10 => {
                let name = take_name(&mut data)?;
                let verb = if code == 9 { ContextVerb::List } else { ContextVerb::Set };
                Ok(Self::MetaContext { verb, name, allocation: take_queries(verb, data)? })
            }
            _ => Err(Refusal::Unsupported),
        }
    }
}

/// Whether the queries select `base:allocation`.
fn take_queries(verb: ContextVerb, mut data: &[u8]) -> Result<bool, Refusal> {
    let count = take_u32(&mut data)?;
    // Asking for nothing lists everything, but sets nothing.
    let mut allocation = count == 0 && verb == ContextVerb::List;
    for _ in 0..count {
        // Ends with an error as soon as the data do, whatever the count says.
        let query = take_name(&mut data)?;
        allocation |= query == ALLOCATION_CONTEXT || (verb == ContextVerb::List && query == "base:");
    }
    if data.is_empty() { Ok(allocation) } else { Err(Refusal::Invalid) }
}

fn take_u16(data: &mut &[u8]) -> Result<u16, Refusal> {
    data.try_get_u16().map_err(|_too_short| Refusal::Invalid)
}

fn take_u32(data: &mut &[u8]) -> Result<u32, Refusal> {
    data.try_get_u32().map_err(|_too_short| Refusal::Invalid)
}

/// A text with its length before it.
fn take_name(data: &mut &[u8]) -> Result<String, Refusal> {
    let len = take_u32(data)? as usize;
    let Some((name, rest)) = data.split_at_checked(len) else { return Err(Refusal::Invalid) };
    *data = rest;
    name_of(name)
}

fn name_of(bytes: &[u8]) -> Result<String, Refusal> {
    if bytes.len() > NAME_BYTES_MAX {
        return Err(Refusal::TooBig);
    }
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        _ => Err(Refusal::Invalid),
    }
}

fn reply(out: &mut BytesMut, code: u32, kind: u32, len: usize) {
    out.put_u64(REPLY_MAGIC);
    out.put_u32(code);
    out.put_u32(kind);
    out.put_u32(u32::try_from(len).expect("our replies are short"));
}

pub fn encode_ack(code: u32, out: &mut BytesMut) {
    reply(out, code, 1, 0);
}

pub fn encode_refusal(code: u32, refusal: Refusal, out: &mut BytesMut) {
    reply(out, code, refusal.to_wire(), 0);
}

/// One line of the answer to LIST.
pub fn encode_listed(code: u32, name: &str, out: &mut BytesMut) {
    reply(out, code, 2, 4 + name.len());
    put_name(name, out);
}

/// The facts of an export: answer to INFO and GO, before the ack.
pub fn encode_description(code: u32, name: Option<&str>, shape: Shape, agreed: Agreed, out: &mut BytesMut) {
    const INFO: u32 = 3;
    reply(out, code, INFO, 12);
    out.put_u16(INFO_EXPORT);
    out.put_u64(shape.size_bytes);
    out.put_u16(shape.flags(agreed));
    reply(out, code, INFO, 14);
    out.put_u16(INFO_BLOCK_SIZE);
    out.put_u32(BLOCK_BYTES_MIN);
    out.put_u32(BLOCK_BYTES_PREFERRED);
    out.put_u32(PAYLOAD_BYTES_MAX);
    if let Some(name) = name {
        reply(out, code, INFO, 2 + name.len());
        out.put_u16(INFO_NAME);
        out.put_slice(name.as_bytes());
    }
}

/// The one meta context, before the ack.
pub fn encode_allocation_context(code: u32, verb: ContextVerb, out: &mut BytesMut) {
    const META_CONTEXT: u32 = 4;
    reply(out, code, META_CONTEXT, 4 + ALLOCATION_CONTEXT.len());
    out.put_u32(match verb {
        ContextVerb::Set => ALLOCATION_CONTEXT_ID,
        ContextVerb::List => 0,
    });
    out.put_slice(ALLOCATION_CONTEXT.as_bytes());
}

/// The answer to EXPORT_NAME, which begins the transmission.
pub fn encode_export_name(shape: Shape, agreed: Agreed, no_zeroes: bool, out: &mut BytesMut) {
    out.put_u64(shape.size_bytes);
    out.put_u16(shape.flags(agreed));
    if !no_zeroes {
        out.put_bytes(0, 124);
    }
}

fn put_name(name: &str, out: &mut BytesMut) {
    out.put_u32(u32::try_from(name.len()).expect("names are at most 4 KiB"));
    out.put_slice(name.as_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn with_name(name: &str, rest: &[u8]) -> Vec<u8> {
        let mut data = BytesMut::new();
        put_name(name, &mut data);
        data.extend_from_slice(rest);
        data.to_vec()
    }

    proptest! {
        #[test]
        fn no_option_panics_or_loops(code in 0_u32..13, data in vec(any::<u8>(), 0..200)) {
            drop(ClientOption::parse(code, &data));
        }

        #[test]
        fn names_come_through(name in "[a-z0-9-]{0,40}", infos in vec(any::<u16>(), 0..5)) {
            let mut rest = u16::try_from(infos.len()).unwrap().to_be_bytes().to_vec();
            rest.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
            let parsed = ClientOption::parse(7, &with_name(&name, &rest));
            let wants_name = infos.contains(&INFO_NAME);
            prop_assert_eq!(parsed, Ok(ClientOption::Describe { ask: Ask::Go, name, wants_name }));
        }
    }

    #[test]
    fn lengths_and_counts_that_lie_are_invalid() {
        for data in [&[][..], &[0, 0, 0, 9, b'x'], &[0xff; 4], &[0xff; 40]] {
            for code in [6, 7, 9, 10] {
                assert_eq!(ClientOption::parse(code, data), Err(Refusal::Invalid), "{code} {data:?}");
            }
        }
        // Four billion queries of which none follows.
        assert_eq!(ClientOption::parse(10, &with_name("x", &[0xff; 4])), Err(Refusal::Invalid));
        assert_eq!(ClientOption::parse(3, b"x"), Err(Refusal::Invalid));
        assert_eq!(ClientOption::parse(1, &[0xff, 0xfe]), Err(Refusal::Invalid));
        assert_eq!(ClientOption::parse(1, &[b'x'; NAME_BYTES_MAX + 1]), Err(Refusal::TooBig));
        assert_eq!(ClientOption::parse(5, b""), Err(Refusal::Unsupported));
    }
}
