//! The size of a disk.

use e2e::{Cluster, unique};
use serde_json::json;

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

#[test]
fn a_sprite_that_is_created_with_a_larger_disk_can_use_all_of_it() {
    let cluster = Cluster::shared();
    let name = unique("large");
    let (status, created) =
        cluster.api("POST", "/v1/sprites", Some(&json!({ "name": name, "disk_bytes": 200_u64 << 30 })));
    assert_eq!(status, 201, "{created}");
    let sprite = e2e::Sprite::existing(cluster, &name);
    let size = size_gib(&sprite);
    assert!(size > 190, "its file system has {size} GiB of 200");
}
