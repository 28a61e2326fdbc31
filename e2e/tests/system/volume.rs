//! `sprited volume`: an operator takes a disk out of the bucket.

use std::process::Command;

use e2e::{Cluster, Finished, binary};

fn volume(cluster: &Cluster, arguments: &[&str]) -> Finished {
    let mut command = Command::new(binary("sprited"));
    command.arg("volume").args(arguments).arg("--data").arg(cluster.folder());
    cluster.run(command, b"")
}

fn run(cluster: &Cluster, program: &str, arguments: &[&str]) -> Finished {
    let mut command = Command::new(program);
    command.args(arguments);
    cluster.run(command, b"")
}

#[test]
fn an_exported_checkpoint_is_a_clean_file_system_with_what_was_in_it() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("export");
    sprite.sh("echo then > ~/file");
    let checkpoint = sprite.checkpoint("for export");
    sprite.sh("echo later > ~/file");
    sprite.cli(&["sync"]).success();

    volume(cluster, &["verify", &sprite.name]).success().says("is whole");
    let summary = volume(cluster, &["inspect", &sprite.name, "--json"]).success().out();
    let summary: serde_json::Value = serde_json::from_str(&summary).expect("JSON");
    assert_eq!(summary["checkpoints"][0]["id"], checkpoint, "{summary}");
    volume(cluster, &["inspect", &sprite.name]).success().says("for export");

    // Goes with the cluster.
    let folder = cluster.folder().join("export");
    std::fs::create_dir_all(&folder).expect("it is made");
    let file = |name: &str| folder.join(name).display().to_string();
    let (raw, qcow2) = (file("disk.raw"), file("disk.qcow2"));
    volume(cluster, &["export", &sprite.name, &raw, "--checkpoint", &checkpoint]).success();
    // Never mounted on the host.
    run(cluster, "e2fsck", &["-fn", &raw]).success();
    assert_eq!(run(cluster, "debugfs", &["-R", "cat /home/sprite/file", &raw]).success().out().trim(), "then");
    volume(cluster, &["export", &sprite.name, &qcow2, "--checkpoint", &checkpoint, "--format", "qcow2"]).success();
    run(cluster, "qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &qcow2]).success().says("identical");

    volume(cluster, &["export", &sprite.name, &raw]).refused().says("not overwritten");
    volume(cluster, &["export", &sprite.name, &file("x"), "--checkpoint", "v77"]).refused().says("v77");
    volume(cluster, &["verify", "nobody-has-this-name"]).refused().says("no sprite nobody-has-this-name");
}
