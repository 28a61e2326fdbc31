//! `sprited volume`: an operator takes a disk out of the bucket.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use e2e::{Cluster, Finished, binary, eventually};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

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
    volume(cluster, &["export", &sprite.name, &qcow2, "--checkpoint", &checkpoint]).success();
    run(cluster, "qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &qcow2]).success().says("identical");

    let half = file("half.raw");
    let mut exporting = Command::new(binary("sprited"));
    exporting.args(["volume", "export", &sprite.name, &half, "--data"]).arg(cluster.folder());
    let mut exporting = exporting.stderr(Stdio::null()).spawn().expect("it starts");
    let unfinished = folder.join("half.raw.unfinished");
    eventually("an export under way", Duration::from_secs(30), || {
        if unfinished.exists() { Ok(()) } else { Err(format!("{:?}", exporting.try_wait())) }
    });
    kill(Pid::from_raw(exporting.id().try_into().expect("a pid")), Signal::SIGINT).expect("it runs");
    assert_eq!(exporting.wait().expect("it ends").code(), Some(130));
    assert!(!unfinished.exists() && !Path::new(&half).exists(), "an interrupted export leaves something");

    volume(cluster, &["export", &sprite.name, &raw]).refused().says("not overwritten");
    volume(cluster, &["export", &sprite.name, &file("x"), "--checkpoint", "v77"]).refused().says("v77");
    let mut elsewhere = Command::new(binary("sprited"));
    elsewhere.args(["volume", "inspect", &sprite.name, "--data"]).arg(folder.join("nowhere"));
    cluster.run(elsewhere, b"").refused().says("no bucket");
    assert!(!folder.join("nowhere").exists(), "looking has made a bucket");
    volume(cluster, &["verify", "nobody-has-this-name"]).refused().says("no sprite nobody-has-this-name");
}
