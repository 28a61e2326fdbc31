//! A new sprite that begins as another one was.

use e2e::{Cluster, Sprite, unique};
use serde_json::json;

fn fork<'a>(cluster: &'a Cluster, from: &str) -> Sprite<'a> {
    Sprite::create(cluster, &unique("fork"), &["--from", from])
}

#[test]
fn a_fork_has_the_disk_of_a_checkpoint_and_nothing_else_in_common() {
    let cluster = Cluster::shared();
    let parent = cluster.new_sprite("parent");
    parent.sh("echo then > ~/file; sudo apt-mark hold git >/dev/null");
    let checkpoint = parent.checkpoint("to be forked");
    parent.sh("echo later > ~/file");

    let fork = fork(cluster, &format!("{}@{checkpoint}", parent.name));
    assert_eq!(fork.sh("cat ~/file; apt-mark showhold; hostname"), format!("then\ngit\n{}", fork.name));
    fork.sh("echo forked > ~/file");
    assert_eq!(parent.sh("cat ~/file"), "later");

    let identity =
        "cat /etc/machine-id; findmnt -no UUID /; sudo ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key | cut -d' ' -f2";
    let (of_parent, of_fork) = (parent.sh(identity), fork.sh(identity));
    for (one, other) in of_parent.lines().zip(of_fork.lines()) {
        assert_ne!(one, other, "an identity repeats:\n{of_parent}\n\n{of_fork}");
    }
    assert_eq!(fork.record()["from"], json!({ "sprite": parent.name, "checkpoint": checkpoint }));
    fork.cli(&["info"]).success().says(&format!("{}@{checkpoint}", parent.name));
    // Its checkpoints are its own.
    assert_eq!(fork.checkpoint(""), "v1");
}

#[test]
fn a_fork_of_a_sprite_as_it_is_now_outlives_it() {
    let cluster = Cluster::shared();
    let parent = cluster.new_sprite("parent");
    parent.cli(&["resize", "--disk", "120G"]).success();
    parent.sh("head -c 20M /dev/urandom > ~/file; sha256sum ~/file > ~/sum");
    let fork = fork(cluster, &parent.name);
    let size = fork.sh("df --output=size -BG / | tail -n 1").trim().trim_end_matches('G').parse::<u64>();
    assert!(size.is_ok_and(|gib| gib > 110), "its file system is smaller than its parent's");
    drop(parent);
    fork.cli(&["sleep", "--cold"]).success();
    fork.sh("sha256sum --check --status ~/sum");
    let second = Sprite::create(cluster, &unique("fork"), &["--from", &fork.name]);
    drop(fork);
    second.sh("sha256sum --check --status ~/sum");
}

#[test]
fn what_cannot_be_forked_is_refused_and_the_name_stays_free() {
    let cluster = Cluster::shared();
    let parent = cluster.new_sprite("parent");
    let name = unique("fork");
    let create = |from: &str| cluster.sprite(["create", &name, "--skip-console", "--from", from]);
    create(&format!("{}@v9", parent.name)).refused().says("v9");
    create("nobody-has-this-name").refused().says("nobody-has-this-name");
    create("@v1").refused().says("demo@v3");
    let (status, said) = cluster.api("POST", "/v1/sprites", Some(&json!({ "name": name, "from": {} })));
    assert_eq!(status, 422, "{said}");
    cluster.sprite(["create", &name, "--skip-console"]).success();
    drop(Sprite::existing(cluster, &name));
}
