//! Everything of a host dies at once, at any moment.

use e2e::{Cluster, Options};

use crate::one_at_a_time;

#[test]
fn when_everything_is_killed_the_disk_is_whole_to_the_last_fsync() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let sprite = cluster.new_sprite("all");
    sprite.sh("mkdir ~/d; for i in $(seq 40); do echo $i > ~/d/$i; sync ~/d/$i ~/d; done; head -c 30M /dev/urandom > ~/d/big; sync; sha256sum ~/d/* > ~/sums; sync ~/sums");
    cluster.kill_sprited();
    assert!(sprite.kill_qemu());
    cluster.start_sprited();
    sprite.sh("sha256sum --check --status ~/sums && test $(ls ~/d | wc -l) = 41");
}
