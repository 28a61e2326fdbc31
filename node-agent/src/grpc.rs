//! The `Node` service: what coordinators and routers ask of this host.

use std::pin::Pin;

use blockstore::store::{ForkError, StoreError};
use futures_util::{Stream, StreamExt as _};
use proto::{
    id::SpriteId,
    node::{
        CreateCheckpointRequest, CreateReply, CreateRequest, DeleteCheckpointReply, DeleteCheckpointRequest,
        DescribeReply, DescribeRequest, DestroyReply, DestroyRequest, ListCheckpointsReply, ListCheckpointsRequest,
        ReloadReply, ReloadRequest, ResizeReply, ResizeRequest, RestartReply, RestartRequest, RestoreCheckpointRequest,
        RouteEvent, SleepReply, SleepRequest, SpriteStatus, StatusRequest, SyncReply, SyncRequest, WakeReply,
        WakeRequest, WatchRoutesRequest, node_server::Node, route_event,
    },
    not_here,
    public::CheckpointEvent,
    record::SpriteRecord,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::{
    barrier, checkpoint,
    host::{CreateError, Host, TableChange, WakeError, record_key},
    vm::{Depth, change::chain, task::OrderError},
};

/// Route events on their way to one watcher.
const ROUTE_EVENTS_MAX: usize = 256;
const CHECKPOINT_EVENTS_MAX: usize = 16;

/// Serves [`Host`] over gRPC.
#[derive(Clone, Debug)]
pub struct NodeService {
    pub host: Host,
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Node for NodeService {
    type CreateCheckpointStream = Events<CheckpointEvent>;
    type RestoreCheckpointStream = Events<CheckpointEvent>;
    type WatchRoutesStream = Events<RouteEvent>;

    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<CreateReply>, Status> {
        let begun = std::time::Instant::now();
        let request = request.into_inner();
        let record: SpriteRecord = serde_json::from_slice(&request.rec)
            .map_err(|error| Status::invalid_argument(format!("the record is not readable: {error}")))?;
        // A caller that goes away must not leave half a sprite behind.
        let host = self.host.clone();
        let created = tokio::spawn(async move { host.create(record).await }).await;
        let created = created.map_err(|error| Status::internal(error.to_string()))?.map_err(create_status)?;
        Ok(Response::new(CreateReply {
            sprite_id: created.id.to_string(),
            from: created.from.to_owned(),
            took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        }))
    }

    async fn wake(&self, request: Request<WakeRequest>) -> Result<Response<WakeReply>, Status> {
        let begun = std::time::Instant::now();
        let id = parse(&request.get_ref().sprite_id)?;
        let before = self.status_of(id)?;
        let running = self.host.running(id).await.map_err(wake_status)?;
        let resumed = running.was.to_owned();
        let status = self.status_of(id)?;
        Ok(Response::new(WakeReply {
            reason: status.reason.clone(),
            status: Some(status),
            was: before.state,
            took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            resumed,
        }))
    }

    async fn sleep(&self, request: Request<SleepRequest>) -> Result<Response<SleepReply>, Status> {
        let request = request.into_inner();
        let id = parse(&request.sprite_id)?;
        let depth = match request.to.as_str() {
            "paused" => Depth::Paused,
            "" | "suspended" => Depth::Suspended,
            "cold" => Depth::Cold,
            other => {
                return Err(Status::invalid_argument(format!("cannot sleep {other:?}: use paused, suspended or cold")));
            }
        };
        let report = self.host.sleep(id, depth).await.map_err(order_status)?;
        let ms = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Ok(Response::new(SleepReply {
            status: Some(self.status_of(id)?),
            frozen_ms: ms(report.frozen),
            local_ms: ms(report.local),
            bucket_ms: ms(report.bucket),
            woken: report.woken,
        }))
    }

    async fn destroy(&self, request: Request<DestroyRequest>) -> Result<Response<DestroyReply>, Status> {
        self.host.destroy(parse(&request.get_ref().sprite_id)?).await.map_err(order_status)?;
        Ok(Response::new(DestroyReply {}))
    }

    async fn restart(&self, request: Request<RestartRequest>) -> Result<Response<RestartReply>, Status> {
        self.host.reboot(parse(&request.get_ref().sprite_id)?).await.map_err(order_status)?;
        Ok(Response::new(RestartReply {}))
    }

    async fn reload(&self, request: Request<ReloadRequest>) -> Result<Response<ReloadReply>, Status> {
        let id = parse(&request.get_ref().sprite_id)?;
        let record = self.host.resources().config.bucket.read_record::<SpriteRecord>(&record_key(id)).await;
        match record {
            Ok(Some(record)) => self.host.reload(record.value).await,
            Ok(None) => return Err(Status::not_found(format!("sprite {id} has no record"))),
            Err(error) => return Err(Status::unavailable(chain(&error))),
        }
        Ok(Response::new(ReloadReply {}))
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Result<Response<ResizeReply>, Status> {
        let request = request.into_inner();
        let id = parse(&request.sprite_id)?;
        let disk_bytes = crate::resize::grow(&self.host, id, request.disk_bytes).await?;
        Ok(Response::new(ResizeReply { disk_bytes }))
    }

    async fn sync(&self, request: Request<SyncRequest>) -> Result<Response<SyncReply>, Status> {
        let begun = std::time::Instant::now();
        let reached = barrier::barrier(&self.host, parse(&request.get_ref().sprite_id)?).await?;
        Ok(Response::new(SyncReply {
            watermark_unix_ms: reached.watermark_unix_ms,
            generation: reached.generation,
            took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        }))
    }

    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Result<Response<Self::CreateCheckpointStream>, Status> {
        let request = request.into_inner();
        let id = parse(&request.sprite_id)?;
        let running = self.host.running(id).await.map_err(wake_status)?;
        let volume = self.host.resources().store.volume(id).ok_or_else(|| not_here(id))?;
        let begun = std::time::Instant::now();
        // A caller that goes away must not leave the guest's file system frozen, nor a seal of which nobody knows.
        let taken = tokio::spawn({
            let volume = volume.clone();
            async move {
                let taken = checkpoint::take(&running.agent, &volume, request.comment, false).await;
                drop(running);
                taken
            }
        });
        let taken = taken
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| checkpoint_status(&error))?;
        let mut events = checkpoint::events(&taken);
        if !request.durable {
            return Ok(stream_of(events));
        }
        let (sender, receiver) = mpsc::channel(CHECKPOINT_EVENTS_MAX);
        let last = events.pop();
        tokio::spawn(async move {
            for event in events {
                drop(sender.send(Ok(event)).await);
            }
            let durable = volume.wait_durable(&taken.checkpoint.id).await;
            let end = match (durable, last) {
                (Ok(()), Some(mut last)) => {
                    last.durable_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                    if let Some(checkpoint) = &mut last.checkpoint {
                        checkpoint.durable = true;
                    }
                    Ok(last)
                }
                (Err(error), _) => {
                    Err(Status::unavailable(format!("sealed, but not in the bucket yet: {}", chain(&error))))
                }
                (Ok(()), None) => Err(Status::internal("a checkpoint without an end")),
            };
            drop(sender.send(end).await);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn restore_checkpoint(
        &self,
        request: Request<RestoreCheckpointRequest>,
    ) -> Result<Response<Self::RestoreCheckpointStream>, Status> {
        let request = request.into_inner();
        let id = parse(&request.sprite_id)?;
        let wanted = request.checkpoint;
        let known = self.checkpoints_of(id).await?.iter().any(|checkpoint| checkpoint.id == wanted);
        if !known {
            return Err(Status::not_found(format!("checkpoint not found: {wanted}")));
        }
        let begun = std::time::Instant::now();
        let (sender, receiver) = mpsc::channel(CHECKPOINT_EVENTS_MAX);
        let host = self.host.clone();
        tokio::spawn(async move {
            let info = format!("Restoring to checkpoint {wanted}...");
            drop(sender.send(Ok(CheckpointEvent { kind: "info".into(), data: info, ..Default::default() })).await);
            let end = match host.restore(id, wanted.clone()).await {
                Ok(()) => CheckpointEvent {
                    kind: "complete".into(),
                    data: format!("Restored to checkpoint {wanted} successfully"),
                    returned_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
                    ..Default::default()
                },
                Err(error) => CheckpointEvent { kind: "error".into(), data: chain(&error), ..Default::default() },
            };
            drop(sender.send(Ok(end)).await);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointReply>, Status> {
        let request = request.into_inner();
        let id = parse(&request.sprite_id)?;
        let store = &self.host.resources().store;
        let deleted = store.delete_checkpoint(id, &request.checkpoint).await;
        deleted.map_err(|error| checkpoint_status(&error))?;
        Ok(Response::new(DeleteCheckpointReply {}))
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsReply>, Status> {
        let id = parse(&request.get_ref().sprite_id)?;
        Ok(Response::new(ListCheckpointsReply { checkpoints: self.checkpoints_of(id).await? }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<SpriteStatus>, Status> {
        Ok(Response::new(self.status_of(parse(&request.get_ref().sprite_id)?)?))
    }

    async fn watch_routes(
        &self,
        _request: Request<WatchRoutesRequest>,
    ) -> Result<Response<Self::WatchRoutesStream>, Status> {
        let (sender, receiver) = mpsc::channel(ROUTE_EVENTS_MAX);
        tokio::spawn(watch_routes(self.host.clone(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver).map(Ok))))
    }

    async fn describe(&self, _request: Request<DescribeRequest>) -> Result<Response<DescribeReply>, Status> {
        let resources = self.host.resources();
        let running =
            self.host.ids().iter().filter_map(|id| self.host.status(*id)).filter(|status| status.qemu_pid > 0).count();
        Ok(Response::new(DescribeReply {
            node: resources.config.node.clone(),
            version: proto::VERSION.to_owned(),
            accel: resources.config.accel.name().to_owned(),
            running: u32::try_from(running).unwrap_or(u32::MAX),
            pool: u32::try_from(self.host.pool().len().await).unwrap_or(u32::MAX),
            memory_free_bytes: resources.free_memory_bytes(),
        }))
    }
}

impl NodeService {
    fn status_of(&self, id: SpriteId) -> Result<SpriteStatus, Status> {
        self.host.status(id).ok_or_else(|| not_here(id))
    }

    async fn checkpoints_of(&self, id: SpriteId) -> Result<Vec<proto::public::Checkpoint>, Status> {
        let store = &self.host.resources().store;
        let all = store.checkpoints(id).await.map_err(|error| checkpoint_status(&error))?;
        Ok(all.iter().map(checkpoint::to_public).collect())
    }
}

/// Sends every status once, then `synced`, then what changes. Ends when the watcher goes, or lags too far behind to be sure of anything.
async fn watch_routes(host: Host, sender: mpsc::Sender<RouteEvent>) {
    let (sprites, mut table) = host.watch();
    let mut changes = tokio_stream::StreamMap::new();
    for status in sprites {
        let first = status.borrow().clone();
        if sender.send(sprite_event(first.clone())).await.is_err() {
            return;
        }
        changes.insert(first.sprite_id, tokio_stream::wrappers::WatchStream::from_changes(status));
    }
    if sender.send(RouteEvent { event: Some(route_event::Event::Synced(true)) }).await.is_err() {
        return;
    }
    loop {
        let event = tokio::select! {
            Some((_, status)) = changes.next(), if !changes.is_empty() => sprite_event(status),
            change = table.recv() => match change {
                Ok(TableChange::Came(status)) => {
                    let first = status.borrow().clone();
                    changes.insert(first.sprite_id.clone(), tokio_stream::wrappers::WatchStream::from_changes(status));
                    sprite_event(first)
                }
                Ok(TableChange::Gone(id)) => {
                    changes.remove(&id.to_string());
                    RouteEvent { event: Some(route_event::Event::Gone(id.to_string())) }
                }
                Err(_lagged_or_closed) => return,
            },
            () = sender.closed() => return,
        };
        if sender.send(event).await.is_err() {
            return;
        }
    }
}

fn sprite_event(status: SpriteStatus) -> RouteEvent {
    RouteEvent { event: Some(route_event::Event::Sprite(status)) }
}

fn stream_of(events: Vec<CheckpointEvent>) -> Response<Events<CheckpointEvent>> {
    Response::new(Box::pin(tokio_stream::iter(events.into_iter().map(Ok))))
}

fn parse(id: &str) -> Result<SpriteId, Status> {
    id.parse().map_err(|error: proto::id::BadSpriteId| Status::invalid_argument(error.to_string()))
}

fn create_status(error: CreateError) -> Status {
    match error {
        CreateError::NoCapacity(_) => Status::resource_exhausted(error.to_string()),
        CreateError::Record(_) => Status::unavailable(chain(&error)),
        CreateError::Start(_) => Status::internal(chain(&error)),
        CreateError::Fork(ForkError::Store(_)) => Status::unavailable(chain(&error)),
        CreateError::Fork(ForkError::TooSmall { .. }) => Status::invalid_argument(error.to_string()),
        CreateError::Fork(ForkError::TooMany { .. }) => Status::failed_precondition(error.to_string()),
        CreateError::Fork(ForkError::Parent { ref source, .. }) => {
            let status = checkpoint_status(source);
            match status.code() {
                // Of a checkpoint that the caller has named.
                tonic::Code::NotFound => Status::invalid_argument(chain(&error)),
                code => Status::new(code, chain(&error)),
            }
        }
    }
}

/// The API's 503 and 504, as the data plane answers: another try may well do.
pub(crate) fn wake_status(error: WakeError) -> Status {
    match error {
        WakeError::NotHere(id) => not_here(id),
        WakeError::NoCapacity(_) => Status::resource_exhausted(error.to_string()),
        WakeError::Failed { .. } => Status::aborted(error.to_string()),
        WakeError::Timeout(_) => Status::deadline_exceeded(error.to_string()),
    }
}

fn order_status(error: OrderError) -> Status {
    match error {
        OrderError::Refused(_) => Status::failed_precondition(error.to_string()),
        OrderError::Failed(_) => Status::internal(error.to_string()),
        OrderError::ShuttingDown => Status::unavailable(error.to_string()),
    }
}

fn checkpoint_status(error: &blockstore::store::CheckpointError) -> Status {
    use blockstore::store::CheckpointError;
    match error {
        CheckpointError::Unknown { .. } => Status::not_found(error.to_string()),
        CheckpointError::CommentTooLong { .. } => Status::invalid_argument(error.to_string()),
        CheckpointError::CurrentBase { .. } | CheckpointError::Lost { .. } | CheckpointError::TooMany { .. } => {
            Status::failed_precondition(error.to_string())
        }
        CheckpointError::Store(source)
            if matches!(**source, StoreError::Unknown { .. } | StoreError::Destroyed { .. }) =>
        {
            Status::failed_precondition(chain(error))
        }
        CheckpointError::Store(_) | CheckpointError::Volume(_) => Status::unavailable(chain(error)),
    }
}
