//! Frames of the exec protocol, seen from the client.

use bytes::{BufMut as _, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const EXIT: u8 = 3;
const STDIN_EOF: u8 = 4;

/// What the server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Info(Info),
    /// A terminal has only this stream.
    Stdout(Bytes),
    Stderr(Bytes),
    Exit(u8),
    Closed(Option<String>),
    /// Pings, keepalives, and whatever a later version says.
    Nothing,
}

/// Which session this is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Info {
    pub(crate) session_id: String,
    #[serde(default)]
    pub(crate) tty: bool,
}

pub(crate) fn said(message: Message, tty: bool) -> Said {
    match message {
        Message::Text(text) => serde_json::from_str(&text).map_or(Said::Nothing, event),
        Message::Binary(data) if tty => Said::Stdout(data),
        Message::Binary(data) => frame(data),
        Message::Close(frame) => {
            Said::Closed(frame.map(|frame| frame.reason.to_string()).filter(|reason| !reason.is_empty()))
        }
        Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => Said::Nothing,
    }
}

fn event(event: Value) -> Said {
    match event["type"].as_str() {
        Some("session_info") => serde_json::from_value(event).map_or(Said::Nothing, Said::Info),
        Some("exit") => match event["exit_code"].as_i64().or_else(|| event["code"].as_i64()) {
            // No code of a process: something went wrong.
            Some(code) => Said::Exit(u8::try_from(code).unwrap_or(1)),
            None => Said::Nothing,
        },
        Some(_) | None => Said::Nothing,
    }
}

/// One message of a session without a terminal, or one chunk of an HTTP exec.
pub(crate) fn frame(mut data: Bytes) -> Said {
    let Some(&stream) = data.first() else { return Said::Nothing };
    let payload = data.split_off(1);
    match stream {
        STDOUT => Said::Stdout(payload),
        STDERR => Said::Stderr(payload),
        // No payload means success.
        EXIT => Said::Exit(payload.first().copied().unwrap_or(0)),
        _ => Said::Nothing,
    }
}

pub(crate) fn stdin(data: &[u8], tty: bool) -> Message {
    let mut frame = BytesMut::with_capacity(1 + data.len());
    if !tty {
        frame.put_u8(STDIN);
    }
    frame.put_slice(data);
    Message::Binary(frame.freeze())
}

/// In a terminal, the end of input is a character (Ctrl-D), which happens to be the same byte.
pub(crate) fn stdin_eof() -> Message {
    Message::Binary(Bytes::from_static(&[STDIN_EOF]))
}

pub(crate) fn resize(rows: u16, cols: u16) -> Message {
    Message::text(json!({ "type": "resize", "cols": cols, "rows": rows }).to_string())
}

pub(crate) fn signal(name: &str) -> Message {
    Message::text(json!({ "type": "signal", "signal": name }).to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn binary(data: &'static [u8]) -> Message {
        Message::Binary(Bytes::from_static(data))
    }

    #[test]
    fn servers_are_understood() {
        assert_eq!(said(binary(b"\x01hi"), false), Said::Stdout(Bytes::from_static(b"hi")));
        assert_eq!(said(binary(b"\x02hi"), false), Said::Stderr(Bytes::from_static(b"hi")));
        assert_eq!(said(binary(b"\x03\x2a"), false), Said::Exit(42));
        assert_eq!(said(binary(b"\x03"), false), Said::Exit(0));
        assert_eq!(said(binary(b"\x09what"), false), Said::Nothing);
        assert_eq!(
            said(binary(b"\x03x"), true),
            Said::Stdout(Bytes::from_static(b"\x03x")),
            "a terminal's bytes are bytes"
        );
        let text = |text: &'static str| said(Message::text(text), true);
        assert_eq!(text(r#"{"type":"exit","exit_code":7,"code":7}"#), Said::Exit(7));
        assert_eq!(text(r#"{"type":"exit","code":143}"#), Said::Exit(143));
        assert_eq!(text(r#"{"type":"exit","exit_code":-1}"#), Said::Exit(1), "no success");
        let info = r#"{"type":"session_info","session_id":"9","command":"ok","created":1,"cols":80,"rows":24,"is_owner":true,"tty":true}"#;
        assert_eq!(text(info), Said::Info(Info { session_id: "9".into(), tty: true }));
        for other in [r#"{"type":"keepalive"}"#, r#"{"type":"debug","msg":1}"#, "{", "[]", ""] {
            assert_eq!(text(other), Said::Nothing, "{other}");
        }
    }

    #[test]
    fn we_are_understood() {
        assert_eq!(stdin(b"a", false), binary(b"\x00a"));
        assert_eq!(stdin(b"a", true), binary(b"a"));
        assert_eq!(stdin_eof(), binary(b"\x04"));
        assert_eq!(resize(50, 132).into_text().unwrap(), r#"{"cols":132,"rows":50,"type":"resize"}"#);
        assert_eq!(signal("SIGINT").into_text().unwrap(), r#"{"signal":"SIGINT","type":"signal"}"#);
    }

    proptest! {
        #[test]
        fn no_message_does_harm(data: Vec<u8>, text in ".{0,80}", tty: bool) {
            drop(said(Message::Binary(data.into()), tty));
            drop(said(Message::text(text), tty));
        }
    }
}
