//! A server that speaks the dialect. Its sprites: `demo` is there, `nobody` is not, `moving` answers 503 the first two times.
//!
//! Its commands: `echo WORDS`, `both`, `exit N`, `cat`, `query` (prints the request's query), `trap` (waits for a signal, says which, exits 7),
//! `deaf` (reads nothing, ends by the kill call), `yes` (prints for ever), `vanish` (the connection breaks), `stopped` (the sprite goes), `shell`
//! (echoes what is typed; `q` ends it with 3).

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{
        Path as Segments, Query, RawQuery, Request, State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{any, delete, get, post},
};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::sync::Notify;

#[derive(Default)]
struct Log {
    requests: Mutex<Vec<String>>,
    refusals: AtomicU32,
    killed: Notify,
}

type Shared = Arc<Log>;

pub(crate) struct Fake {
    address: SocketAddr,
    log: Shared,
    home: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let log = Shared::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let app = app(Arc::clone(&log));
        runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, log, home: tempfile::tempdir().unwrap(), _runtime: runtime }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://api.localhost:{}", self.address.port())
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// What was asked and said so far, one line each.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.requests.lock().unwrap().clone()
    }

    pub(crate) fn heard(&self, text: &str) -> bool {
        self.log().iter().any(|line| line.contains(text))
    }
}

fn note(log: &Shared, line: impl Into<String>) {
    log.requests.lock().unwrap().push(line.into());
}

fn app(log: Shared) -> Router {
    Router::new()
        .route("/v1/sprites", get(list).post(create))
        .route("/v1/sprites/{name}", get(info).put(update).delete(gone))
        .route("/v1/sprites/{name}/exec", any(exec))
        .route("/v1/sprites/{name}/exec/{id}", any(attach))
        .route("/v1/sprites/{name}/exec/{id}/kill", post(kill))
        .route("/v1/sprites/{name}/proxy", any(proxy))
        .route("/v1/sprites/{name}/checkpoint", post(checkpoint))
        .route("/v1/sprites/{name}/checkpoints", get(checkpoints))
        .route("/v1/sprites/{name}/checkpoints/{id}", delete(gone_checkpoint).get(one_checkpoint))
        .route("/v1/sprites/{name}/checkpoints/{id}/restore", post(restore))
        .route("/v1/sprites/{name}/{call}", post(life))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&log), gate))
        .with_state(log)
}

/// Token, log, and the sprites that are not there.
async fn gate(State(log): State<Shared>, request: Request, next: axum::middleware::Next) -> Response {
    note(&log, format!("{} {}", request.method(), request.uri()));
    if request.headers().get(header::AUTHORIZATION).is_none_or(|value| value != "Bearer acme/org/tok/secret") {
        return refuse(StatusCode::UNAUTHORIZED, json!({"error": "authentication failed"}));
    }
    let sprite = request.uri().path().split('/').nth(3).unwrap_or_default().to_owned();
    match sprite.as_str() {
        "nobody" => refuse(StatusCode::NOT_FOUND, json!({"error": "sprite not found"})),
        "moving" if log.refusals.fetch_add(1, Ordering::SeqCst) < 2 => {
            let mut response =
                refuse(StatusCode::SERVICE_UNAVAILABLE, json!({"error": "sprite is moving", "message": "try again"}));
            response.headers_mut().insert(header::RETRY_AFTER, "0".parse().unwrap());
            response
        }
        _ => next.run(request).await,
    }
}

fn refuse(status: StatusCode, body: Value) -> Response {
    (status, Json(body)).into_response()
}

fn object(name: &str) -> Value {
    json!({
        "name": name, "id": "sprite-1", "organization": "acme", "status": "warm", "state": "suspended", "reason": "idle", "size": "m",
        "url": format!("https://{name}-abcdef.sprites.localhost"), "url_settings": {"auth": "sprite"}, "created_at": "2026-01-01T00:00:00.000Z",
        "disk_bytes": 107_374_182_400_u64, "used_bytes": 1_503_238_553_u64, "labels": [],
    })
}

async fn list(Query(query): Query<std::collections::HashMap<String, String>>, request: Request) -> Response {
    if request.headers().get(header::ACCEPT).is_some_and(|accept| accept == "application/x-ndjson") {
        let lines = "{\"type\":\"heartbeat\"}\n\n{\"name\":\"demo\",\"status\":\"running\",\"timestamp\":\"2026-01-01T00:00:00Z\"}\n";
        return lines.into_response();
    }
    let (names, next) = match query.get("continuation_token").map(String::as_str) {
        None => (["alpha", "beta"], json!("more")),
        Some("more") => (["demo", "zeta"], Value::Null),
        Some(_) => return refuse(StatusCode::BAD_REQUEST, json!({"error": "bad token"})),
    };
    let sprites: Vec<Value> = names.iter().map(|name| object(name)).collect();
    Json(json!({"sprites": sprites, "has_more": !next.is_null(), "next_continuation_token": next, "name": "acme"}))
        .into_response()
}

async fn create(State(log): State<Shared>, Json(body): Json<Value>) -> Response {
    note(&log, format!("create {body}"));
    match body["name"].as_str().unwrap_or_default() {
        "" => refuse(StatusCode::UNPROCESSABLE_ENTITY, json!({"error": "name is required"})),
        "taken" => refuse(StatusCode::CONFLICT, json!({"error": "conflict"})),
        name if name.chars().any(char::is_uppercase) => {
            refuse(StatusCode::UNPROCESSABLE_ENTITY, json!({"error": "invalid"}))
        }
        name => (StatusCode::CREATED, Json(object(name))).into_response(),
    }
}

async fn info(Segments(name): Segments<String>) -> Response {
    Json(object(&name)).into_response()
}

async fn update(State(log): State<Shared>, Segments(name): Segments<String>, Json(body): Json<Value>) -> Response {
    note(&log, format!("update {body}"));
    let mut object = object(&name);
    if body["url_settings"]["auth"] == "public" {
        object["url_settings"]["auth"] = json!("public");
    }
    Json(object).into_response()
}

async fn gone() -> StatusCode {
    StatusCode::NO_CONTENT
}

async fn life(
    State(log): State<Shared>,
    Segments((name, call)): Segments<(String, String)>,
    Json(body): Json<Value>,
) -> Response {
    note(&log, format!("{call} {body}"));
    Json(object(&name)).into_response()
}

async fn checkpoint(State(log): State<Shared>, Json(body): Json<Value>) -> Response {
    note(&log, format!("checkpoint {body}"));
    if body["comment"] == "fail" {
        return "{\"type\":\"info\",\"data\":\"trying\"}\n{\"type\":\"error\",\"error\":\"the disk is full\"}\n"
            .into_response();
    }
    if body["comment"] == "break" {
        return "{\"type\":\"info\",\"data\":\"trying\"}\n".into_response();
    }
    let lines = [
        json!({"type": "info", "data": "Creating checkpoint..."}),
        json!({"type": "info", "data": "  ID: v3"}),
        json!({"type": "complete", "data": "Checkpoint v3 created successfully"}),
    ];
    // A blank line keeps a slow stream alive; the last one has no newline.
    format!("{}\n\n{}\n{}", lines[0], lines[1], lines[2]).into_response()
}

async fn checkpoints() -> Response {
    Json(json!([{"id": "v1", "create_time": "2026-01-01T00:00:00Z", "comment": "before the mess", "durable": true}, {"id": "Current", "create_time": "2026-01-01T00:00:00Z"}]))
        .into_response()
}

async fn one_checkpoint(Segments((_, id)): Segments<(String, String)>) -> Response {
    Json(json!({"id": id, "create_time": "2026-01-01T00:00:00Z", "comment": "c"})).into_response()
}

async fn gone_checkpoint(Segments((_, id)): Segments<(String, String)>) -> Response {
    match id.as_str() {
        "v1" => refuse(
            StatusCode::CONFLICT,
            json!({"error": "v1 is the current base", "message": "restore another one first"}),
        ),
        _ => StatusCode::NO_CONTENT.into_response(),
    }
}

async fn restore(Segments((_, id)): Segments<(String, String)>) -> Response {
    match id.as_str() {
        "v1" => json!({"type": "complete", "data": "Restored v1"}).to_string().into_response(),
        _ => refuse(StatusCode::NOT_FOUND, json!({"error": format!("checkpoint not found: {id}")})),
    }
}

async fn kill(State(log): State<Shared>, RawQuery(query): RawQuery) -> Response {
    note(&log, format!("kill {}", query.unwrap_or_default()));
    log.killed.notify_one();
    json!({"type": "complete", "exit_code": 130}).to_string().into_response()
}

fn words(query: &str, key: &str) -> Vec<String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .filter(|(known, _)| *known == key)
        .map(|(_, value)| percent_encoding::percent_decode_str(value).decode_utf8().unwrap().into_owned())
        .collect()
}

async fn exec(
    State(log): State<Shared>,
    RawQuery(query): RawQuery,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
    body: Body,
) -> Response {
    let query = query.unwrap_or_default();
    let argv = words(&query, "cmd");
    match upgrade {
        Ok(upgrade) => upgrade.on_upgrade(move |socket| session(socket, log, query, argv)),
        Err(_no_websocket) if argv.is_empty() => {
            Json(json!({"count": 1, "sessions": [{"id": "42", "command": "/usr/bin/bash -l", "created": "2026-01-01T00:00:00Z", "tty": true, "workdir": "/home/sprite"}]})).into_response()
        }
        Err(_no_websocket) => http_exec(&argv, body).await,
    }
}

/// Frames as chunks, back to back.
async fn http_exec(argv: &[String], body: Body) -> Response {
    let input = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let mut frames: Vec<Bytes> = Vec::new();
    match argv[0].as_str() {
        "cat" => frames.extend(input.chunks(1000).map(|piece| Bytes::from([&[1], piece].concat()))),
        "both" => frames.extend([Bytes::from_static(b"\x01out"), Bytes::from_static(b"\x02err")]),
        other => panic!("{other} over HTTP"),
    }
    frames.push(Bytes::from_static(b"\x03\x05"));
    Body::from_stream(futures_util::stream::iter(frames.into_iter().map(Ok::<_, std::io::Error>))).into_response()
}

async fn attach(
    State(log): State<Shared>,
    Segments((_, id)): Segments<(String, String)>,
    upgrade: WebSocketUpgrade,
) -> Response {
    if id != "42" {
        return refuse(StatusCode::NOT_FOUND, json!({"error": format!("session not found: {id}")}));
    }
    upgrade.on_upgrade(move |socket| session(socket, log, "tty=true".to_owned(), vec!["shell".into()]))
}

async fn say(socket: &mut WebSocket, stream: u8, text: &[u8]) {
    // The client may have left, which is what some tests are about.
    drop(socket.send(Message::Binary(Bytes::from([&[stream], text].concat()))).await);
}

async fn end(mut socket: WebSocket, code: u8, tty: bool) {
    if !tty {
        say(&mut socket, 3, &[code]).await;
    }
    drop(socket.send(Message::Text(json!({"type": "exit", "exit_code": code, "code": code}).to_string().into())).await);
    close(&mut socket, if tty && code != 0 { 4001 } else { 1000 }, "").await;
}

async fn close(socket: &mut WebSocket, code: u16, reason: &'static str) {
    drop(socket.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await);
    while let Some(Ok(_)) = socket.recv().await {}
}

async fn session(mut socket: WebSocket, log: Shared, query: String, argv: Vec<String>) {
    let tty = query.contains("tty=true");
    let info = json!({"type": "session_info", "session_id": "42", "command": argv.join(" "), "created": 1, "cols": 80, "rows": 24, "is_owner": true, "tty": tty});
    socket.send(Message::Text(info.to_string().into())).await.unwrap();
    let code = match argv[0].as_str() {
        "echo" => {
            say(&mut socket, 1, argv[1..].join(" ").as_bytes()).await;
            0
        }
        "both" => {
            say(&mut socket, 1, b"out").await;
            drop(socket.send(Message::Text(r#"{"type":"keepalive"}"#.into())).await);
            say(&mut socket, 2, b"err").await;
            0
        }
        "exit" => argv[1].parse().unwrap(),
        "query" => {
            say(&mut socket, 1, query.as_bytes()).await;
            0
        }
        "cat" => cat(&mut socket).await,
        "trap" => trap(&mut socket, &log).await,
        "shell" => match shell(&mut socket, &log).await {
            Some(code) => code,
            None => return note(&log, "left"),
        },
        "deaf" => {
            say(&mut socket, 1, b"ready\n").await;
            log.killed.notified().await;
            130
        }
        "yes" => return yes(socket, &log).await,
        "vanish" => return say(&mut socket, 1, b"part").await,
        "stopped" => return close(&mut socket, 1012, "the sprite was stopped").await,
        other => panic!("no command {other}"),
    };
    end(socket, code, tty).await;
}

async fn cat(socket: &mut WebSocket) -> u8 {
    while let Some(Ok(message)) = socket.recv().await {
        if let Message::Binary(data) = message {
            match data[0] {
                0 => say(socket, 1, &data[1..]).await,
                4 => return 0,
                other => panic!("stream {other}"),
            }
        }
    }
    99
}

async fn trap(socket: &mut WebSocket, log: &Shared) -> u8 {
    say(socket, 1, b"ready\n").await;
    while let Some(Ok(message)) = socket.recv().await {
        if let Message::Text(text) = message {
            note(log, format!("said {text}"));
            say(socket, 1, text.as_bytes()).await;
            return 7;
        }
    }
    99
}

/// `None` if the client left.
async fn shell(socket: &mut WebSocket, log: &Shared) -> Option<u8> {
    drop(socket.send(Message::Binary(Bytes::from_static(b"$ "))).await);
    loop {
        match socket.recv().await {
            Some(Ok(Message::Binary(typed))) if typed.contains(&b'q') => return Some(3),
            Some(Ok(Message::Binary(typed))) => {
                note(log, format!("typed {typed:?}"));
                drop(socket.send(Message::Binary(typed)).await);
            }
            Some(Ok(Message::Text(text))) => note(log, format!("said {text}")),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
        }
    }
}

async fn yes(socket: WebSocket, log: &Shared) {
    let (mut sink, mut stream) = socket.split();
    let line = Bytes::from([&[1_u8][..], &b"y\n".repeat(8192)].concat());
    let listen = async {
        while let Some(Ok(message)) = stream.next().await {
            if let Message::Text(text) = message {
                note(log, format!("said {text}"));
            }
        }
    };
    let print = async { while futures_util::SinkExt::send(&mut sink, Message::Binary(line.clone())).await.is_ok() {} };
    tokio::join!(listen, print);
    note(log, "left");
}

async fn proxy(State(log): State<Shared>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(move |mut socket| async move {
        let Some(Ok(Message::Text(wanted))) = socket.recv().await else { return };
        note(&log, format!("proxy {wanted}"));
        let wanted: Value = serde_json::from_str(&wanted).unwrap();
        if wanted["port"] == 1 {
            drop(
                socket
                    .send(Message::Text(json!({"status": "error", "error": "connection refused"}).to_string().into()))
                    .await,
            );
            return close(&mut socket, 4004, "connection refused").await;
        }
        drop(
            socket.send(Message::Text(json!({"status": "connected", "target": "10.0.0.1:7"}).to_string().into())).await,
        );
        // An echo that says goodbye: what it prints after our side's end must arrive.
        while let Some(Ok(message)) = socket.recv().await {
            if let Message::Binary(data) = message {
                let done = data.ends_with(b"bye\n");
                drop(socket.send(Message::Binary(data)).await);
                if done {
                    return close(&mut socket, 1000, "").await;
                }
            }
        }
    })
}
