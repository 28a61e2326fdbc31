//! A coordinator on a bucket folder and a fake node, called as the edge calls it: over its unix socket.

use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, Method, Request, header},
};
use blockstore::bucket::Bucket;
use hyper_util::rt::TokioIo;
use proto::{node::node_server::NodeServer, paths::SPRITE_ID_HEADER};
use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::ServiceExt as _;

use super::fake_node::{FakeNode, Served, echo};
use crate::{Config, Tokens, node::Node, service};

/// Long enough for anything here on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

pub(super) struct Rig {
    pub(super) folder: tempfile::TempDir,
    pub(super) bucket: Bucket,
    pub(super) node: Arc<FakeNode>,
    pub(super) token: String,
    pub(super) service: service::Service,
    stop: tokio::sync::watch::Sender<bool>,
}

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Answer {
    #[track_caller]
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// Status and the dialect's `error`.
    #[track_caller]
    pub(super) fn refusal(&self) -> (u16, String) {
        let body = self.json();
        assert!(body["message"].as_str().is_some_and(|message| message.len() > 10), "a refusal without advice: {body}");
        (self.status, body["error"].as_str().unwrap_or_default().to_owned())
    }
}

impl Rig {
    pub(super) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bucket = Bucket::open(&format!("dir:{}", folder.path().join("bucket").display())).await.unwrap();
        let node = FakeNode::new(bucket.clone());
        serve_node(&node, folder.path().join("node.sock"));
        let token = Tokens::new(bucket.clone()).mint("local", "test").await.unwrap();
        let config = Config {
            bucket: bucket.clone(),
            node_socket: folder.path().join("node.sock"),
            domain: "sprites.localhost".into(),
            port: 8443,
        };
        let listener = UnixListener::bind(folder.path().join("coordinator.sock")).unwrap();
        let (stop, mut stopped) = tokio::sync::watch::channel(false);
        tokio::spawn(crate::serve(config, listener, async move { drop(stopped.wait_for(|stop| *stop).await) }));
        let service = second_service(&bucket, folder.path().join("node.sock"), stop.subscribe());
        Self { folder, bucket, node, token, service, stop }
    }

    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    pub(super) async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        let mut request = Request::builder().method(Method::from_bytes(method.as_bytes()).unwrap()).uri(path);
        request = request.header(header::AUTHORIZATION, format!("Bearer {}", self.token));
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        self.send(request.body(body).unwrap()).await
    }

    pub(super) async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, None).await
    }

    #[track_caller]
    pub(super) fn create(&self, name: &str) -> impl Future<Output = Value> {
        let created = self.call("POST", "/v1/sprites", Some(serde_json::json!({ "name": name })));
        async move {
            let answer = created.await;
            assert_eq!(answer.status, 201, "{:?}", answer.body);
            answer.json()
        }
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Answer {
        let (parts, body) = self.open(request).await.into_parts();
        let body = tokio::time::timeout(DEADLINE, axum::body::to_bytes(Body::new(body), 64 << 20))
            .await
            .expect("the answer ends");
        Answer { status: parts.status.as_u16(), headers: parts.headers, body: body.unwrap() }
    }

    /// The head of an answer, and its body as it comes.
    pub(super) async fn open(&self, mut request: Request<Body>) -> hyper::Response<hyper::body::Incoming> {
        request.headers_mut().entry(header::HOST).or_insert("api.localhost".parse().unwrap());
        let stream = UnixStream::connect(self.folder.path().join("coordinator.sock")).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        tokio::time::timeout(DEADLINE, sender.send_request(request)).await.expect("an answer").unwrap()
    }

    /// A gRPC channel to the coordinator.
    pub(super) fn channel(&self) -> Channel {
        let path = self.folder.path().join("coordinator.sock");
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://coordinator").connect_with_connector_lazy(connector)
    }

    /// A request with the token in its metadata.
    pub(super) fn authorized<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.token).parse().unwrap());
        request
    }
}

/// Another coordinator's service on the same bucket, without its background tasks.
fn second_service(bucket: &Bucket, node_socket: PathBuf, stop: tokio::sync::watch::Receiver<bool>) -> service::Service {
    service::Service::new(service::Parts {
        bucket: bucket.clone(),
        node: Node::at(node_socket),
        domain: "sprites.localhost".into(),
        port: 8443,
        stop,
    })
}

fn serve_node(node: &Arc<FakeNode>, socket: PathBuf) {
    let control = tonic::service::Routes::new(NodeServer::new(Served(Arc::clone(node)))).into_axum_router();
    let data = Router::new().fallback(echo);
    let app = Router::new().fallback(move |request: Request<Body>| {
        let plane = if request.headers().contains_key(SPRITE_ID_HEADER) { data.clone() } else { control.clone() };
        plane.oneshot(request)
    });
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
}

/// Waits until `look` has something, with a deadline.
pub(super) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = tokio::time::Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < end, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
