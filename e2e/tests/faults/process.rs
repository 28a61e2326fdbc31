//! Processes of a sprite that die: its QEMU in each state, and everything at once.

use std::{process::Command, time::Duration};

use e2e::{Cluster, Options, Sprite, eventually};

use crate::one_at_a_time;

/// The QEMU of a sprite, by its folder in the command line; `None` when it has none.
fn qemu_of(cluster: &Cluster, sprite: &Sprite<'_>) -> Option<i32> {
    let id = sprite.record()["id"].as_str().expect("a sprite has an id").trim_start_matches("sprite-").to_owned();
    let pattern = format!("qemu-system.*{}.*{id}", cluster.folder().display());
    let found = Command::new("pgrep").args(["-f", &pattern]).output().expect("pgrep runs");
    String::from_utf8_lossy(&found.stdout).lines().next().and_then(|pid| pid.parse().ok())
}

fn kill(pid: i32) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill runs").success());
    eventually("the end of QEMU", Duration::from_secs(20), || {
        if std::path::Path::new(&format!("/proc/{pid}/exe")).exists() { Err("it runs".to_owned()) } else { Ok(()) }
    });
}

#[test]
fn a_sprite_whose_qemu_dies_comes_back_from_its_disk_and_says_so() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let sprite = cluster.new_sprite("dies");
    sprite.sh("echo running > ~/file && sync");
    kill(qemu_of(&cluster, &sprite).expect("it runs"));
    assert_eq!(sprite.sh("cat ~/file"), "running");

    sprite.sh("echo paused > ~/file && sync");
    sprite.cli(&["sleep", "--paused"]).success();
    kill(qemu_of(&cluster, &sprite).expect("it is paused"));
    assert_eq!(sprite.sh("cat ~/file"), "paused");
    let info = sprite.cli(&["info", "--json"]).success().out();
    assert!(info.contains("lost"), "what was lost is told: {info}");

    sprite.cli(&["sleep"]).success();
    assert_eq!(qemu_of(&cluster, &sprite), None, "a suspended sprite costs no process");
    assert_eq!(sprite.sh("cat ~/file"), "paused");
}

#[test]
fn when_everything_is_killed_the_disk_is_whole_to_the_last_fsync() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let sprite = cluster.new_sprite("all");
    sprite.sh("mkdir ~/d; for i in $(seq 40); do echo $i > ~/d/$i; sync ~/d/$i ~/d; done; head -c 30M /dev/urandom > ~/d/big; sync; sha256sum ~/d/* > ~/sums; sync ~/sums");
    let qemu = qemu_of(&cluster, &sprite).expect("it runs");
    cluster.kill_sprited();
    kill(qemu);
    cluster.start_sprited();
    sprite.sh("sha256sum --check --status ~/sums && test $(ls ~/d | wc -l) = 41");
}
