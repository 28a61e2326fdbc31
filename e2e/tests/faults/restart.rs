//! `sprited` ends, in every way there is, and comes back.

use std::time::Duration;

use e2e::{Cluster, Options, full_size};

use crate::one_at_a_time;

/// Ruling 19: dead for so long, and nothing in the VM has noticed. A minute in `./dev soak`.
fn dead_for() -> Duration {
    Duration::from_secs(if full_size() { 60 } else { 10 })
}

#[test]
fn killed_sprited_comes_back_to_running_vms() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let sprite = cluster.new_sprite("orphan");
    sprite.start_counter("/tmp/count");
    let (before, pid) = sprite.counter("/tmp/count");
    sprite.sh("echo fsynced > ~/file && sync ~/file");
    let boot_id = sprite.sh("cat /proc/sys/kernel/random/boot_id");

    cluster.kill_sprited();
    e2e::pause(dead_for());
    cluster.start_sprited();

    let (after, same_pid) = sprite.counter("/tmp/count");
    assert_eq!(pid, same_pid, "the process was started again");
    assert!(after > before);
    assert_eq!(sprite.sh("cat /proc/sys/kernel/random/boot_id"), boot_id, "\"come back\" never means rebooted");
    assert_eq!(sprite.sh("cat ~/file"), "fsynced");
}

#[test]
fn down_and_up_bring_everything_back_even_without_the_nodes_folder() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let (warm, cold) = (cluster.new_sprite("warm"), cluster.new_sprite("cold"));
    warm.start_counter("/tmp/count");
    let (_, pid) = warm.counter("/tmp/count");
    cold.sh("head -c 20M /dev/urandom > ~/data && sha256sum ~/data > ~/sum");
    cold.cli(&["sleep", "--cold"]).success();

    cluster.stop_sprited();
    cluster.start_sprited();
    assert_eq!(warm.counter("/tmp/count").1, pid, "down suspends, up resumes");

    cold.cli(&["sleep", "--cold"]).success();
    warm.cli(&["sleep", "--cold"]).success();
    cluster.stop_sprited();
    cluster.delete_node_folder();
    cluster.start_sprited();
    cold.sh("sha256sum --check --status ~/sum");
    assert_eq!(warm.sh("echo up"), "up");
}

#[test]
fn nothing_of_a_destroyed_sprite_stays_on_the_host() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let sprite = cluster.new_sprite("trace");
    sprite.sh("true");
    cluster.kill_sprited();
    cluster.start_sprited();
    drop(sprite);
    cluster.stop_sprited();
    let folder = cluster.folder().display().to_string();
    let left = std::process::Command::new("pgrep").args(["-fa", &format!("qemu.*{folder}")]).output().unwrap();
    let left = String::from_utf8_lossy(&left.stdout);
    assert!(left.is_empty(), "{left:?}");
}
