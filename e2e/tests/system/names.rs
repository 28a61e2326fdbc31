//! Names and unknown sprites: refused with a reason, never a hang.

use e2e::Cluster;
use serde_json::json;

#[test]
fn bad_names_are_refused_with_what_is_wrong() {
    let cluster = Cluster::shared();
    let long = "a".repeat(64);
    for name in ["", long.as_str(), "Upper", "ünïcode", "a--b", "-a", "a.b", "a/b"] {
        let (status, answer) = cluster.api("POST", "/v1/sprites", Some(&json!({ "name": name })));
        assert!([400, 422].contains(&status), "{name:?}: {status} {answer}");
        assert!(!answer.is_null(), "{name:?}: the answer explains nothing");
        if !name.starts_with('-') {
            cluster.sprite(["create", name, "--skip-console"]).refused().says("name");
        }
    }
}

#[test]
fn a_taken_name_is_a_conflict() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("taken");
    assert_eq!(cluster.api("POST", "/v1/sprites", Some(&json!({ "name": sprite.name }))).0, 409);
    cluster.sprite(["create", &sprite.name, "--skip-console"]).refused().says("exists");
}

#[test]
fn an_unknown_sprite_is_named_in_every_refusal() {
    let cluster = Cluster::shared();
    for command in [
        &["exec", "-s", "nobody", "--", "true"][..],
        &["checkpoint", "create", "-s", "nobody"],
        &["restore", "v1", "-s", "nobody"],
        &["sleep", "-s", "nobody"],
        &["wake", "-s", "nobody"],
        &["info", "-s", "nobody"],
        &["destroy", "nobody", "--force"],
    ] {
        cluster.sprite(command).refused().says("not found");
    }
}

#[test]
fn without_a_token_nothing_is_told() {
    let cluster = Cluster::shared();
    let status = cluster.curl(["-o", "/dev/null", "-w", "%{http_code}", &format!("{}/v1/sprites", cluster.api_url())]);
    assert_eq!(status.success().out(), "401");
}
