//! The list of sessions, and ending one.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use futures_util::{StreamExt as _, stream};
use proto::agent::{KillEvent, KillSessionRequest, Session};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Call, answer, query::go_duration, refusal::Refusal, say_wake};
use crate::agent::CallError;

/// The body of a kill is a signal and a number.
const KILL_BODY_BYTES_MAX: usize = 64 << 10;
const KILL_SIGNAL: &str = "SIGTERM";
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn list(call: Call) -> Result<Response, Refusal> {
    let awake = call.wake().await?;
    let sessions = answer(awake.agent.list_sessions(), None).await?;
    let shown: Vec<Value> = sessions.iter().map(show).collect();
    let mut response = Response::new(Body::from(json!({ "count": shown.len(), "sessions": shown }).to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    say_wake(response.headers_mut(), awake.was);
    Ok(response)
}

fn show(session: &Session) -> Value {
    json!({
        "id": session.id,
        "command": session.command,
        "workdir": session.workdir,
        "created": time(session.created_unix_ms),
        "bytes_per_second": session.bytes_per_second,
        "is_active": session.is_active,
        "last_activity": (session.last_activity_unix_ms > 0).then(|| time(session.last_activity_unix_ms)),
        "tty": session.tty,
    })
}

/// RFC 3339 with exactly three digits of fraction: one client refuses any number but 0, 3 and 6.
fn time(unix_ms: u64) -> String {
    let time =
        i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// What a client may say in the body instead of in the query.
#[derive(Debug, Default, Deserialize)]
struct KillBody {
    signal: Option<String>,
    timeout: Option<Value>,
}

pub(super) async fn kill(call: Call, session_id: String) -> Result<Response, Refusal> {
    let query = call.query();
    let awake = call.wake().await?;
    let body = axum::body::to_bytes(call.body, KILL_BODY_BYTES_MAX)
        .await
        .map_err(|error| Refusal::bad_request(error.to_string()))?;
    let body: KillBody = if body.is_empty() {
        KillBody::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| Refusal::bad_request(format!("the body is not JSON: {error}")))?
    };
    let signal = query.get("signal").map(str::to_owned).or(body.signal).unwrap_or_else(|| KILL_SIGNAL.into());
    let timeout = match (query.get("timeout"), &body.timeout) {
        (Some(text), _) => go_duration(text),
        (None, Some(Value::String(text))) => go_duration(text),
        (None, Some(Value::Number(seconds))) => go_duration(&seconds.to_string()),
        (None, None | Some(Value::Null)) => Some(KILL_TIMEOUT),
        (None, Some(_)) => None,
    };
    let timeout = timeout.ok_or_else(|| Refusal::bad_request("timeout is not a duration such as 10s"))?;
    let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    let request = KillSessionRequest { session_id: session_id.clone(), signal, timeout_ms };
    let mut events = answer(awake.agent.kill_session(request), Some(&session_id)).await?;
    // An unknown session may be noticed only now.
    let first =
        async { events.message().await.map_err(|source| CallError { call: "KillSession", source: Box::new(source) }) };
    let first = answer(first, Some(&session_id)).await?;
    let was = awake.was;
    let rest = stream::unfold((events, awake), |(mut events, awake)| async move {
        let event = match events.message().await {
            Ok(event) => event?,
            Err(status) => {
                KillEvent { r#type: "error".into(), message: status.message().to_owned(), ..KillEvent::default() }
            }
        };
        Some((event, (events, awake)))
    });
    let lines =
        stream::iter(first).chain(rest).map(|event| Ok::<_, std::convert::Infallible>(format!("{}\n", line(&event))));
    let mut response = Response::new(Body::from_stream(lines));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    say_wake(response.headers_mut(), was);
    Ok(response)
}

fn line(event: &KillEvent) -> Value {
    let mut line = json!({ "type": event.r#type });
    if !event.message.is_empty() {
        line["message"] = json!(event.message);
    }
    if !event.signal.is_empty() {
        line["signal"] = json!(event.signal);
    }
    if event.pid != 0 {
        line["pid"] = json!(event.pid);
    }
    if let Some(code) = event.exit_code {
        line["exit_code"] = json!(code);
    }
    line
}
