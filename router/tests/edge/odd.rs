//! Requests that are not what they should be, byte by byte.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{API, PUBLIC, World, empty, soon};

/// What comes back for `request`, until the edge closes.
async fn raw(world: &World, request: &[u8]) -> String {
    let mut stream = world.tls(PUBLIC, "http/1.1").await;
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is as good an end as any.
    drop(soon("the end of the connection", stream.read_to_end(&mut answer)).await);
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

#[tokio::test]
async fn heads_that_could_be_read_in_two_ways_are_refused() {
    let world = World::start().await;
    let node = world.plain_node();
    let long = "a".repeat(70_000);
    let many: String = (0..101).map(|n| format!("x-{n}: 1\r\n")).collect();
    let cases: Vec<(&str, String, &str, &str)> = vec![
        ("no host", "GET / HTTP/1.1\r\n\r\n".into(), "400", "SPR-B01"),
        ("two hosts", format!("GET / HTTP/1.1\r\nhost: {PUBLIC}\r\nhost: {PUBLIC}\r\n\r\n"), "400", "SPR-B01"),
        (
            "host and target differ",
            format!("GET http://evil.org/ HTTP/1.1\r\nhost: {PUBLIC}\r\n\r\n"),
            "400",
            "SPR-B01",
        ),
        ("user in the target", format!("GET http://x@{PUBLIC}/ HTTP/1.1\r\nhost: {PUBLIC}\r\n\r\n"), "400", "SPR-B01"),
        ("path in the host", format!("GET / HTTP/1.1\r\nhost: {PUBLIC}/x\r\n\r\n"), "400", "SPR-B01"),
        ("list in the host", format!("GET / HTTP/1.1\r\nhost: {PUBLIC}, evil.org\r\n\r\n"), "400", "SPR-B01"),
        ("foreign host", "GET / HTTP/1.1\r\nhost: evil.org\r\n\r\n".into(), "421", "SPR-R02"),
        (
            "the API on a sprite's connection",
            format!("GET /v1/sprites HTTP/1.1\r\nhost: {API}\r\n\r\n"),
            "421",
            "SPR-R03",
        ),
        ("connect", format!("CONNECT {PUBLIC}:443 HTTP/1.1\r\nhost: {PUBLIC}:443\r\n\r\n"), "405", "SPR-B02"),
        (
            "two lengths",
            format!("POST / HTTP/1.1\r\nhost: {PUBLIC}\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"),
            "400",
            "SPR-B05",
        ),
        (
            "length with a sign",
            format!("POST / HTTP/1.1\r\nhost: {PUBLIC}\r\ncontent-length: +1\r\n\r\na"),
            "400",
            "SPR-B05",
        ),
        (
            "unknown coding",
            format!("POST / HTTP/1.1\r\nhost: {PUBLIC}\r\ntransfer-encoding: chunked, x\r\n\r\n0\r\n\r\n"),
            "400",
            "SPR-B05",
        ),
        (
            "coding before a space",
            format!("POST / HTTP/1.1\r\nhost: {PUBLIC}\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n"),
            "400",
            "SPR-B05",
        ),
        ("folded header", format!("GET / HTTP/1.1\r\nhost: {PUBLIC}\r\nx: a\r\n b\r\n\r\n"), "400", "SPR-B05"),
        ("bare line end in a value", format!("GET / HTTP/1.1\r\nhost: {PUBLIC}\r\nx: a\rb\r\n\r\n"), "400", "SPR-B05"),
        ("nul in a value", format!("GET / HTTP/1.1\r\nhost: {PUBLIC}\r\nx: a\0b\r\n\r\n"), "400", "SPR-B05"),
        ("no version", format!("GET /\r\nhost: {PUBLIC}\r\n\r\n"), "400", "SPR-B05"),
        ("another protocol", "SSH-2.0-OpenSSH_9\r\n\r\n".into(), "400", "SPR-B05"),
        ("long target", format!("GET /{long} HTTP/1.1\r\nhost: {PUBLIC}\r\n\r\n"), "414", "SPR-B04"),
        ("many headers", format!("GET / HTTP/1.1\r\nhost: {PUBLIC}\r\n{many}\r\n"), "431", "SPR-B03"),
        (
            "large headers",
            format!("GET / HTTP/1.1\r\nhost: {PUBLIC}\r\nx: {}\r\n\r\n", "a".repeat(300_000)),
            "431",
            "SPR-B03",
        ),
    ];
    let mut wrong = Vec::new();
    for (what, request, expected, code) in cases {
        let closing =
            request.replacen("\r\n\r\n", "\r\nconnection: close\r\n\r\n", usize::from(!request.starts_with("SSH")));
        let answer = raw(&world, closing.as_bytes()).await;
        let well_formed = answer.contains("content-type: application/json") && answer.contains("\"message\":");
        if status(&answer) != expected || !answer.contains(code) || !well_formed {
            wrong.push(format!("{what}: {answer}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(node.all().is_empty(), "{:?}", node.all());
}

#[tokio::test]
async fn http2_without_its_protocol_agreed_gets_no_answer() {
    let world = World::start().await;
    assert_eq!(raw(&world, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await, "");
}

#[tokio::test]
async fn nothing_can_be_smuggled_past_the_end_of_a_body() {
    let world = World::start().await;
    let node = world.node("node.sock", async |request: axum::extract::Request| {
        let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
        format!("[{}]", String::from_utf8_lossy(&body))
    });
    let hidden = "GET /hidden HTTP/1.1\r\nhost: x\r\n\r\n";
    let chunked = format!("{:x}\r\n{hidden}\r\n0\r\n\r\n", hidden.len());
    for request in [
        // Both framings: chunked counts, and the connection ends there.
        format!(
            "POST /a HTTP/1.1\r\nhost: {PUBLIC}\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n{chunked}"
        ),
        format!(
            "POST /a HTTP/1.1\r\nhost: {PUBLIC}\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\nconnection: close\r\n\r\n{chunked}"
        ),
        format!(
            "POST /a HTTP/1.1\r\nhost: {PUBLIC}\r\ntransfer-encoding: CHUNKED\r\nconnection: close\r\n\r\n{chunked}"
        ),
        format!(
            "POST /a HTTP/1.1\r\nhost: {PUBLIC}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{hidden}",
            hidden.len()
        ),
    ] {
        let before = node.all().len();
        let answer = raw(&world, request.as_bytes()).await;
        let arrived = &node.all()[before..];
        assert!(arrived.iter().all(|seen| seen.path == "/a"), "{request}: {arrived:?}");
        assert!(status(&answer) == "400" || answer.contains(&format!("[{hidden}]")), "{request}: {answer}");
        for seen in arrived {
            let framings =
                [seen.headers.contains_key("content-length"), seen.headers.contains_key("transfer-encoding")];
            assert_eq!(framings.iter().filter(|there| **there).count(), 1, "{seen:?}");
        }
    }
}

#[tokio::test]
async fn a_bad_chunk_or_a_cut_body_never_ends_a_request_well() {
    let world = World::start().await;
    world.node("node.sock", async |request: axum::extract::Request| {
        match axum::body::to_bytes(request.into_body(), 1 << 20).await {
            Ok(_) => "complete",
            Err(_) => "cut",
        }
    });
    for body in
        ["5\r\nhelloXX0\r\n\r\n", "zz\r\nhello\r\n0\r\n\r\n", "-1\r\n\r\n", "fffffffffffffffff\r\nx\r\n0\r\n\r\n"]
    {
        let head =
            format!("POST / HTTP/1.1\r\nhost: {PUBLIC}\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n");
        let answer = raw(&world, format!("{head}{body}").as_bytes()).await;
        assert!(!answer.contains("complete"), "{body:?}: {answer}");
    }
}

#[tokio::test]
async fn long_targets_and_pipelined_requests_pass() {
    let world = World::start().await;
    let node = world.plain_node();
    let path = format!("/{}", "a".repeat(65_000));
    assert_eq!(world.get(PUBLIC, &path, &[]).await.status, 200);
    assert_eq!(node.last().path, path);
    let two = format!(
        "GET /1 HTTP/1.1\r\nhost: {PUBLIC}\r\n\r\nGET /2 HTTP/1.1\r\nhost: {PUBLIC}\r\nconnection: close\r\n\r\n"
    );
    let answers = raw(&world, two.as_bytes()).await;
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 2, "{answers}");
    let old = format!("GET /old HTTP/1.0\r\nhost: {PUBLIC}\r\n\r\n");
    assert_eq!(status(&raw(&world, old.as_bytes()).await), "200");
}

#[tokio::test]
async fn http2_requests_with_forged_framing_are_refused() {
    let world = World::start().await;
    let node = world.plain_node();
    let sender = world.http2(PUBLIC).await;
    // A path with `..`, an encoded slash and a query of its own is passed on as it is.
    assert_eq!(world.get2(&sender, PUBLIC, "/a/..%2f?x=%0d%0a").await.status, 200);
    assert_eq!(node.last().path, "/a/..%2f?x=%0d%0a");
    let request =
        http::Request::builder().uri(format!("https://{PUBLIC}/")).header("host", "evil.org").body(empty()).unwrap();
    let reply = soon("the answer", sender.clone().send_request(request)).await.unwrap();
    assert_eq!(reply.status(), 400);
    assert_eq!(node.all().len(), 1);
}
