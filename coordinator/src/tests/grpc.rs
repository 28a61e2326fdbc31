//! The same functions over gRPC, and the edge's questions.

use proto::{
    control::{AuthenticateRequest, ResolveRequest, control_client::ControlClient},
    public::{exec_request::Input, exec_response::Output, sprites_client::SpritesClient, *},
};
use serde_json::json;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::rig::{Rig, eventually};

#[tokio::test]
async fn a_sprites_life_over_grpc() {
    let rig = Rig::start().await;
    let mut client = SpritesClient::new(rig.channel());
    let create = || CreateSpriteRequest {
        name: "demo".into(),
        size: "s".into(),
        labels: vec!["x".into()],
        ..Default::default()
    };
    let unknown = client.create_sprite(create()).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unauthenticated);
    let made = client.create_sprite(rig.authorized(create())).await.unwrap().into_inner();
    assert_eq!((made.status.as_str(), made.size.as_str(), made.labels.len(), made.public), ("running", "s", 1, false));
    assert_eq!(rig.get("/v1/sprites/demo").await.json()["id"], made.id, "one sprite for both");
    assert_eq!(client.create_sprite(rig.authorized(create())).await.unwrap_err().code(), Code::AlreadyExists);
    let twice = || CreateSpriteRequest { name: "twice".into(), request_id: "r-1".into(), ..Default::default() };
    let first = client.create_sprite(rig.authorized(twice())).await.unwrap().into_inner();
    assert_eq!(client.create_sprite(rig.authorized(twice())).await.unwrap().into_inner().id, first.id);
    let other = CreateSpriteRequest { request_id: "r-2".into(), ..twice() };
    assert_eq!(client.create_sprite(rig.authorized(other)).await.unwrap_err().code(), Code::AlreadyExists);
    client.destroy_sprite(rig.authorized(DestroySpriteRequest { name: "twice".into() })).await.unwrap();
    let update = UpdateSpriteRequest { name: "demo".into(), public: Some(true), ..Default::default() };
    let updated = client.update_sprite(rig.authorized(update)).await.unwrap().into_inner();
    assert!(updated.public && updated.labels == ["x"], "{updated:?}");
    let slept = client
        .sleep_sprite(rig.authorized(SleepSpriteRequest { name: "demo".into(), to: String::new() }))
        .await
        .unwrap();
    assert_eq!(slept.into_inner().sprite.unwrap().status, "warm");
    let mut watch =
        client.watch_sprites(rig.authorized(WatchSpritesRequest { prefix: "demo".into() })).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, "warm");
    let woken =
        client.wake_sprite(rig.authorized(WakeSpriteRequest { name: "demo".into() })).await.unwrap().into_inner();
    assert_eq!((woken.resumed.as_str(), woken.sprite.unwrap().status.as_str()), ("memory", "running"));
    eventually("the watch sees it", async || {
        (watch.message().await.unwrap().unwrap().status == "running").then_some(())
    })
    .await;
    let checkpoint = CreateCheckpointRequest { name: "demo".into(), comment: "c".into(), durable: false };
    let mut events = client.create_checkpoint(rig.authorized(checkpoint)).await.unwrap().into_inner();
    let mut last = None;
    while let Some(event) = events.message().await.unwrap() {
        last = Some(event);
    }
    assert_eq!(last.unwrap().checkpoint.unwrap().id, "v1");
    let listed = client.list_checkpoints(rig.authorized(ListCheckpointsRequest { name: "demo".into() })).await.unwrap();
    assert_eq!(listed.into_inner().checkpoints.len(), 1);
    let delete = DeleteCheckpointRequest { name: "demo".into(), checkpoint: "v1".into() };
    assert_eq!(client.delete_checkpoint(rig.authorized(delete)).await.unwrap_err().code(), Code::FailedPrecondition);
    let listed = client.list_sprites(rig.authorized(ListSpritesRequest::default())).await.unwrap().into_inner();
    assert_eq!((listed.sprites.len(), listed.next_continuation_token.as_str()), (1, ""));
    client.destroy_sprite(rig.authorized(DestroySpriteRequest { name: "demo".into() })).await.unwrap();
    let gone = client.get_sprite(rig.authorized(GetSpriteRequest { name: "demo".into() })).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert!(gone.message().contains("sprite list"), "without advice: {}", gone.message());
}

fn start(argv: &[&str]) -> ExecRequest {
    let argv = argv.iter().map(|word| (*word).to_owned()).collect();
    ExecRequest {
        input: Some(Input::Start(ExecStart { name: "demo".into(), argv, stdin: true, ..Default::default() })),
    }
}

#[tokio::test]
async fn exec_carries_both_ways_and_ends_with_the_exit_code() {
    let rig = Rig::start().await;
    rig.create("demo").await;
    let mut client = SpritesClient::new(rig.channel());
    let stdin = vec![b'x'; 300_000];
    let input = |input| ExecRequest { input: Some(input) };
    let requests = vec![start(&["cat"]), input(Input::Stdin(stdin.clone()))];
    let mut answers = client.exec(rig.authorized(tokio_stream::iter(requests))).await.unwrap().into_inner();
    let (mut session, mut stdout, mut stderr, mut exit) = (None, Vec::new(), Vec::new(), None);
    while let Some(answer) = answers.message().await.unwrap() {
        match answer.output.unwrap() {
            Output::Session(id) => session = Some(id),
            Output::Stdout(data) => stdout.extend(data),
            Output::Stderr(data) => stderr.extend(data),
            Output::Exit(code) => exit = Some(code),
        }
    }
    assert_eq!((session.as_deref(), stdout == stdin, stderr.as_slice(), exit), (Some("7"), true, &b"e"[..], Some(42)));

    let refused = client.exec(rig.authorized(tokio_stream::iter([start(&["refuse"])]))).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().contains("session not found"), "{}", refused.message());
    let nothing = client.exec(rig.authorized(tokio_stream::iter([input(Input::Stdin(vec![1]))]))).await.unwrap_err();
    assert_eq!(nothing.code(), Code::InvalidArgument);
    let large = "x".repeat(70_000);
    let large = client.exec(rig.authorized(tokio_stream::iter([start(&["echo", &large])]))).await.unwrap_err();
    assert_eq!(large.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn health_and_reflection_answer_without_a_token() {
    let rig = Rig::start().await;
    let check = HealthCheckRequest { service: "sprites.v1.Sprites".into() };
    assert_eq!(HealthClient::new(rig.channel()).check(check).await.unwrap().into_inner().status, 1);
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(rig.channel())
        .server_reflection_info(tokio_stream::iter([ask]))
        .await
        .unwrap()
        .into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services");
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains(&"sprites.v1.Sprites".to_owned()), "{names:?}");
    assert!(
        !names.iter().any(|name| name.contains("node") || name.contains("control")),
        "internal services are shown: {names:?}"
    );
}

#[tokio::test]
async fn the_edge_learns_who_and_where() {
    let rig = Rig::start().await;
    let created = rig.create("demo").await;
    let mut client = ControlClient::new(rig.channel());
    let who = client.authenticate(AuthenticateRequest { token: rig.token.clone() }).await.unwrap().into_inner();
    assert_eq!(who.org, "local");
    let nobody = client.authenticate(AuthenticateRequest { token: "a/b/c/d".into() }).await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unauthenticated);

    let url = created["url"].as_str().unwrap();
    let label = url.strip_prefix("https://").unwrap().split('.').next().unwrap().to_owned();
    let by_label = ResolveRequest { label, ..Default::default() };
    let by_name = ResolveRequest { org: "local".into(), name: "demo".into(), ..Default::default() };
    for ask in [by_label.clone(), by_name.clone()] {
        let route = client.resolve(ask).await.unwrap().into_inner();
        assert_eq!((route.was.as_str(), route.public, route.http_port), ("running", false, 8080));
        assert_eq!(created["id"], format!("sprite-{}", route.sprite_id));
        assert!(route.node.starts_with("unix:/") && route.node.ends_with("node.sock"), "{}", route.node);
    }
    rig.call("PUT", "/v1/sprites/demo", Some(json!({ "url_settings": { "auth": "public" } }))).await;
    rig.call("POST", "/v1/sprites/demo/sleep", None).await;
    let route = client.resolve(by_label.clone()).await.unwrap().into_inner();
    assert_eq!((route.was.as_str(), route.public), ("suspended", true), "asked without waking");
    let woken = client.resolve(ResolveRequest { wake: true, ..by_label.clone() }).await.unwrap().into_inner();
    assert_eq!(woken.was, "suspended");
    assert_eq!(client.resolve(by_name).await.unwrap().into_inner().was, "running");
    for label in ["nobody-aaaaaa", "x", "demo-aaaaaa", "../../x-aaaaaa"] {
        let error = client.resolve(ResolveRequest { label: label.into(), ..Default::default() }).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{label}");
    }
    let other = ResolveRequest { org: "other".into(), name: "demo".into(), ..Default::default() };
    assert_eq!(client.resolve(other).await.unwrap_err().code(), Code::NotFound);
    rig.call("DELETE", "/v1/sprites/demo", None).await;
    assert_eq!(client.resolve(by_label).await.unwrap_err().code(), Code::NotFound, "a label alone is no sprite");
}
