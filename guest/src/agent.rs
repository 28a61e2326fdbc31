//! The service that the host calls: each rpc is a few words to the part that does it.

use std::{fs, io, os::fd::AsFd as _, path::Path, sync::Arc, time::Duration};

use proto::agent::{
    AnswerReply, AnswerRequest, ConfigureReply, ConfigureRequest, EnvironmentState, ExecInput, ExecOutput, FreezeReply,
    FreezeRequest, GrowFilesystemReply, GrowFilesystemRequest, GuestEvent, HelloReply, HelloRequest, KillEvent,
    KillSessionRequest, ListSessionsReply, ListSessionsRequest, PortEvent, StartEnvironmentReply,
    StartEnvironmentRequest, StopEnvironmentReply, StopEnvironmentRequest, SyncReply, SyncRequest, ThawReply,
    ThawRequest, TunnelInput, TunnelOutput, WatchPortsRequest, WatchRequest, agent_server,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    environment::{DEVICE, Environment, Phase, Started},
    exec::Sessions,
    freeze::{Bell, Freezer, millis},
    life::Life,
    log,
    ports::{self, Listening, Ports},
    reaper::Reaper,
    sys, tunnel,
    watch::Hub,
};

/// Rises with every change of meaning of the protocol.
const PROTOCOL: u32 = 1;
/// What a request without a limit of its own gets.
const FREEZE_LIMIT_DEFAULT: Duration = Duration::from_millis(200);
const FROZEN_MAX_DEFAULT: Duration = Duration::from_secs(2);
const PORT_EVENTS_MAX: usize = 64;

/// Everything PID 1 has.
#[derive(Debug)]
pub(crate) struct Agent {
    environment: Arc<Environment>,
    sessions: Arc<Sessions>,
    hub: Arc<Hub>,
    freezer: Freezer,
    ports: Ports,
    life: Arc<Life>,
    host: watch::Sender<bool>,
    /// Of the boot, see `init::timer_trouble`.
    timer_trouble: String,
}

/// While it lives a host is connected.
#[derive(Debug)]
pub(crate) struct Connected<'a>(&'a watch::Sender<bool>);

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

impl Agent {
    pub(crate) fn new(reaper: Reaper, timer_trouble: String) -> Self {
        let host = watch::Sender::new(false);
        let ports = Ports::default();
        let environment = Arc::new(Environment::new(reaper.clone()));
        let sessions = Sessions::new(Arc::clone(&environment), reaper, ports.clone(), host.subscribe());
        let hub = Hub::new(Arc::clone(&sessions), Arc::clone(&environment));
        Self {
            life: Life::new(Arc::clone(&environment), Arc::clone(&hub)),
            hub,
            environment,
            sessions,
            freezer: Freezer::default(),
            ports,
            host,
            timer_trouble,
        }
    }

    pub(crate) fn host_connected(&self) -> Connected<'_> {
        self.host.send_replace(true);
        Connected(&self.host)
    }
}

fn unavailable(error: impl std::fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn or_default(ms: u32, default: Duration) -> Duration {
    if ms == 0 { default } else { Duration::from_millis(ms.into()) }
}

fn grow(volume: &fs::File) -> io::Result<u64> {
    let bytes = sys::block_device_bytes(&fs::File::open(DEVICE)?)?;
    let block = u64::try_from(nix::sys::statfs::fstatfs(volume.as_fd())?.block_size()).map_err(io::Error::other)?;
    let blocks = bytes / block.max(1);
    sys::resize_ext4(volume, blocks)?;
    Ok(blocks * block)
}

async fn tell_ports(mut listening: watch::Receiver<Listening>, to: mpsc::Sender<Result<PortEvent, Status>>) {
    let mut known = Listening::default();
    loop {
        let now = Arc::clone(&listening.borrow_and_update());
        for event in ports::changes(&known, &now) {
            if to.send(Ok(event)).await.is_err() {
                return;
            }
        }
        known = now;
        tokio::select! {
            changed = listening.changed() => if changed.is_err() { return },
            () = to.closed() => return,
        }
    }
}

type Reply<T> = Result<Response<T>, Status>;
type Stream<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl agent_server::Agent for Agent {
    async fn hello(&self, _request: Request<HelloRequest>) -> Reply<HelloReply> {
        let environment = match self.environment.phase() {
            Phase::Stopped => EnvironmentState::Stopped,
            Phase::Started => EnvironmentState::Started,
            Phase::Failed => EnvironmentState::Failed,
        };
        Ok(Response::new(HelloReply {
            agent_version: proto::VERSION.into(),
            protocol: PROTOCOL,
            environment: environment.into(),
            timer_trouble: self.timer_trouble.clone(),
        }))
    }

    async fn configure(&self, request: Request<ConfigureRequest>) -> Reply<ConfigureReply> {
        let clock_was_off_ms = self.life.configure(request.into_inner()).await?;
        Ok(Response::new(ConfigureReply { clock_was_off_ms }))
    }

    async fn start_environment(&self, _request: Request<StartEnvironmentRequest>) -> Reply<StartEnvironmentReply> {
        let Started { mount, start, .. } = self.life.start().await?;
        Ok(Response::new(StartEnvironmentReply { mount_ms: millis(mount), start_ms: millis(start) }))
    }

    async fn stop_environment(&self, request: Request<StopEnvironmentRequest>) -> Reply<StopEnvironmentReply> {
        // A frozen file system cannot be unmounted.
        self.freezer.thaw();
        let grace = Duration::from_millis(request.into_inner().grace_ms.into());
        let stopped = self.environment.stop(grace).await;
        Ok(Response::new(StopEnvironmentReply { clean: stopped.clean, holder: stopped.holder }))
    }

    async fn freeze(&self, request: Request<FreezeRequest>) -> Reply<FreezeReply> {
        let request = request.into_inner();
        let volume = match self.environment.volume() {
            Ok(volume) => volume,
            Err(error) => {
                return Ok(Response::new(FreezeReply { reason: error.to_string(), ..FreezeReply::default() }));
            }
        };
        let limit = or_default(request.limit_ms, FREEZE_LIMIT_DEFAULT);
        let max_frozen = or_default(request.max_frozen_ms, FROZEN_MAX_DEFAULT);
        let bell = match request.bell_bytes {
            0 => None,
            bytes => match Bell::new(Path::new(DEVICE), bytes) {
                Ok(bell) => Some(bell),
                // Frozen all the same, for a host that seals and thaws by itself.
                Err(error) => {
                    log!("no bell: {error}");
                    None
                }
            },
        };
        Ok(Response::new(self.freezer.freeze(volume, bell, limit, max_frozen).await))
    }

    async fn thaw(&self, _request: Request<ThawRequest>) -> Reply<ThawReply> {
        Ok(Response::new(self.freezer.thaw()))
    }

    async fn grow_filesystem(&self, _request: Request<GrowFilesystemRequest>) -> Reply<GrowFilesystemReply> {
        let volume = self.environment.volume().map_err(unavailable)?;
        let grown = blocking(move || grow(&volume)).await;
        let size_bytes =
            grown.map_err(|error| Status::failed_precondition(format!("cannot grow the file system: {error}")))?;
        Ok(Response::new(GrowFilesystemReply { size_bytes }))
    }

    async fn sync(&self, _request: Request<SyncRequest>) -> Reply<SyncReply> {
        // Without an environment there is nothing to write.
        if let Ok(volume) = self.environment.volume() {
            let synced = blocking(move || Ok(nix::unistd::syncfs(&*volume)?)).await;
            synced.map_err(|error| Status::data_loss(format!("cannot write everything to the disk: {error}")))?;
        }
        Ok(Response::new(SyncReply {}))
    }

    type ExecStream = Stream<ExecOutput>;

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Reply<Self::ExecStream> {
        let mut inputs = request.into_inner();
        let first = inputs.message().await?;
        let messages = self.sessions.serve(first, self.life.env(), inputs).await?;
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn list_sessions(&self, _request: Request<ListSessionsRequest>) -> Reply<ListSessionsReply> {
        Ok(Response::new(ListSessionsReply { sessions: self.sessions.list() }))
    }

    type KillSessionStream = Stream<KillEvent>;

    async fn kill_session(&self, request: Request<KillSessionRequest>) -> Reply<Self::KillSessionStream> {
        Ok(Response::new(ReceiverStream::new(self.sessions.kill(request.into_inner())?)))
    }

    type TunnelStream = Stream<TunnelOutput>;

    async fn tunnel(&self, request: Request<Streaming<TunnelInput>>) -> Reply<Self::TunnelStream> {
        Ok(Response::new(ReceiverStream::new(tunnel::open(request.into_inner()).await?)))
    }

    type WatchPortsStream = Stream<PortEvent>;

    async fn watch_ports(&self, _request: Request<WatchPortsRequest>) -> Reply<Self::WatchPortsStream> {
        let (events, out) = mpsc::channel(PORT_EVENTS_MAX);
        tokio::spawn(tell_ports(self.ports.watch().await, events));
        Ok(Response::new(ReceiverStream::new(out)))
    }

    type WatchStream = Stream<GuestEvent>;

    async fn watch(&self, _request: Request<WatchRequest>) -> Reply<Self::WatchStream> {
        Ok(Response::new(ReceiverStream::new(self.hub.watch())))
    }

    async fn answer(&self, request: Request<AnswerRequest>) -> Reply<AnswerReply> {
        self.hub.answer(request.into_inner()).await;
        Ok(Response::new(AnswerReply {}))
    }
}
