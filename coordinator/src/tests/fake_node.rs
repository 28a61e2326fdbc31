//! A node agent without VMs: it keeps the contract of the `Node` service (ids, the record, states), and fails on demand.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use axum::{
    extract::{WebSocketUpgrade, ws},
    response::Response as HttpResponse,
};
use blockstore::bucket::Bucket;
use futures_util::{Stream, StreamExt as _};
use proto::{
    id::SpriteId,
    node::{node_server::Node, *},
    public::{Checkpoint, CheckpointEvent},
    record::SpriteRecord,
};
use tokio::sync::broadcast;
use tonic::{Request, Response, Status};

use crate::index::record_key;

#[derive(Debug)]
pub(super) struct FakeNode {
    bucket: Bucket,
    pub(super) sprites: Mutex<HashMap<SpriteId, SpriteStatus>>,
    checkpoints: Mutex<HashMap<SpriteId, Vec<Checkpoint>>>,
    events: broadcast::Sender<RouteEvent>,
    /// Creates are refused for lack of room while this is above zero; each takes one away.
    pub(super) full: AtomicU64,
    pub(super) destroy_fails: AtomicBool,
    /// The answer to a create is lost, after it was done.
    pub(super) answer_lost: AtomicBool,
    pub(super) reloads: AtomicU64,
    clock_ms: AtomicU64,
}

impl FakeNode {
    pub(super) fn new(bucket: Bucket) -> Arc<Self> {
        let (events, _) = broadcast::channel(1024);
        Arc::new(Self {
            bucket,
            sprites: Mutex::default(),
            checkpoints: Mutex::default(),
            events,
            full: AtomicU64::new(0),
            destroy_fails: AtomicBool::new(false),
            answer_lost: AtomicBool::new(false),
            reloads: AtomicU64::new(0),
            clock_ms: AtomicU64::new(1_700_000_000_000),
        })
    }

    pub(super) fn ids(&self) -> Vec<SpriteId> {
        self.sprites.lock().unwrap().keys().copied().collect()
    }

    fn set(&self, id: SpriteId, state: &str, reason: &str) -> SpriteStatus {
        let since_unix_ms = self.clock_ms.fetch_add(1, Ordering::Relaxed);
        let status = SpriteStatus {
            sprite_id: id.to_string(),
            state: state.to_owned(),
            reason: reason.to_owned(),
            since_unix_ms,
            last_active_unix_ms: since_unix_ms,
            ..Default::default()
        };
        self.sprites.lock().unwrap().insert(id, status.clone());
        drop(self.events.send(RouteEvent { event: Some(route_event::Event::Sprite(status.clone())) }));
        status
    }

    fn find(&self, id: &str) -> Result<(SpriteId, SpriteStatus), Status> {
        let id: SpriteId = id.parse().map_err(|_malformed| Status::invalid_argument("no id"))?;
        let status = self.sprites.lock().unwrap().get(&id).cloned();
        status.map(|status| (id, status)).ok_or_else(|| proto::not_here(id))
    }
}

/// Serves it; what names a sprite in a header is the data plane: an exec that echoes.
pub(super) struct Served(pub(super) Arc<FakeNode>);

pub(super) async fn echo(upgrade: WebSocketUpgrade, uri: axum::http::Uri) -> HttpResponse {
    if uri.query().is_some_and(|query| query.contains("cmd=refuse")) {
        let body = r#"{"error":"session not found: 9","message":"it has ended"}"#;
        return HttpResponse::builder().status(404).body(body.into()).unwrap();
    }
    upgrade.on_upgrade(|mut socket| async move {
        let info = r#"{"type":"session_info","session_id":"7","command":"cat","created":1,"cols":80,"rows":24,"is_owner":true,"tty":false}"#;
        socket.send(ws::Message::Text(info.into())).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            let ws::Message::Binary(data) = message else { continue };
            match data.first() {
                Some(0) => {
                    let echoed = [&[1], &data[1..]].concat();
                    socket.send(ws::Message::Binary(echoed.into())).await.unwrap();
                }
                _ => break,
            }
        }
        socket.send(ws::Message::Binary(vec![2, b'e'].into())).await.unwrap();
        socket.send(ws::Message::Binary(vec![3, 42].into())).await.unwrap();
        drop(socket.send(ws::Message::Close(None)).await);
    })
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Node for Served {
    type CreateCheckpointStream = Events<CheckpointEvent>;
    type RestoreCheckpointStream = Events<CheckpointEvent>;
    type WatchRoutesStream = Events<RouteEvent>;

    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<CreateReply>, Status> {
        let mut record: SpriteRecord = serde_json::from_slice(&request.get_ref().rec).unwrap();
        let less = |full: u64| full.checked_sub(1);
        if self.0.full.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            return Err(Status::resource_exhausted("this host has no room for another sprite"));
        }
        record.id = SpriteId::generate();
        let id = record.id;
        self.0
            .bucket
            .create_record(&record_key(id), record)
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        self.0.set(id, "running", "created");
        if self.0.answer_lost.load(Ordering::Relaxed) {
            return Err(Status::unavailable("the connection broke"));
        }
        Ok(Response::new(CreateReply { sprite_id: id.to_string(), from: "pool".into(), took_ms: 1 }))
    }

    async fn wake(&self, request: Request<WakeRequest>) -> Result<Response<WakeReply>, Status> {
        let (id, before) = self.0.find(&request.get_ref().sprite_id)?;
        let status = Some(self.0.set(id, "running", "woken"));
        let resumed = if before.state == "suspended" { "memory" } else { "none" }.to_owned();
        Ok(Response::new(WakeReply { status, was: before.state, took_ms: 2, resumed, reason: String::new() }))
    }

    async fn sleep(&self, request: Request<SleepRequest>) -> Result<Response<SleepReply>, Status> {
        let (id, _) = self.0.find(&request.get_ref().sprite_id)?;
        let to = request.into_inner().to;
        let status = Some(self.0.set(id, if to.is_empty() { "suspended" } else { &to }, "asked to sleep"));
        Ok(Response::new(SleepReply { status, frozen_ms: 1, local_ms: 2, bucket_ms: 3, woken: false }))
    }

    async fn destroy(&self, request: Request<DestroyRequest>) -> Result<Response<DestroyReply>, Status> {
        if self.0.destroy_fails.load(Ordering::Relaxed) {
            return Err(Status::unavailable("the bucket is away"));
        }
        let id: SpriteId = request.get_ref().sprite_id.parse().unwrap();
        self.0.sprites.lock().unwrap().remove(&id);
        drop(self.0.events.send(RouteEvent { event: Some(route_event::Event::Gone(id.to_string())) }));
        Ok(Response::new(DestroyReply {}))
    }

    async fn restart(&self, request: Request<RestartRequest>) -> Result<Response<RestartReply>, Status> {
        self.0.find(&request.get_ref().sprite_id)?;
        Ok(Response::new(RestartReply {}))
    }

    async fn reload(&self, request: Request<ReloadRequest>) -> Result<Response<ReloadReply>, Status> {
        self.0.find(&request.get_ref().sprite_id)?;
        self.0.reloads.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(ReloadReply {}))
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Result<Response<ResizeReply>, Status> {
        let request = request.into_inner();
        self.0.find(&request.sprite_id)?;
        if request.disk_bytes < 100 << 30 {
            return Err(Status::invalid_argument("a disk can only grow"));
        }
        Ok(Response::new(ResizeReply { disk_bytes: request.disk_bytes }))
    }

    async fn sync(&self, request: Request<SyncRequest>) -> Result<Response<SyncReply>, Status> {
        self.0.find(&request.get_ref().sprite_id)?;
        Ok(Response::new(SyncReply { watermark_unix_ms: 1_700_000_000_000, generation: 3, took_ms: 5 }))
    }

    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Result<Response<Self::CreateCheckpointStream>, Status> {
        let request = request.into_inner();
        let (id, _) = self.0.find(&request.sprite_id)?;
        let mut all = self.0.checkpoints.lock().unwrap();
        let all = all.entry(id).or_default();
        let name = format!("v{}", all.len() + 1);
        let checkpoint = Checkpoint {
            id: name.clone(),
            create_unix_ms: 1_700_000_000_000 + u64::try_from(all.len()).unwrap(),
            comment: request.comment,
            is_current_base: all.is_empty(),
            ..Default::default()
        };
        all.push(checkpoint.clone());
        let event = |kind: &str, data: String, checkpoint| {
            Ok(CheckpointEvent { kind: kind.into(), data, checkpoint, ..Default::default() })
        };
        let events = vec![
            event("info", format!("  ID: {name}"), None),
            event("complete", format!("Checkpoint {name} created successfully"), Some(checkpoint)),
        ];
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn restore_checkpoint(
        &self,
        request: Request<RestoreCheckpointRequest>,
    ) -> Result<Response<Self::RestoreCheckpointStream>, Status> {
        let request = request.into_inner();
        let (id, _) = self.0.find(&request.sprite_id)?;
        let all = self.0.checkpoints.lock().unwrap();
        let is_known = all.get(&id).is_some_and(|all| all.iter().any(|checkpoint| checkpoint.id == request.checkpoint));
        if !is_known {
            return Err(Status::not_found(format!("checkpoint not found: {}", request.checkpoint)));
        }
        let info = CheckpointEvent { kind: "info".into(), data: "Restoring".into(), ..Default::default() };
        let events = vec![Ok(info), Err(Status::internal("the disk is on fire"))];
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointReply>, Status> {
        let request = request.into_inner();
        let (id, _) = self.0.find(&request.sprite_id)?;
        let mut all = self.0.checkpoints.lock().unwrap();
        let all = all.entry(id).or_default();
        match all.iter().position(|checkpoint| checkpoint.id == request.checkpoint) {
            None => Err(Status::not_found("no such checkpoint")),
            Some(at) if all[at].is_current_base => Err(Status::failed_precondition("the live disk grew from it")),
            Some(at) => {
                all.remove(at);
                Ok(Response::new(DeleteCheckpointReply {}))
            }
        }
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsReply>, Status> {
        let (id, _) = self.0.find(&request.get_ref().sprite_id)?;
        let checkpoints = self.0.checkpoints.lock().unwrap().get(&id).cloned().unwrap_or_default();
        Ok(Response::new(ListCheckpointsReply { checkpoints }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<SpriteStatus>, Status> {
        self.0.find(&request.get_ref().sprite_id).map(|(_, status)| Response::new(status))
    }

    async fn watch_routes(&self, _: Request<WatchRoutesRequest>) -> Result<Response<Self::WatchRoutesStream>, Status> {
        let changes = tokio_stream::wrappers::BroadcastStream::new(self.0.events.subscribe());
        let first: Vec<_> = self.0.sprites.lock().unwrap().values().cloned().collect();
        let event = |event| Ok(RouteEvent { event: Some(event) });
        let first = first.into_iter().map(move |status| event(route_event::Event::Sprite(status)));
        let first = first.chain([event(route_event::Event::Synced(true))]);
        let changes = changes.map(|change| change.map_err(|error| Status::data_loss(error.to_string())));
        Ok(Response::new(Box::pin(tokio_stream::iter(first.collect::<Vec<_>>()).chain(changes))))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeReply>, Status> {
        Ok(Response::new(DescribeReply::default()))
    }
}
