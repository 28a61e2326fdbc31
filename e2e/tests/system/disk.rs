//! The size of a disk.

use e2e::Cluster;

fn size_gib(sprite: &e2e::Sprite<'_>) -> u64 {
    sprite.sh("df --output=size -BG / | tail -n 1").trim().trim_end_matches('G').parse().expect("a number")
}

#[test]
fn a_disk_grows_under_a_running_guest_and_stays_grown() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("grow");
    sprite.sh("echo kept > ~/file");
    let before = size_gib(&sprite);
    sprite.cli(&["resize", "--disk", "150G"]).success();
    let after = size_gib(&sprite);
    assert!(after >= before + 40, "{before} GiB, then {after}");
    sprite.cli(&["resize", "--disk", "10G"]).refused().says("grow");
    sprite.cli(&["sleep", "--cold"]).success();
    assert_eq!((size_gib(&sprite), sprite.sh("cat ~/file")), (after, "kept".to_owned()));
}
