//! A guest agent in this process, behind the same marker and HTTP/2 as the real one, which plays commands instead of running them.

use std::{
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use proto::{
    agent::{
        AnswerReply, AnswerRequest, ConfigureReply, ConfigureRequest, ExecInput, ExecOutput, FreezeReply,
        FreezeRequest, GrowFilesystemReply, GrowFilesystemRequest, GuestEvent, HelloReply, HelloRequest, KillEvent,
        KillSessionRequest, ListSessionsReply, ListSessionsRequest, PortEvent, Session, SessionInfo,
        StartEnvironmentReply, StartEnvironmentRequest, StopEnvironmentReply, StopEnvironmentRequest, SyncReply,
        SyncRequest, ThawReply, ThawRequest, TunnelInput, TunnelOpened, TunnelOutput, WatchPortsRequest, WatchRequest,
        agent_server::{Agent, AgentServer},
        exec_input::Input,
        exec_output::Output,
        tunnel_input, tunnel_output,
    },
    resync,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixListener},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::agent::AgentClient;

type Outputs<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The session that runs already.
pub(super) const OLD_SESSION: &str = "9";

/// Serves one session and returns its host side.
pub(super) async fn connect() -> AgentClient {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path: PathBuf = folder.path().join("agent.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a host");
        let nonce = resync::guest_accept(&mut stream).await.expect("a marker");
        stream.write_all(&resync::guest_marker(nonce)).await.expect("an answer");
        let incoming = stream::iter([Ok::<_, std::io::Error>(stream)]).chain(stream::pending());
        drop(
            tonic::transport::Server::builder()
                .add_service(AgentServer::new(Fake::default()))
                .serve_with_incoming(incoming)
                .await,
        );
        drop(folder);
    });
    AgentClient::connect(&path, std::time::Duration::from_secs(10)).await.expect("a session")
}

/// Sizes that the file system has when it is grown, one after the other; the driver knows of the new disk only at the last.
pub(super) const GROWN: [u64; 3] = [100 << 30, 100 << 30, (120 << 30) - 4096];

#[derive(Default)]
struct Fake {
    grown: AtomicUsize,
}

fn out(output: Output) -> ExecOutput {
    ExecOutput { output: Some(output) }
}

fn info(id: &str, command: &str, tty: bool) -> ExecOutput {
    out(Output::Info(SessionInfo {
        session_id: id.into(),
        command: command.into(),
        created_unix_ms: 1_700_000_000_000,
        rows: 24,
        cols: 80,
        is_owner: true,
        tty,
    }))
}

/// Plays `argv`. What each does is its name.
async fn play(argv: Vec<String>, mut inputs: Streaming<ExecInput>, to: mpsc::Sender<Result<ExecOutput, Status>>) {
    let send = async |output: Output| to.send(Ok(out(output))).await.is_ok();
    match argv[0].as_str() {
        "both-streams-7" => {
            send(Output::Stdout(Bytes::from_static(b"hi"))).await;
            send(Output::Stderr(Bytes::from_static(b"e"))).await;
            send(Output::Exit(7)).await;
        }
        "cat" => {
            while let Ok(Some(ExecInput { input: Some(input) })) = inputs.message().await {
                match input {
                    Input::Stdin(data) => drop(send(Output::Stdout(data)).await),
                    Input::StdinEof(_) => break,
                    Input::Signal(signal) => drop(send(Output::Stderr(Bytes::from(signal))).await),
                    Input::Resize(size) => {
                        send(Output::Stdout(Bytes::from(format!("{} {}", size.rows, size.cols)))).await;
                    }
                    Input::Start(_) | Input::Attach(_) => unreachable!("only the first input starts"),
                }
            }
            send(Output::Exit(0)).await;
        }
        "vanish" => {}
        "half-then-vanish" => {
            send(Output::Stdout(Bytes::from_static(b"half"))).await;
            // So that it is on the wire before the break, which takes away what is not.
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        "endless" => {
            let block = Bytes::from(vec![b'x'; 64 << 10]);
            while send(Output::Stdout(block.clone())).await {}
        }
        "silent" => std::future::pending().await,
        other => unreachable!("{other} was refused"),
    }
}

#[tonic::async_trait]
impl Agent for Fake {
    type ExecStream = Outputs<ExecOutput>;
    type KillSessionStream = Outputs<KillEvent>;
    type TunnelStream = Outputs<TunnelOutput>;
    type WatchPortsStream = Outputs<PortEvent>;
    type WatchStream = Outputs<GuestEvent>;

    async fn hello(&self, _request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        Ok(Response::new(HelloReply { protocol: 1, ..HelloReply::default() }))
    }

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut inputs = request.into_inner();
        let first = inputs.message().await?.and_then(|first| first.input);
        let (argv, first_output) = match first {
            Some(Input::Start(start)) if start.argv == ["refused"] => {
                return Err(Status::invalid_argument("no such folder: /no"));
            }
            Some(Input::Start(start)) => {
                let first = info("1", &start.argv.join(" "), start.tty);
                (start.argv, first)
            }
            Some(Input::Attach(attach)) if attach.session_id == OLD_SESSION => {
                (vec!["cat".into()], info(OLD_SESSION, "bash", true))
            }
            Some(Input::Attach(_)) => return Err(Status::not_found("no such session")),
            _ => return Err(Status::invalid_argument("no start")),
        };
        let (to, outputs) = mpsc::channel(4);
        to.try_send(Ok(first_output)).expect("an empty channel");
        tokio::spawn(play(argv, inputs, to));
        Ok(Response::new(Box::pin(ReceiverStream::new(outputs))))
    }

    async fn list_sessions(&self, _: Request<ListSessionsRequest>) -> Result<Response<ListSessionsReply>, Status> {
        let session = Session {
            id: OLD_SESSION.into(),
            command: "/bin/bash".into(),
            workdir: "/home/sprite".into(),
            created_unix_ms: 1_700_000_000_123,
            tty: true,
            ..Session::default()
        };
        Ok(Response::new(ListSessionsReply { sessions: vec![session] }))
    }

    async fn kill_session(
        &self,
        request: Request<KillSessionRequest>,
    ) -> Result<Response<Self::KillSessionStream>, Status> {
        let request = request.into_inner();
        match request.session_id.as_str() {
            OLD_SESSION => {}
            "8" => return Err(Status::failed_precondition("it has exited")),
            _ => return Err(Status::not_found("no such session")),
        }
        let said = format!("{} in {} ms", request.signal, request.timeout_ms);
        let events = [
            KillEvent { r#type: "signal".into(), message: said, signal: request.signal, pid: 9, exit_code: None },
            KillEvent { r#type: "complete".into(), exit_code: Some(143), ..KillEvent::default() },
        ];
        Ok(Response::new(Box::pin(stream::iter(events.map(Ok)))))
    }

    async fn tunnel(&self, request: Request<Streaming<TunnelInput>>) -> Result<Response<Self::TunnelStream>, Status> {
        let mut inputs = request.into_inner();
        let Some(TunnelInput { input: Some(tunnel_input::Input::Open(open)) }) = inputs.message().await? else {
            return Err(Status::invalid_argument("no open"));
        };
        let port = u16::try_from(open.port).map_err(|_malformed| Status::invalid_argument("no port"))?;
        let address: SocketAddr =
            SocketAddr::new(open.host.parse().map_err(|_malformed| Status::invalid_argument("no host"))?, port);
        let stream = TcpStream::connect(address).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let (mut from, mut into) = stream.into_split();
        tokio::spawn(async move {
            while let Ok(Some(TunnelInput { input: Some(tunnel_input::Input::Data(data)) })) = inputs.message().await {
                into.write_all(&data).await.expect("a reader");
            }
        });
        let (to, outputs) = mpsc::channel(4);
        tokio::spawn(async move {
            let opened = tunnel_output::Output::Opened(TunnelOpened { target: address.to_string() });
            drop(to.send(Ok(TunnelOutput { output: Some(opened) })).await);
            let mut buffer = vec![0; 4096];
            while let Ok(len @ 1..) = from.read(&mut buffer).await {
                let data = tunnel_output::Output::Data(Bytes::copy_from_slice(&buffer[..len]));
                drop(to.send(Ok(TunnelOutput { output: Some(data) })).await);
            }
            drop(to.send(Ok(TunnelOutput { output: Some(tunnel_output::Output::Eof(true)) })).await);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outputs))))
    }

    async fn watch_ports(&self, _: Request<WatchPortsRequest>) -> Result<Response<Self::WatchPortsStream>, Status> {
        let event = |open, port| Ok(PortEvent { open, port, address: "0.0.0.0".into(), pid: 5 });
        let present = stream::iter([event(true, 22)]);
        let later = stream::once(async move {
            tokio::time::sleep(std::time::Duration::from_millis(400)).await;
            event(true, 8080)
        });
        Ok(Response::new(Box::pin(present.chain(later).chain(stream::pending()))))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(Box::pin(stream::pending())))
    }

    async fn configure(&self, _: Request<ConfigureRequest>) -> Result<Response<ConfigureReply>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn start_environment(
        &self,
        _: Request<StartEnvironmentRequest>,
    ) -> Result<Response<StartEnvironmentReply>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn stop_environment(
        &self,
        _: Request<StopEnvironmentRequest>,
    ) -> Result<Response<StopEnvironmentReply>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn freeze(&self, _: Request<FreezeRequest>) -> Result<Response<FreezeReply>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn thaw(&self, _: Request<ThawRequest>) -> Result<Response<ThawReply>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn grow_filesystem(
        &self,
        _: Request<GrowFilesystemRequest>,
    ) -> Result<Response<GrowFilesystemReply>, Status> {
        let call = self.grown.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(GrowFilesystemReply { size_bytes: GROWN[call] }))
    }

    async fn sync(&self, _: Request<SyncRequest>) -> Result<Response<SyncReply>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn answer(&self, _: Request<AnswerRequest>) -> Result<Response<AnswerReply>, Status> {
        Err(Status::unimplemented("not played"))
    }
}
