//! The data plane against a small agent, over real sockets.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::http::Request as HttpRequest;
use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Duration, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, protocol::CloseFrame},
};

use tokio_util::sync::CancellationToken;

use super::{Awake, Dial, in_front_of, router};
use crate::{agent::AgentClient, host::WakeError};

mod ended;
mod fake_agent;

/// Any single step; a step that needs more hangs.
const STEP: Duration = Duration::from_secs(10);
const ID: &str = "0198a5f0-0000-7000-8000-000000000001";

type Socket = WebSocketStream<TcpStream>;

/// A node with one sprite.
struct Node {
    address: SocketAddr,
    /// Requests that hold the sprite awake.
    held: Arc<AtomicUsize>,
    /// The end of its VM.
    ended: CancellationToken,
    /// So many wakes give a VM that has ended before anything could be asked of it.
    stillborn: Arc<AtomicUsize>,
}

struct Hold(Arc<AtomicUsize>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Reaches what listens on this machine's 127.0.0.2 as if it were the guest's network.
fn dial() -> Dial {
    Arc::new(|port| TcpStream::connect(SocketAddr::from(([127, 0, 0, 2], port))).boxed())
}

async fn node() -> Node {
    let agent = fake_agent::connect().await;
    node_of(agent).await
}

async fn node_of(agent: AgentClient) -> Node {
    let held = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&held);
    let (ended, stillborn) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
    let (end, stillborns) = (ended.clone(), Arc::clone(&stillborn));
    let data = router(move |id| {
        let (agent, count) = (agent.clone(), Arc::clone(&count));
        let ended = end.child_token();
        if stillborns.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            ended.cancel();
        }
        async move {
            if id.to_string() != ID {
                return Err(WakeError::NotHere(id));
            }
            count.fetch_add(1, Ordering::SeqCst);
            Ok(Awake { agent, dial: dial(), ended, was: "paused", hold: Box::new(Hold(count)) })
        }
    });
    let control = axum::Router::new().fallback(|| async { "control" });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, in_front_of(control, data)).await });
    Node { address, held, ended, stillborn }
}

impl Node {
    async fn socket(&self, path: &str) -> Result<Socket, Box<tungstenite::Error>> {
        self.socket_as(path, "test").await
    }

    async fn socket_as(&self, path: &str, agent: &str) -> Result<Socket, Box<tungstenite::Error>> {
        let request = HttpRequest::builder()
            .uri(format!("ws://{}/v1/sprites/x{path}", self.address))
            .header("host", "api.localhost")
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", tungstenite::handshake::client::generate_key())
            .header("user-agent", agent)
            .header("x-sprite-id", ID)
            .body(())
            .unwrap();
        let stream = TcpStream::connect(self.address).await.unwrap();
        match timeout(STEP, tokio_tungstenite::client_async(request, stream)).await.expect("an answer") {
            Ok((socket, response)) => {
                if path.starts_with("/exec") {
                    assert_eq!(response.headers()["x-sprite-capabilities"], "signal");
                    assert_eq!(response.headers()["sprite-version"], "0.1.0");
                }
                Ok(socket)
            }
            Err(error) => Err(Box::new(error)),
        }
    }

    /// Status and JSON of a refused handshake.
    async fn refused(&self, path: &str) -> (u16, Value) {
        match *self.socket(path).await.expect_err("a refusal") {
            tungstenite::Error::Http(response) => {
                let body = response.body().as_deref().unwrap_or_default();
                (response.status().as_u16(), serde_json::from_slice(body).unwrap())
            }
            other => panic!("{other}"),
        }
    }

    /// One request, byte by byte; returns head and body as they are on the wire.
    async fn http(&self, request: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.replace('\n', "\r\n").as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        timeout(STEP, stream.read_to_end(&mut answer)).await.expect("an end").unwrap();
        let end = answer.windows(4).position(|part| part == b"\r\n\r\n").expect("a head") + 4;
        (String::from_utf8_lossy(&answer[..end]).to_lowercase(), answer.split_off(end))
    }

    async fn get(&self, path: &str) -> (String, Value) {
        let request = format!("GET {path} HTTP/1.1\nhost: a\nx-sprite-id: {ID}\nconnection: close\n\n");
        let (head, body) = self.http(&request).await;
        (head, serde_json::from_slice(&body).unwrap_or_default())
    }

    async fn await_released(&self) {
        let released = async {
            while self.held.load(Ordering::SeqCst) > 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(STEP, released).await.expect("the sprite is let go");
    }
}

async fn next(socket: &mut Socket) -> Message {
    loop {
        let message = timeout(STEP, socket.next()).await.expect("a message").expect("not the end").expect("no error");
        if !matches!(message, Message::Ping(_) | Message::Pong(_)) {
            return message;
        }
    }
}

async fn next_json(socket: &mut Socket) -> Value {
    match next(socket).await {
        Message::Text(text) => serde_json::from_str(&text).unwrap(),
        other => panic!("{other:?}"),
    }
}

async fn next_binary(socket: &mut Socket) -> Vec<u8> {
    match next(socket).await {
        Message::Binary(data) => data.to_vec(),
        other => panic!("{other:?}"),
    }
}

async fn close_code(socket: &mut Socket) -> u16 {
    match next(socket).await {
        Message::Close(Some(CloseFrame { code, .. })) => code.into(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_file_system_is_grown_until_the_guest_knows_its_new_disk() {
    let agent = fake_agent::connect().await;
    timeout(STEP, agent.grow_filesystem(120 << 30)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_command_ends_as_every_client_needs_it() {
    let node = node().await;
    let mut socket = node.socket("/exec?cmd=both-streams-7&path=both-streams-7&stdin=true").await.unwrap();
    let info = next_json(&mut socket).await;
    assert_eq!(info["type"], "session_info");
    assert_eq!((info["session_id"].as_str(), info["tty"].as_bool()), (Some("1"), Some(false)));
    assert_eq!(info["created"], 1_700_000_000);
    assert_eq!(next_binary(&mut socket).await, b"\x01hi");
    assert_eq!(next_binary(&mut socket).await, b"\x02e");
    assert_eq!(next_binary(&mut socket).await, b"\x03\x07");
    assert_eq!(next_json(&mut socket).await, json!({ "type": "exit", "exit_code": 7, "code": 7 }));
    assert_eq!(close_code(&mut socket).await, 1000);
    drop(socket);
    node.await_released().await;
}

#[tokio::test]
async fn a_terminal_has_no_frames_and_says_failure_by_its_close_code() {
    let node = node().await;
    let mut socket = node.socket("/exec?cmd=both-streams-7&tty=true").await.unwrap();
    assert_eq!(next_json(&mut socket).await["tty"], true);
    assert_eq!(next_binary(&mut socket).await, b"hi");
    assert_eq!(next_binary(&mut socket).await, b"e");
    assert_eq!(next_json(&mut socket).await["exit_code"], 7);
    assert_eq!(close_code(&mut socket).await, 4001);
}

#[tokio::test]
async fn input_reaches_the_command_in_every_form() {
    let node = node().await;
    let mut socket = node.socket("/exec?cmd=cat&stdin=true").await.unwrap();
    next_json(&mut socket).await;
    let large: Vec<u8> = (0..300_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    socket.send(Message::binary([&[0], large.as_slice()].concat())).await.unwrap();
    let mut echoed: Vec<u8> = Vec::new();
    while echoed.len() < large.len() {
        let frame = next_binary(&mut socket).await;
        assert_eq!(frame[0], 1);
        echoed.extend(&frame[1..]);
    }
    assert!(echoed == large);
    socket.send(Message::text(r#"{"type":"signal","signal":"SIGINT"}"#)).await.unwrap();
    assert_eq!(next_binary(&mut socket).await, b"\x02SIGINT");
    socket.send(Message::text(r#"{"type":"unknown"}"#)).await.unwrap();
    socket.send(Message::text("not json")).await.unwrap();
    socket.send(Message::binary(vec![4])).await.unwrap();
    assert_eq!(next_binary(&mut socket).await, b"\x03\x00");
    next_json(&mut socket).await;
    assert_eq!(close_code(&mut socket).await, 1000);
}

#[tokio::test]
async fn attaching_works_in_both_forms() {
    let node = node().await;
    for path in ["/exec/9?stdin=true", "/exec?id=9", "/exec?session_id=9&cmd=bash&path=bash"] {
        let mut socket = node.socket(path).await.unwrap();
        let info = next_json(&mut socket).await;
        assert_eq!((info["session_id"].as_str(), info["tty"].as_bool()), (Some("9"), Some(true)), "{path}");
        socket.send(Message::binary(b"\x04x".to_vec())).await.unwrap();
        assert_eq!(next_binary(&mut socket).await, b"\x04x", "a terminal takes every byte");
        socket.send(Message::text(r#"{"type":"resize","rows":50,"cols":132}"#)).await.unwrap();
        assert_eq!(next_binary(&mut socket).await, b"50 132");
        socket.close(Some(CloseFrame { code: 1000.into(), reason: "".into() })).await.unwrap();
        assert_eq!(close_code(&mut socket).await, 1000);
    }
    node.await_released().await;
}

#[tokio::test]
async fn refusals_come_before_the_switch_and_are_json() {
    let node = node().await;
    let (status, body) = node.refused("/exec/77").await;
    assert_eq!((status, body["error"].as_str()), (404, Some("session not found: 77")));
    let (status, body) = node.refused("/exec?cmd=refused&dir=/no").await;
    assert_eq!(status, 400);
    assert!(body["message"].as_str().unwrap().contains("/no"), "{body}");
    assert_eq!(node.refused("/exec?cmd=cat&env=NOVALUE").await.0, 400);
    assert_eq!(node.refused("/exec?cmd=cat&max_run_after_disconnect=soon").await.0, 400);
    node.await_released().await;
}

#[tokio::test]
async fn a_guest_that_goes_away_is_no_exit() {
    let node = node().await;
    let mut socket = node.socket("/exec?cmd=vanish").await.unwrap();
    next_json(&mut socket).await;
    assert_eq!(close_code(&mut socket).await, 1012);
}

#[tokio::test]
async fn a_silent_command_is_kept_alive_by_a_message() {
    let node = node().await;
    let mut socket = node.socket("/exec?cmd=silent").await.unwrap();
    next_json(&mut socket).await;
    let begun = std::time::Instant::now();
    let message = timeout(Duration::from_secs(30), async {
        loop {
            match socket.next().await.expect("not the end").expect("no error") {
                Message::Text(text) => return text,
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    });
    assert_eq!(message.await.expect("a message").as_str(), r#"{"type":"keepalive"}"#);
    assert!(begun.elapsed() > Duration::from_secs(13), "{:?}", begun.elapsed());
    drop(socket);
    node.await_released().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_guest_and_its_end_is_noticed() {
    let node = node().await;
    let mut socket = node.socket("/exec?cmd=endless").await.unwrap();
    next_json(&mut socket).await;
    next_binary(&mut socket).await;
    drop(socket);
    node.await_released().await;
}

#[tokio::test]
async fn over_http_each_chunk_is_one_frame() {
    let node = node().await;
    let head = format!("host: a\nx-sprite-id: {ID}\nconnection: close\n");
    let request = format!("POST /v1/sprites/x/exec?cmd=both-streams-7 HTTP/1.1\n{head}content-length: 0\n\n");
    let (answer, body) = node.http(&request).await;
    assert!(answer.starts_with("http/1.1 200"), "{answer}");
    assert!(answer.contains("content-type: application/octet-stream"), "{answer}");
    assert_eq!(body, b"3\r\n\x01hi\r\n2\r\n\x02e\r\n2\r\n\x03\x07\r\n0\r\n\r\n");

    let request = format!("POST /v1/sprites/x/exec?cmd=cat&stdin=true HTTP/1.1\n{head}content-length: 5\n\nhello");
    let (_, body) = node.http(&request).await;
    assert_eq!(body, b"6\r\n\x01hello\r\n2\r\n\x03\x00\r\n0\r\n\r\n");
    let request = format!("POST /v1/sprites/x/exec?cmd=half-then-vanish HTTP/1.1\n{head}content-length: 0\n\n");
    let (_, body) = node.http(&request).await;
    assert!(body.starts_with(b"5\r\n\x01half\r\n"), "{body:?}");
    assert!(!body.ends_with(b"0\r\n\r\n"), "a part must not look like the whole: {body:?}");
    node.await_released().await;
}

#[tokio::test]
async fn sessions_are_listed_and_ended() {
    let node = node().await;
    let (head, body) = node.get("/v1/sprites/x/exec").await;
    assert!(head.contains("sprite-version: 0.1.0"), "{head}");
    assert_eq!((body["count"].as_u64(), body["sessions"][0]["id"].as_str()), (Some(1), Some("9")));
    assert_eq!(body["sessions"][0]["created"], "2023-11-14T22:13:20.123Z");
    assert_eq!(body["sessions"][0]["last_activity"], Value::Null);

    let request = format!("HEAD /v1/sprites/x/exec HTTP/1.1\nhost: a\nx-sprite-id: {ID}\nconnection: close\n\n");
    assert!(node.http(&request).await.0.contains("sprite-version: 0.1.0"));

    let kill = async |session: &str, query: &str, body: &str| {
        let len = body.len();
        node.http(&format!(
            "POST /v1/sprites/x/exec/{session}/kill{query} HTTP/1.1\nhost: a\nx-sprite-id: {ID}\nconnection: close\ncontent-length: {len}\n\n{body}"
        ))
        .await
    };
    for (query, body, said) in [
        ("?signal=SIGKILL&timeout=0s", "", "SIGKILL in 0 ms"),
        ("", r#"{"signal":"SIGINT","timeout":3}"#, "SIGINT in 3000 ms"),
        ("", "", "SIGTERM in 10000 ms"),
    ] {
        let (head, body) = kill("9", query, body).await;
        assert!(head.starts_with("http/1.1 200") && head.contains("application/x-ndjson"), "{head}");
        let body = String::from_utf8(body).unwrap();
        assert!(body.contains(said), "{body}");
        assert!(body.contains(r#""type":"complete""#) && body.contains(r#""exit_code":143"#), "{body}");
    }
    assert!(kill("77", "", "").await.0.starts_with("http/1.1 404"));
    assert!(kill("8", "", "").await.0.starts_with("http/1.1 410"));
    assert!(kill("9", "?timeout=soon", "").await.0.starts_with("http/1.1 400"));
    assert!(kill("9", "", "{").await.0.starts_with("http/1.1 400"));
    node.await_released().await;
}

#[tokio::test]
async fn control_sockets_run_one_operation_after_the_other() {
    let node = node().await;
    let mut socket = node.socket("/control").await.unwrap();
    node.await_released().await;
    let start = r#"control:{"type":"op.start","op":"exec","args":{"cmd":["both-streams-7"],"stdin":"false"}}"#;
    for _round in 0..2 {
        socket.send(Message::text(start)).await.unwrap();
        socket.send(Message::binary(vec![4])).await.unwrap();
        assert_eq!(next_json(&mut socket).await["type"], "session_info");
        assert_eq!(next_binary(&mut socket).await, b"\x01hi");
        assert_eq!(next_binary(&mut socket).await, b"\x02e");
        assert_eq!(next_binary(&mut socket).await, b"\x03\x07");
        let complete = next(&mut socket).await.into_text().unwrap();
        assert_eq!(complete.as_str(), r#"control:{"args":{"exitCode":7},"type":"op.complete"}"#);
    }
    socket.send(Message::text(r#"control:{"type":"op.start","op":"fs.read","args":{}}"#)).await.unwrap();
    assert!(next(&mut socket).await.into_text().unwrap().contains("op.error"));
    socket.send(Message::text(r#"control:{"type":"op.start","op":"exec","args":{"cmd":["refused"]}}"#)).await.unwrap();
    assert!(next(&mut socket).await.into_text().unwrap().contains("no such folder"));
    node.await_released().await;
    match *node.socket_as("/control", "sprites-go-sdk/1.0").await.expect_err("a refusal") {
        tungstenite::Error::Http(response) => {
            assert_eq!(response.status(), 404);
            assert!(serde_json::from_slice::<Value>(response.body().as_deref().unwrap()).unwrap()["error"].is_string());
        }
        other => panic!("{other}"),
    }
}

/// A server that says its name and then echoes, on `ip`.
async fn echo_server(ip: [u8; 4]) -> u16 {
    let listener = TcpListener::bind(SocketAddr::from((ip, 0))).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(b"name").await.unwrap();
                let (mut from, mut to) = stream.split();
                drop(tokio::io::copy(&mut from, &mut to).await);
            });
        }
    });
    port
}

async fn free_port() -> u16 {
    TcpListener::bind("127.0.0.2:0").await.unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn a_proxied_connection_reaches_network_and_loopback_alike() {
    let node = node().await;
    for (ip, host) in [([127, 0, 0, 2], "localhost"), ([127, 0, 0, 1], "localhost"), ([127, 0, 0, 1], "127.0.0.1")] {
        let port = echo_server(ip).await;
        let mut socket = node.socket("/proxy").await.unwrap();
        socket.send(Message::text(json!({ "host": host, "port": port }).to_string())).await.unwrap();
        let answer = next_json(&mut socket).await;
        assert_eq!(answer, json!({ "status": "connected", "target": format!("10.0.0.1:{port}") }));
        assert_eq!(next_binary(&mut socket).await, b"name");
        socket.send(Message::binary(b"to and fro".to_vec())).await.unwrap();
        assert_eq!(next_binary(&mut socket).await, b"to and fro");
        socket.close(None).await.unwrap();
    }
    let nowhere = free_port().await;
    for target in
        [json!({ "host": "192.0.2.1", "port": 80 }), json!({ "port": nowhere }), json!({ "port": 0 }), json!("x")]
    {
        let mut socket = node.socket("/proxy").await.unwrap();
        socket.send(Message::text(target.to_string())).await.unwrap();
        assert_eq!(next_json(&mut socket).await["status"], "error", "{target}");
        assert_eq!(close_code(&mut socket).await, 4004);
    }
    node.await_released().await;
}

#[tokio::test]
async fn ports_are_listed_and_then_told() {
    let node = node().await;
    let mut socket = node.socket("/ports/watch").await.unwrap();
    let list = next_json(&mut socket).await;
    assert_eq!((list["type"].as_str(), list["ports"][0]["port"].as_u64()), (Some("port_list"), Some(22)));
    let opened = next_json(&mut socket).await;
    assert_eq!(opened, json!({ "type": "port_opened", "port": 8080, "address": "0.0.0.0", "pid": 5 }));
    drop(socket);
    node.await_released().await;
}

/// A web server on `ip` that shows what it was asked.
async fn web_server(ip: [u8; 4]) -> u16 {
    let listener = TcpListener::bind(SocketAddr::from((ip, 0))).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let app = axum::Router::new().fallback(|request: HttpRequest<axum::body::Body>| async move {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        format!("{} {} {:?}\n{}", parts.method, parts.uri, parts.headers, String::from_utf8_lossy(&body))
    });
    tokio::spawn(async move { axum::serve(listener, app).await });
    port
}

#[tokio::test]
async fn the_url_reaches_a_server_on_the_network_or_on_loopback() {
    let node = node().await;
    for ip in [[127, 0, 0, 2], [127, 0, 0, 1]] {
        let port = web_server(ip).await;
        let (head, body) = node
            .http(&format!(
                "POST /sprites.node.v1.Node/Destroy?x=1 HTTP/1.1\nhost: me.example\nx-sprite-id: {ID}\nx-sprite-port: {port}\nx-own: kept\nx-hop: gone\nconnection: close, x-hop\ncontent-length: 4\n\nbody"
            ))
            .await;
        let body = String::from_utf8(body).unwrap();
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert!(head.contains("x-sprite-wake: paused"), "{head}");
        assert!(body.starts_with("POST /sprites.node.v1.Node/Destroy?x=1 "), "its path is its own affair: {body}");
        assert!(body.contains("me.example") && body.contains("kept") && body.ends_with("\nbody"), "{body}");
        assert!(!body.contains("x-sprite-id") && !body.contains("x-hop"), "{body}");
    }
    node.await_released().await;
}

#[tokio::test]
async fn nothing_listening_is_said_to_programs_and_people() {
    let node = node().await;
    let port = free_port().await;
    let ask = async |accept: &str| {
        node.http(&format!(
            "GET / HTTP/1.1\nhost: a\nx-sprite-id: {ID}\nx-sprite-port: {port}\naccept: {accept}\nconnection: close\n\n"
        ))
        .await
    };
    let (head, body) = ask("*/*").await;
    assert!(head.starts_with("http/1.1 502") && head.contains("x-sprite-error: spr-p01"), "{head}");
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["code"], "SPR-P01");
    assert!(body["message"].as_str().unwrap().contains(&port.to_string()), "{body}");
    let (head, body) = ask("text/html,*/*").await;
    assert!(head.contains("text/html"), "{head}");
    let page = String::from_utf8(body).unwrap();
    assert!(page.contains("<h1>") && page.contains(&port.to_string()) && page.contains("SPR-P01"), "{page}");
    // Not a web server at all.
    let port = echo_server([127, 0, 0, 2]).await;
    let (head, _) = node
        .http(&format!("GET / HTTP/1.1\nhost: a\nx-sprite-id: {ID}\nx-sprite-port: {port}\nconnection: close\n\n"))
        .await;
    assert!(head.starts_with("http/1.1 502") && head.contains("spr-p03"), "{head}");
    node.await_released().await;
}

/// A WebSocket server inside, for one client, that echoes.
async fn websocket_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() {
                socket.send(message).await.unwrap();
            }
        }
    });
    port
}

async fn own_websocket(node: &Node, port: u16) -> Socket {
    let request = HttpRequest::builder()
        .uri(format!("ws://{}/ws", node.address))
        .header("host", "me.example")
        .header("connection", "keep-alive, Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", tungstenite::handshake::client::generate_key())
        .header("x-sprite-id", ID)
        .header("x-sprite-port", port)
        .body(())
        .unwrap();
    let stream = TcpStream::connect(node.address).await.unwrap();
    timeout(STEP, tokio_tungstenite::client_async(request, stream)).await.unwrap().unwrap().0
}

#[tokio::test]
async fn a_websocket_of_the_sprites_own_server_is_passed_through() {
    let node = node().await;
    let port = websocket_server().await;
    let mut socket = own_websocket(&node, port).await;
    socket.send(Message::text("through")).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text("through"));
    assert_eq!(node.held.load(Ordering::SeqCst), 1, "it is in use as long as the socket is open");
    drop(socket);
    node.await_released().await;
}

#[tokio::test]
async fn requests_that_name_no_sprite_of_ours_are_told_so() {
    let node = node().await;
    let (_, body) = node.http("GET /v1/sprites/x/exec HTTP/1.1\nhost: a\nconnection: close\n\n").await;
    assert_eq!(body, b"control", "without a sprite's id it is the control plane's");
    let ask = async |id: &str, port: &str, path: &str| {
        node.http(&format!("GET {path} HTTP/1.1\nhost: a\nx-sprite-id: {id}\n{port}connection: close\n\n")).await
    };
    let other = "0198a5f0-0000-7000-8000-000000000002";
    let (head, body) = ask(other, "", "/v1/sprites/x/exec").await;
    assert!(head.starts_with("http/1.1 404") && head.contains("x-sprite-error: spr-n01"), "{head}");
    assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["error"], "sprite not found");
    assert!(ask("nonsense", "", "/v1/sprites/x/exec").await.0.starts_with("http/1.1 400"));
    assert!(ask(ID, "x-sprite-port: 70000\n", "/").await.0.starts_with("http/1.1 400"));
    for path in ["/", "/v1/sprites/x", "/v1/sprites/x/unknown", "/v1/sprites/x/exec/1/2", "/v1/other/x/exec"] {
        let (head, body) = ask(ID, "", path).await;
        assert!(head.starts_with("http/1.1 404"), "{path}: {head}");
        assert!(serde_json::from_slice::<Value>(&body).unwrap()["error"].is_string(), "{path}");
    }
    assert!(ask(ID, "", "/v1/sprites/x/proxy").await.0.starts_with("http/1.1 426"));
}
