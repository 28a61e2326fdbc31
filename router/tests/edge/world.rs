//! An edge between a client and two fakes: a coordinator that knows a few sprites, and nodes that answer for them.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{
    body::Body as AxumBody,
    extract::Request as AxumRequest,
    response::{IntoResponse, Response as AxumResponse},
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proto::control::{
    AuthenticateReply, AuthenticateRequest, ResolveReply, ResolveRequest,
    control_server::{Control, ControlServer},
};
use router::{
    Config, NodeAddress, Router,
    ca::{Ca, ServerNames},
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    net::{TcpStream, UnixListener},
    sync::Semaphore,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub(crate) const API: &str = "api.localhost";
pub(crate) const PRIVATE: &str = "demo-a1b2c3.sprites.localhost";
pub(crate) const PUBLIC: &str = "open-a1b2c3.sprites.localhost";
pub(crate) const ASLEEP: &str = "lazy-a1b2c3.sprites.localhost";
/// Sleeps and belongs to no node.
pub(crate) const NOWHERE: &str = "away-a1b2c3.sprites.localhost";
/// Of another organisation.
pub(crate) const FOREIGN: &str = "theirs-zzzzzz.sprites.localhost";
pub(crate) const TOKEN: &str = "local/0190a6d2f1c87b3e9d4f5a6b7c8d9e0f/0190a6d2f1c87b3e9d4f5a6b7c8d9e10/secret";
pub(crate) const FOREIGN_TOKEN: &str = "them/0190a6d2f1c87b3e9d4f5a6b7c8d9e1f/0190a6d2f1c87b3e9d4f5a6b7c8d9e20/secret";
pub(crate) const BEARER: (&str, &str) =
    ("authorization", "Bearer local/0190a6d2f1c87b3e9d4f5a6b7c8d9e0f/0190a6d2f1c87b3e9d4f5a6b7c8d9e10/secret");

/// The coordinator ends the connection instead of answering.
pub(crate) const BREAKS_OFF: &str = "/v1/breaks-off";

/// Nothing in these tests takes long; what does hangs.
const DEADLINE: Duration = Duration::from_secs(20);

const WAKE_PERMITS: u32 = 1000;

pub(crate) type ClientBody = UnsyncBoxBody<Bytes, Infallible>;

/// Fails the test instead of hanging it.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {DEADLINE:?}"))
}

/// One sprite as the fake coordinator knows it.
#[derive(Clone)]
pub(crate) struct Sprite {
    pub(crate) id: proto::id::SpriteId,
    pub(crate) org: &'static str,
    pub(crate) public: bool,
    pub(crate) was: &'static str,
    /// Whose socket answers for it.
    pub(crate) node: Option<&'static str>,
    /// Where a wake puts it if it is nowhere.
    pub(crate) wakes_at: Result<&'static str, tonic::Code>,
}

pub(crate) struct Coordinator {
    folder: PathBuf,
    pub(crate) sprites: Mutex<HashMap<String, Sprite>>,
    pub(crate) authenticates: AtomicU32,
    pub(crate) resolves: AtomicU32,
    pub(crate) wakes: AtomicU32,
    /// A wake takes a permit and gives it back.
    pub(crate) wake_gate: Semaphore,
}

#[tonic::async_trait]
impl Control for Coordinator {
    async fn authenticate(
        &self,
        request: tonic::Request<AuthenticateRequest>,
    ) -> Result<tonic::Response<AuthenticateReply>, Status> {
        self.authenticates.fetch_add(1, Ordering::SeqCst);
        let org = match request.into_inner().token.as_str() {
            TOKEN => "local",
            FOREIGN_TOKEN => "them",
            _ => return Err(Status::unauthenticated("no such token")),
        };
        Ok(tonic::Response::new(AuthenticateReply { org: org.to_owned(), token_id: "t1".to_owned() }))
    }

    async fn resolve(&self, request: tonic::Request<ResolveRequest>) -> Result<tonic::Response<ResolveReply>, Status> {
        let ResolveRequest { label, org, name, wake } = request.into_inner();
        self.resolves.fetch_add(1, Ordering::SeqCst);
        let sprite = {
            let sprites = self.sprites.lock().unwrap();
            let by_name = |known: &Sprite, text: &str| {
                known.org == org && text.rsplit_once('-').is_some_and(|(its, _)| its == name)
            };
            let found = sprites
                .iter()
                .find(|(text, known)| if label.is_empty() { by_name(known, text) } else { **text == label });
            found.map(|(_, known)| known.clone()).ok_or_else(|| Status::not_found("no such sprite"))?
        };
        let mut node = sprite.node;
        if wake {
            self.wakes.fetch_add(1, Ordering::SeqCst);
            let _permit = self.wake_gate.acquire().await.unwrap();
            node = Some(sprite.wakes_at.map_err(|code| Status::new(code, "no"))?);
        }
        Ok(tonic::Response::new(ResolveReply {
            sprite_id: sprite.id.to_string(),
            name: String::new(),
            org: sprite.org.to_owned(),
            node: node.map(|node| format!("unix:{}", self.folder.join(node).display())).unwrap_or_default(),
            public: sprite.public,
            was: sprite.was.to_owned(),
            http_port: 8080,
        }))
    }
}

/// What arrived at a fake.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// Requests that arrived, and a gate for those that wait.
#[derive(Default)]
pub(crate) struct Arrivals {
    seen: Mutex<Vec<Seen>>,
    count: tokio::sync::watch::Sender<usize>,
}

impl Arrivals {
    pub(crate) fn note(&self, request: &AxumRequest) {
        let seen = Seen {
            method: request.method().to_string(),
            path: request.uri().path_and_query().map_or_else(String::new, ToString::to_string),
            headers: request.headers().clone(),
        };
        self.seen.lock().unwrap().push(seen);
        self.count.send_modify(|count| *count += 1);
    }

    pub(crate) fn all(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn last(&self) -> Seen {
        self.all().pop().expect("a request arrived")
    }

    pub(crate) async fn reach(&self, count: usize) {
        let mut watch = self.count.subscribe();
        soon("requests that arrive", watch.wait_for(|now| *now >= count)).await.unwrap();
    }
}

/// Edge, fakes and a client that trusts the edge's authority.
pub(crate) struct World {
    pub(crate) address: SocketAddr,
    pub(crate) coordinator: Arc<Coordinator>,
    pub(crate) rest: Arc<Arrivals>,
    pub(crate) stop: CancellationToken,
    pub(crate) running: JoinHandle<()>,
    folder: tempfile::TempDir,
    roots: RootCertStore,
}

impl World {
    /// An edge and a coordinator; nodes are added by the tests.
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::ensure(&folder.path().join("ca")).unwrap();
        let identity = ca.server(&ServerNames::new([API], "sprites.localhost")).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.bundle().as_bytes()).unwrap()).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let socket = folder.path().join("coordinator.sock");
        let coordinator = Arc::new(Coordinator {
            folder: folder.path().to_owned(),
            sprites: Mutex::new(sprites()),
            authenticates: AtomicU32::new(0),
            resolves: AtomicU32::new(0),
            wakes: AtomicU32::new(0),
            wake_gate: Semaphore::new(WAKE_PERMITS as usize),
        });
        let rest = Arc::<Arrivals>::default();
        serve(&socket, coordinator_app(Arc::clone(&coordinator), Arc::clone(&rest)));
        let config = Config {
            listen: vec![any],
            identity,
            api_hosts: vec![API.to_owned()],
            sprite_domain: "sprites.localhost".to_owned(),
            coordinator: NodeAddress::Unix(socket),
        };
        let router = Router::bind(config).unwrap();
        let address = router.addresses()[0];
        let stop = CancellationToken::new();
        let running = tokio::spawn(router.run(stop.clone()));
        Self { address, coordinator, rest, stop, running, folder, roots }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A node that answers every request with `answer`.
    pub(crate) fn node<F, R>(
        &self,
        name: &str,
        answer: impl Fn(AxumRequest) -> F + Clone + Send + Sync + 'static,
    ) -> Arc<Arrivals>
    where
        F: Future<Output = R> + Send + 'static,
        R: IntoResponse + 'static,
    {
        let arrivals = Arc::<Arrivals>::default();
        let noted = Arc::clone(&arrivals);
        let app = axum::Router::new().fallback(move |request: AxumRequest| {
            noted.note(&request);
            answer(request)
        });
        serve(&self.path(name), app);
        arrivals
    }

    /// A node that says `ok`, as one that had the sprite running.
    pub(crate) fn plain_node(&self) -> Arc<Arrivals> {
        self.node("node.sock", async |_| ([("x-sprite-wake", "none")], "ok"))
    }

    pub(crate) fn set(&self, label: &str, change: impl FnOnce(&mut Sprite)) {
        change(self.coordinator.sprites.lock().unwrap().get_mut(label).expect("a sprite of the table"));
    }

    pub(crate) async fn try_tls(&self, sni: &str, protocols: &[&str]) -> std::io::Result<TlsStream<TcpStream>> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_root_certificates(self.roots.clone()).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(sni.to_owned()).unwrap(), stream).await
    }

    pub(crate) async fn tls(&self, sni: &str, protocol: &str) -> TlsStream<TcpStream> {
        soon("a TLS handshake", self.try_tls(sni, &[protocol])).await.unwrap()
    }

    pub(crate) async fn http1(&self, sni: &str) -> http1::SendRequest<ClientBody> {
        let (sender, connection) = http1::handshake(TokioIo::new(self.tls(sni, "http/1.1").await)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }

    pub(crate) async fn http2(&self, sni: &str) -> http2::SendRequest<ClientBody> {
        let io = TokioIo::new(self.tls(sni, "h2").await);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    /// A GET over HTTP/1.1 on a connection of its own.
    pub(crate) async fn get(&self, host: &str, path: &str, headers: &[(&str, &str)]) -> Reply {
        self.call("GET", host, path, headers).await
    }

    pub(crate) async fn call(&self, method: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> Reply {
        let mut sender = self.http1(host).await;
        let mut request = Request::builder().method(method).uri(path).header("host", host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = soon(path, sender.send_request(request.body(empty()).unwrap())).await.unwrap();
        Reply::of(answer).await
    }

    /// A GET over HTTP/2 on `sender`'s connection.
    pub(crate) async fn get2(&self, sender: &http2::SendRequest<ClientBody>, host: &str, path: &str) -> Reply {
        let request = Request::builder().uri(format!("https://{host}{path}")).body(empty()).unwrap();
        Reply::of(soon(path, sender.clone().send_request(request)).await.unwrap()).await
    }
}

fn sprites() -> HashMap<String, Sprite> {
    let sprite = |org, public, was, node| Sprite {
        id: proto::id::SpriteId::generate(),
        org,
        public,
        was,
        node,
        wakes_at: Ok("node.sock"),
    };
    let all = [
        (PRIVATE, sprite("local", false, "running", Some("node.sock"))),
        (PUBLIC, sprite("local", true, "running", Some("node.sock"))),
        (ASLEEP, sprite("local", true, "suspended", Some("node.sock"))),
        (NOWHERE, sprite("local", true, "cold", None)),
        (FOREIGN, sprite("them", false, "running", Some("node.sock"))),
    ];
    all.into_iter().map(|(host, sprite)| (label(host).to_owned(), sprite)).collect()
}

pub(crate) fn label(host: &str) -> &str {
    host.split('.').next().unwrap_or_default()
}

fn coordinator_app(coordinator: Arc<Coordinator>, rest: Arc<Arrivals>) -> axum::Router {
    let noted = Arc::clone(&rest);
    axum::Router::new()
        .route_service("/sprites.control.v1.Control/{method}", ControlServer::from_arc(coordinator))
        .route(
            "/sprites.v1.Sprites/Echo",
            axum::routing::post(async move |request: AxumRequest| {
                noted.note(&request);
                grpc_echo(request)
            }),
        )
        .route(BREAKS_OFF, axum::routing::get(break_off))
        .fallback(async move |request: AxumRequest| {
            rest.note(&request);
            (StatusCode::OK, "from the coordinator")
        })
}

/// Unwinds the task of the connection, without the noise of a panic.
async fn break_off() -> StatusCode {
    std::panic::resume_unwind(Box::new("as a test wants it"))
}

/// Sends every message back as it comes and ends with a status in the trailers.
fn grpc_echo(request: AxumRequest) -> AxumResponse {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    trailers.insert("grpc-message", "done".parse().unwrap());
    let body = request.into_body().with_trailers(std::future::ready(Some(Ok(trailers))));
    Response::builder().header("content-type", "application/grpc").body(AxumBody::new(body)).unwrap()
}

fn serve(socket: &Path, app: axum::Router) {
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
}

pub(crate) fn empty() -> ClientBody {
    Empty::new().boxed_unsync()
}

pub(crate) fn full(text: &'static str) -> ClientBody {
    Full::new(Bytes::from_static(text.as_bytes())).boxed_unsync()
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) async fn of(answer: Response<Incoming>) -> Self {
        let (head, body) = answer.into_parts();
        let body = soon("the rest of an answer", body.collect()).await.unwrap().to_bytes();
        Self { status: head.status, headers: head.headers, body: String::from_utf8(body.to_vec()).unwrap() }
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Status and our own code, empty if the answer is not ours.
    pub(crate) fn verdict(&self) -> (u16, &str) {
        (self.status.as_u16(), self.header("x-sprite-error"))
    }
}

impl World {
    /// Until the guard is dropped, no wake is answered.
    pub(crate) async fn take_wake_gate(self: Arc<Self>) -> impl Drop {
        struct Taken(Arc<World>);
        impl Drop for Taken {
            fn drop(&mut self) {
                self.0.coordinator.wake_gate.add_permits(WAKE_PERMITS as usize);
            }
        }
        self.coordinator.wake_gate.acquire_many(WAKE_PERMITS).await.unwrap().forget();
        Taken(self)
    }
}
