//! `/.sprite/api.sock`: HTTP for the programs inside (sprites-api.md §13). Anybody there may use it, so it has bounds of its own.

use std::{
    os::unix::{fs::PermissionsExt as _, net::UnixListener as StdListener},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Path, State},
    http::{Method, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use futures_util::stream;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{net::UnixListener, sync::Semaphore};

use crate::{
    environment::{Environment, NotRunning},
    life::Life,
    log,
    tasks::TaskError,
    watch::{AskError, Hub},
};

pub(crate) const SOCKET: &str = "/.sprite/api.sock";
/// Connections at a time; further ones wait.
const CONNECTIONS_MAX: usize = 64;
/// What is sent here are a few words of JSON.
const BODY_BYTES_MAX: usize = 64 << 10;
/// A client that does not say what it wants is dropped.
const HEADER_LIMIT: Duration = Duration::from_secs(30);
/// How long the host may take to begin an answer, and between two pieces.
const ANSWER_LIMIT: Duration = Duration::from_secs(600);

#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub(crate) hub: Arc<Hub>,
    pub(crate) life: Arc<Life>,
}

/// Serves the socket of an environment that has just started, until it ends.
pub(crate) async fn start(api: Api, environment: &Environment) -> Result<(), NotRunning> {
    let listener = environment.inside(|| {
        drop(std::fs::remove_file(SOCKET));
        let listener = StdListener::bind(SOCKET)?;
        std::fs::set_permissions(SOCKET, std::fs::Permissions::from_mode(0o666))?;
        listener.set_nonblocking(true)?;
        Ok::<_, std::io::Error>(listener)
    });
    let listener = match listener.await?.and_then(UnixListener::from_std) {
        Ok(listener) => listener,
        Err(error) => {
            log!("{SOCKET}: {error}");
            return Ok(());
        }
    };
    let ended = environment.ending()?;
    tokio::spawn(async move {
        tokio::select! {
            () = serve(listener, router(api)) => {}
            () = ended => {}
        }
    });
    Ok(())
}

async fn serve(listener: UnixListener, router: Router) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log!("{SOCKET}: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEADER_LIMIT);
            // A client that breaks off has nobody to tell.
            drop(builder.serve_connection(TokioIo::new(stream), service).await);
            drop(permit);
        });
    }
}

fn router(api: Api) -> Router {
    Router::new()
        .route("/info", get(info))
        .route("/v1/info", get(info))
        .route("/v1/tasks", get(list_tasks).post(create_task).put(put_task))
        .route("/v1/tasks/{name}", get(get_task).put(put_named_task).delete(delete_task))
        .route("/v1/sync", post(forward))
        .route("/v1/checkpoint", post(forward))
        .route("/v1/checkpoints", get(forward))
        .route("/v1/checkpoints/{id}", get(forward))
        .route("/v1/checkpoints/{id}/restore", post(forward))
        .fallback(async |method: Method, uri: Uri| {
            error(StatusCode::NOT_FOUND, format!("not found: {method} {}", uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            error(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not possible on {}", uri.path()))
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api)
}

fn error(status: StatusCode, message: impl Into<String>) -> Response {
    (status, Json(json!({ "error": message.into() }))).into_response()
}

async fn info(State(api): State<Api>) -> Json<Value> {
    let identity = api.life.identity();
    Json(json!({
        "sprite_id": identity.sprite_id,
        "sprite_name": identity.name,
        "sprite_url": identity.url,
        "version": identity.version,
        "org": identity.org,
    }))
}

/// The body of a task's request.
#[derive(Debug, Default, Deserialize)]
struct TaskBody {
    #[serde(default)]
    name: String,
    #[serde(default)]
    expire: Value,
}

fn task_body(body: &[u8]) -> Result<TaskBody, Box<Response>> {
    serde_json::from_slice(body).map_err(|bad| {
        Box::new(error(
            StatusCode::BAD_REQUEST,
            format!("the body is not {{\"name\": text, \"expire\": seconds or duration}}: {bad}"),
        ))
    })
}

fn refused(refusal: &TaskError) -> Response {
    let status = match refusal {
        TaskError::Name | TaskError::Expire => StatusCode::BAD_REQUEST,
        TaskError::Exists(_) => StatusCode::CONFLICT,
        TaskError::TooMany => StatusCode::TOO_MANY_REQUESTS,
    };
    error(status, refusal.to_string())
}

async fn list_tasks(State(api): State<Api>) -> Response {
    Json(json!({ "tasks": api.hub.with_tasks(|tasks, now| tasks.list(now)) })).into_response()
}

async fn get_task(State(api): State<Api>, Path(name): Path<String>) -> Response {
    match api.hub.with_tasks(|tasks, now| tasks.get(&name, now)) {
        Some(task) => Json(task).into_response(),
        None => error(StatusCode::NOT_FOUND, format!("task not found: {name}")),
    }
}

async fn create_task(State(api): State<Api>, body: Bytes) -> Response {
    let body = match task_body(&body) {
        Ok(body) => body,
        Err(refusal) => return *refusal,
    };
    match api.hub.with_tasks(|tasks, now| tasks.create(&body.name, &body.expire, now)) {
        Ok(task) => (StatusCode::CREATED, Json(task)).into_response(),
        Err(refusal) => refused(&refusal),
    }
}

async fn put_task(State(api): State<Api>, body: Bytes) -> Response {
    match task_body(&body) {
        Ok(body) => put(&api, &body.name, &body.expire),
        Err(refusal) => *refusal,
    }
}

async fn put_named_task(State(api): State<Api>, Path(name): Path<String>, body: Bytes) -> Response {
    match task_body(&body) {
        Ok(body) => put(&api, &name, &body.expire),
        Err(refusal) => *refusal,
    }
}

fn put(api: &Api, name: &str, expire: &Value) -> Response {
    match api.hub.with_tasks(|tasks, now| tasks.put(name, expire, now)) {
        Ok(task) => Json(task).into_response(),
        Err(refusal) => refused(&refusal),
    }
}

async fn delete_task(State(api): State<Api>, Path(name): Path<String>) -> Response {
    if api.hub.with_tasks(|tasks, now| tasks.delete(&name, now)) {
        StatusCode::NO_CONTENT.into_response()
    } else {
        error(StatusCode::NOT_FOUND, format!("task not found: {name}"))
    }
}

/// The host's session ended before its answer did.
#[derive(Debug, thiserror::Error)]
#[error("the sprite's host was restarted before it had answered; look whether it was done before you repeat it")]
struct Lost;

/// What only the host can do.
async fn forward(State(api): State<Api>, method: Method, uri: Uri, body: Bytes) -> Response {
    let path = uri.path_and_query().map_or(uri.path(), |path| path.as_str());
    let mut answer = match api.hub.ask(method.as_str(), path, body.to_vec()).await {
        Ok(answer) => answer,
        Err(refusal @ (AskError::NoHost | AskError::TooMany)) => {
            return error(StatusCode::SERVICE_UNAVAILABLE, refusal.to_string());
        }
    };
    let first = match tokio::time::timeout(ANSWER_LIMIT, answer.pieces.recv()).await {
        Ok(Some(first)) => first,
        Ok(None) => return error(StatusCode::BAD_GATEWAY, Lost.to_string()),
        Err(_elapsed) => return error(StatusCode::GATEWAY_TIMEOUT, "the sprite's host does not answer"),
    };
    let status = u16::try_from(first.status)
        .ok()
        .and_then(|status| StatusCode::from_u16(status).ok())
        .unwrap_or(StatusCode::BAD_GATEWAY);
    let kind = first.content_type.clone();
    // `first` was taken already; then what follows, until the piece that says so. A body that ends without it is an error for its reader.
    let pieces = stream::try_unfold((Some(first), Some(answer)), |(first, answer)| async move {
        let Some(mut answer) = answer else { return Ok(None) };
        let piece = match first {
            Some(first) => first,
            None => tokio::time::timeout(ANSWER_LIMIT, answer.pieces.recv()).await.ok().flatten().ok_or(Lost)?,
        };
        let rest = (!piece.done).then_some(answer);
        Ok::<_, Lost>(Some((Bytes::from(piece.data), (None, rest))))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    *response.status_mut() = status;
    if let Ok(kind) = kind.parse() {
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use proto::agent::AnswerRequest;

    use super::*;
    use crate::watch::tests::{LIMIT, hub, request};

    #[tokio::test]
    async fn a_restarted_host_is_an_error_at_once() {
        let (hub, _sessions, environment) = hub();
        let life = Life::new(environment, Arc::clone(&hub));
        let mut host = hub.watch();
        let api = Api { hub, life };
        let asked = tokio::spawn(forward(State(api), Method::POST, Uri::from_static("/v1/checkpoint"), Bytes::new()));
        request(&mut host).await;
        drop(host);
        let response = tokio::time::timeout(LIMIT, asked).await.expect("waits for a host that has left").unwrap();
        assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
        let text = response.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&text).contains("was restarted"), "{text:?}");
    }

    #[tokio::test]
    async fn half_an_answer_does_not_look_whole() {
        let (hub, _sessions, environment) = hub();
        let life = Life::new(environment, Arc::clone(&hub));
        let mut host = hub.watch();
        let api = Api { hub: Arc::clone(&hub), life };
        let asked = tokio::spawn(forward(State(api), Method::GET, Uri::from_static("/v1/checkpoints"), Bytes::new()));
        let id = request(&mut host).await.id;
        hub.answer(AnswerRequest { id, status: 200, data: b"[".to_vec(), ..AnswerRequest::default() }).await;
        let response = tokio::time::timeout(LIMIT, asked).await.unwrap().unwrap();
        drop(host);
        let body = tokio::time::timeout(LIMIT, response.into_body().collect()).await.unwrap();
        assert!(body.is_err(), "cut short, and nobody knows");
    }
}
