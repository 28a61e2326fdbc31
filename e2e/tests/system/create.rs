//! Create, list, info, destroy.

use e2e::{Cluster, Sprite, unique};

#[test]
fn a_new_sprite_is_a_whole_debian_with_a_root_capable_user() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("new");
    assert_eq!(sprite.sh("whoami; sudo -n whoami; hostname"), format!("sprite\nroot\n{}", sprite.name));
    assert!(sprite.sh("cat /etc/os-release").contains("Debian"));
    let disk_kib: u64 = sprite.sh("df --output=size / | tail -n 1").trim().parse().unwrap();
    assert!(disk_kib > 90 << 20, "the disk has {disk_kib} KiB");
    for tool in [
        "git", "curl", "wget", "jq", "vim", "less", "tmux", "htop", "python3", "pip3", "node", "npm", "gcc", "ssh",
        "sqlite3",
    ] {
        sprite.sh(&format!("command -v {tool}"));
    }
}

#[test]
fn sizes_are_what_they_say() {
    let cluster = Cluster::shared();
    let sprite = Sprite::create(cluster, &unique("small"), &["--size", "s"]);
    assert_eq!(sprite.sh("nproc"), "1");
    let memory_kib: u64 = sprite.sh("awk '/MemTotal/ { print $2 }' /proc/meminfo").parse().unwrap();
    assert!((800 << 10..=1 << 20).contains(&memory_kib), "{memory_kib} KiB");
}

#[test]
fn a_destroyed_sprite_is_gone_and_its_name_is_free() {
    let cluster = Cluster::shared();
    let name = unique("again");
    let first = Sprite::create(cluster, &name, &[]);
    first.sh("echo old > ~/file && sync");
    let old_id = first.record()["id"].clone();
    cluster.sprite(["destroy", &name, "--force"]).success();
    assert_eq!(cluster.api("GET", &format!("/v1/sprites/{name}"), None).0, 404);
    cluster.sprite(["exec", "-s", &name, "--", "true"]).refused();
    let second = Sprite::create(cluster, &name, &[]);
    assert_ne!(second.record()["id"], old_id, "an id is never used again");
    second.exec(&["test", "-e", "/home/sprite/file"]).code(1);
    drop(second);
    // It drops as the first one, which is gone already: destroy answers 404 and that is fine.
    drop(first);
}

#[test]
fn the_list_shows_every_sprite_once_with_its_state() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("listed");
    let listed = cluster.sprite(["list"]).success().out();
    assert_eq!(listed.lines().filter(|line| line.contains(&sprite.name)).count(), 1, "{listed}");
    let (status, answer) = cluster.api("GET", &format!("/v1/sprites?prefix={}", sprite.name), None);
    assert_eq!(status, 200);
    let only = answer["sprites"].as_array().unwrap();
    assert_eq!(only.len(), 1, "{answer}");
    assert!(["running", "warm", "cold"].contains(&only[0]["status"].as_str().unwrap()), "{answer}");
}

#[test]
fn two_sprites_share_nothing_that_must_differ() {
    let cluster = Cluster::shared();
    let (one, two) = (cluster.new_sprite("twin"), cluster.new_sprite("twin"));
    let identity = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; findmnt -no UUID /; head -c 16 /dev/urandom | od -An -tx1";
    let (first, second) = (one.sh(identity), two.sh(identity));
    for (a, b) in first.lines().zip(second.lines()) {
        assert_ne!(a, b, "\n{first}\n\n{second}");
    }
}
