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
