//! The dialect: shapes, statuses, settings.

use std::sync::atomic::Ordering;

use axum::{
    body::Body,
    http::{Request, header},
};
use serde_json::{Value, json};

use super::rig::Rig;

#[tokio::test]
async fn a_sprite_has_the_dialects_fields_and_ours() {
    let rig = Rig::start().await;
    let body = json!({
        "name": "demo", "labels": ["b", "a", "ü=1"], "environment": {"A": "1"}, "url_settings": {"auth": "public"},
        "size": "l", "idle_timeout": "1h30m", "always_on": true, "unknown": {"field": 1}, "config": {"cpus": 99}, "runtime": "dev",
    });
    let answer = rig.call("POST", "/v1/sprites", Some(body)).await;
    assert_eq!(answer.status, 201);
    assert_eq!(answer.headers["sprite-version"], "0.1.0");
    let created = answer.json();
    let same = rig.get("/v1/sprites/demo").await.json();
    for (key, value) in [
        ("name", json!("demo")),
        ("organization", json!("local")),
        ("status", json!("running")),
        ("url_settings", json!({"auth": "public"})),
        ("labels", json!(["b", "a", "ü=1"])),
        ("environment", json!({"A": "1"})),
        ("size", json!("l")),
        ("config", json!({"ram_mb": 4096, "cpus": 4, "storage_gb": 100})),
        ("idle_timeout", json!("1h30m")),
        ("always_on", json!(true)),
        ("disk_bytes", json!(100_u64 << 30)),
        ("state", json!("running")),
        ("reason", json!("created")),
    ] {
        assert_eq!((&created[key], &same[key]), (&value, &value), "{key}");
    }
    assert!(created["id"].as_str().unwrap().starts_with("sprite-"));
    let url = created["url"].as_str().unwrap();
    let oid = url.strip_prefix("https://demo-").and_then(|rest| rest.strip_suffix(".sprites.localhost:8443")).unwrap();
    assert!(oid.len() == 6 && oid.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{url}");
    let time = created["created_at"].as_str().unwrap();
    assert!(time.len() == "2026-01-01T00:00:00.000Z".len() && time.ends_with('Z'), "{time}");
    assert_eq!(created["last_warming_at"], Value::Null, "no time is null, never empty");
}

#[tokio::test]
async fn refusals_have_one_shape() {
    let rig = Rig::start().await;
    let long = "a".repeat(64);
    for name in ["", long.as_str(), "Upper", "ünïcode", "a--b", "-a", "a.b", "a/b"] {
        let refused = rig.call("POST", "/v1/sprites", Some(json!({ "name": name }))).await;
        let (status, error) = refused.refusal();
        assert_eq!(status, 422, "{name:?}");
        assert_eq!(error == "name is required", name.is_empty(), "{name:?}: {error}");
    }
    assert_eq!(rig.call("POST", "/v1/sprites", None).await.refusal(), (422, "name is required".to_owned()));
    for (field, value) in [
        ("size", json!("xl")),
        ("idle_timeout", json!("soon")),
        ("disk_bytes", json!(5)),
        ("labels", json!([""])),
        ("environment", json!({"": "x"})),
        ("url_settings", json!({"auth": "nobody"})),
        ("url_settings", json!({"private_access": "admins"})),
    ] {
        let refused = rig.call("POST", "/v1/sprites", Some(json!({ "name": "demo", field: value }))).await;
        assert_eq!(refused.refusal(), (422, "invalid request".to_owned()), "{field}");
    }
    assert_eq!(rig.call("POST", "/v1/sprites", Some(json!({ "name": 7 }))).await.refusal().0, 400);
    assert_eq!(rig.call("POST", "/v1/sprites", Some(json!("x".repeat(2 << 20)))).await.refusal().0, 413);
    assert!(rig.node.ids().is_empty(), "nothing was made");
    for (method, path, error) in [
        ("GET", "/v1/sprites/nobody", "sprite not found"),
        ("GET", "/v1/sprites/No%20Body", "sprite not found"),
        ("PUT", "/v1/sprites/nobody", "sprite not found"),
        ("DELETE", "/v1/sprites/nobody", "sprite not found"),
        ("POST", "/v1/sprites/nobody/sleep", "sprite not found"),
        ("POST", "/v1/sprites/nobody/wake", "sprite not found"),
        ("POST", "/v1/sprites/nobody/checkpoint", "sprite not found"),
        ("GET", "/v1/sprites/nobody/checkpoints", "sprite not found"),
        ("GET", "/v1/sprites/nobody/something", "not found"),
        ("POST", "/v1/sprites/nobody", "not found"),
        ("GET", "/v1/sprites/%ff", "sprite not found"),
        ("GET", "/v2", "not found"),
    ] {
        let answer = rig.call(method, path, None).await;
        assert_eq!(answer.refusal(), (404, error.to_owned()), "{method} {path}");
        assert!(answer.headers.contains_key("sprite-version"), "{path}");
    }
}

#[tokio::test]
async fn without_a_valid_token_nothing_is_told() {
    let rig = Rig::start().await;
    rig.create("demo").await;
    for path in ["/v1/sprites", "/v1/sprites/demo", "/v1/sprites/nobody", "/v1/organization", "/x"] {
        for token in [None, Some("Bearer x"), Some("Bearer local/a/b/c"), Some("Basic eDp5"), Some("Bearer ")] {
            let mut request = Request::get(path);
            if let Some(token) = token {
                request = request.header(header::AUTHORIZATION, token);
            }
            let answer = rig.send(request.body(Body::empty()).unwrap()).await;
            assert_eq!(answer.refusal(), (401, "authentication failed".to_owned()), "{path} {token:?}");
        }
    }
    let healthy = rig.send(Request::get("/healthz").body(Body::empty()).unwrap()).await;
    assert_eq!(healthy.status, 200);
}

#[tokio::test]
async fn settings_change_one_by_one_and_the_node_hears_of_it() {
    let rig = Rig::start().await;
    rig.create("demo").await;
    let put = async |body: Value| {
        let answer = rig.call("PUT", "/v1/sprites/demo", Some(body)).await;
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answer.json()
    };
    assert_eq!(put(json!({ "labels": ["a", "b"] })).await["labels"], json!(["a", "b"]));
    assert_eq!(put(json!({ "url_settings": { "auth": "public" } })).await["labels"], json!(["a", "b"]), "labels stay");
    assert_eq!(put(json!({ "clear_labels": true })).await["labels"], json!([]));
    assert_eq!(put(json!({ "idle_timeout": "never" })).await["idle_timeout"], "never");
    assert_eq!(put(json!({ "always_on": true })).await["always_on"], true);
    let last = put(json!({})).await;
    assert_eq!((&last["url_settings"]["auth"], &last["idle_timeout"]), (&json!("public"), &json!("never")));
    assert_eq!(rig.node.reloads.load(Ordering::Relaxed), 6);
    assert_eq!(rig.call("PUT", "/v1/sprites/demo", Some(json!({ "size": "l" }))).await.refusal().0, 422);

    let body = json!({ "at": ["2h"], "every": "1h" });
    assert_eq!(rig.call("POST", "/v1/sprites/demo/wake", Some(body)).await.json()["sprite"]["wake_every"], "1h");
    // What is not named stays.
    for (body, every, times) in [
        (json!({ "at": ["2h", "3h"] }), json!("1h"), 2),
        (json!({ "every": "3h" }), json!("3h"), 2),
        (json!({ "every": "never" }), Value::Null, 0),
        (json!({ "at": ["2h"], "every": "1h" }), json!("1h"), 1),
    ] {
        rig.call("POST", "/v1/sprites/demo/wake", Some(body.clone())).await.json();
        let timers = rig.get("/v1/sprites/demo/wake-timers").await.json();
        assert_eq!((&timers["every"], timers["at"].as_array().map(Vec::len)), (&every, Some(times)), "{body}");
    }
    let timers = rig.call("POST", "/v1/sprites/demo/wake-timers", Some(json!({ "every": "2h" }))).await.json();
    assert_eq!((timers["every"].as_str(), timers["at"].as_array().map(Vec::len)), (Some("2h"), Some(1)));
    assert_eq!(
        rig.call("PUT", "/v1/sprites/demo/wake-timers", Some(json!({ "at": ["1h"] }))).await.json()["every"],
        Value::Null
    );
    assert_eq!(rig.call("DELETE", "/v1/sprites/demo/wake-timers", None).await.status, 204);
    assert_eq!(rig.get("/v1/sprites/demo/wake-timers").await.json(), json!({ "at": [], "every": null }));
}

#[tokio::test]
async fn many_changes_at_once_all_take_effect() {
    let rig = Rig::start().await;
    rig.create("demo").await;
    let bodies = [
        json!({ "labels": ["x"] }),
        json!({ "always_on": true }),
        json!({ "idle_timeout": "2m" }),
        json!({ "url_settings": { "auth": "public" } }),
    ];
    let answers =
        futures_util::future::join_all(bodies.into_iter().map(|body| rig.call("PUT", "/v1/sprites/demo", Some(body))))
            .await;
    assert!(answers.iter().all(|answer| answer.status == 200));
    let sprite = rig.get("/v1/sprites/demo").await.json();
    assert_eq!(
        (&sprite["labels"], &sprite["always_on"], &sprite["idle_timeout"], &sprite["url_settings"]["auth"]),
        (&json!(["x"]), &json!(true), &json!("2m"), &json!("public"))
    );
}

#[tokio::test]
async fn sleep_and_wake_say_what_happened() {
    let rig = Rig::start().await;
    rig.create("demo").await;
    let slept = rig.call("POST", "/v1/sprites/demo/sleep", Some(json!({ "to": "suspended" }))).await.json();
    assert_eq!(
        (&slept["sprite"]["status"], &slept["sprite"]["state"], &slept["bucket_ms"]),
        (&json!("warm"), &json!("suspended"), &json!(3))
    );
    assert_eq!(rig.get("/v1/sprites/demo/check").await.json()["status"], "hibernated");
    let woken = rig.call("POST", "/v1/sprites/demo/wake", None).await.json();
    assert_eq!(
        (&woken["was"], &woken["resumed"], &woken["sprite"]["status"]),
        (&json!("suspended"), &json!("memory"), &json!("running"))
    );
    let cold = rig.call("POST", "/v1/sprites/demo/sleep", Some(json!({ "cold": true }))).await.json();
    assert_eq!(cold["sprite"]["status"], "cold");
    assert_eq!(rig.call("POST", "/v1/sprites/demo/sleep", Some(json!({ "to": "deep" }))).await.refusal().0, 422);
    assert_eq!(rig.call("POST", "/v1/sprites/demo/restart", None).await.json()["sprite_name"], "demo");
    assert_eq!(rig.call("POST", "/v1/sprites/demo/upgrade", None).await.json()["status"], "upgraded");
    let reached = rig.call("POST", "/v1/sprites/demo/sync", None).await.json();
    assert_eq!(reached, json!({ "watermark_at": "2023-11-14T22:13:20.000Z", "generation": 3, "took_ms": 5 }));
    let larger = rig.call("POST", "/v1/sprites/demo/resize", Some(json!({ "disk_bytes": 200_u64 << 30 }))).await.json();
    assert_eq!(larger["disk_bytes"], 200_u64 << 30);
    assert_eq!(rig.get("/v1/sprites/demo").await.json()["config"]["storage_gb"], 200);
    assert_eq!(rig.call("POST", "/v1/sprites/demo/resize", Some(json!({ "disk_bytes": 1 }))).await.refusal().0, 422);
}

#[tokio::test]
async fn checkpoints_speak_the_dialect() {
    let rig = Rig::start().await;
    rig.create("demo").await;
    let made = rig.call("POST", "/v1/sprites/demo/checkpoint", Some(json!({ "comment": "first" }))).await;
    assert_eq!((made.status, made.headers["content-type"].to_str().unwrap()), (200, "application/x-ndjson"));
    let lines: Vec<Value> = made
        .body
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    assert!(lines.iter().any(|line| line["data"].as_str().unwrap().contains("ID: v1")), "{lines:?}");
    let last = lines.last().unwrap();
    assert_eq!((&last["type"], &last["data"]), (&json!("complete"), &json!("Checkpoint v1 created successfully")));
    assert_eq!(last["checkpoint"]["comment"], "first");
    // Refused here, so that no guest is frozen for it; the message names the limit.
    let (longest, too_long) = ("x".repeat(256), "x".repeat(257));
    let refused = rig.call("POST", "/v1/sprites/demo/checkpoint", Some(json!({ "comment": too_long }))).await;
    assert_eq!(refused.refusal().0, 422);
    assert!(refused.json()["message"].as_str().unwrap().contains("256"), "{:?}", refused.body);
    assert_eq!(rig.get("/v1/sprites/demo/checkpoints").await.json().as_array().unwrap().len(), 2, "Current and v1");
    assert_eq!(rig.call("POST", "/v1/sprites/demo/checkpoint", Some(json!({ "comment": longest }))).await.status, 200);
    assert_eq!(rig.call("DELETE", "/v1/sprites/demo/checkpoints/v2", None).await.status, 204);
    rig.call("POST", "/v1/sprites/demo/checkpoint", None).await;
    let listed = rig.get("/v1/sprites/demo/checkpoints").await.json();
    let ids: Vec<&str> =
        listed.as_array().unwrap().iter().map(|checkpoint| checkpoint["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["Current", "v2", "v1"]);
    assert!(
        listed
            .as_array()
            .unwrap()
            .iter()
            .all(|checkpoint| checkpoint["create_time"].as_str().is_some_and(|time| time.ends_with('Z')))
    );
    assert_eq!(rig.get("/v1/sprites/demo/checkpoints/v1").await.json()["comment"], "first");
    assert_eq!(
        rig.get("/v1/sprites/demo/checkpoints/v9").await.refusal(),
        (404, "checkpoint not found: v9".to_owned())
    );
    assert_eq!(rig.call("DELETE", "/v1/sprites/demo/checkpoints/v1", None).await.refusal().0, 409, "the current base");
    assert_eq!(rig.call("DELETE", "/v1/sprites/demo/checkpoints/Current", None).await.refusal().0, 409);
    assert_eq!(rig.call("DELETE", "/v1/sprites/demo/checkpoints/v2", None).await.status, 204);
    assert_eq!(rig.call("DELETE", "/v1/sprites/demo/checkpoints/v2", None).await.refusal().0, 404);
    for unknown in ["v9", "not%20on%20this%20host"] {
        let refused = rig.call("POST", &format!("/v1/sprites/demo/checkpoints/{unknown}/restore"), None).await;
        assert_eq!(refused.refusal().0, 404, "{unknown}");
    }
    let broken = rig.call("POST", "/v1/sprites/demo/checkpoints/v1/restore", None).await;
    let last =
        String::from_utf8_lossy(&broken.body).lines().last().map(|line| serde_json::from_str::<Value>(line).unwrap());
    assert_eq!(
        last.map(|line| (line["type"].clone(), line["error"].clone())),
        Some((json!("error"), json!("the disk is on fire")))
    );
    rig.node.sprites.lock().unwrap().clear();
    let refused = rig.call("POST", "/v1/sprites/demo/checkpoints/v1/restore", None).await;
    assert_eq!(refused.refusal().0, 503, "the host does not have the sprite, which says nothing about the checkpoint");
}
