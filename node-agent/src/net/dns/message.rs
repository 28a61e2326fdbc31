//! Just enough of the DNS message format to answer special names and to match answers with questions.

use std::net::{Ipv4Addr, Ipv6Addr};

const HEADER_BYTES: usize = 12;
const NAME_BYTES_MAX: usize = 255;
const LABEL_BYTES_MAX: usize = 63;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const RCODE_SERVFAIL: u8 = 2;
const RCODE_NXDOMAIN: u8 = 3;
/// Local answers may be kept this long by the guest.
const TTL_S: u32 = 60;

/// The one question of a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Labels in lower case.
    labels: Vec<Vec<u8>>,
    kind: u16,
    /// Where the question ends in the message.
    end: usize,
}

/// What happens to a name that never leaves the machine (RFC 6761, 6762, 7686).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// `localhost` and everything below it: the guest itself.
    Loopback,
    /// Does not exist in the DNS.
    Nowhere,
}

/// The question of a standard query with exactly one; `None` for anything else.
pub fn question(message: &[u8]) -> Option<Question> {
    let header = message.get(..HEADER_BYTES)?;
    let (is_response, opcode) = (header[2] & 0x80 != 0, (header[2] >> 3) & 0xf);
    let questions = u16::from_be_bytes([header[4], header[5]]);
    if is_response || opcode != 0 || questions != 1 {
        return None;
    }
    read_question(message)
}

fn read_question(message: &[u8]) -> Option<Question> {
    let mut labels = Vec::new();
    let mut at = HEADER_BYTES;
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        if len == 0 {
            break;
        }
        // A compressed name cannot stand in the first question: there is nothing before it to point at.
        if len > LABEL_BYTES_MAX || at + len > HEADER_BYTES + NAME_BYTES_MAX {
            return None;
        }
        labels.push(message.get(at..at + len)?.to_ascii_lowercase());
        at += len;
    }
    let kind = message.get(at..at + 2)?;
    message.get(at + 2..at + 4)?;
    Some(Question { labels, kind: u16::from_be_bytes([kind[0], kind[1]]), end: at + 4 })
}

/// Whether the name has to be answered here.
pub fn special(question: &Question) -> Option<Special> {
    match question.labels.last()?.as_slice() {
        b"localhost" => Some(Special::Loopback),
        b"local" | b"invalid" | b"onion" => Some(Special::Nowhere),
        _ => None,
    }
}

/// The answer to a special name.
pub fn local_answer(query: &[u8], question: &Question, special: Special) -> Vec<u8> {
    let address = match (special, question.kind) {
        (Special::Loopback, TYPE_A) => Ipv4Addr::LOCALHOST.octets().to_vec(),
        (Special::Loopback, TYPE_AAAA) => Ipv6Addr::LOCALHOST.octets().to_vec(),
        // The name exists and has no such record.
        (Special::Loopback, _) => return reply(query, question, 0, 0),
        (Special::Nowhere, _) => return reply(query, question, RCODE_NXDOMAIN, 0),
    };
    let mut answer = reply(query, question, 0, 1);
    // The name: a pointer to the question's.
    answer.extend([0xc0, 0x0c]);
    answer.extend(question.kind.to_be_bytes());
    answer.extend(1_u16.to_be_bytes());
    answer.extend(TTL_S.to_be_bytes());
    answer.push(0);
    answer.push(if question.kind == TYPE_A { 4 } else { 16 });
    answer.extend(address);
    answer
}

/// "No name server answered."
pub fn failure(query: &[u8], question: &Question) -> Vec<u8> {
    reply(query, question, RCODE_SERVFAIL, 0)
}

fn reply(query: &[u8], question: &Question, rcode: u8, answers: u16) -> Vec<u8> {
    let recursion_desired = query[2] & 1;
    let mut message = query[..2].to_vec();
    message.extend([0x80 | recursion_desired, 0x80 | rcode]);
    message.extend(1_u16.to_be_bytes());
    message.extend(answers.to_be_bytes());
    message.extend([0; 4]);
    message.extend_from_slice(&query[HEADER_BYTES..question.end]);
    message
}

/// Whether `answer` is a response to `query`: same id, and the same question if it repeats it.
pub fn answers(query: &[u8], answer: &[u8]) -> bool {
    let same_id = query.get(..2).is_some_and(|id| answer.get(..2) == Some(id));
    let is_response = answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
    if !same_id || !is_response || answer.len() < HEADER_BYTES {
        return false;
    }
    let questions = u16::from_be_bytes([answer[4], answer[5]]);
    questions == 0 || read_question(answer) == read_question(query)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend_from_slice(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend(1_u16.to_be_bytes());
        message
    }

    fn special_of(name: &str) -> Option<Special> {
        special(&question(&query(name, TYPE_A)).unwrap())
    }

    #[test]
    fn names_of_this_machine_never_leave_it() {
        assert_eq!(special_of("localhost"), Some(Special::Loopback));
        assert_eq!(special_of("demo-abc123.sprites.LocalHost"), Some(Special::Loopback));
        assert_eq!(special_of("printer.local"), Some(Special::Nowhere));
        assert_eq!(special_of("localhost.example"), None);
        assert_eq!(special_of("notlocalhost"), None);
    }

    #[test]
    fn localhost_is_the_guest_itself() {
        let message = query("x.localhost", TYPE_A);
        let answer = local_answer(&message, &question(&message).unwrap(), Special::Loopback);
        assert!(answers(&message, &answer));
        assert_eq!(&answer[answer.len() - 4..], [127, 0, 0, 1]);
        assert_eq!(answer[7], 1);
    }

    #[test]
    fn an_answer_to_another_question_is_not_taken() {
        let (one, other) = (query("a.example", TYPE_A), query("b.example", TYPE_A));
        let forged = failure(&other, &question(&other).unwrap());
        assert!(!answers(&one, &forged));
        assert!(!answers(&one, &one), "a query is no answer");
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Some(question) = question(&bytes) {
                let answer = special(&question).map_or_else(
                    || failure(&bytes, &question),
                    |special| local_answer(&bytes, &question, special),
                );
                prop_assert!(answers(&bytes, &answer));
            }
        }
    }
}
