//! What passes through: bodies as they come, chunks as they were, upgrades, trailers.

use std::{convert::Infallible, sync::Arc};

use axum::{
    body::Body as AxumBody,
    extract::{
        FromRequestParts,
        ws::{CloseFrame, Message as AxumMessage, WebSocketUpgrade},
    },
    response::{IntoResponse, Response as AxumResponse},
};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{Request, Version};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    sync::{Semaphore, mpsc},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest, protocol::frame::coding::CloseCode},
};

use crate::world::{API, BEARER, ClientBody, PRIVATE, PUBLIC, Reply, World, empty, full, soon};

/// A request body that the test feeds.
fn fed() -> (mpsc::Sender<&'static str>, ClientBody) {
    let (feed, pieces) = mpsc::channel(1);
    let frames = ReceiverStream::new(pieces)
        .map(|piece: &str| Ok::<_, Infallible>(Frame::data(Bytes::from_static(piece.as_bytes()))));
    (feed, StreamBody::new(frames).boxed_unsync())
}

/// The next piece. Over HTTP/2 the end may be a frame without data.
async fn next(body: &mut Incoming) -> Option<String> {
    loop {
        let frame = soon("a piece of the answer", body.frame()).await?.unwrap();
        let data = frame.into_data().expect("data, not trailers");
        if !data.is_empty() {
            return Some(String::from_utf8(data.to_vec()).unwrap());
        }
    }
}

#[tokio::test]
async fn bodies_stream_in_both_directions_at_once() {
    let world = World::start().await;
    world.node("node.sock", async |request: axum::extract::Request| AxumResponse::new(request.into_body()));
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let (feed, body) = fed();
        let uri = if version == Version::HTTP_2 { format!("https://{PUBLIC}/") } else { "/".to_owned() };
        let request = Request::builder().method("POST").uri(uri).header("host", PUBLIC).body(body).unwrap();
        let (mut one, two) = (world.http1(PUBLIC).await, world.http2(PUBLIC).await);
        let answering = async {
            if version == Version::HTTP_2 {
                two.clone().send_request(request).await
            } else {
                one.send_request(request).await
            }
        };
        let answer = soon("the head of the answer, while the request goes on", answering).await.unwrap();
        assert_eq!(answer.version(), version);
        let mut body = answer.into_body();
        // Each piece comes back before the next is sent.
        for piece in ["one", "two", "three"] {
            feed.send(piece).await.unwrap();
            assert_eq!(next(&mut body).await.as_deref(), Some(piece), "{version:?}");
        }
        drop(feed);
        assert_eq!(next(&mut body).await, None);
    }
}

#[tokio::test]
async fn a_streamed_answer_is_as_fresh_as_its_source() {
    let world = World::start().await;
    let (events, from_events) = mpsc::channel::<&'static str>(1);
    let source = Arc::new(std::sync::Mutex::new(Some(from_events)));
    world.node("node.sock", move |_| {
        let events = ReceiverStream::new(source.lock().unwrap().take().unwrap()).map(Ok::<_, Infallible>);
        async { ([("content-type", "text/event-stream")], AxumBody::from_stream(events)) }
    });
    let mut sender = world.http1(PUBLIC).await;
    let request = Request::builder().uri("/").header("host", PUBLIC).body(empty()).unwrap();
    let answer = soon("the head, before there is a body", sender.send_request(request)).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut body = answer.into_body();
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        events.send(event).await.unwrap();
        assert_eq!(next(&mut body).await.as_deref(), Some(event));
    }
    drop(body);
    drop(sender);
    // The client has gone; the program behind learns of it.
    soon("the end at the source", events.closed()).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_source() {
    const OFFERED: usize = 64 << 20;
    let world = World::start().await;
    let taken = Arc::new(Semaphore::new(0));
    let counter = Arc::clone(&taken);
    world.node("node.sock", move |_| {
        let counter = Arc::clone(&counter);
        let pieces = (0..OFFERED >> 16).map(move |_| {
            counter.add_permits(1);
            Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 1 << 16]))
        });
        async { AxumBody::from_stream(futures_util::stream::iter(pieces)) }
    });
    let mut sender = world.http1(PUBLIC).await;
    let request = Request::builder().uri("/").header("host", PUBLIC).body(empty()).unwrap();
    let mut body = soon("the head", sender.send_request(request)).await.unwrap().into_body();
    let mut read = 0;
    while let Some(frame) = soon("the next piece", body.frame()).await {
        read += frame.unwrap().into_data().unwrap().len();
        // Slow at first: on one thread, a source that nobody stops would come to its end meanwhile.
        for _ in 0..if read < 1 << 20 { 2_000 } else { 0 } {
            tokio::task::yield_now().await;
        }
        let on_the_way = (taken.available_permits() << 16) - read;
        assert!(on_the_way < OFFERED / 2, "{on_the_way} bytes are on their way to somebody who does not read");
    }
    assert_eq!(read, OFFERED);
}

/// Echoes messages, then closes with a code of its own.
async fn echo(request: axum::extract::Request) -> AxumResponse {
    let (mut parts, _) = request.into_parts();
    let Ok(upgrade) = WebSocketUpgrade::from_request_parts(&mut parts, &()).await else {
        return "no WebSocket".into_response();
    };
    upgrade.on_upgrade(async |mut socket| {
        while let Some(Ok(message)) = socket.recv().await {
            match message {
                AxumMessage::Text(text) if text == "bye" => {
                    let close = CloseFrame { code: 4001, reason: "done".into() };
                    drop(socket.send(AxumMessage::Close(Some(close))).await);
                }
                AxumMessage::Text(_) | AxumMessage::Binary(_) => socket.send(message).await.unwrap(),
                _ => {}
            }
        }
    })
}

type Socket = WebSocketStream<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

async fn websocket(world: &World, host: &str, path: &str, authorized: bool) -> Result<Socket, tungstenite::Error> {
    let mut request = format!("wss://{host}{path}").into_client_request().unwrap();
    if authorized {
        request.headers_mut().insert("authorization", BEARER.1.parse().unwrap());
    }
    soon("the handshake", client_async(request, world.tls(host, "http/1.1").await)).await.map(|(socket, _)| socket)
}

#[tokio::test]
async fn websockets_reach_the_program_and_the_dialect_in_both_directions() {
    let world = World::start().await;
    let node = world.node("node.sock", echo);
    for (host, path) in [(PRIVATE, "/ws?a=b"), (API, "/v1/sprites/demo/exec?cmd=sh")] {
        let mut socket = websocket(&world, host, path, true).await.unwrap();
        let seen = node.last();
        assert_eq!((seen.path.as_str(), seen.header("upgrade"), seen.header("authorization")), (path, "websocket", ""));
        let large = Bytes::from(vec![7; 1 << 20]);
        for message in [Message::text("hello"), Message::binary(Bytes::from_static(b"\0\x01")), Message::binary(large)]
        {
            socket.send(message.clone()).await.unwrap();
            assert_eq!(soon("the echo", socket.next()).await.unwrap().unwrap(), message);
        }
        socket.send(Message::text("bye")).await.unwrap();
        let Message::Close(Some(close)) = soon("the close", socket.next()).await.unwrap().unwrap() else {
            panic!("not a close");
        };
        assert_eq!((close.code, close.reason.as_str()), (CloseCode::Library(4001), "done"));
    }
}

#[tokio::test]
async fn a_refused_websocket_gets_json() {
    let world = World::start().await;
    let node = world.node("node.sock", echo);
    for (host, path, error) in
        [(PRIVATE, "/ws", "unauthorized"), (API, "/v1/sprites/demo/exec?cmd=sh", "authentication failed")]
    {
        let Err(tungstenite::Error::Http(answer)) = websocket(&world, host, path, false).await else {
            panic!("{host}{path} was not refused");
        };
        assert_eq!(answer.status(), 401);
        let body = String::from_utf8(answer.body().clone().unwrap_or_default()).unwrap();
        assert!(body.contains(&format!("\"error\":\"{error}\"")), "{body:?}");
    }
    assert!(node.all().is_empty());
}

#[tokio::test]
async fn a_switch_that_nobody_asked_for_is_no_answer() {
    let world = World::start().await;
    let listener = UnixListener::bind(world.path("node.sock")).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
            )
            .await
            .unwrap();
        let mut rest = Vec::new();
        drop(stream.read_to_end(&mut rest).await);
    });
    assert_eq!(world.get(PUBLIC, "/", &[]).await.verdict(), (502, "SPR-U02"));
}

#[tokio::test]
async fn every_chunk_of_an_exec_arrives_as_one_chunk() {
    let frames: [&[u8]; 4] = [b"\x01hello", b"\x02oops", &[b'\x01'; 70_000], b"\x03\x07"];
    let mut answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for frame in frames {
        answer.extend_from_slice(format!("{:x}\r\n", frame.len()).as_bytes());
        answer.extend_from_slice(frame);
        answer.extend_from_slice(b"\r\n");
    }
    answer.extend_from_slice(b"0\r\n\r\n");
    // In pieces that fall into the middle of everything, and all at once.
    for piece_len in [1, 3, 4096, answer.len()] {
        let world = World::start().await;
        let listener = UnixListener::bind(world.path("node.sock")).unwrap();
        let answer = answer.clone();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            for piece in answer.chunks(piece_len) {
                stream.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        let mut client = world.tls(API, "http/1.1").await;
        let request = format!(
            "POST /v1/sprites/demo/exec?cmd=a HTTP/1.1\r\nhost: {API}\r\nauthorization: {}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            BEARER.1
        );
        client.write_all(request.as_bytes()).await.unwrap();
        let mut received = Vec::new();
        drop(soon("the answer", client.read_to_end(&mut received)).await);
        assert_eq!(chunks(&received), frames, "sent in pieces of {piece_len}");
    }
}

/// The chunks of a raw HTTP/1.1 answer, as they stood on the wire.
fn chunks(answer: &[u8]) -> Vec<&[u8]> {
    let line_end = |bytes: &[u8]| bytes.windows(2).position(|two| two == b"\r\n").expect("a line ends");
    let mut rest = &answer[answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head ends") + 4..];
    let mut chunks = Vec::new();
    loop {
        let end = line_end(rest);
        let len = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if len == 0 {
            return chunks;
        }
        chunks.push(&rest[end + 2..end + 2 + len]);
        rest = &rest[end + 2 + len + 2..];
    }
}

#[tokio::test]
async fn grpc_streams_both_ways_and_ends_with_its_trailers() {
    let world = World::start().await;
    let (feed, body) = fed();
    let request = Request::builder()
        .method("POST")
        .uri(format!("https://{API}/sprites.v1.Sprites/Echo"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", BEARER.1)
        .body(body)
        .unwrap();
    let mut sender = world.http2(API).await;
    let answer = soon("the head", sender.send_request(request)).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    let seen = world.rest.last();
    assert_eq!((seen.header("te"), seen.header("authorization")), ("trailers", BEARER.1));
    let mut body = answer.into_body();
    for message in ["\0\0\0\0\x01a", "\0\0\0\0\x01b"] {
        feed.send(message).await.unwrap();
        assert_eq!(next(&mut body).await.as_deref(), Some(message));
    }
    drop(feed);
    let trailers = soon("the trailers", body.collect()).await.unwrap().trailers().cloned().expect("trailers");
    assert_eq!(
        (&trailers["grpc-status"], &trailers["grpc-message"]),
        (&"0".parse().unwrap(), &"done".parse().unwrap())
    );
}

#[tokio::test]
async fn lengths_and_methods_are_kept() {
    let world = World::start().await;
    world.node("node.sock", async |request: axum::extract::Request| {
        let length = request.headers().get("content-length").map_or("none", |value| value.to_str().unwrap()).to_owned();
        let method = request.method().to_string();
        ([("x-method", method), ("x-length", length)], "12345")
    });
    let head = world.call("HEAD", PUBLIC, "/", &[]).await;
    assert_eq!((head.header("content-length"), head.header("x-method"), head.body.as_str()), ("5", "HEAD", ""));
    let mut sender = world.http1(PUBLIC).await;
    for method in ["POST", "PUT", "PATCH", "DELETE", "PROPFIND"] {
        let request = Request::builder().method(method).uri("/").header("host", PUBLIC).body(full("abc")).unwrap();
        let reply = Reply::of(soon(method, sender.send_request(request)).await.unwrap()).await;
        assert_eq!(
            (reply.header("x-method"), reply.header("x-length"), reply.header("content-length")),
            (method, "3", "5")
        );
    }
}
