//! What programs inside a sprite ask of the host (`sprite-env`), and what the guest reports of itself.
//!
//! One task per living VM reads the agent's event stream. Nothing inside is trusted: a request can only concern the sprite it comes from.

use std::sync::Arc;

use blockstore::store::{CheckpointError, Volume};
use proto::{
    agent::{AnswerRequest, HostRequest, guest_event},
    id::SpriteId,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::{
    agent::AgentClient,
    barrier, checkpoint,
    resources::Resources,
    vm::{
        change::chain,
        task::{Command, OrderError},
    },
};

/// Requests of one guest that are worked on at a time; further ones wait.
const REQUESTS_MAX: usize = 8;

/// Serves one VM until its control channel ends.
pub(crate) async fn serve(
    resources: &Arc<Resources>,
    sprite: SpriteId,
    agent: AgentClient,
    owner: &mpsc::Sender<Command>,
) {
    let mut events = match agent.watch().await {
        Ok(events) => events,
        Err(error) => {
            tracing::debug!(%sprite, error = chain(&error), "no events from the guest");
            return;
        }
    };
    let permits = Arc::new(Semaphore::new(REQUESTS_MAX));
    loop {
        let event = match events.message().await {
            Ok(Some(event)) => event,
            Ok(None) | Err(_) => return,
        };
        match event.event {
            Some(guest_event::Event::Request(request)) => {
                let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
                let (resources, agent, owner) = (Arc::clone(resources), agent.clone(), owner.clone());
                tokio::spawn(async move {
                    answer(&resources, sprite, &agent, &owner, request).await;
                    drop(permit);
                });
            }
            Some(_) if owner.send(Command::Guest(Box::new(event))).await.is_err() => return,
            Some(_) | None => {}
        }
    }
}

/// A status, a content type and the whole body.
struct Reply {
    status: u32,
    content_type: &'static str,
    body: Vec<u8>,
}

impl Reply {
    fn json(status: u32, value: &Value) -> Self {
        Self { status, content_type: "application/json", body: value.to_string().into_bytes() }
    }

    fn error(status: u32, message: impl Into<String>) -> Self {
        Self::json(status, &json!({ "error": message.into() }))
    }

    fn lines(events: impl IntoIterator<Item = Value>) -> Self {
        let mut body = String::new();
        for event in events {
            body.push_str(&event.to_string());
            body.push('\n');
        }
        Self { status: 200, content_type: "application/x-ndjson", body: body.into_bytes() }
    }
}

async fn answer(
    resources: &Resources,
    sprite: SpriteId,
    agent: &AgentClient,
    owner: &mpsc::Sender<Command>,
    request: HostRequest,
) {
    let id = request.id;
    let Some(volume) = resources.store.volume(sprite) else {
        return send(agent, id, Reply::error(503, "the disk is not on this host at the moment; try again")).await;
    };
    let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
    let reply = match (request.method.as_str(), parts.as_slice()) {
        ("GET", ["v1", "checkpoints"]) => list(&volume).await,
        ("GET", ["v1", "checkpoints", id]) => get(&volume, id).await,
        ("POST", ["v1", "sync"]) => sync(agent, &volume).await,
        ("POST", ["v1", "checkpoint"]) => create(agent, &volume, &request.body).await,
        ("POST", ["v1", "checkpoints", checkpoint, "restore"]) => {
            // The answer has to leave before the environment that asked for it ends.
            let accepted = known(&volume, checkpoint).await;
            if accepted {
                let text = format!("Restoring to checkpoint {checkpoint}; all sessions end now");
                send(
                    agent,
                    id,
                    Reply::lines([
                        json!({ "type": "info", "data": text }),
                        json!({ "type": "complete", "data": text }),
                    ]),
                )
                .await;
                restore(owner, (*checkpoint).to_owned()).await;
                return;
            }
            Reply::error(404, format!("checkpoint not found: {checkpoint}"))
        }
        _ => Reply::error(404, format!("not found: {} {}", request.method, request.path)),
    };
    send(agent, id, reply).await;
}

async fn send(agent: &AgentClient, id: u64, reply: Reply) {
    let answer = AnswerRequest {
        id,
        status: reply.status,
        content_type: reply.content_type.to_owned(),
        data: reply.body,
        done: true,
    };
    if let Err(error) = agent.answer(answer).await {
        tracing::debug!(error = chain(&error), "the guest does not take an answer");
    }
}

async fn known(volume: &Volume, checkpoint: &str) -> bool {
    volume.checkpoints().await.iter().any(|known| known.id == checkpoint)
}

async fn restore(owner: &mpsc::Sender<Command>, checkpoint: String) {
    let (reply, done) = oneshot::channel();
    if owner.send(Command::Restore { checkpoint: checkpoint.clone(), reply }).await.is_err() {
        return;
    }
    if let Ok(Err(OrderError::Failed(reason))) = done.await {
        tracing::warn!(checkpoint, reason, "a restore asked for inside failed");
    }
}

async fn create(agent: &AgentClient, volume: &Volume, body: &[u8]) -> Reply {
    #[derive(Deserialize, Default)]
    struct Request {
        #[serde(default)]
        comment: String,
    }
    let request: Request = match body {
        [] => Request::default(),
        body => match serde_json::from_slice(body) {
            Ok(request) => request,
            Err(error) => return Reply::error(400, format!("the body is not {{\"comment\": text}}: {error}")),
        },
    };
    match checkpoint::take(agent, volume, request.comment, false).await {
        Ok(taken) => Reply::lines(checkpoint::events(&taken).iter().map(|event| {
            json!({ "type": event.kind, "data": event.data, "time": jiff::Timestamp::now().round(jiff::Unit::Second).unwrap_or_default().to_string() })
        })),
        Err(error @ (CheckpointError::CommentTooLong { .. } | CheckpointError::TooMany { .. })) => {
            Reply::error(422, error.to_string())
        }
        Err(error) => Reply::error(500, format!("cannot take a checkpoint: {}", chain(&error))),
    }
}

async fn sync(agent: &AgentClient, volume: &Volume) -> Reply {
    match barrier::of_running(agent, volume).await {
        Ok(reached) => Reply::json(
            200,
            &json!({ "watermark_at": time(reached.watermark_unix_ms), "generation": reached.generation }),
        ),
        Err(error) => Reply::error(503, chain(&error)),
    }
}

fn time(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.unwrap_or_default().to_string()
}

fn shown(checkpoint: &blockstore::store::Checkpoint) -> Value {
    json!({
        "id": checkpoint.id,
        "create_time": time(checkpoint.created_unix_ms),
        "comment": checkpoint.comment,
        "durable": checkpoint.durable,
        "is_auto": checkpoint.is_auto,
    })
}

async fn list(volume: &Volume) -> Reply {
    let all = volume.checkpoints().await;
    Reply::json(200, &Value::Array(all.iter().map(shown).collect()))
}

async fn get(volume: &Volume, id: &str) -> Reply {
    match volume.checkpoints().await.iter().find(|checkpoint| checkpoint.id == id) {
        Some(checkpoint) => Reply::json(200, &shown(checkpoint)),
        None => Reply::error(404, format!("checkpoint not found: {id}")),
    }
}
