//! Checkpoints bring back every byte.

use e2e::Cluster;

#[test]
fn a_restore_brings_back_what_was_changed_deleted_and_added() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("ckpt");
    let (id, url) = (sprite.record()["id"].clone(), sprite.url());
    sprite
        .sh("mkdir ~/d && echo one > ~/d/changed && head -c 8M /dev/urandom > ~/d/deleted && sha256sum ~/d/* > ~/sums");
    assert_eq!(sprite.checkpoint("before the mess"), "v1");
    sprite.sh("echo two > ~/d/changed; rm ~/d/deleted; echo new > ~/d/added; sync");
    sprite.cli(&["restore", "v1"]).success();
    sprite.sh("sha256sum --check --status ~/sums && test ! -e ~/d/added");
    assert_eq!((sprite.record()["id"].clone(), sprite.url()), (id, url), "a restore keeps the identity");

    let listed = sprite.cli(&["checkpoint", "list"]).success().out();
    assert!(listed.contains("v1") && listed.contains("before the mess"), "{listed}");
    assert_eq!(sprite.checkpoint("second"), "v2", "numbers are never used again");
}

#[test]
fn a_sprite_without_usr_comes_back() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("wrecked");
    let good = sprite.checkpoint("whole");
    sprite.exec(&["sudo", "sh", "-c", "rm -rf /usr /bin /lib; true"]);
    sprite.exec(&["ls", "/"]).refused();
    sprite.cli(&["restore", &good]).success();
    assert_eq!(sprite.sh("echo alive"), "alive");
}

#[test]
fn a_sprite_whose_disk_was_overwritten_comes_back() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("shredded");
    sprite.sh("echo kept > ~/kept && sync");
    let good = sprite.checkpoint("whole");
    let root = sprite.sh("findmnt -no SOURCE /");
    // It may lose its connection or its exit code on the way: only the restore counts.
    drop(sprite.exec(&["sudo", "dd", "if=/dev/urandom", &format!("of={root}"), "bs=1M", "count=256"]));
    sprite.cli(&["restore", &good]).success();
    assert_eq!(sprite.sh("cat ~/kept"), "kept");
}

/// Ruling 15. What a user leaves on the disk, and how: each holds it in another way, and the last two cannot be ended from inside.
const HOLDERS: [(&str, &str); 5] = [
    (
        "swap",
        "sudo fallocate -l 64M /swap && sudo chmod 600 /swap && sudo mkswap -q /swap && sudo swapon /swap && grep -q ^/swap /proc/swaps",
    ),
    (
        "a loop mount with an open file",
        "truncate -s 64M ~/disk && mkfs.ext4 -q ~/disk && mkdir ~/mounted && sudo mount -o loop ~/disk ~/mounted && \
         sudo sh -c 'setsid sleep 1000 > ~sprite/mounted/held 2>&1 < /dev/null &' && findmnt ~/mounted",
    ),
    ("the raw device", "sudo sh -c 'setsid sleep 1000 > /dev/null 2>&1 < /dev/vda &'"),
    (
        "a FUSE mount that does not answer",
        "printf %s 'import ctypes, os, time
fuse = os.open(\"/dev/fuse\", os.O_RDWR)
os.mkdir(\"/hung\")
options = b\"fd=%d,rootmode=40000,user_id=0,group_id=0\" % fuse
assert ctypes.CDLL(None).mount(b\"hung\", b\"/hung\", b\"fuse\", 0, options) == 0
os.fork() and os._exit(0)
os.setsid()
time.sleep(1000)' > ~/hung.py && sudo python3 ~/hung.py > /dev/null 2>&1 < /dev/null && \
         sudo sh -c 'setsid ls /hung > /dev/null 2>&1 < /dev/null &' && until ps -eo stat,args | grep -q '^D.*ls /hung'; do sleep 0.1; done",
    ),
    (
        "a process that waits for a frozen file system, which no signal ends",
        "sudo sh -c 'fsfreeze --freeze /; setsid touch /frozen > /dev/null 2>&1 < /dev/null & \
         until ps -eo stat,args | grep -q \"^D.*touch /frozen\"; do sleep 0.1; done'",
    ),
];

#[test]
fn a_restore_works_whatever_holds_the_disk() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("held");
    sprite.sh("echo one > ~/file && sync");
    let good = sprite.checkpoint("free");
    for (what, line) in HOLDERS {
        println!("held by {what}");
        sprite.sh("echo two > ~/file && sync");
        sprite.sh(line);
        sprite.cli(&["restore", &good]).success();
        assert_eq!(sprite.sh("cat ~/file"), "one", "held by {what}");
    }
}

#[test]
fn unknown_checkpoints_are_refused_and_nothing_changes() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("nockpt");
    sprite.sh("echo here > ~/file");
    for id in ["v9", "x", "v-1", "v99999999999999999999"] {
        sprite.cli(&["restore", id]).refused();
    }
    assert_eq!(sprite.sh("cat ~/file"), "here");
}

#[test]
fn a_checkpoint_can_be_made_from_inside() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("inside");
    sprite.sh("sprite-env checkpoints create --comment inner");
    assert!(sprite.cli(&["checkpoint", "list"]).success().out().contains("inner"));
}
