//! Lists: every sprite once, whatever the page size; changes by others; the endless form.

use std::collections::BTreeSet;

use axum::{
    body::Body,
    http::{Request, header},
};
use futures_util::StreamExt as _;
use http_body_util_lines::lines;
use proto::id::SpriteName;
use serde_json::{Value, json};

use super::rig::{Rig, eventually};
use crate::{
    index::record_key,
    names::{Names, now},
};

/// The lines of a body as they come.
mod http_body_util_lines {
    use axum::body::Body;
    use futures_util::{Stream, StreamExt as _, stream};
    use serde_json::Value;

    pub(super) fn lines(body: hyper::body::Incoming) -> impl Stream<Item = Value> + Unpin {
        let chunks = Body::new(body).into_data_stream();
        Box::pin(stream::unfold((chunks, Vec::new()), |(mut chunks, mut buffer): (_, Vec<u8>)| async move {
            loop {
                if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = buffer.drain(..=end).collect();
                    if let Ok(value) = serde_json::from_slice::<Value>(&line) {
                        return Some((value, (chunks, buffer)));
                    }
                    continue;
                }
                buffer.extend_from_slice(&chunks.next().await?.ok()?);
            }
        }))
    }
}

/// Writes sprites into the bucket as another coordinator and its node would.
async fn plant(rig: &Rig, count: usize) {
    let template = rig.create("template").await;
    let id = template["id"].as_str().unwrap().parse().unwrap();
    let template = rig.bucket.read_record::<proto::record::SpriteRecord>(&record_key(id)).await.unwrap().unwrap().value;
    assert_eq!(rig.call("DELETE", "/v1/sprites/template", None).await.status, 204);
    let names = Names::new(rig.bucket.clone());
    for number in 0..count {
        let name: SpriteName = format!("s{number:03}").parse().unwrap();
        let crate::names::Claimed::Ours(claim) = names.claim("local", &name).await.unwrap() else { panic!("taken") };
        let mut record = template.clone();
        record.id = proto::id::SpriteId::generate();
        record.name = name;
        record.created_at = claim.since;
        record.updated_at = now();
        let id = record.id;
        rig.bucket.create_record(&record_key(id), record).await.unwrap();
        names.settle(&claim, id).await.unwrap();
    }
}

/// Reads all pages; checks what must hold on each.
async fn walk(rig: &Rig, query: &str) -> Vec<String> {
    let (mut names, mut token, mut pages) = (Vec::new(), None::<String>, 0);
    loop {
        let more = token.as_ref().map(|token| format!("&continuation_token={token}")).unwrap_or_default();
        let page = rig.get(&format!("/v1/sprites?{query}{more}")).await.json();
        let sprites = page["sprites"].as_array().unwrap();
        assert!(sprites.len() <= 50, "{}", sprites.len());
        names.extend(sprites.iter().map(|sprite| sprite["name"].as_str().unwrap().to_owned()));
        assert_eq!(page["has_more"].as_bool().unwrap(), page["next_continuation_token"].is_string(), "{page}");
        for counter in ["running", "warm", "cold", "running_limit", "warm_limit", "name"] {
            assert_eq!(page[counter], page["org"][counter], "{counter}");
        }
        pages += 1;
        assert!(pages <= 1 + 120, "a list without end");
        match page["next_continuation_token"].as_str() {
            Some(next) => token = Some(next.to_owned()),
            None => return names,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_hold_every_sprite_once_in_order() {
    for count in [0, 1, 51, 120] {
        let rig = Rig::start().await;
        plant(&rig, count).await;
        let expected: Vec<String> = (0..count).map(|number| format!("s{number:03}")).collect();
        eventually("the other coordinator's sprites", async || {
            (walk(&rig, "max_results=100").await == expected).then_some(())
        })
        .await;
        assert_eq!(walk(&rig, "max_results=7").await, expected);
        assert_eq!(walk(&rig, "").await, expected);
        assert_eq!(walk(&rig, "max_results=0").await.len(), count, "clamped, not refused");
        assert_eq!(walk(&rig, "prefix=s00&max_results=many").await.len(), count.min(10));
        assert_eq!(walk(&rig, "prefix=nobody").await, [""; 0]);
        let page = rig.get("/v1/sprites").await.json();
        assert_eq!(page["cold"].as_u64(), Some(count as u64), "no node has them: cold");
    }
}

#[tokio::test]
async fn a_forged_token_is_refused() {
    let rig = Rig::start().await;
    for token in ["x", "%21%21", "Li4vLi4v"] {
        assert_eq!(rig.get(&format!("/v1/sprites?continuation_token={token}")).await.refusal().0, 400, "{token}");
    }
}

#[tokio::test]
async fn what_one_coordinator_does_the_other_lists() {
    let rig = Rig::start().await;
    let listed = async || -> BTreeSet<String> {
        let listed = rig.service.list("local", "", None, 50).await.unwrap();
        listed.sprites.iter().map(|view| view.record.name.to_string()).collect()
    };
    rig.create("one").await;
    assert_eq!(
        rig.get("/v1/sprites").await.json()["sprites"][0]["status"],
        "running",
        "its own writes are seen at once"
    );
    eventually("one is listed", async || listed().await.contains("one").then_some(())).await;
    rig.call("PUT", "/v1/sprites/one", Some(json!({ "labels": ["x"] }))).await;
    eventually("its label is listed", async || {
        let listed = rig.service.list("local", "", None, 50).await.unwrap();
        (listed.sprites[0].record.labels == ["x"]).then_some(())
    })
    .await;
    rig.call("DELETE", "/v1/sprites/one", None).await;
    assert_eq!(rig.get("/v1/sprites").await.json()["sprites"], json!([]));
    eventually("one is gone", async || listed().await.is_empty().then_some(())).await;
    let others = rig.service.list("others", "", None, 50).await.unwrap();
    assert!(others.sprites.is_empty(), "an organisation sees its own only");
}

#[tokio::test]
async fn a_watcher_sees_what_is_and_then_what_changes() {
    let rig = Rig::start().await;
    rig.create("one").await;
    rig.create("other").await;
    let request = Request::get("/v1/sprites?prefix=on")
        .header(header::AUTHORIZATION, format!("Bearer {}", rig.token))
        .header(header::ACCEPT, "application/x-ndjson");
    let answer = rig.open(request.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    let mut lines = lines(answer.into_body());
    let mut until = async |what: &str, wanted: &dyn Fn(&Value) -> bool| {
        let seen = async {
            loop {
                let line = lines.next().await.expect("the watch goes on");
                assert!(line["name"].is_null() || line["name"] == "one", "{line}");
                assert_eq!(line["org"]["name"], "local");
                if wanted(&line) {
                    return line;
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), seen)
            .await
            .unwrap_or_else(|_| panic!("never seen: {what}"))
    };
    until("it runs", &|line| line["status"] == "running").await;
    assert_eq!(rig.call("POST", "/v1/sprites/one/sleep", None).await.status, 200);
    until("it is warm", &|line| line["status"] == "warm" && line["state"] == "suspended").await;
    assert_eq!(rig.call("DELETE", "/v1/sprites/one", None).await.status, 204);
    until("it is gone", &|line| line["type"] == "deleted").await;
    rig.stop();
    let end = async { while lines.next().await.is_some() {} };
    tokio::time::timeout(std::time::Duration::from_secs(60), end).await.expect("a watch ends with the coordinator");
}
