//! The node agent, as a coordinator calls it: gRPC over its unix socket, each call with a deadline of its own.

use std::{path::PathBuf, time::Duration};

use hyper_util::rt::TokioIo;
use proto::{
    id::SpriteId,
    node::{
        CreateCheckpointRequest, CreateReply, CreateRequest, DeleteCheckpointRequest, DestroyRequest,
        ListCheckpointsRequest, ReloadRequest, ResizeRequest, RestartRequest, RestoreCheckpointRequest, RouteEvent,
        SleepReply, SleepRequest, SpriteStatus, StatusRequest, SyncReply, SyncRequest, WakeReply, WakeRequest,
        WatchRoutesRequest, node_client::NodeClient,
    },
    public::{Checkpoint, CheckpointEvent},
    record::SpriteRecord,
};
use tokio::net::UnixStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

use crate::refusal::Refusal;

/// For a question that needs neither disk nor VM.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// A VM without hardware virtualisation on a busy host; the node goes on after that, and its sprite is freed when the claim is gone.
const CREATE_LIMIT: Duration = Duration::from_secs(300);
/// The node gives up a wake after 60 s.
const WAKE_LIMIT: Duration = Duration::from_secs(75);
/// The node gives an order to sleep 600 s, because it includes the push.
const SLEEP_LIMIT: Duration = Duration::from_secs(610);
/// Restart, destroy, delete of a checkpoint: the node gives these 120 s.
const JOB_LIMIT: Duration = Duration::from_secs(130);
/// Wakes the sprite, grows the file system.
const RESIZE_LIMIT: Duration = Duration::from_secs(200);
/// The guest's page cache, then what the bucket lacks: the node bounds both.
const SYNC_LIMIT: Duration = Duration::from_secs(610);
/// From the call to the first event. A sleeping sprite is woken first.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(150);

/// Where the node agent listens, and a connection to it that is made when needed and again when lost.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    socket: PathBuf,
    client: NodeClient<Channel>,
}

impl Node {
    /// Must be called inside a Tokio runtime. The node need not be there yet.
    pub(crate) fn at(socket: PathBuf) -> Self {
        let path = socket.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://node").connect_with_connector_lazy(connector);
        Self { socket, client: NodeClient::new(channel) }
    }

    /// As routes name it.
    pub(crate) fn address(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    pub(crate) fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// Makes a sprite out of `record`. The node fills in the id and writes the record.
    ///
    /// # Errors
    ///
    /// [`CreateFailure::Refused`]: nothing was made. [`CreateFailure::Unclear`]: it may have been, or may yet be.
    pub(crate) async fn create(&self, record: &SpriteRecord) -> Result<CreateReply, CreateFailure> {
        let rec = serde_json::to_vec(record).map_err(|error| {
            CreateFailure::Refused(Status::internal(format!("the record has no JSON form: {error}")))
        })?;
        let request = CreateRequest {
            name: record.name.to_string(),
            org: record.org.clone(),
            url: record.url.clone(),
            size: record.size.as_str().to_owned(),
            env: record.environment.clone().into_iter().collect(),
            rec,
        };
        let mut client = self.client.clone();
        match within(CREATE_LIMIT, client.create(request)).await {
            Ok(reply) => Ok(reply),
            Err(status) => Err(match status.code() {
                tonic::Code::ResourceExhausted
                | tonic::Code::InvalidArgument
                | tonic::Code::FailedPrecondition
                | tonic::Code::Internal => CreateFailure::Refused(status),
                _ => CreateFailure::Unclear(status),
            }),
        }
    }

    pub(crate) async fn status(&self, id: SpriteId) -> Result<SpriteStatus, Status> {
        let request = StatusRequest { sprite_id: id.to_string() };
        within(ASK_LIMIT, self.client.clone().status(request)).await
    }

    pub(crate) async fn wake(&self, id: SpriteId) -> Result<WakeReply, Status> {
        let request = WakeRequest { sprite_id: id.to_string() };
        within(WAKE_LIMIT, self.client.clone().wake(request)).await
    }

    pub(crate) async fn sleep(&self, id: SpriteId, to: &str) -> Result<SleepReply, Status> {
        let request = SleepRequest { sprite_id: id.to_string(), to: to.to_owned() };
        within(SLEEP_LIMIT, self.client.clone().sleep(request)).await
    }

    pub(crate) async fn destroy(&self, id: SpriteId) -> Result<(), Status> {
        let request = DestroyRequest { sprite_id: id.to_string() };
        within(JOB_LIMIT, self.client.clone().destroy(request)).await.map(drop)
    }

    pub(crate) async fn restart(&self, id: SpriteId) -> Result<(), Status> {
        let request = RestartRequest { sprite_id: id.to_string() };
        within(JOB_LIMIT, self.client.clone().restart(request)).await.map(drop)
    }

    pub(crate) async fn reload(&self, id: SpriteId) -> Result<(), Status> {
        let request = ReloadRequest { sprite_id: id.to_string() };
        within(ASK_LIMIT, self.client.clone().reload(request)).await.map(drop)
    }

    pub(crate) async fn resize(&self, id: SpriteId, disk_bytes: u64) -> Result<u64, Status> {
        let request = ResizeRequest { sprite_id: id.to_string(), disk_bytes };
        within(RESIZE_LIMIT, self.client.clone().resize(request)).await.map(|reply| reply.disk_bytes)
    }

    pub(crate) async fn sync(&self, id: SpriteId) -> Result<SyncReply, Status> {
        within(SYNC_LIMIT, self.client.clone().sync(SyncRequest { sprite_id: id.to_string() })).await
    }

    pub(crate) async fn checkpoints(&self, id: SpriteId) -> Result<Vec<Checkpoint>, Status> {
        let request = ListCheckpointsRequest { sprite_id: id.to_string() };
        within(ASK_LIMIT, self.client.clone().list_checkpoints(request)).await.map(|reply| reply.checkpoints)
    }

    pub(crate) async fn create_checkpoint(
        &self,
        id: SpriteId,
        comment: String,
        durable: bool,
    ) -> Result<Streaming<CheckpointEvent>, Status> {
        let request = CreateCheckpointRequest { sprite_id: id.to_string(), comment, durable };
        within(CHECKPOINT_LIMIT, self.client.clone().create_checkpoint(request)).await
    }

    pub(crate) async fn restore_checkpoint(
        &self,
        id: SpriteId,
        checkpoint: &str,
    ) -> Result<Streaming<CheckpointEvent>, Refusal> {
        let request = RestoreCheckpointRequest { sprite_id: id.to_string(), checkpoint: checkpoint.to_owned() };
        let answer = within(CHECKPOINT_LIMIT, self.client.clone().restore_checkpoint(request)).await;
        answer.map_err(|status| about_checkpoint(status, checkpoint))
    }

    pub(crate) async fn delete_checkpoint(&self, id: SpriteId, checkpoint: &str) -> Result<(), Refusal> {
        let request = DeleteCheckpointRequest { sprite_id: id.to_string(), checkpoint: checkpoint.to_owned() };
        let answer = within(JOB_LIMIT, self.client.clone().delete_checkpoint(request)).await;
        answer.map(drop).map_err(|status| about_checkpoint(status, checkpoint))
    }

    pub(crate) async fn watch_routes(&self) -> Result<Streaming<RouteEvent>, Status> {
        within(ASK_LIMIT, self.client.clone().watch_routes(WatchRoutesRequest {})).await
    }
}

/// A create that was not confirmed.
#[derive(Debug)]
pub(crate) enum CreateFailure {
    Refused(Status),
    Unclear(Status),
}

/// "Not found" is about the checkpoint, unless the host does not have the sprite itself.
fn about_checkpoint(status: Status, checkpoint: &str) -> Refusal {
    let is_checkpoint = status.code() == tonic::Code::NotFound && !proto::is_not_here(&status);
    if is_checkpoint { Refusal::CheckpointNotFound { id: checkpoint.to_owned() } } else { status.into() }
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_elapsed) => Err(Status::deadline_exceeded(format!("the host did not answer within {limit:?}"))),
    }
}
