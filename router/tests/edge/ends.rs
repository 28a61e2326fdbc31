//! Handshakes, the plain port, and the end of an edge.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use http::Request;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
};

use crate::world::{API, PRIVATE, PUBLIC, Reply, World, empty, soon};

#[tokio::test]
async fn the_authority_vouches_for_the_api_and_every_sprite_in_both_protocols() {
    let world = World::start().await;
    for host in [
        API,
        PRIVATE,
        "3000--demo-a1b2c3.sprites.localhost",
        "not-yet-a1b2c3.sprites.localhost",
        "sprites.localhost",
        "localhost",
        "127.0.0.1",
    ] {
        for (offered, agreed) in [(&["h2", "http/1.1"][..], Some("h2")), (&["http/1.1"], Some("http/1.1")), (&[], None)]
        {
            let stream = soon("the handshake", world.try_tls(host, offered)).await.unwrap();
            let protocol =
                stream.get_ref().1.alpn_protocol().map(|protocol| String::from_utf8_lossy(protocol).into_owned());
            assert_eq!(protocol.as_deref(), agreed, "{host} {offered:?}");
        }
    }
    for host in ["evil.org", "api.localhost.evil.org", "xapi.localhost"] {
        soon("the handshake", world.try_tls(host, &["h2"])).await.unwrap_err();
    }
    soon("the handshake", world.try_tls(API, &["spdy/3"])).await.unwrap_err();
    // Not offering any protocol means HTTP/1.1.
    let mut stream = world.try_tls(API, &[]).await.unwrap();
    stream
        .write_all(format!("GET /healthz HTTP/1.1\r\nhost: {API}\r\nconnection: close\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    drop(soon("the answer", stream.read_to_string(&mut answer)).await);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[tokio::test]
async fn plain_text_to_the_edge_ends_without_an_answer_from_a_program() {
    let world = World::start().await;
    let node = world.plain_node();
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(format!("GET / HTTP/1.1\r\nhost: {PUBLIC}\r\n\r\n").as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    drop(soon("the end", stream.read_to_end(&mut answer)).await);
    assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");
    assert!(node.all().is_empty());
}

#[tokio::test]
async fn an_edge_that_stops_finishes_what_is_in_flight_and_cuts_tunnels() {
    let world = Arc::new(World::start().await);
    let gate = Arc::new(Semaphore::new(0));
    let of_node = Arc::clone(&gate);
    let node = world.node("node.sock", move |request: axum::extract::Request| {
        let gate = Arc::clone(&of_node);
        async move {
            use axum::{extract::FromRequestParts, response::IntoResponse};
            let (mut parts, _) = request.into_parts();
            if let Ok(upgrade) = axum::extract::ws::WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
                return upgrade.on_upgrade(async |mut socket| while let Some(Ok(_)) = socket.recv().await {});
            }
            let _permit = gate.acquire().await.unwrap();
            "in time".into_response()
        }
    });
    let request =
        tokio_tungstenite::tungstenite::client::IntoClientRequest::into_client_request(format!("wss://{PUBLIC}/ws"))
            .unwrap();
    let (mut tunnel, _) = tokio_tungstenite::client_async(request, world.tls(PUBLIC, "http/1.1").await).await.unwrap();
    let idle = world.http2(PUBLIC).await;
    let mut in_flight = Vec::new();
    for http2 in [false, true] {
        let client = Arc::clone(&world);
        in_flight.push(tokio::spawn(async move {
            if http2 {
                let sender = client.http2(PUBLIC).await;
                client.get2(&sender, PUBLIC, "/").await
            } else {
                client.get(PUBLIC, "/", &[]).await
            }
        }));
    }
    node.reach(3).await;
    world.stop.cancel();
    // The tunnel ends, the listener is closed, and what is in flight still gets its answer.
    soon("the end of the tunnel", async { while let Some(Ok(_)) = tunnel.next().await {} }).await;
    soon("the listener to close", async {
        while TcpStream::connect(world.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    gate.add_permits(2);
    for request in in_flight {
        let reply: Reply = soon("what was in flight", request).await.unwrap();
        assert_eq!((reply.status.as_u16(), reply.body.as_str()), (200, "in time"));
    }
    let late = Request::builder().uri(format!("https://{PUBLIC}/")).body(empty()).unwrap();
    soon("the idle connection", idle.clone().send_request(late)).await.unwrap_err();
    soon("the edge", async {
        while !world.running.is_finished() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_edge_that_stops_does_not_wait_for_ever() {
    let world = Arc::new(World::start().await);
    let node = world.node("node.sock", async |_| std::future::pending::<&str>().await);
    let client = Arc::clone(&world);
    let hanging = tokio::spawn(async move {
        let mut sender = client.http1(PUBLIC).await;
        sender.send_request(Request::builder().uri("/").header("host", PUBLIC).body(empty()).unwrap()).await.map(drop)
    });
    node.reach(1).await;
    world.stop.cancel();
    soon("the hanging request", hanging).await.unwrap().unwrap_err();
}
