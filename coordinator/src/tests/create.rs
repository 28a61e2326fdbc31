//! Names and crashes: each step of create and destroy can be the last.

use std::sync::atomic::Ordering;

use jiff::{SignedDuration, Timestamp};
use proto::{
    id::{SpriteId, SpriteName},
    record::SpriteRecord,
};
use serde_json::json;

use super::rig::{Rig, eventually};
use crate::{index::record_key, names::NameEntry};

fn name(text: &str) -> SpriteName {
    text.parse().unwrap()
}

fn long_ago() -> Timestamp {
    Timestamp::now() - SignedDuration::from_secs(3600)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_creates_of_a_name_one_succeeds() {
    let rig = Rig::start().await;
    let body = || Some(json!({ "name": "demo" }));
    let answers = futures_util::future::join_all((0..12).map(|_| rig.call("POST", "/v1/sprites", body()))).await;
    let mut statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [vec![201], vec![409; 11]].concat());
    assert_eq!(rig.node.ids().len(), 1);
    for lost in answers.iter().filter(|answer| answer.status == 409) {
        assert!(lost.refusal().1.contains("sprite"), "{:?}", lost.body);
    }
    assert_eq!(rig.call("POST", "/v1/sprites", body()).await.refusal(), (409, "sprite already exists".to_owned()));
}

#[tokio::test]
async fn a_host_without_room_is_told_and_the_name_stays_free() {
    let rig = Rig::start().await;
    rig.node.full.store(1, Ordering::Relaxed);
    let refused = rig.call("POST", "/v1/sprites", Some(json!({ "name": "demo" }))).await;
    assert_eq!(refused.refusal(), (503, "no capacity".to_owned()));
    assert!(refused.headers.contains_key("retry-after"));
    rig.create("demo").await;
    rig.node.full.store(2, Ordering::Relaxed);
    let patient = rig.call("POST", "/v1/sprites", Some(json!({ "name": "patient", "wait_for_capacity": true }))).await;
    assert_eq!(patient.status, 201);
}

#[tokio::test]
async fn a_lost_answer_of_the_node_loses_no_sprite() {
    let rig = Rig::start().await;
    rig.node.answer_lost.store(true, Ordering::Relaxed);
    let created = rig.create("demo").await;
    assert_eq!(created["id"], rig.node.ids()[0].public());
    assert_eq!(rig.get("/v1/sprites/demo").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_is_repeated_with_its_request_id_makes_one_sprite() {
    let rig = Rig::start().await;
    let create = |id: &str| rig.call("POST", "/v1/sprites", Some(json!({ "name": "demo", "request_id": id })));
    // At once, as a client that gave up waiting repeats it while the first is still at work.
    let answers = futures_util::future::join_all((0..8).map(|_| create("mine"))).await;
    let made = rig.node.ids();
    assert_eq!(made.len(), 1);
    for answer in &answers {
        assert_eq!((answer.status, answer.json()["id"].clone()), (201, json!(made[0].public())), "{:?}", answer.body);
    }
    assert_eq!(create("other").await.refusal(), (409, "sprite already exists".to_owned()));
    assert_eq!(rig.call("DELETE", "/v1/sprites/demo", None).await.status, 204);
    let again = create("mine").await;
    assert_eq!(again.status, 201);
    assert_ne!(again.json()["id"], made[0].public(), "the id is kept with the sprite, no longer");
}

#[tokio::test]
async fn a_repeated_create_finds_what_a_crashed_coordinator_made() {
    let rig = Rig::start().await;
    let created = rig.call("POST", "/v1/sprites", Some(json!({ "name": "demo", "request_id": "mine" }))).await.json();
    let since = Timestamp::now() - SignedDuration::from_secs(3600);
    let mut record = rig.bucket.read_record::<SpriteRecord>(&record_key(rig.node.ids()[0])).await.unwrap().unwrap();
    record.value.created_at = since;
    rig.bucket.update_record(&record, record.value.clone()).await.unwrap();
    let key = "v1/names/local/demo";
    let name = rig.bucket.read_record::<NameEntry>(key).await.unwrap().unwrap();
    rig.bucket.update_record(&name, NameEntry::Pending { since, renewed: since }).await.unwrap();
    let again = rig.call("POST", "/v1/sprites", Some(json!({ "name": "demo", "request_id": "mine" }))).await;
    assert_eq!((again.status, again.json()["id"].clone()), (201, created["id"].clone()));
}

/// As a coordinator that crashed between its steps leaves things.
async fn abandon_claim(rig: &Rig, text: &str, with_record: bool) -> Option<SpriteId> {
    let since = long_ago();
    let key = format!("v1/names/local/{text}");
    let record = if with_record {
        let id: SpriteId = rig.create("template").await["id"].as_str().unwrap().parse().unwrap();
        let template = rig.bucket.read_record::<SpriteRecord>(&record_key(id)).await.unwrap().unwrap().value;
        Some(SpriteRecord {
            id: SpriteId::generate(),
            name: name(text),
            created_at: since,
            updated_at: since,
            ..template
        })
    } else {
        None
    };
    rig.bucket.create_record(&key, NameEntry::Pending { since, renewed: since }).await.unwrap();
    match record {
        Some(record) => Some(rig.bucket.create_record(&record_key(record.id), record).await.unwrap().value.id),
        None => None,
    }
}

#[tokio::test]
async fn a_claim_given_up_without_a_sprite_frees_the_name() {
    let rig = Rig::start().await;
    abandon_claim(&rig, "demo", false).await;
    assert_eq!(rig.get("/v1/sprites/demo").await.status, 404);
    rig.create("demo").await;
}

#[tokio::test]
async fn a_claim_given_up_with_a_sprite_gives_it_the_name() {
    let rig = Rig::start().await;
    let id = abandon_claim(&rig, "demo", true).await.unwrap();
    let refused = rig.call("POST", "/v1/sprites", Some(json!({ "name": "demo" }))).await;
    assert_eq!(refused.status, 409, "{:?}", refused.body);
    assert_eq!(rig.get("/v1/sprites/demo").await.json()["id"], id.public());
}

#[tokio::test]
async fn a_claim_that_is_still_held_is_busy() {
    let rig = Rig::start().await;
    let now = Timestamp::now();
    rig.bucket.create_record("v1/names/local/demo", NameEntry::Pending { since: now, renewed: now }).await.unwrap();
    let refused = rig.call("POST", "/v1/sprites", Some(json!({ "name": "demo" }))).await;
    assert_eq!(refused.refusal(), (409, "sprite name is busy".to_owned()));
    assert_eq!(rig.get("/v1/sprites/demo").await.status, 404);
}

#[tokio::test]
async fn a_destroy_that_failed_halfway_is_finished_by_the_next_one_or_by_a_create() {
    let rig = Rig::start().await;
    for by_create in [false, true] {
        let first = rig.create("demo").await;
        rig.node.destroy_fails.store(true, Ordering::Relaxed);
        assert_eq!(rig.call("DELETE", "/v1/sprites/demo", None).await.refusal().0, 503);
        assert_eq!(rig.get("/v1/sprites/demo").await.status, 404, "gone for everybody from the first step on");
        assert_eq!(rig.get("/v1/sprites").await.json()["sprites"], json!([]));
        rig.node.destroy_fails.store(false, Ordering::Relaxed);
        if !by_create {
            assert_eq!(rig.call("DELETE", "/v1/sprites/demo", None).await.status, 204);
            assert_eq!(
                rig.call("DELETE", "/v1/sprites/demo", None).await.refusal(),
                (404, "sprite not found".to_owned())
            );
        }
        let second = rig.create("demo").await;
        assert_ne!(first["id"], second["id"]);
        assert_eq!(first["url"], second["url"], "a name keeps its address");
        assert_eq!(rig.node.ids().len(), 1);
        assert_eq!(rig.call("DELETE", "/v1/sprites/demo", None).await.status, 204);
        assert!(rig.node.ids().is_empty());
    }
    let left = rig.bucket.list("v1/sprites").await.unwrap();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn the_sweep_frees_what_nobody_names_and_nothing_else() {
    let rig = Rig::start().await;
    let kept = rig.create("kept").await;
    let orphan = abandon_claim(&rig, "orphan", true).await.unwrap();
    rig.bucket.delete("v1/names/local/orphan").await.unwrap();
    rig.service.sweep_now().await;
    assert!(
        rig.bucket.get(&record_key(orphan)).await.unwrap().is_some(),
        "a name object that is lost is no reason to destroy"
    );
    rig.bucket.create_record("v1/names/local/orphan", NameEntry::Free { since: Timestamp::now() }).await.unwrap();
    rig.service.sweep_now().await;
    assert!(rig.bucket.get(&record_key(orphan)).await.unwrap().is_none());
    assert_eq!(rig.get("/v1/sprites/kept").await.json()["id"], kept["id"]);
    assert_eq!(rig.get("/v1/sprites/template").await.status, 200);
}

#[tokio::test]
async fn a_node_that_is_away_is_said_not_guessed() {
    let rig = Rig::start().await;
    rig.create("demo").await;
    rig.node.sprites.lock().unwrap().clear();
    let check = eventually("the check sees it", async || {
        let check = rig.get("/v1/sprites/demo/check").await;
        (check.status == 200).then(|| check.json())
    })
    .await;
    assert!(["error", "healthy"].contains(&check["status"].as_str().unwrap()), "{check}");
    let refused = rig.call("POST", "/v1/sprites/demo/wake", None).await;
    assert_eq!(refused.refusal(), (503, "temporarily unavailable".to_owned()));
}
