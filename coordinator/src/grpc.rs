//! The public gRPC service: the same functions as REST, in messages.

use std::{pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt as _, stream};
use proto::{
    id::SpriteName,
    public::{
        self, CheckpointEvent, CreateCheckpointRequest, CreateSpriteRequest, DeleteCheckpointRequest,
        DeleteCheckpointResponse, DestroySpriteRequest, DestroySpriteResponse, ExecRequest, ExecResponse,
        GetSpriteRequest, ListCheckpointsRequest, ListCheckpointsResponse, ListSpritesRequest, ListSpritesResponse,
        RestoreCheckpointRequest, SleepSpriteRequest, SleepSpriteResponse, Sprite, SyncSpriteRequest,
        SyncSpriteResponse, UpdateSpriteRequest, WakeSpriteRequest, WakeSpriteResponse, WatchSpritesRequest,
        sprites_server::Sprites,
    },
    record::{UrlAuth, UrlSettings},
};
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{MetadataMap, MetadataValue},
};

use crate::{
    refusal::Refusal,
    rest,
    service::{CheckpointEvents, ForkSource, IdleTimeout, NewSprite, PAGE_MAX, Service, Update, labels, request_id},
    tokens::Caller,
    view::{self, View},
    watch::{Seen, Watch},
};

mod exec;

/// A silent watch looks around this often.
const WATCH_LIMIT: Duration = Duration::from_secs(30);

/// Serves [`Service`] over gRPC.
#[derive(Clone, Debug)]
pub(crate) struct SpritesService {
    pub(crate) service: Service,
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl SpritesService {
    async fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        let authorizations = metadata.get_all("authorization").iter().map(MetadataValue::as_encoded_bytes);
        Ok(self.service.authenticate(proto::token::bearer(authorizations)).await?)
    }
}

#[tonic::async_trait]
impl Sprites for SpritesService {
    type WatchSpritesStream = Events<Sprite>;
    type ExecStream = Events<ExecResponse>;
    type CreateCheckpointStream = Events<CheckpointEvent>;
    type RestoreCheckpointStream = Events<CheckpointEvent>;

    async fn create_sprite(&self, request: Request<CreateSpriteRequest>) -> Result<Response<Sprite>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let new = new_sprite(request.into_inner())?;
        let view = self.service.create(&caller.org, new).await?;
        Ok(Response::new(view.to_proto()))
    }

    async fn get_sprite(&self, request: Request<GetSpriteRequest>) -> Result<Response<Sprite>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let view = self.service.get(&caller.org, &request.get_ref().name).await?;
        Ok(Response::new(view.to_proto()))
    }

    async fn list_sprites(
        &self,
        request: Request<ListSpritesRequest>,
    ) -> Result<Response<ListSpritesResponse>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let request = request.into_inner();
        let after = match request.continuation_token.as_str() {
            "" => None,
            token => Some(rest::read_token(token)?),
        };
        let limit = match request.max_results {
            0 => PAGE_MAX,
            limit => usize::try_from(limit).unwrap_or(PAGE_MAX),
        };
        let listed = self.service.list(&caller.org, &request.prefix, after.as_deref(), limit).await?;
        Ok(Response::new(ListSpritesResponse {
            sprites: listed.sprites.iter().map(View::to_proto).collect(),
            next_continuation_token: listed.next.as_ref().map(rest::token_after).unwrap_or_default(),
        }))
    }

    async fn update_sprite(&self, request: Request<UpdateSpriteRequest>) -> Result<Response<Sprite>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let request = request.into_inner();
        let cleared = request.clear_labels.then(Vec::new);
        let update = Update {
            url_auth: request.public.map(url_auth),
            labels: if request.labels.is_empty() { cleared } else { Some(labels(request.labels)?) },
            idle_timeout: request.idle_timeout.as_deref().map(IdleTimeout::parse).transpose()?,
            ..Update::default()
        };
        let view = self.service.update(&caller.org, &request.name, update).await?;
        Ok(Response::new(view.to_proto()))
    }

    async fn destroy_sprite(
        &self,
        request: Request<DestroySpriteRequest>,
    ) -> Result<Response<DestroySpriteResponse>, Status> {
        let caller = self.caller(request.metadata()).await?;
        self.service.destroy(&caller.org, &request.get_ref().name).await?;
        Ok(Response::new(DestroySpriteResponse {}))
    }

    async fn watch_sprites(
        &self,
        request: Request<WatchSpritesRequest>,
    ) -> Result<Response<Self::WatchSpritesStream>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let watch = Watch::begin(&self.service, &caller.org, &request.get_ref().prefix).await?;
        let batches = stream::unfold(watch, |mut watch| async move {
            let seen = watch.next(WATCH_LIMIT).await?;
            Some((stream::iter(seen.into_iter().map(|seen| Ok(watched(seen)))), watch))
        });
        Ok(Response::new(Box::pin(batches.flatten())))
    }

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let output = exec::open(&self.service, &caller.org, request.into_inner()).await?;
        Ok(Response::new(output))
    }

    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Result<Response<Self::CreateCheckpointStream>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let request = request.into_inner();
        let events =
            self.service.create_checkpoint(&caller.org, &request.name, request.comment, request.durable).await?;
        Ok(Response::new(told(events)))
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let checkpoints = self.service.checkpoints(&caller.org, &request.get_ref().name).await?;
        Ok(Response::new(ListCheckpointsResponse { checkpoints }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointResponse>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let DeleteCheckpointRequest { name, checkpoint } = request.into_inner();
        self.service.delete_checkpoint(&caller.org, &name, &checkpoint).await?;
        Ok(Response::new(DeleteCheckpointResponse {}))
    }

    async fn restore_checkpoint(
        &self,
        request: Request<RestoreCheckpointRequest>,
    ) -> Result<Response<Self::RestoreCheckpointStream>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let RestoreCheckpointRequest { name, checkpoint } = request.into_inner();
        let events = self.service.restore(&caller.org, &name, &checkpoint).await?;
        Ok(Response::new(told(events)))
    }

    async fn sleep_sprite(
        &self,
        request: Request<SleepSpriteRequest>,
    ) -> Result<Response<SleepSpriteResponse>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let SleepSpriteRequest { name, to } = request.into_inner();
        let (view, reply) = self.service.sleep(&caller.org, &name, &to).await?;
        Ok(Response::new(SleepSpriteResponse {
            sprite: Some(view.to_proto()),
            frozen_ms: reply.frozen_ms,
            local_ms: reply.local_ms,
            bucket_ms: reply.bucket_ms,
            woken: reply.woken,
        }))
    }

    async fn wake_sprite(&self, request: Request<WakeSpriteRequest>) -> Result<Response<WakeSpriteResponse>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let (view, reply) = self.service.wake(&caller.org, &request.get_ref().name).await?;
        let sprite = Some(view.to_proto());
        Ok(Response::new(WakeSpriteResponse { sprite, resumed: reply.resumed, took_ms: reply.took_ms }))
    }

    async fn sync_sprite(&self, request: Request<SyncSpriteRequest>) -> Result<Response<SyncSpriteResponse>, Status> {
        let caller = self.caller(request.metadata()).await?;
        let reached = self.service.sync(&caller.org, &request.get_ref().name).await?;
        Ok(Response::new(SyncSpriteResponse {
            watermark_at: view::time_of_ms(reached.watermark_unix_ms).unwrap_or_default(),
            generation: reached.generation,
            took_ms: reached.took_ms,
        }))
    }
}

fn new_sprite(request: CreateSpriteRequest) -> Result<NewSprite, Refusal> {
    let idle_timeout = Some(request.idle_timeout.as_str()).filter(|text| !text.is_empty());
    Ok(NewSprite {
        name: request.name.parse::<SpriteName>()?,
        size: Some(request.size.as_str()).filter(|size| !size.is_empty()).map(rest::size).transpose()?,
        disk_bytes: None,
        from: request.from.map(fork_source).transpose()?,
        labels: labels(request.labels)?,
        environment: request.environment.into_iter().collect(),
        url_settings: UrlSettings { auth: url_auth(request.public), private_access: None },
        idle_timeout: idle_timeout.map(IdleTimeout::parse).transpose()?,
        always_on: false,
        wait_for_capacity: false,
        request_id: request_id(request.request_id)?,
    })
}

fn fork_source(from: public::ForkSource) -> Result<ForkSource, Refusal> {
    if from.sprite.is_empty() {
        return Err(Refusal::Invalid("`from` names no sprite to fork".to_owned()));
    }
    Ok(ForkSource {
        sprite: from.sprite,
        checkpoint: Some(from.checkpoint).filter(|checkpoint| !checkpoint.is_empty()),
    })
}

fn url_auth(public: bool) -> UrlAuth {
    if public { UrlAuth::Public } else { UrlAuth::Sprite }
}

/// A sprite that went away is reported by its name and the state `destroyed`.
fn watched(seen: Seen) -> Sprite {
    match seen {
        Seen::Sprite(view) => view.to_proto(),
        Seen::Gone(name) => Sprite { name, state: "destroyed".to_owned(), ..Default::default() },
    }
}

fn told(events: CheckpointEvents) -> Events<CheckpointEvent> {
    Box::pin(events.map(|event| event.map_err(Status::from)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_without_a_name_is_refused_as_in_rest() {
        let error = new_sprite(CreateSpriteRequest::default()).unwrap_err();
        assert_eq!(Status::from(error).code(), tonic::Code::InvalidArgument);
        let bad = CreateSpriteRequest { name: "a".into(), size: "xl".into(), ..Default::default() };
        assert!(new_sprite(bad).is_err());
        let good = CreateSpriteRequest { name: "a".into(), idle_timeout: "never".into(), ..Default::default() };
        assert_eq!(new_sprite(good).unwrap().idle_timeout, Some(IdleTimeout::Never));
    }
}
