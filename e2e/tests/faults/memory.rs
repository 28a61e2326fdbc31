//! A memory image is resumed at most once (ruling 2), wherever the host dies on the way to it and back.

use std::{fs, path::Path, thread, time::Duration};

use e2e::{Cluster, Options, Sprite, full_size, pause};

use crate::one_at_a_time;

/// How far a suspend or a resume is, by what is seen in the sprite's folder.
struct Step {
    what: &'static str,
    change: &'static str,
    begun: fn(&Path) -> bool,
    /// Whether memory outlives the death of `sprited`, and of QEMU as well.
    keeps_memory: (bool, bool),
}

const STEPS: [Step; 7] = [
    Step { what: "the order is given", change: "sleep", begun: |_| true, keeps_memory: (true, false) },
    Step {
        what: "the state is written",
        change: "sleep",
        begun: |run| run.join("state.tmp").exists(),
        keeps_memory: (true, false),
    },
    Step {
        what: "the state is whole",
        change: "sleep",
        begun: |run| run.join("state").exists(),
        keeps_memory: (true, false),
    },
    Step {
        what: "memory is on the disk",
        change: "sleep",
        begun: |run| run.join("memory.img").exists(),
        keeps_memory: (true, true),
    },
    Step {
        what: "the image is spent",
        change: "wake",
        begun: |run| run.join("state.spent").exists(),
        keeps_memory: (false, false),
    },
    Step {
        what: "the image is loaded",
        change: "wake",
        begun: |run| note_has(run, r#""loading": true"#),
        keeps_memory: (false, false),
    },
    Step {
        what: "it runs",
        change: "wake",
        begun: |run| note_has(run, r#""loading": false"#) && !note_has(run, r#""process": null"#),
        keeps_memory: (false, false),
    },
];

fn note_has(run: &Path, text: &str) -> bool {
    fs::read_to_string(run.join("vm.json")).is_ok_and(|note| note.contains(text))
}

/// Says each number once, to the disk: memory that went on twice would say a number twice.
const NUMBERS: &str = "import os, time
path = os.path.expanduser('~/numbers')
said = sum(1 for _ in open(path)) if os.path.exists(path) else 0
with open(path, 'a') as file:
    while True:
        said += 1
        file.write(f'{said}\\n')
        file.flush()
        os.fsync(file.fileno())
        time.sleep(0.02)
";
const NUMBERS_PID: &str = "pgrep --exact --full 'python3 /home/sprite/numbers.py'";
const START_NUMBERS: &str =
    "setsid -f python3 ~/numbers.py > /dev/null 2>&1 < /dev/null; until [ -s ~/numbers ]; do sleep 0.05; done";
/// The last number, if all are right and the file system has no complaints.
const CHECK_NUMBERS: &str = "until [ -s ~/numbers ]; do sleep 0.05; done; awk '$1 != NR { print \"line \" NR \" has \" $1; exit 1 }' ~/numbers && \\
    ! sudo dmesg | grep 'EXT4-fs error' && tail -n 1 ~/numbers";

#[test]
fn memory_goes_on_at_most_once_wherever_the_host_dies() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let sprite = cluster.new_sprite("once");
    cluster.run(sprite.exec_command(&[], &["sh", "-c", "cat > ~/numbers.py"]), NUMBERS.as_bytes()).success();
    // In CI QEMU dies as well at every other step.
    let rounds = if full_size() { 6 } else { 1 };
    for round in 0..rounds {
        for (index, step) in STEPS.iter().enumerate() {
            die_at(&cluster, &sprite, step, (round + index) % 2 == 1);
        }
    }
}

fn die_at(cluster: &Cluster, sprite: &Sprite<'_>, step: &Step, qemu_too: bool) {
    println!("{} of {}; QEMU dies too: {qemu_too}", step.what, step.change);
    let pid = sprite.sh(&format!("{NUMBERS_PID} || {{ {START_NUMBERS}; until {NUMBERS_PID}; do sleep 0.05; done; }}"));
    let before = last_number(sprite);
    // Its memory has something to say beyond what the disk had at its start.
    sprite.sh(&format!("until [ $(tail -n 1 ~/numbers) -gt {before} ]; do sleep 0.05; done"));
    if step.change == "wake" {
        sprite.cli(&["sleep"]).success();
    }
    let run = sprite.run_folder();
    thread::scope(|scope| {
        let changing = scope.spawn(|| sprite.cli(&[step.change]));
        while !(step.begun)(&run) && !changing.is_finished() {
            pause(Duration::from_micros(200));
        }
        cluster.kill_sprited();
        if qemu_too {
            sprite.kill_qemu();
        }
        // It may have been through just before; otherwise it says that the connection broke.
        drop(changing.join().expect("the command was run"));
    });
    cluster.start_sprited();
    let after = last_number(sprite);
    assert!(after >= before, "{after} after {before}: what was fsynced is lost ({})", step.what);
    let kept = if qemu_too { step.keeps_memory.1 } else { step.keeps_memory.0 };
    if kept {
        assert_eq!(sprite.sh(NUMBERS_PID), pid, "memory is lost ({})", step.what);
    }
}

#[track_caller]
fn last_number(sprite: &Sprite<'_>) -> u64 {
    sprite.sh(CHECK_NUMBERS).parse().expect("a number")
}
