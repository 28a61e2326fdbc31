//! `exec` without a WebSocket: the request's body is stdin, each chunk of the answer is one frame.
//!
//! Chunks have no length of their own in this protocol, so every frame must stay one chunk: no compression, no buffering, HTTP/1.1.

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use proto::agent::{ExecInput, exec_input, exec_output::Output as Guest};
use tokio::sync::mpsc;

use super::{Awake, Call, frames, refusal::Refusal, say_wake, session::Session};

/// Runs a command and streams what it prints.
pub(super) async fn run(call: Call) -> Result<Response, Refusal> {
    let mut start = call.query().exec_start().map_err(Refusal::bad_request)?;
    start.tty = false;
    start.size = None;
    let stdin = start.stdin;
    let awake = call.wake().await?;
    let started = Session::open(&awake.agent, exec_input::Input::Start(start)).await;
    let session = started.map_err(|refusal| awake.explain(refusal))?;
    let input = session.input.clone();
    if stdin {
        tokio::spawn(send_body(call.body, input.clone()));
    }
    let was = awake.was;
    let mut response = Response::new(Body::from_stream(frames(session, awake)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    say_wake(headers, was);
    Ok(response)
}

/// Ends with the body, or when the command takes no more.
async fn send_body(body: Body, guest: mpsc::Sender<ExecInput>) {
    let mut data = body.into_data_stream();
    while let Some(Ok(data)) = data.next().await {
        for piece in frames::pieces(data) {
            if guest.send(ExecInput { input: Some(exec_input::Input::Stdin(piece)) }).await.is_err() {
                return;
            }
        }
    }
    drop(guest.send(ExecInput { input: Some(exec_input::Input::StdinEof(true)) }).await);
}

/// Frames until the exit. Breaks off with an error if the guest goes away, so that the client does not take a part for the whole.
fn frames(session: Session, awake: Awake) -> impl Stream<Item = Result<Bytes, tonic::Status>> + Send {
    stream::unfold(Some((session, awake)), |state| async move {
        let (mut session, awake) = state?;
        loop {
            match session.output.message().await {
                Ok(Some(message)) => match message.output {
                    Some(Guest::Stdout(data)) => {
                        return Some((Ok(frames::output(frames::Output::Stdout, &data)), Some((session, awake))));
                    }
                    Some(Guest::Stderr(data)) => {
                        return Some((Ok(frames::output(frames::Output::Stderr, &data)), Some((session, awake))));
                    }
                    Some(Guest::Exit(code)) => return Some((Ok(frames::exit(code)), None)),
                    Some(Guest::Info(_) | Guest::Port(_)) | None => {}
                },
                Ok(None) => return Some((Err(tonic::Status::unavailable("the sprite was stopped")), None)),
                Err(status) => return Some((Err(status), None)),
            }
        }
    })
}
