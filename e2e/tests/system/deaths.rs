//! A sprite's QEMU, or the guest in it, dies: what was under way ends with an answer, and the next request finds the disk.

use std::{
    thread,
    time::{Duration, Instant},
};

use e2e::{Cluster, Sprite, full_size, pause};

/// A change is through after this, on a machine that is not too busy.
const CHANGE: Duration = Duration::from_millis(1500);

#[test]
fn a_sprite_whose_qemu_dies_comes_back_from_its_disk_and_says_so() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("dies");
    sprite.sh("echo running > ~/file && sync");
    assert!(sprite.kill_qemu());
    assert_eq!(sprite.sh("cat ~/file"), "running");

    sprite.sh("echo paused > ~/file && sync");
    sprite.cli(&["sleep", "--paused"]).success();
    assert!(sprite.kill_qemu());
    assert_eq!(sprite.sh("cat ~/file"), "paused");
    let info = sprite.cli(&["info", "--json"]).success().out();
    assert!(info.contains("lost"), "what was lost is told: {info}");

    sprite.cli(&["sleep"]).success();
    assert_eq!(sprite.qemu(), None, "a suspended sprite costs no process");
    assert_eq!(sprite.sh("cat ~/file"), "paused");
}

#[test]
fn whatever_is_under_way_when_qemu_dies_ends_with_an_answer() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("midway");
    sprite.sh("head -c 8M /dev/urandom > ~/data && sha256sum ~/data > ~/sum && sync");
    sprite.cli(&["checkpoint", "create"]).success();
    let changes: [(&[&str], &[&str]); 6] = [
        (&[], &["sleep"]),
        (&["sleep"], &["wake"]),
        (&[], &["checkpoint", "create"]),
        (&[], &["restore", "v1"]),
        (&[], &["sleep", "--cold"]),
        (&["sleep", "--cold"], &["wake"]),
    ];
    for _ in 0..if full_size() { 10 } else { 1 } {
        for (before, change) in changes {
            sprite.sh("true");
            if !before.is_empty() {
                sprite.cli(before).success();
            }
            die_during(&sprite, change);
            sprite.sh("sha256sum --check --status ~/sum");
        }
    }
}

/// Kills whatever QEMU the sprite has, or gets, at a random moment of `change`.
fn die_during(sprite: &Sprite<'_>, change: &[&str]) {
    let after = CHANGE.mul_f64(rand::random_range(0.0..1.0));
    println!("{change:?}: QEMU dies after {after:?}");
    let answer = thread::scope(|scope| {
        let changing = scope.spawn(|| sprite.cli(change));
        pause(after);
        let end = Instant::now() + CHANGE;
        // None yet, or none any more: a change may begin or end with none.
        while !sprite.kill_qemu() && !changing.is_finished() && Instant::now() < end {}
        changing.join().expect("the command was run")
    });
    if answer.status.is_none_or(|status| !status.success()) {
        let said = answer.refused().err();
        assert!(said.contains('✗') && !said.contains("internal"), "a reason is given: {said}");
    }
}

#[test]
fn a_guest_that_crashes_is_booted_by_the_next_request() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("panics");
    sprite.sh("echo kept > ~/file && sync");
    let boot = sprite.sh("cat /proc/sys/kernel/random/boot_id");
    sprite.exec(&["sudo", "sh", "-c", "echo c > /proc/sysrq-trigger"]).refused().says("✗");
    assert_eq!(sprite.sh("cat ~/file"), "kept");
    assert_ne!(sprite.sh("cat /proc/sys/kernel/random/boot_id"), boot, "it was booted");
    let info = sprite.cli(&["info", "--json"]).success().out();
    assert!(info.contains("memory lost"), "what was lost is told: {info}");
}

#[test]
fn a_root_user_cannot_end_the_machine_from_inside() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("vandal");
    sprite.sh("echo kept > ~/file && sync");
    let boot = sprite.sh("cat /proc/sys/kernel/random/boot_id");
    sprite.exec(&["sudo", "kill", "-KILL", "-1"]).refused();
    assert_eq!(sprite.sh("cat ~/file"), "kept");
    // reboot(2), as the program of that name calls it: the environment is started again, the machine goes on.
    sprite.exec(&["sudo", "python3", "-c", "import ctypes; ctypes.CDLL(None).reboot(0x01234567)"]).refused();
    assert_eq!(sprite.sh("cat ~/file"), "kept");
    let info = sprite.cli(&["info", "--json"]).success().out();
    assert!(info.contains("rebooted from inside"), "{info}");
    sprite.sh("for folder in /run /.sprite; do sudo dd if=/dev/zero of=$folder/filler bs=1M 2>/dev/null; done; test -s /run/filler");
    assert_eq!(sprite.sh("cat ~/file"), "kept");
    assert_eq!(sprite.sh("cat /proc/sys/kernel/random/boot_id"), boot, "the same machine all the time");
}
