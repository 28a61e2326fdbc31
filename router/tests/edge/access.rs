//! Who may, what the next hop is told, and what refusals look like.

use std::sync::atomic::Ordering::SeqCst;

use http::Request;

use crate::world::{API, ASLEEP, BEARER, FOREIGN, FOREIGN_TOKEN, NOWHERE, PRIVATE, PUBLIC, Reply, World, empty, soon};

#[tokio::test]
async fn calls_of_the_api_go_to_the_coordinator_with_their_token() {
    let world = World::start().await;
    let node = world.plain_node();
    let sender = world.http2(API).await;
    for path in ["/v1/sprites", "/v1/sprites/demo", "/v1/sprites/demo/checkpoints/v1/restore", "/healthz"] {
        let one = world.get(API, path, &[BEARER]).await;
        assert_eq!((one.status.as_u16(), one.body.as_str()), (200, "from the coordinator"), "{path}");
        let seen = world.rest.last();
        assert_eq!((seen.path.as_str(), seen.header("authorization"), seen.header("host")), (path, BEARER.1, API));
        let two = world.get2(&sender, API, path).await;
        assert_eq!((two.status.as_u16(), two.body.as_str()), (200, "from the coordinator"), "{path} over HTTP/2");
        assert_eq!(world.rest.last().header("host"), API);
    }
    assert!(node.all().is_empty());
    assert_eq!(world.coordinator.authenticates.load(SeqCst), 0, "the coordinator checks by itself");
}

#[tokio::test]
async fn calls_that_move_bytes_go_straight_to_the_node() {
    let world = World::start().await;
    let node = world.plain_node();
    for path in
        ["/v1/sprites/demo/exec?cmd=a&cmd=b%20c", "/v1/sprites/demo/fs/read?path=/x", "/v1/sprites/d%65mo/exec/7/kill"]
    {
        let reply = world.call("POST", API, path, &[BEARER, ("x-sprite-id", "forged"), ("x-sprite-port", "22")]).await;
        assert_eq!((reply.status.as_u16(), reply.body.as_str()), (200, "ok"), "{path}");
        let seen = node.last();
        assert_eq!((seen.method.as_str(), seen.path.as_str()), ("POST", path));
        let id = world.coordinator.sprites.lock().unwrap()["demo-a1b2c3"].id;
        assert_eq!(seen.header("x-sprite-id"), id.to_string());
        for gone in ["x-sprite-port", "authorization"] {
            assert!(!seen.headers.contains_key(gone), "{path} {gone}");
        }
    }
    assert!(world.rest.all().is_empty());
    let refused = async |headers: &[(&str, &str)], name: &str| {
        let reply = world.get(API, &format!("/v1/sprites/{name}/exec"), headers).await;
        let (status, code) = reply.verdict();
        (status, code.to_owned(), reply.body)
    };
    let before = node.all().len();
    for headers in
        [&[][..], &[("authorization", "Bearer wrong")], &[("authorization", "Basic eDp5")], &[BEARER, BEARER]]
    {
        let (status, code, body) = refused(headers, "demo").await;
        assert_eq!((status, code.as_str()), (401, "SPR-A01"), "{headers:?}");
        assert!(body.contains("\"error\":\"authentication failed\""), "{body}");
    }
    for name in ["nobody", "theirs", "UPPER", "a--b", "a%2Fb", ""] {
        let (status, code, _) = refused(&[BEARER], name).await;
        assert_eq!((status, code.as_str()), (404, "SPR-R01"), "{name}");
    }
    assert_eq!(node.all().len(), before);
}

#[tokio::test]
async fn a_sprites_program_sees_the_request_but_not_the_platforms_token() {
    let world = World::start().await;
    let node = world.plain_node();
    let headers = [
        BEARER,
        ("cookie", "a=1"),
        ("x-sprite-id", "forged"),
        ("x-forwarded-for", "1.2.3.4"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
    ];
    let reply = world.get(PRIVATE, "/a/../b?c=%20d", &headers).await;
    assert_eq!((reply.status.as_u16(), reply.body.as_str()), (200, "ok"));
    assert!(reply.headers.contains_key("x-request-id") && reply.headers.contains_key("via"));
    let seen = node.last();
    assert_eq!(seen.path, "/a/../b?c=%20d", "the path is the program's affair");
    for gone in ["authorization", "x-hop", "connection"] {
        assert!(!seen.headers.contains_key(gone), "{gone}");
    }
    for (name, value) in [
        ("host", PRIVATE),
        ("x-sprite-port", "8080"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", PRIVATE),
        ("x-forwarded-for", "1.2.3.4, 127.0.0.1"),
        ("sprite-client-ip", "127.0.0.1"),
        ("cookie", "a=1"),
        ("via", "1.1 sprites"),
    ] {
        assert_eq!(seen.header(name), value, "{name}");
    }
    assert_eq!(seen.header("x-forwarded-port"), world.address.port().to_string());
    assert_ne!(seen.header("x-sprite-id"), "forged");

    world.get(PUBLIC, "/", &[("authorization", "Bearer of the program's own")]).await;
    assert_eq!(node.last().header("authorization"), "Bearer of the program's own");
    let theirs = format!("Bearer {FOREIGN_TOKEN}");
    for headers in [&[BEARER][..], &[("authorization", &theirs)], &[("authorization", "Basic eDp5"), BEARER]] {
        assert_eq!(world.get(PUBLIC, "/", headers).await.status, 200);
        assert!(!node.last().headers.contains_key("authorization"), "a public sprite was shown {headers:?}");
    }
    world.get(&format!("3000--{PUBLIC}"), "/", &[]).await;
    assert_eq!(node.last().header("x-sprite-port"), "3000");
}

#[tokio::test]
async fn who_may_not_open_a_sprite_does_not_wake_it() {
    let world = World::start().await;
    let node = world.plain_node();
    let theirs = format!("Bearer {FOREIGN_TOKEN}");
    for host in [PRIVATE, ASLEEP, NOWHERE] {
        world.set(crate::world::label(host), |sprite| sprite.public = false);
        for authorization in [None, Some("Bearer wrong"), Some(theirs.as_str()), Some("Basic eDp5")] {
            let headers: Vec<(&str, &str)> = authorization.map(|value| ("authorization", value)).into_iter().collect();
            let reply = world.get(host, "/", &headers).await;
            assert_eq!(reply.verdict(), (401, "SPR-A02"), "{host} {authorization:?}");
            assert_eq!(reply.header("www-authenticate"), "Bearer realm=\"sprites\"");
            assert!(reply.body.contains("\"error\":\"unauthorized\""), "{}", reply.body);
        }
    }
    assert_eq!(world.get(FOREIGN, "/", &[BEARER]).await.verdict(), (401, "SPR-A02"));
    assert_eq!(node.all().len(), 0);
    assert_eq!(world.coordinator.wakes.load(SeqCst), 0);
    assert_eq!(world.get(FOREIGN, "/", &[("authorization", &theirs)]).await.status, 200);
}

#[tokio::test]
async fn a_sprite_made_public_opens_without_waiting_for_the_memory_of_the_edge() {
    let world = World::start().await;
    world.plain_node();
    assert_eq!(world.get(PRIVATE, "/", &[]).await.status, 401);
    world.set("demo-a1b2c3", |sprite| sprite.public = true);
    // A refusal is never given on a route older than 100 ms; the client may need one more attempt within that.
    let opened = async {
        while world.get(PRIVATE, "/", &[]).await.status != 200 {
            tokio::task::yield_now().await;
        }
    };
    soon("a public sprite", opened).await;
}

#[tokio::test]
async fn refusals_are_pages_for_browsers_and_json_for_programs() {
    let world = World::start().await;
    world.plain_node();
    let page = world.get(PRIVATE, "/", &[("accept", "text/html,application/xhtml+xml,*/*;q=0.8")]).await;
    assert_eq!((page.status.as_u16(), page.header("content-type")), (401, "text/html; charset=utf-8"));
    assert!(page.body.contains("sprite url --public"), "{}", page.body);
    let json = world.get(PRIVATE, "/", &[("accept", "*/*")]).await;
    assert_eq!(json.header("content-type"), "application/json");
    assert_eq!(json.header("cache-control"), "no-store");
    assert_eq!(world.get("nobody-a1b2c3.sprites.localhost", "/", &[]).await.verdict(), (404, "SPR-R01"));
    assert_eq!(world.get("sprites.localhost", "/", &[]).await.verdict(), (404, "SPR-R01"));
}

#[tokio::test]
async fn pages_and_api_share_no_connection() {
    let world = World::start().await;
    let node = world.plain_node();
    let of_page = world.http2(PUBLIC).await;
    assert_eq!(world.get2(&of_page, API, "/v1/sprites").await.verdict(), (421, "SPR-R03"));
    assert_eq!(
        world.get2(&of_page, ASLEEP, "/").await.status,
        200,
        "sprites may share one: their certificate is the same"
    );
    let of_api = world.http2(API).await;
    assert_eq!(world.get2(&of_api, PUBLIC, "/").await.verdict(), (421, "SPR-R03"));
    assert!(world.rest.all().is_empty());
    assert_eq!(node.all().len(), 1);
}

#[tokio::test]
async fn services_of_our_own_processes_cannot_be_called_from_outside() {
    let world = World::start().await;
    let sender = world.http2(API).await;
    for path in [
        "/sprites.control.v1.Control/Authenticate",
        "/sprites.control.v1.Control/Resolve",
        "/sprites.node.v1.Node/Destroy",
        "/sprites%2econtrol.v1.Control/Resolve",
        "//sprites.control.v1.Control/Resolve",
    ] {
        let uri = format!("https://{API}{path}");
        let request = Request::builder()
            .method("POST")
            .uri(uri)
            .header("content-type", "application/grpc")
            .body(empty())
            .unwrap();
        let reply = Reply::of(soon(path, sender.clone().send_request(request)).await.unwrap()).await;
        assert_eq!((reply.verdict(), reply.header("grpc-status")), ((404, "SPR-R05"), "12"), "{path}");
    }
    assert_eq!(world.coordinator.authenticates.load(SeqCst) + world.coordinator.resolves.load(SeqCst), 0);
    assert!(world.rest.all().is_empty());
}
