//! `sprited` ends, in every way there is, and comes back.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdout, Stdio},
    time::Duration,
};

use e2e::{Cluster, Options, Sprite, eventually, full_size};

use crate::one_at_a_time;

/// Ruling 19: dead for so long, and nothing in the VM has noticed. A minute in `./dev soak`.
fn dead_for() -> Duration {
    Duration::from_secs(if full_size() { 60 } else { 10 })
}

/// For a client to notice, and for a sprite to wake.
const SOON: Duration = Duration::from_secs(60);

/// A client of a command that counts, by pid, in a terminal.
struct Counting<'a> {
    sprite: &'a Sprite<'a>,
    client: Child,
    screen: BufReader<ChildStdout>,
}

impl<'a> Counting<'a> {
    fn start(sprite: &'a Sprite<'a>) -> Self {
        let count = "i=0; while sleep 0.2; do i=$((i+1)); echo $$ $i; done";
        Self::follow(sprite, sprite.exec_command(&["--tty"], &["bash", "-c", count]))
    }

    fn follow(sprite: &'a Sprite<'a>, mut command: std::process::Command) -> Self {
        // Standard input stays open, as a person's does.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut client = command.spawn().expect("sprite starts");
        let screen = BufReader::new(client.stdout.take().expect("it was asked for"));
        Self { sprite, client, screen }
    }

    /// The next pid and count on the screen.
    fn next(&mut self) -> (u64, u64) {
        let mut line = String::new();
        while line.trim().is_empty() {
            line.clear();
            let len = self.screen.read_line(&mut line).expect("the screen can be read");
            assert!(len > 0, "the client ended: {}", self.end());
        }
        let mut numbers = line.split_whitespace().map(|word| word.parse().unwrap_or_else(|_| panic!("{line:?}")));
        (numbers.next().expect("a pid"), numbers.next().expect("a count"))
    }

    /// What the client says when it has ended, as it must.
    fn end(&mut self) -> String {
        eventually("the client's end", SOON, || {
            self.client.try_wait().expect("it is our child").map(drop).ok_or_else(|| "it runs".to_owned())
        });
        let mut said = String::new();
        self.client.stderr.take().expect("it was asked for").read_to_string(&mut said).expect("it is text");
        said
    }

    /// Once its host is gone the client says how to get back; does that when the host is there again.
    fn attach_again(mut self, cluster: &Cluster) -> Self {
        let said = self.end();
        let again = said.split_once("sprite attach ").unwrap_or_else(|| panic!("no advice in {said:?}")).1;
        let again = again.split_whitespace().next().expect("a session's id").to_owned();
        Self::follow(self.sprite, cluster.sprite_command(["attach", &again, "-s", &self.sprite.name]))
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.client.kill());
        drop(self.client.wait());
    }
}

#[test]
fn killed_sprited_comes_back_to_running_vms_and_makes_up_for_timers() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let (sprite, timed) = (cluster.new_sprite("orphan"), cluster.new_sprite("timed"));
    timed.cli(&["sleep"]).success();
    sprite.start_counter("/tmp/count");
    let (before, pid) = sprite.counter("/tmp/count");
    sprite.sh("echo fsynced > ~/file && sync ~/file");
    let boot_id = sprite.sh("cat /proc/sys/kernel/random/boot_id");
    let mut session = Counting::start(&sprite);
    let (session_pid, count) = session.next();

    timed.cli(&["wake", "--at", &format!("+{}s", dead_for().as_secs() - 1)]).success();
    cluster.kill_sprited();
    e2e::pause(dead_for());
    cluster.start_sprited();

    let mut session = session.attach_again(&cluster);
    // Beyond what was counted when the host went: the screen shows that again first.
    let beyond = count + 4 * dead_for().as_secs();
    let (same_pid, _) =
        std::iter::repeat_with(|| session.next()).find(|(_, count)| *count > beyond).expect("it is endless");
    assert_eq!(same_pid, session_pid, "the open session's command goes on");
    timed.await_status("running", SOON);
    let (after, same_pid) = sprite.counter("/tmp/count");
    assert_eq!(pid, same_pid, "the process was started again");
    assert!(after > before);
    assert_eq!(sprite.sh("cat /proc/sys/kernel/random/boot_id"), boot_id, "\"come back\" never means rebooted");
    assert_eq!(sprite.sh("cat ~/file"), "fsynced");
}

#[test]
fn down_and_up_bring_everything_back_even_without_the_nodes_folder() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let (warm, cold) = (cluster.new_sprite("warm"), cluster.new_sprite("cold"));
    warm.start_counter("/tmp/count");
    let (_, pid) = warm.counter("/tmp/count");
    cold.sh("head -c 20M /dev/urandom > ~/data && sha256sum ~/data > ~/sum");
    cold.cli(&["sleep", "--cold"]).success();

    cluster.stop_sprited();
    cluster.start_sprited();
    assert_eq!(warm.counter("/tmp/count").1, pid, "down suspends, up resumes");

    cold.cli(&["sleep", "--cold"]).success();
    warm.cli(&["sleep", "--cold"]).success();
    cluster.stop_sprited();
    cluster.delete_node_folder();
    cluster.start_sprited();
    cold.sh("sha256sum --check --status ~/sum");
    assert_eq!(warm.sh("echo up"), "up");
}

#[test]
fn sleeping_processes_go_on_after_an_upgrade_of_the_guest() {
    let _turn = one_at_a_time();
    let folder = e2e::image().with_file_name(e2e::unique("image"));
    std::fs::create_dir(&folder).expect("it is made");
    for file in ["vmlinux", "initrd", "rootfs.ext4", "rootfs.digest"] {
        std::os::unix::fs::symlink(e2e::image().join(file), folder.join(file)).expect("it is linked");
    }
    let cluster = Cluster::start(Options { image: Some(folder.clone()), ..Options::default() });
    let sprite = cluster.new_sprite("upgrade");
    sprite.start_counter("/tmp/count");
    let (before, pid) = sprite.counter("/tmp/count");
    cluster.stop_sprited();
    // Another initramfs, with the same in it: zeros behind its end are nothing.
    let mut initrd = std::fs::read(e2e::image().join("initrd")).expect("it is read");
    initrd.extend([0; 4096]);
    std::fs::remove_file(folder.join("initrd")).expect("it is replaced");
    std::fs::write(folder.join("initrd"), initrd).expect("it is replaced");
    cluster.start_sprited();
    let (after, same_pid) = sprite.counter("/tmp/count");
    assert!(same_pid == pid && after > before, "{before}, then {after} of another process: {}", sprite.record());
    drop(sprite);
    drop(cluster);
    std::fs::remove_dir_all(folder).expect("it is removed");
}

#[test]
fn nothing_of_a_destroyed_sprite_stays_on_the_host() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let sprite = cluster.new_sprite("trace");
    sprite.sh("true");
    cluster.kill_sprited();
    cluster.start_sprited();
    drop(sprite);
    cluster.stop_sprited();
    let folder = cluster.folder().display().to_string();
    let left = std::process::Command::new("pgrep").args(["-fa", &format!("qemu.*{folder}")]).output().unwrap();
    let left = String::from_utf8_lossy(&left.stdout);
    assert!(left.is_empty(), "{left:?}");
}
