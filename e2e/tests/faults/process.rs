//! Everything of a host dies at once, at any moment.

use std::{fs, path::PathBuf, time::Duration};

use e2e::{Cluster, Options, eventually};

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

/// The folder of the host's seed, once there is one.
fn seed(cluster: &Cluster) -> PathBuf {
    eventually("a seed", Duration::from_secs(60), || {
        let golden = fs::read_dir(cluster.folder().join("node/golden")).map_err(|error| error.to_string())?;
        let mut inner = golden.flatten().filter_map(|folder| fs::read_dir(folder.path()).ok()).flatten().flatten();
        let seed = inner.find(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.starts_with("seed-") && !name.ends_with(".new")
        });
        seed.map(|entry| entry.path()).ok_or_else(|| "there is none".to_owned())
    })
}

#[test]
fn a_seed_that_does_not_start_costs_no_create_and_is_made_anew() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options { flags: vec!["--pool-size".into(), "0".into()], ..Options::default() });
    let seed_folder = seed(&cluster);
    fs::write(seed_folder.join("state"), "no state of a machine").expect("it is written");
    // The folder is there a moment before sprites begin as copies of it.
    eventually("the end of the useless seed", Duration::from_secs(60), || {
        assert_eq!(cluster.new_sprite("all").sh("echo works"), "works");
        if seed_folder.exists() { Err("the next node agent would load it".to_owned()) } else { Ok(()) }
    });
    // Another sprited need not wait until the host tries again by itself.
    cluster.stop_sprited();
    cluster.start_sprited();
    assert_eq!(seed(&cluster), seed_folder, "of the same golden VM and base");
    let state = fs::metadata(seed_folder.join("state")).expect("it is there").len();
    assert!(state > 10_000, "{state} bytes");
    assert_eq!(cluster.new_sprite("all").sh("echo works"), "works");
}

#[test]
fn what_was_synced_to_the_bucket_outlives_the_host() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let (outside, inside) = (cluster.new_sprite("outside"), cluster.new_sprite("inside"));
    // No fsync: the guests hold it in memory.
    let write = "head -c 20M /dev/urandom > ~/data; sha256sum ~/data > ~/sum";
    outside.sh(write);
    inside.sh(write);
    outside.cli(&["sync"]).success().says("in the bucket");
    assert!(inside.sh("sprite-env sync").contains("watermark_at"));
    // The disk of the host burns.
    cluster.kill_sprited();
    assert!(outside.kill_qemu() && inside.kill_qemu());
    cluster.delete_node_folder();
    cluster.start_sprited();
    for sprite in [outside, inside] {
        sprite.sh("sha256sum --check --status ~/sum");
    }
}
