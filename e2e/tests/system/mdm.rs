//! A real app (`examples/mdm`) as its author runs it: installed from a package repository, used by devices all the time, while the sprite
//! sleeps and wakes, is checkpointed and restored. What was acknowledged is there afterwards.

use std::{
    collections::BTreeSet,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use e2e::{Cluster, Repository, Sprite, eventually, pause, repository};
use serde_json::{Value, json};

const SLEEPS: usize = 20;
const DEVICES: usize = 8;
/// Rows that have to be acknowledged between two sleeps, so that each of them has work before and after.
const ROWS_BETWEEN: usize = 4;
const PROGRESS_DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn an_app_loses_no_acknowledged_row_through_sleeps_a_checkpoint_and_a_restore() {
    let cluster = Cluster::shared();
    let repository = Repository::of_python(cluster, &repository().join("examples/mdm"));
    let sprite = cluster.new_sprite("mdm");
    // The system's pip: unpacking another into the venv, and compiling ahead, takes emulated processors longer than all the sleeps below.
    sprite.sh(&format!(
        "python3 -m venv --without-pip ~/mdm && pip --python ~/mdm/bin/python install --no-compile {} sprite-mdm",
        repository.pip_flags()
    ));
    start(&sprite);
    let app = App { cluster, url: sprite.url() };
    let devices: Vec<u64> = (0..DEVICES).map(|number| app.enrol(&format!("serial-{number}"))).collect();

    let load = Load::default();
    let (before, after) = load.during(&app, &devices, || {
        for _ in 0..SLEEPS / 2 {
            sleep_under_load(&sprite, &load);
        }
        // Acknowledged before it was asked for: in the checkpoint. Sent after it was reported: not in it.
        let before = load.acknowledged();
        sprite.checkpoint("half-way");
        let after = load.next();
        for _ in SLEEPS / 2..SLEEPS {
            sleep_under_load(&sprite, &load);
        }
        (before, after)
    });
    assert_lost_none(&sprite, &load.acknowledged(), "after the sleeps");

    sprite.cli(&["restore", "v1"]).success();
    let kept = rows(&sprite);
    let missing: Vec<_> = before.difference(&kept).collect();
    assert!(missing.is_empty(), "acknowledged before the checkpoint and not in it: {missing:?}");
    let added: Vec<_> = kept.range(after..).collect();
    assert!(added.is_empty(), "sent after the checkpoint and still there: {added:?}");

    // It goes on from there: the same devices, and again nothing is lost, not even with the processes.
    start(&sprite);
    assert_eq!(devices, (0..DEVICES).map(|number| app.enrol(&format!("serial-{number}"))).collect::<Vec<_>>());
    let more = Load::starting_at(load.next());
    more.during(&app, &devices, || sleep_under_load(&sprite, &more));
    sprite.cli(&["sleep", "--cold"]).success();
    assert_lost_none(&sprite, &more.acknowledged(), "after a cold start");
}

/// As the README of the example does. Bounded by the command's own deadline.
fn start(sprite: &Sprite<'_>) {
    sprite.sh(
        "setsid -f ~/mdm/bin/mdm >~/mdm.log 2>&1 </dev/null; until curl -sf localhost:8080/health; do sleep 0.1; done",
    );
}

/// The next request wakes it; rows must be acknowledged again before the next sleep.
fn sleep_under_load(sprite: &Sprite<'_>, load: &Load) {
    load.await_progress();
    sprite.cli(&["sleep"]).success();
    load.await_progress();
}

fn assert_lost_none(sprite: &Sprite<'_>, acknowledged: &BTreeSet<u64>, when: &str) {
    let stored = rows(sprite);
    let lost: Vec<_> = acknowledged.difference(&stored).collect();
    assert!(lost.is_empty(), "{when}: {} of {} acknowledged rows are lost: {lost:?}", lost.len(), acknowledged.len());
}

/// What the database has, read without the app.
fn rows(sprite: &Sprite<'_>) -> BTreeSet<u64> {
    let text = sprite.sh("sqlite3 ~/mdm.sqlite \"SELECT json_extract(report, '$.row') FROM checkins\"");
    text.lines().map(|line| line.parse().unwrap_or_else(|_| panic!("{line:?} is no row number"))).collect()
}

/// The app as its devices see it: by its URL.
struct App {
    cluster: &'static Cluster,
    url: String,
}

impl App {
    /// None when there was no answer, or not this one: then nothing was promised.
    fn post(&self, path: &str, body: &Value) -> Option<(String, Value)> {
        let answer = self.cluster.curl([
            "-H",
            &format!("Authorization: Bearer {}", self.cluster.token()),
            "-H",
            "Content-Type: application/json",
            "-d",
            &body.to_string(),
            "-w",
            "\n%{http_code}",
            &format!("{}{path}", self.url),
        ]);
        answer.status.filter(std::process::ExitStatus::success)?;
        let text = answer.out();
        let (body, status) = text.rsplit_once('\n')?;
        Some((status.to_owned(), serde_json::from_str(body).ok()?))
    }

    fn enrol(&self, serial: &str) -> u64 {
        let (status, device) = self.post("/devices", &json!({ "serial": serial, "model": "m" })).expect("an answer");
        assert!(["200", "201"].contains(&status.as_str()), "{status} {device}");
        device["id"].as_u64().unwrap_or_else(|| panic!("{device} has no id"))
    }
}

/// Devices that check in without a pause, each row with a number of its own.
#[derive(Default)]
struct Load {
    rows: Mutex<Rows>,
    stop: AtomicBool,
}

#[derive(Default)]
struct Rows {
    next: u64,
    acknowledged: BTreeSet<u64>,
}

impl Load {
    fn starting_at(next: u64) -> Self {
        let load = Self::default();
        load.rows().next = next;
        load
    }

    /// Runs `work` while the devices check in.
    fn during<T>(&self, app: &App, devices: &[u64], work: impl FnOnce() -> T) -> T {
        /// Also when `work` panics: the scope waits for the devices.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        std::thread::scope(|scope| {
            for half in devices.chunks(devices.len().div_ceil(2)) {
                scope.spawn(move || self.check_in(app, half));
            }
            let _stop = Stop(&self.stop);
            work()
        })
    }

    fn check_in(&self, app: &App, devices: &[u64]) {
        for device in devices.iter().cycle() {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let row = self.take();
            match app.post(&format!("/devices/{device}/checkins"), &json!({ "row": row, "battery": 80 })) {
                Some((status, _)) if status == "201" => {
                    self.rows().acknowledged.insert(row);
                }
                // Refused or cut off: no promise. Not at once again, so that a broken sprite is not flooded.
                Some(_) | None => pause(Duration::from_millis(100)),
            }
        }
    }

    fn take(&self) -> u64 {
        let mut rows = self.rows();
        rows.next += 1;
        rows.next - 1
    }

    fn next(&self) -> u64 {
        self.rows().next
    }

    fn acknowledged(&self) -> BTreeSet<u64> {
        self.rows().acknowledged.clone()
    }

    #[track_caller]
    fn await_progress(&self) {
        let wanted = self.rows().acknowledged.len() + ROWS_BETWEEN;
        eventually("acknowledged rows", PROGRESS_DEADLINE, || {
            let count = self.rows().acknowledged.len();
            if count >= wanted { Ok(()) } else { Err(format!("{count} of {wanted}")) }
        });
    }

    fn rows(&self) -> std::sync::MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
