//! Checkpoints.

use axum::{body::Body, http::StatusCode, response::Response};
use futures_util::{Stream, StreamExt as _};
use jiff::Timestamp;
use proto::{
    paths::CURRENT_CHECKPOINT,
    public::{Checkpoint, CheckpointEvent},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Call, json_response, ndjson, no_content, read_json};
use crate::{
    refusal::Refusal,
    service::CheckpointEvents,
    view::{time, time_of_ms},
};

#[derive(Deserialize)]
struct CreateBody {
    comment: Option<String>,
    durable: Option<bool>,
}

pub(super) async fn create(call: &Call, body: Body, name: &str) -> Result<Response, Refusal> {
    let body: CreateBody = read_json(body).await?;
    let (comment, durable) = (body.comment.unwrap_or_default(), body.durable.unwrap_or_default());
    let events = call.service.create_checkpoint(call.org(), name, comment, durable).await?;
    Ok(ndjson::response(lines(events)))
}

pub(super) async fn restore(call: &Call, name: &str, id: &str) -> Result<Response, Refusal> {
    let events = call.service.restore(call.org(), name, id).await?;
    Ok(ndjson::response(lines(events)))
}

pub(super) async fn list(call: &Call, name: &str) -> Result<Response, Refusal> {
    let checkpoints = call.service.checkpoints(call.org(), name).await?;
    let all: Vec<Value> = std::iter::once(current(&checkpoints)).chain(checkpoints.iter().map(object)).collect();
    Ok(json_response(StatusCode::OK, &Value::Array(all)))
}

pub(super) async fn get(call: &Call, name: &str, id: &str) -> Result<Response, Refusal> {
    let checkpoints = call.service.checkpoints(call.org(), name).await?;
    let found = match checkpoints.iter().find(|checkpoint| checkpoint.id == id) {
        Some(checkpoint) => object(checkpoint),
        None if id == CURRENT_CHECKPOINT => current(&checkpoints),
        None => return Err(Refusal::CheckpointNotFound { id: id.to_owned() }),
    };
    Ok(json_response(StatusCode::OK, &found))
}

pub(super) async fn delete(call: &Call, name: &str, id: &str) -> Result<Response, Refusal> {
    call.service.delete_checkpoint(call.org(), name, id).await?;
    Ok(no_content())
}

fn object(checkpoint: &Checkpoint) -> Value {
    let mut object = json!({
        "id": checkpoint.id,
        // Clients need a time, always.
        "create_time": time_of_ms(checkpoint.create_unix_ms).unwrap_or_else(|| time(Timestamp::UNIX_EPOCH)),
        "comment": checkpoint.comment,
        // Nothing makes checkpoints by itself; clients expect the field.
        "is_auto": false,
        "health": "",
        "durable": checkpoint.durable,
        "lost": checkpoint.lost,
        "consistency": checkpoint.consistency,
        "is_current_base": checkpoint.is_current_base,
    });
    if !checkpoint.source_id.is_empty() {
        object["source_id"] = checkpoint.source_id.as_str().into();
    }
    object
}

fn current(checkpoints: &[Checkpoint]) -> Value {
    let mut object =
        json!({ "id": CURRENT_CHECKPOINT, "create_time": time(Timestamp::now()), "is_auto": false, "health": "" });
    if let Some(base) = checkpoints.iter().find(|checkpoint| checkpoint.is_current_base) {
        object["source_id"] = base.id.as_str().into();
    }
    object
}

/// The dialect's stream events; an error is the last line.
fn lines(events: CheckpointEvents) -> impl Stream<Item = Value> + Send {
    events.map(|event| match event {
        Ok(event) => line(&event),
        Err(refusal) => {
            let body = refusal.to_json();
            json!({ "type": "error", "error": body["message"], "time": time(Timestamp::now()) })
        }
    })
}

fn line(event: &CheckpointEvent) -> Value {
    let mut line = json!({ "type": event.kind, "data": event.data, "time": time(Timestamp::now()) });
    match event.kind.as_str() {
        "error" => line["error"] = event.data.as_str().into(),
        "complete" => {
            line["pause_us"] = event.pause_us.into();
            line["returned_ms"] = event.returned_ms.into();
            line["durable_ms"] = event.durable_ms.into();
            if let Some(checkpoint) = &event.checkpoint {
                line["checkpoint"] = object(checkpoint);
            }
        }
        _ => {}
    }
    line
}
