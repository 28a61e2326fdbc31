//! A guest that takes all it can get: refused inside, and everything else goes on.

use e2e::{Cluster, full_size};

#[test]
fn a_guest_that_eats_its_memory_loses_the_eater_only() {
    let cluster = Cluster::shared();
    let sprite = e2e::Sprite::create(cluster, &e2e::unique("hungry"), &["--size", "s"]);
    let eater = "x = []\nwhile True:\n  x.append(bytearray(16 << 20))";
    sprite.exec(&["python3", "-c", eater]).refused();
    assert_eq!(sprite.sh("echo alive"), "alive");
}

#[test]
fn a_guest_that_eats_its_process_table_is_restored_and_disturbs_nobody() {
    let cluster = Cluster::shared();
    let neighbour = cluster.new_sprite("calm");
    let sprite = e2e::Sprite::create(cluster, &e2e::unique("bomb"), &["--size", "s"]);
    sprite.sh("echo kept > ~/file && sync");
    let good = sprite.checkpoint("calm");
    // The second line makes no process, so it runs to its end whatever the first does.
    let line = ":(){ :|:& };: >/dev/null 2>&1 </dev/null
        until read -r processes < /sys/fs/cgroup/pids.current && [ $processes -gt 300 ]; do :; done; echo $processes";
    let processes: u32 = sprite.sh(line).parse().expect("a number of processes");
    assert!(processes > 300, "{processes}");
    assert_eq!(neighbour.sh("echo here"), "here");
    sprite.cli(&["restore", &good]).success();
    assert_eq!(sprite.sh("cat ~/file"), "kept");
}

#[test]
fn a_disk_can_be_filled_and_is_usable_again_after_that() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("full");
    // Blocks are taken, not written: full for the guest, nothing for the host.
    let line = "sudo fallocate -l $(df --output=avail -B1 / | tail -n 1) /filler; sudo dd if=/dev/zero of=/rest bs=1M count=64 2>&1 | grep -q 'No space left'; \
                sudo rm -f /filler /rest; echo again > ~/file && sync && cat ~/file";
    assert_eq!(sprite.sh(line), "again");
}

#[test]
fn an_endless_stdin_costs_no_memory() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("stdin");
    let bytes: u64 = if full_size() { 10_000_000_000 } else { 300_000_000 };
    let mut client = sprite.exec_command(&[], &["sh", "-c", "wc -c"]);
    let mut feeder = std::process::Command::new("head")
        .args(["-c", &bytes.to_string(), "/dev/zero"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("head runs");
    client.stdin(feeder.stdout.take().expect("it was asked for"));
    let output = client.output().expect("the client runs");
    feeder.wait().expect("it is our child");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        bytes.to_string(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
