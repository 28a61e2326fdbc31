//! Sleep, wake, restart, resize, sync, check.

use axum::{
    body::Body,
    http::{Method, StatusCode},
    response::Response,
};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Call, json_response, no_content, read_json};
use crate::{
    duration,
    refusal::Refusal,
    service::{Update, WakeTimers},
    view::{View, time, time_of_ms},
};

#[derive(Deserialize)]
struct SleepBody {
    to: Option<String>,
    cold: Option<bool>,
}

#[derive(Deserialize)]
struct ResizeBody {
    disk_bytes: Option<u64>,
}

#[derive(Deserialize)]
struct WakeTimersBody {
    at: Option<Vec<String>>,
    every: Option<String>,
}

pub(super) async fn sleep(call: &Call, body: Body, name: &str) -> Result<Response, Refusal> {
    let body: SleepBody = read_json(body).await?;
    let to = match (body.to, body.cold) {
        (Some(to), _) => to,
        (None, Some(true)) => "cold".to_owned(),
        (None, Some(false) | None) => "suspended".to_owned(),
    };
    let (view, reply) = call.service.sleep(call.org(), name, &to).await?;
    let body = json!({
        "sprite": view.to_json(),
        "frozen_ms": reply.frozen_ms,
        "local_ms": reply.local_ms,
        "bucket_ms": reply.bucket_ms,
        "woken": reply.woken,
    });
    Ok(json_response(StatusCode::OK, &body))
}

/// Wakes it now; with `at` or `every` it sets those timers instead, and leaves the others.
pub(super) async fn wake(call: &Call, body: Body, name: &str) -> Result<Response, Refusal> {
    let body: WakeTimersBody = read_json(body).await?;
    if body.at.is_some() || body.every.is_some() {
        let view = put_timers(call, name, &body, Replace::Named).await?;
        return Ok(json_response(StatusCode::OK, &json!({ "sprite": view.to_json() })));
    }
    let (view, reply) = call.service.wake(call.org(), name).await?;
    let body = json!({
        "sprite": view.to_json(),
        "was": reply.was,
        "resumed": reply.resumed,
        "reason": reply.reason,
        "took_ms": reply.took_ms,
    });
    Ok(json_response(StatusCode::OK, &body))
}

pub(super) async fn wake_timers(call: &Call, name: &str) -> Result<Response, Refusal> {
    let view = call.service.get(call.org(), name).await?;
    Ok(json_response(StatusCode::OK, &timers_json(&view)))
}

/// PUT replaces both; POST changes what it names.
pub(super) async fn set_wake_timers(call: &Call, body: Body, name: &str) -> Result<Response, Refusal> {
    let body: WakeTimersBody = read_json(body).await?;
    let replace = if call.parts.method == Method::PUT { Replace::Both } else { Replace::Named };
    let view = put_timers(call, name, &body, replace).await?;
    Ok(json_response(StatusCode::OK, &timers_json(&view)))
}

enum Replace {
    Both,
    Named,
}

async fn put_timers(call: &Call, name: &str, body: &WakeTimersBody, replace: Replace) -> Result<View, Refusal> {
    let mut wake = WakeTimers::parse(body.at.as_deref(), body.every.as_deref(), Timestamp::now())?;
    if let Replace::Both = replace {
        wake.at.get_or_insert_default();
        wake.every_ms.get_or_insert_default();
    }
    call.service.update(call.org(), name, Update { wake, ..Update::default() }).await
}

pub(super) async fn clear_wake_timers(call: &Call, name: &str) -> Result<Response, Refusal> {
    let update = Update { wake: WakeTimers::NONE, ..Update::default() };
    call.service.update(call.org(), name, update).await?;
    Ok(no_content())
}

fn timers_json(view: &View) -> Value {
    let at: Vec<String> = view.record.wake_at.iter().copied().map(time).collect();
    json!({ "at": at, "every": view.record.wake_every_ms.map(duration::format_ms) })
}

pub(super) async fn resize(call: &Call, body: Body, name: &str) -> Result<Response, Refusal> {
    let body: ResizeBody = read_json(body).await?;
    let disk_bytes = body.disk_bytes.ok_or_else(|| Refusal::Invalid("disk_bytes is required".to_owned()))?;
    let view = call.service.resize(call.org(), name, disk_bytes).await?;
    Ok(json_response(StatusCode::OK, &view.to_json()))
}

pub(super) async fn sync(call: &Call, name: &str) -> Result<Response, Refusal> {
    let reached = call.service.sync(call.org(), name).await?;
    let body = json!({
        "watermark_at": time_of_ms(reached.watermark_unix_ms),
        "generation": reached.generation,
        "took_ms": reached.took_ms,
    });
    Ok(json_response(StatusCode::OK, &body))
}

pub(super) async fn restart(call: &Call, name: &str) -> Result<Response, Refusal> {
    let record = call.service.restart(call.org(), name).await?;
    let body = json!({
        "sprite_name": record.name,
        "machine_id": record.id.public(),
        "message": format!("{} was restarted", record.name),
    });
    Ok(json_response(StatusCode::OK, &body))
}

/// Sprites take over a new runtime by themselves, so there is nothing to do.
pub(super) async fn upgrade(call: &Call, name: &str) -> Result<Response, Refusal> {
    let view = call.service.get(call.org(), name).await?;
    let body = json!({ "name": view.record.name, "status": "upgraded", "version": proto::VERSION });
    Ok(json_response(StatusCode::OK, &body))
}

/// Does not wake it.
pub(super) async fn check(call: &Call, name: &str) -> Result<Response, Refusal> {
    let begun = Instant::now();
    let view = call.service.get(call.org(), name).await?;
    let (status, reason) = match &view.status {
        None => ("error", Some("its host does not answer".to_owned())),
        Some(status) => match status.state.as_str() {
            "running" | "restoring" => ("healthy", None),
            "paused" | "suspended" | "cold" => ("hibernated", Some(status.reason.clone())),
            _ => ("unhealthy", Some(status.reason.clone())),
        },
    };
    let body = json!({
        "sprite_name": view.record.name,
        "sprite_id": view.record.id.public(),
        "status": status,
        "reason": reason.filter(|reason| !reason.is_empty()),
        "checked_at": time(Timestamp::now()),
        "elapsed": u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    });
    Ok(json_response(StatusCode::OK, &body))
}
