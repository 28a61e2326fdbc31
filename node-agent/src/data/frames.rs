//! Frames of the exec protocol: what goes over a WebSocket or as HTTP chunks, and back.

use axum::extract::ws::Message;
use bytes::{BufMut as _, Bytes, BytesMut};
use proto::agent::{ExecInput, PortEvent, SessionInfo, TerminalSize, exec_input::Input};
use serde::Deserialize;
use serde_json::{Value, json};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const EXIT: u8 = 3;
const STDIN_EOF: u8 = 4;
/// Largest piece of stdin in one message to the guest.
const STDIN_PIECE_BYTES: usize = 64 << 10;

/// Which stream bytes come from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Output {
    Stdout,
    Stderr,
}

pub(super) fn output(stream: Output, data: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(1 + data.len());
    frame.put_u8(match stream {
        Output::Stdout => STDOUT,
        Output::Stderr => STDERR,
    });
    frame.put_slice(data);
    frame.freeze()
}

/// One byte of exit code, as the clients need it.
pub(super) fn exit(code: i32) -> Bytes {
    Bytes::from(vec![EXIT, code.to_le_bytes()[0]])
}

/// Both keys: some clients know only the one, some only the other.
pub(super) fn exit_text(code: i32) -> Value {
    json!({ "type": "exit", "exit_code": code, "code": code })
}

pub(super) fn session_info(info: &SessionInfo) -> Value {
    json!({
        "type": "session_info",
        "session_id": info.session_id,
        "command": info.command,
        "created": info.created_unix_ms / 1000,
        "cols": info.cols,
        "rows": info.rows,
        "is_owner": info.is_owner,
        "tty": info.tty,
    })
}

pub(super) fn port(event: &PortEvent) -> Value {
    let kind = if event.open { "port_opened" } else { "port_closed" };
    json!({ "type": kind, "port": event.port, "address": event.address, "pid": event.pid })
}

pub(super) fn keepalive() -> Value {
    json!({ "type": "keepalive" })
}

/// What a client says in JSON.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Said {
    Resize { rows: u32, cols: u32 },
    Signal { signal: String },
}

fn said(text: &[u8]) -> Option<Input> {
    match serde_json::from_slice(text).ok()? {
        Said::Resize { rows, cols } => Some(Input::Resize(TerminalSize { rows, cols })),
        Said::Signal { signal } => Some(Input::Signal(signal)),
    }
}

/// How the client on the other side frames its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Direct,
    /// Control sockets: some clients send JSON in binary messages there.
    Control,
}

/// The guest's inputs for one message. Unknown ones mean nothing, as the dialect asks.
pub(super) fn inputs(message: Message, tty: bool, dialect: Dialect) -> Vec<ExecInput> {
    let wrap = |input: Input| ExecInput { input: Some(input) };
    match message {
        Message::Text(text) => said(text.as_bytes()).map(wrap).into_iter().collect(),
        Message::Binary(data) => {
            if dialect == Dialect::Control
                && (data.starts_with(b"{\"type\":\"resize\"") || data.starts_with(b"{\"type\":\"signal\""))
                && let Some(input) = said(&data)
            {
                return vec![wrap(input)];
            }
            match (tty, data.first()) {
                (_, None) => Vec::new(),
                (true, Some(_)) => pieces(data).map(Input::Stdin).map(wrap).collect(),
                (false, Some(&STDIN)) => pieces(data.slice(1..)).map(Input::Stdin).map(wrap).collect(),
                (false, Some(&STDIN_EOF)) => vec![wrap(Input::StdinEof(true))],
                (false, Some(_)) => Vec::new(),
            }
        }
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => Vec::new(),
    }
}

/// Cuts what a client wrote at once into messages the guest takes. Copies nothing.
pub(super) fn pieces(mut data: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let len = data.len().min(STDIN_PIECE_BYTES);
        (len > 0).then(|| data.split_to(len))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(message: Message, tty: bool, dialect: Dialect) -> Vec<String> {
        let text = |input: ExecInput| match input.input.unwrap() {
            Input::Stdin(data) => format!("stdin {}", data.len()),
            Input::StdinEof(_) => "eof".into(),
            Input::Resize(size) => format!("resize {}x{}", size.rows, size.cols),
            Input::Signal(signal) => format!("signal {signal}"),
            Input::Start(_) | Input::Attach(_) => "other".into(),
        };
        inputs(message, tty, dialect).into_iter().map(text).collect()
    }

    #[test]
    fn frames_mean_what_the_dialect_says() {
        let binary = |data: &[u8]| Message::Binary(Bytes::copy_from_slice(data));
        assert_eq!(kinds(binary(b"\x00abc"), false, Dialect::Direct), ["stdin 3"]);
        assert_eq!(kinds(binary(b"\x04"), false, Dialect::Direct), ["eof"]);
        assert_eq!(kinds(binary(b"\x04"), true, Dialect::Direct), ["stdin 1"], "in a terminal that is Ctrl-D");
        assert_eq!(kinds(binary(b"\x09what"), false, Dialect::Direct), [""; 0]);
        assert_eq!(kinds(binary(b""), false, Dialect::Direct), [""; 0]);
        let large = vec![0; (64 << 10) * 2 + 2];
        assert_eq!(kinds(binary(&large), false, Dialect::Direct), ["stdin 65536", "stdin 65536", "stdin 1"]);
        let resize = r#"{"type":"resize","cols":132,"rows":50}"#;
        assert_eq!(kinds(Message::Text(resize.into()), true, Dialect::Direct), ["resize 50x132"]);
        assert_eq!(kinds(binary(resize.as_bytes()), true, Dialect::Control), ["resize 50x132"]);
        assert_eq!(kinds(binary(resize.as_bytes()), true, Dialect::Direct), [format!("stdin {}", resize.len())]);
        assert_eq!(kinds(Message::Text(r#"{"type":"other"}"#.into()), true, Dialect::Direct), [""; 0]);
    }
}
