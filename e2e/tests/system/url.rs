//! The sprite's own address.

use e2e::{Cluster, Sprite};

fn get(cluster: &Cluster, flags: &[&str], url: &str) -> (String, String) {
    let arguments = flags.iter().copied().chain(["-w", "\n%{http_code}", url]);
    let answer = cluster.curl(arguments).success().out();
    let (body, status) = answer.rsplit_once('\n').expect("curl was told to print the status");
    (status.to_owned(), body.to_owned())
}

fn bearer(cluster: &Cluster) -> String {
    format!("Authorization: Bearer {}", cluster.token())
}

#[test]
fn the_url_is_private_until_it_is_made_public() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("url");
    sprite.serve_http("hello from inside");
    let url = sprite.url();
    assert_eq!(get(cluster, &[], &url).0, "401");
    assert_eq!(get(cluster, &["-H", "Authorization: Bearer wrong/org/token/value"], &url).0, "401");
    for version in ["--http1.1", "--http2"] {
        let (status, body) = get(cluster, &[version, "-H", &bearer(cluster)], &url);
        assert_eq!((status.as_str(), body.trim()), ("200", "hello from inside"), "{version}");
    }
    sprite.cli(&["url", "--public"]).success();
    assert_eq!(get(cluster, &[], &url).0, "200");
}

#[test]
fn a_request_wakes_a_sleeping_sprite_and_is_held_not_refused() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("wakeup");
    sprite.serve_http("awake again");
    sprite.cli(&["sleep"]).success();
    assert_eq!(sprite.status(), "warm");
    let (status, body) = get(cluster, &["-H", &bearer(cluster)], &sprite.url());
    assert_eq!((status.as_str(), body.trim()), ("200", "awake again"));
}

#[test]
fn nothing_listening_is_a_502_that_says_so() {
    let cluster = Cluster::shared();
    let sprite: Sprite<'_> = cluster.new_sprite("silent");
    let (status, body) = get(cluster, &["-H", &bearer(cluster)], &sprite.url());
    assert_eq!(status, "502");
    assert!(body.contains("8080"), "{body}");
    let elsewhere = format!("https://nobody-aaaaaa.sprites.localhost:{}", cluster.port());
    assert!(["401", "404"].contains(&get(cluster, &["-H", &bearer(cluster)], &elsewhere).0.as_str()));
}
