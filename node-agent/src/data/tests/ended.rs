//! What becomes of connections whose VM ends under them: put to sleep by order, restarted, restored.

use tokio::sync::oneshot;

use super::*;

/// A server that reads one request, says `answer` and then nothing any more, as a VM that has been stopped. Tells when it has.
async fn stopped_server(answer: &'static str) -> (u16, oneshot::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (said, told) = oneshot::channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
        stream.write_all(answer.as_bytes()).await.unwrap();
        said.send(()).unwrap();
        std::future::pending::<()>().await;
    });
    (port, told)
}

fn get(port: u16) -> String {
    format!("GET / HTTP/1.1\nhost: a\nx-sprite-id: {ID}\nx-sprite-port: {port}\nconnection: close\n\n")
}

/// The answer to a request whose VM ends when its server has said `answer`.
async fn answer_of_the_ended(node: &Node, answer: &'static str) -> (String, Vec<u8>) {
    let (port, told) = stopped_server(answer).await;
    let request = get(port);
    let (got, ()) = tokio::join!(node.http(&request), async {
        timeout(STEP, told).await.expect("the server is asked").unwrap();
        node.ended.cancel();
    });
    node.await_released().await;
    got
}

#[tokio::test]
async fn a_request_is_refused_when_its_vm_ends_before_the_answer() {
    let node = node().await;
    let (head, body) = answer_of_the_ended(&node, "").await;
    assert!(head.starts_with("http/1.1 503") && head.contains("x-sprite-error: spr-w04"), "{head}");
    assert!(head.contains("retry-after"), "{head}");
    assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["code"], "SPR-W04");
}

#[tokio::test]
async fn a_body_is_cut_when_its_vm_ends() {
    for answer in ["HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "HTTP/1.0 200 OK\r\n\r\nabc"] {
        let node = node().await;
        let (head, body) = answer_of_the_ended(&node, answer).await;
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert_eq!(body, b"3\r\nabc\r\n", "what was said, and no end that would look like the whole");
    }
}

#[tokio::test]
async fn a_websocket_of_the_sprites_own_server_breaks_when_its_vm_ends() {
    let node = node().await;
    let mut socket = own_websocket(&node, websocket_server().await).await;
    socket.send(Message::text("through")).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text("through"));
    node.ended.cancel();
    let end = timeout(STEP, socket.next()).await.expect("an end");
    assert!(!matches!(end, Some(Ok(_))), "{end:?}");
    node.await_released().await;
}

#[tokio::test]
async fn a_proxied_connection_closes_as_restarted_when_its_vm_ends() {
    let node = node().await;
    let mut socket = node.socket("/proxy").await.unwrap();
    let port = echo_server([127, 0, 0, 2]).await;
    socket.send(Message::text(json!({ "port": port }).to_string())).await.unwrap();
    assert_eq!(next_json(&mut socket).await["status"], "connected");
    assert_eq!(next_binary(&mut socket).await, b"name");
    node.ended.cancel();
    assert_eq!(close_code(&mut socket).await, 1012);
    node.await_released().await;
}

#[tokio::test]
async fn a_request_that_has_not_been_sent_wakes_the_sprite_again() {
    let node = node().await;
    let port = web_server([127, 0, 0, 2]).await;
    node.stillborn.store(2, Ordering::SeqCst);
    assert!(node.http(&get(port)).await.0.starts_with("http/1.1 200"));
    node.stillborn.store(100, Ordering::SeqCst);
    let (head, _) = node.http(&get(port)).await;
    assert!(head.starts_with("http/1.1 503") && head.contains("spr-w04"), "{head}");
    node.await_released().await;
}
