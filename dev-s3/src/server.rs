//! Connections, and the faults that show at the level of HTTP.
//!
//! One task accepts; each connection is a task of its set, at most [`CONNECTIONS_MAX`]. Dropping [`Server`] ends them all at once, which
//! is what a test of "the bucket is gone" wants.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hyper::{Method, body::Incoming, service::Service};
use hyper_util::rt::TokioIo;
use s3s::{
    HttpError, HttpResponse,
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
};

use crate::{Config, Faults, OpenStoreError, api::Api, faults::FaultCell, store::Store};

/// Connections served at once; further clients wait in the listener's backlog.
const CONNECTIONS_MAX: usize = 1_024;
/// Pause after an accept that failed for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Store(#[from] OpenStoreError),
    #[error("cannot create bucket {bucket:?}")]
    Bucket {
        bucket: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen on {listen}")]
    Listen {
        listen: SocketAddr,
        #[source]
        source: io::Error,
    },
}

/// A running server. It stops when this is dropped.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    faults: Arc<FaultCell>,
    task: JoinHandle<()>,
}

impl Server {
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://address`, as clients want it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Replaces the faults from the next request on.
    pub fn set_faults(&self, faults: Faults) {
        self.faults.set(faults);
    }

    /// Waits for the server, which ends only with its runtime.
    pub async fn wait(mut self) {
        // An error is our own abort, or a panic that was reported already.
        drop((&mut self.task).await);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts a server and returns once it accepts connections.
pub async fn serve(config: Config) -> Result<Server, ServeError> {
    let store = Arc::new(Store::open(config.root.as_deref())?);
    for bucket in &config.buckets {
        match store.create_bucket(bucket) {
            Ok(_) => {}
            Err(source) => return Err(ServeError::Bucket { bucket: bucket.clone(), source }),
        }
    }
    let faults = Arc::new(FaultCell::new(config.faults, config.seed));
    let mut builder = S3ServiceBuilder::new(Api { store, faults: Arc::clone(&faults) });
    builder.set_auth(SimpleAuth::from_single(config.access_key, config.secret_key));
    let service = Faulty { s3: builder.build(), faults: Arc::clone(&faults) };
    let failed = |source| ServeError::Listen { listen: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    let task = tokio::spawn(accept(listener, service));
    Ok(Server { addr, faults, task })
}

async fn accept(listener: TcpListener, service: Faulty) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let service = service.clone();
                connections.spawn(async move {
                    let _slot = slot;
                    serve_connection(stream, service).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, service: Faulty) {
    // Without it head and body of a small answer meet Nagle and delayed acknowledgement: 40 ms for each.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "connection ended");
    }
}

/// The S3 service behind the faults that any request may meet.
#[derive(Clone)]
struct Faulty {
    s3: S3Service,
    faults: Arc<FaultCell>,
}

impl Faulty {
    async fn answer(self, request: hyper::Request<Incoming>) -> Result<HttpResponse, HttpError> {
        let latency = self.faults.get(|f| f.latency);
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        if self.faults.hits(|f| f.fail) {
            return Ok(failure());
        }
        let writes = matches!(*request.method(), Method::PUT | Method::POST | Method::DELETE);
        let response = Service::call(&self.s3, request).await?;
        if self.faults.hits(|f| f.drop_reply) {
            return Err(HttpError::new("injected fault: answer dropped".into()));
        }
        if writes && response.status().is_success() && self.faults.hits(|f| f.fail_after_apply) {
            return Ok(failure());
        }
        Ok(response)
    }
}

fn failure() -> HttpResponse {
    let body = "<Error><Code>InternalError</Code><Message>injected fault</Message></Error>".to_owned();
    let mut response = HttpResponse::new(s3s::Body::from(body));
    *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
    response
}

impl Service<hyper::Request<Incoming>> for Faulty {
    type Response = HttpResponse;
    type Error = HttpError;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send>>;

    fn call(&self, request: hyper::Request<Incoming>) -> Self::Future {
        Box::pin(self.clone().answer(request))
    }
}
