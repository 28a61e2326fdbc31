//! The control socket: commands one after the other over one WebSocket.
//!
//! Clients keep such sockets open in pools, so an idle one does not keep the sprite awake: each operation wakes it and holds it for itself.

use axum::{
    extract::ws::Message,
    http::{StatusCode, header},
    response::Response,
};
use futures_util::StreamExt as _;
use proto::agent::{ExecAttach, exec_input::Input as First};
use serde_json::{Value, json};

use super::{
    Call, Wake,
    exec::close_reason,
    frames::{self, Dialect},
    query::Query,
    refusal::Refusal,
    session::{Ended, Session},
    websocket::{self, Gone, Input, NORMAL, Output, RESTARTED},
};
use proto::id::SpriteId;

const PREFIX: &str = "control:";
/// This client's control mode loses its own answers; refused, it uses direct sockets.
const REFUSED_AGENT: &str = "sprites-go-sdk/";

pub(super) async fn open(mut call: Call) -> Result<Response, Refusal> {
    let agent = call.parts.headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default();
    if agent.starts_with(REFUSED_AGENT) {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "not found",
            "no control socket for this client; use direct sockets",
        ));
    }
    let upgrade = websocket::handshake(&mut call).await?;
    // 101 says that operations can begin.
    drop(call.wake().await?);
    let (wake, id) = (call.wake, call.id);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let (mut output, mut input) = websocket::split(socket);
        let (code, reason) = serve(&wake, id, &mut output, &mut input).await;
        websocket::close(output, input, code, &reason).await;
    }))
}

/// Runs operations until the client leaves or the guest does. Returns how to close.
async fn serve(wake: &Wake, id: SpriteId, output: &mut Output, input: &mut Input) -> (u16, String) {
    loop {
        let message = tokio::select! {
            message = input.next() => message,
            () = tokio::time::sleep_until(output.keepalive_due()) => match keep_open(output).await {
                Ok(()) => continue,
                Err(Gone) => return (NORMAL, String::new()),
            },
        };
        let text = match message {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Close(_)) | Err(_)) | None => return (NORMAL, String::new()),
            // Input that came after its command had ended.
            Some(Ok(_)) => continue,
        };
        let Some(first) = operation(&text) else { continue };
        let ended = match first {
            Ok(first) => run(wake, id, first, output, input).await,
            Err(reason) => Err(reason),
        };
        let told = match ended {
            Ok(Ended::Exit(code)) => say(output, &json!({ "type": "op.complete", "args": { "exitCode": code } })).await,
            Ok(Ended::Disconnected) => return (NORMAL, String::new()),
            Ok(Ended::Lost(reason)) => {
                drop(say(output, &json!({ "type": "op.error", "args": { "error": reason } })).await);
                return (RESTARTED, close_reason(&reason));
            }
            Err(reason) => say(output, &json!({ "type": "op.error", "args": { "error": reason } })).await,
        };
        if let Err(Gone) = told {
            return (NORMAL, String::new());
        }
    }
}

/// Between operations only a ping: clients do not expect messages then.
async fn keep_open(output: &mut Output) -> Result<(), Gone> {
    output.ping().await?;
    output.reset_silence();
    Ok(())
}

async fn say(output: &mut Output, value: &Value) -> Result<(), Gone> {
    output.text(format!("{PREFIX}{value}")).await
}

async fn run(wake: &Wake, id: SpriteId, first: First, output: &mut Output, input: &mut Input) -> Result<Ended, String> {
    let awake = wake.up(id).await.map_err(|refusal| refusal.to_string())?;
    let mut session = Session::open(&awake.agent, first).await.map_err(|refusal| refusal.to_string())?;
    if let Err(Gone) = output.json(&frames::session_info(&session.info)).await {
        return Ok(Ended::Disconnected);
    }
    let ended = session.join(output, input, Dialect::Control).await;
    if let Ended::Exit(code) = ended {
        let told = if session.info.tty {
            output.json(&frames::exit_text(code)).await
        } else {
            output.binary(frames::exit(code)).await
        };
        if let Err(Gone) = told {
            return Ok(Ended::Disconnected);
        }
    }
    Ok(ended)
}

/// The operation a text asks for; `None` for what is not a request to begin one.
fn operation(text: &str) -> Option<Result<First, String>> {
    let said: Value = serde_json::from_str(text.strip_prefix(PREFIX)?).ok()?;
    if said["type"] != "op.start" {
        return None;
    }
    if said["op"] != "exec" {
        return Some(Err(format!("unknown operation {}", said["op"])));
    }
    let mut query = Query::default();
    for (key, value) in said["args"].as_object().into_iter().flatten() {
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        for value in values {
            query.push(key, value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
    }
    Some(match query.get("id") {
        Some(session_id) => {
            Ok(First::Attach(ExecAttach { session_id: session_id.to_owned(), size: query.terminal_size() }))
        }
        None => query.exec_start().map(First::Start),
    })
}
