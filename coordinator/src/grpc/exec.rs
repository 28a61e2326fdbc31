//! `Exec` over gRPC: a client of the node's own exec WebSocket, so that both ways run the same commands.
//!
//! ```text
//!  caller ──ExecRequest──▶ ┌────────┐ ──binary 00 stdin, 04 eof; text resize, signal──▶ node
//!         ◀─ExecResponse── │ bridge │ ◀─binary 01 stdout, 02 stderr, 03 exit; text session_info, exit──
//!                          └────────┘
//! ```
//! One task for each exec. It ends with the command, or when either side goes away; then the WebSocket is closed, and the node does with the
//! command what it does with any whose client has left.

use std::time::Duration;

use axum::body::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proto::{
    id::SpriteId,
    paths::SPRITE_ID_HEADER,
    public::{ExecRequest, ExecResponse, ExecStart, exec_request::Input, exec_response::Output},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{net::UnixStream, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest as _, http, protocol::CloseFrame},
};
use tonic::{Code, Status, Streaming};

use super::Events;
use crate::{refusal::Refusal, service::Service};

/// From the handshake to the 101: a wake at its longest, and the start of the command.
const OPEN_LIMIT: Duration = Duration::from_secs(90);
/// The first message of the caller.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Answers on their way to the caller; behind them the node is not read.
const OUTPUTS_MAX: usize = 16;
/// Argv and environment go in the request's target, which HTTP limits to 64 KiB.
const TARGET_BYTES_MAX: usize = 60_000;
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const EXIT: u8 = 3;
const STDIN_EOF: u8 = 4;

type Socket = WebSocketStream<UnixStream>;

/// Starts the command, or attaches, and returns its output.
pub(super) async fn open(
    service: &Service,
    org: &str,
    mut requests: Streaming<ExecRequest>,
) -> Result<Events<ExecResponse>, Status> {
    let first = match timeout(START_LIMIT, requests.message()).await {
        Ok(message) => message?,
        Err(_elapsed) => return Err(Status::deadline_exceeded("no `start` came; it has to be the first message")),
    };
    let Some(ExecRequest { input: Some(Input::Start(start)) }) = first else {
        return Err(Status::invalid_argument("the first message has to be `start`"));
    };
    let id = service.get(org, &start.name).await?.record.id;
    let target = target(&start)?;
    let socket = match timeout(OPEN_LIMIT, connect(service, id, &target)).await {
        Ok(socket) => socket?,
        Err(_elapsed) => return Err(Status::deadline_exceeded("the sprite did not answer in time; try again")),
    };
    let (sender, receiver) = mpsc::channel(OUTPUTS_MAX);
    tokio::spawn(bridge(socket, requests, sender));
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

async fn connect(service: &Service, id: SpriteId, target: &str) -> Result<Socket, Status> {
    let stream = UnixStream::connect(service.node().socket()).await;
    let stream = stream.map_err(|error| Status::unavailable(format!("the sprite's host does not answer: {error}")))?;
    let unusable =
        |error: tungstenite::Error| Status::invalid_argument(format!("the command cannot be passed on: {error}"));
    let mut request = format!("ws://node{target}").into_client_request().map_err(unusable)?;
    let id = http::HeaderValue::from_str(&id.to_string()).expect("an id is hexadecimal digits and hyphens");
    request.headers_mut().insert(SPRITE_ID_HEADER, id);
    match client_async(request, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(answer)) => Err(refused(&answer)),
        Err(error) => Err(Status::unavailable(format!("the sprite's host broke off: {error}"))),
    }
}

/// A refused handshake, in the dialect's shape.
fn refused(answer: &http::Response<Option<Vec<u8>>>) -> Status {
    let body: Value = answer.body().as_deref().and_then(|body| serde_json::from_slice(body).ok()).unwrap_or_default();
    let text = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
    let code = match answer.status().as_u16() {
        400 | 414 | 422 => Code::InvalidArgument,
        404 | 410 => Code::NotFound,
        409 => Code::FailedPrecondition,
        429 => Code::ResourceExhausted,
        503 if text("error") == "no capacity" => Code::ResourceExhausted,
        502 | 503 => Code::Unavailable,
        504 => Code::DeadlineExceeded,
        _ => Code::Internal,
    };
    Status::new(code, format!("{}: {}", text("error"), text("message")))
}

/// Path and query of the node's exec call. The node does not look at the name: the header says which sprite.
fn target(start: &ExecStart) -> Result<String, Refusal> {
    let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let mut query = vec![format!("stdin={}", start.stdin || start.tty)];
    for word in &start.argv {
        query.push(format!("cmd={}", encode(word)));
    }
    if let Some(program) = start.argv.first() {
        query.push(format!("path={}", encode(program)));
    }
    for (name, value) in &start.env {
        query.push(format!("env={}", encode(&format!("{name}={value}"))));
    }
    if !start.dir.is_empty() {
        query.push(format!("dir={}", encode(&start.dir)));
    }
    if start.tty {
        query.push("tty=true".to_owned());
    }
    if start.rows > 0 && start.cols > 0 {
        query.push(format!("rows={}&cols={}", start.rows, start.cols));
    }
    let path = match start.session_id.as_str() {
        "" => "/v1/sprites/-/exec".to_owned(),
        session => format!("/v1/sprites/-/exec/{}", encode(session)),
    };
    let target = format!("{path}?{}", query.join("&"));
    if target.len() > TARGET_BYTES_MAX {
        return Err(Refusal::Invalid(format!(
            "command and environment have {} bytes when encoded, more than {TARGET_BYTES_MAX}; pass large data over stdin",
            target.len()
        )));
    }
    Ok(target)
}

async fn bridge(
    socket: Socket,
    mut requests: Streaming<ExecRequest>,
    answers: mpsc::Sender<Result<ExecResponse, Status>>,
) {
    let (mut sink, mut source) = socket.split();
    let (mut tty, mut is_open, mut is_eof) = (false, true, false);
    let end = loop {
        tokio::select! {
            message = source.next() => match received(message, &mut tty) {
                Received::Output(output) => {
                    if answers.send(Ok(ExecResponse { output: Some(output) })).await.is_err() {
                        break Ok(());
                    }
                }
                Received::Exit(code) => {
                    drop(answers.send(Ok(ExecResponse { output: Some(Output::Exit(code)) })).await);
                    break Ok(());
                }
                Received::Nothing => {}
                Received::Lost(reason) => break Err(Status::unavailable(reason)),
            },
            request = requests.message(), if is_open => {
                let input = match request {
                    Ok(Some(request)) => request.input,
                    // Half-closed: nothing more to read for the command.
                    Ok(None) => { is_open = false; (!is_eof).then_some(Input::StdinEof(true)) }
                    Err(_gone) => break Ok(()),
                };
                is_eof |= matches!(input, Some(Input::StdinEof(true)));
                // The command may have ended; what it said last is still to be read.
                if let Some(message) = input.and_then(|input| sent(input, tty)) && sink.send(message).await.is_err() {
                    is_open = false;
                }
            }
            () = answers.closed() => break Ok(()),
        }
    };
    if let Err(status) = end {
        drop(answers.send(Err(status)).await);
    }
    // The node may be gone, which is as good.
    drop(sink.send(Message::Close(None)).await);
}

enum Received {
    Output(Output),
    Exit(i32),
    Nothing,
    Lost(String),
}

/// What the node says in JSON.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Said {
    SessionInfo {
        session_id: String,
        tty: bool,
    },
    Exit {
        exit_code: i32,
    },
    #[serde(other)]
    Other,
}

fn received(message: Option<Result<Message, tungstenite::Error>>, tty: &mut bool) -> Received {
    match message {
        Some(Ok(Message::Binary(data))) if *tty => Received::Output(Output::Stdout(data.into())),
        Some(Ok(Message::Binary(data))) => framed(&data),
        Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
            Ok(Said::SessionInfo { session_id, tty: is_tty }) => {
                *tty = is_tty;
                Received::Output(Output::Session(session_id))
            }
            Ok(Said::Exit { exit_code }) => Received::Exit(exit_code),
            Ok(Said::Other) | Err(_) => Received::Nothing,
        },
        Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Received::Nothing,
        Some(Ok(Message::Close(frame))) => Received::Lost(closed(frame.as_ref())),
        Some(Err(error)) => Received::Lost(format!("the connection to the sprite broke: {error}")),
        None => Received::Lost("the connection to the sprite ended".to_owned()),
    }
}

fn framed(data: &Bytes) -> Received {
    let payload = || data.get(1..).unwrap_or_default().to_vec();
    match data.first() {
        Some(&STDOUT) => Received::Output(Output::Stdout(payload())),
        Some(&STDERR) => Received::Output(Output::Stderr(payload())),
        Some(&EXIT) => Received::Exit(data.get(1).copied().unwrap_or_default().into()),
        Some(_) | None => Received::Nothing,
    }
}

fn closed(frame: Option<&CloseFrame>) -> String {
    match frame {
        Some(frame) if !frame.reason.is_empty() => format!("the session ended without an exit code: {}", frame.reason),
        Some(_) | None => "the session ended without an exit code; the sprite may have been stopped".to_owned(),
    }
}

fn sent(input: Input, tty: bool) -> Option<Message> {
    match input {
        Input::Stdin(data) if data.is_empty() => None,
        Input::Stdin(data) if tty => Some(Message::Binary(data.into())),
        Input::Stdin(data) => Some(Message::Binary([&[STDIN], data.as_slice()].concat().into())),
        // A terminal has no end but Ctrl-D.
        Input::StdinEof(is_eof) => (is_eof && !tty).then(|| Message::Binary(Bytes::from_static(&[STDIN_EOF]))),
        Input::Resize(size) => {
            Some(Message::Text(json!({ "type": "resize", "rows": size.rows, "cols": size.cols }).to_string().into()))
        }
        Input::Signal(signal) => Some(Message::Text(json!({ "type": "signal", "signal": signal }).to_string().into())),
        // There is one command to a stream.
        Input::Start(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_becomes_a_query_of_the_dialect() {
        let start = ExecStart {
            name: "demo".into(),
            argv: vec!["sh".into(), "-c".into(), "echo a&b=c +é".into()],
            dir: "/tmp".into(),
            env: [("A".to_owned(), "1=2".to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(
            target(&start).unwrap(),
            "/v1/sprites/-/exec?stdin=false&cmd=sh&cmd=%2Dc&cmd=echo%20a%26b%3Dc%20%2B%C3%A9&path=sh&env=A%3D1%3D2&dir=%2Ftmp"
        );
        let attach = ExecStart { session_id: "../7".into(), tty: true, rows: 50, cols: 132, ..Default::default() };
        assert_eq!(target(&attach).unwrap(), "/v1/sprites/-/exec/%2E%2E%2F7?stdin=true&tty=true&rows=50&cols=132");
        let long = ExecStart { argv: vec!["x".repeat(70_000)], ..Default::default() };
        assert!(target(&long).is_err());
    }

    #[test]
    fn frames_are_the_nodes() {
        let binary = |data: &'static [u8]| Some(Ok(Message::Binary(Bytes::from_static(data))));
        let mut tty = false;
        assert!(
            matches!(received(binary(b"\x01ab"), &mut tty), Received::Output(Output::Stdout(data)) if data == b"ab")
        );
        assert!(matches!(received(binary(b"\x02e"), &mut tty), Received::Output(Output::Stderr(data)) if data == b"e"));
        assert!(matches!(received(binary(b"\x03\x8f"), &mut tty), Received::Exit(143)));
        assert!(matches!(received(binary(b""), &mut tty), Received::Nothing));
        let text = |text: &str| Some(Ok(Message::Text(text.into())));
        assert!(matches!(received(text(r#"{"type":"keepalive"}"#), &mut tty), Received::Nothing));
        assert!(matches!(received(text(r#"{"type":"session_info","session_id":"9","tty":true,"cols":80}"#), &mut tty),
            Received::Output(Output::Session(id)) if id == "9"));
        assert!(tty);
        assert!(
            matches!(received(binary(b"\x01ab"), &mut tty), Received::Output(Output::Stdout(data)) if data == b"\x01ab")
        );
        assert!(matches!(received(text(r#"{"type":"exit","exit_code":3,"code":3}"#), &mut tty), Received::Exit(3)));
        assert!(matches!(received(None, &mut tty), Received::Lost(_)));
        assert_eq!(sent(Input::Stdin(b"x".to_vec()), false), Some(Message::Binary(Bytes::from_static(b"\x00x"))));
        assert_eq!(sent(Input::StdinEof(true), true), None);
    }
}
