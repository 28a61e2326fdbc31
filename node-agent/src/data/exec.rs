//! `exec` over a WebSocket: a new command, or a session again.

use axum::{
    http::{HeaderName, HeaderValue},
    response::Response,
};
use proto::agent::{ExecAttach, exec_input::Input as First};

use super::{
    Call,
    frames::{self, Dialect},
    refusal::Refusal,
    say_wake,
    session::{Ended, Session},
    websocket::{self, FAILED, NORMAL, Output, RESTARTED},
};

const CAPABILITIES_HEADER: HeaderName = HeaderName::from_static("x-sprite-capabilities");
/// Signals are taken as text frames.
const CAPABILITIES: HeaderValue = HeaderValue::from_static("signal");

/// Starts a command; with `id` (or `session_id`) in the query, the older way to attach.
pub(super) async fn create(call: Call) -> Result<Response, Refusal> {
    let query = call.query();
    if let Some(session) = query.get("id").or_else(|| query.get("session_id")) {
        let session = session.to_owned();
        return attach(call, session).await;
    }
    let start = query.exec_start().map_err(Refusal::bad_request)?;
    open(call, First::Start(start)).await
}

/// Attaches to a session.
pub(super) async fn attach(call: Call, session_id: String) -> Result<Response, Refusal> {
    let size = call.query().terminal_size();
    open(call, First::Attach(ExecAttach { session_id, size })).await
}

async fn open(mut call: Call, first: First) -> Result<Response, Refusal> {
    let upgrade = websocket::handshake(&mut call).await?;
    let awake = call.wake().await?;
    let mut session = Session::open(&awake.agent, first).await.map_err(|refusal| awake.explain(refusal))?;
    let was = awake.was;
    let mut response = upgrade.on_upgrade(move |socket| async move {
        let (mut output, mut input) = websocket::split(socket);
        let ended = match output.json(&frames::session_info(&session.info)).await {
            Ok(()) => session.join(&mut output, &mut input, Dialect::Direct).await,
            Err(_gone) => Ended::Disconnected,
        };
        let (code, reason) = finish(&mut output, &ended, session.info.tty).await;
        drop(session);
        websocket::close(output, input, code, &reason).await;
        // The sprite was in use until here.
        drop(awake);
    });
    response.headers_mut().insert(CAPABILITIES_HEADER, CAPABILITIES);
    say_wake(response.headers_mut(), was);
    Ok(response)
}

/// The last frames of a session. Returns how to close. Which client needs which of them: sprites-api.md §5.4.
async fn finish(output: &mut Output, ended: &Ended, tty: bool) -> (u16, String) {
    match ended {
        Ended::Exit(code) => {
            // A client that has gone meanwhile misses nothing it waits for.
            if !tty {
                drop(output.binary(frames::exit(*code)).await);
            }
            drop(output.json(&frames::exit_text(*code)).await);
            (if tty && *code != 0 { FAILED } else { NORMAL }, String::new())
        }
        Ended::Disconnected => (NORMAL, String::new()),
        Ended::Lost(reason) => (RESTARTED, close_reason(reason)),
    }
}

/// A Close frame carries at most 123 bytes of reason.
pub(super) fn close_reason(reason: &str) -> String {
    const REASON_BYTES_MAX: usize = 123;
    let end = (0..=reason.len().min(REASON_BYTES_MAX)).rev().find(|end| reason.is_char_boundary(*end));
    reason[..end.unwrap_or(0)].to_owned()
}
