//! Sleep and wake: memory survives a suspend, the disk survives everything.

use std::time::Duration;

use e2e::{Cluster, Sprite, eventually, unique};

const WAKE_DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn a_counter_goes_on_where_it_was_suspended() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("warm");
    sprite.start_counter("/tmp/count");
    let (before, pid) = sprite.counter("/tmp/count");
    sprite.cli(&["sleep"]).success();
    assert_eq!(sprite.status(), "warm");
    let (after, same_pid) = sprite.counter("/tmp/count");
    assert_eq!(pid, same_pid, "the process was started again");
    assert!(after >= before, "{after} < {before}");
    assert_clock_is_right(&sprite);
    // Twice: a VM that was restored once is restored again.
    sprite.cli(&["sleep"]).success();
    assert_eq!(sprite.counter("/tmp/count").1, pid);
}

#[test]
fn a_cold_sprite_keeps_its_disk_and_loses_its_processes() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("cold");
    sprite.start_counter("/tmp/count");
    sprite.sh("echo kept > ~/kept");
    sprite.cli(&["sleep", "--cold"]).success();
    assert_eq!(sprite.status(), "cold");
    assert_eq!(sprite.sh("cat ~/kept; pgrep -cf /tmp/count.new || true").lines().next(), Some("kept"));
    assert_eq!(sprite.status(), "running", "an exec wakes it");
}

#[test]
fn wake_and_idle_policy_are_visible() {
    let cluster = Cluster::shared();
    let sprite = Sprite::create(cluster, &unique("idle"), &["--idle-timeout", "2s"]);
    sprite.sh("true");
    sprite.await_status("warm", WAKE_DEADLINE);
    sprite.cli(&["wake"]).success();
    assert_eq!(sprite.status(), "running");
    let awake = Sprite::create(cluster, &unique("never"), &["--idle-timeout", "never"]);
    awake.sh("true");
    sprite.await_status("warm", WAKE_DEADLINE);
    assert_eq!(awake.status(), "running", "`never` means never");
}

#[test]
fn policy_and_timers_are_set_by_the_command_line() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("policy");
    sprite.cli(&["config", "update", "--idle-timeout", "2s"]).success();
    sprite.await_status("warm", WAKE_DEADLINE);
    sprite.cli(&["config", "update", "--always-on", "true"]).success();
    sprite.await_status("running", WAKE_DEADLINE);
    // An order is an order; it holds until somebody needs the sprite, or a timer is due.
    sprite.cli(&["sleep"]).success();
    assert_eq!(sprite.status(), "warm");
    sprite.cli(&["wake", "--at", "+3s"]).success().says("will be woken");
    sprite.await_status("running", WAKE_DEADLINE);
    sprite.cli(&["config", "update", "--always-on", "false"]).success();
    sprite.await_status("warm", WAKE_DEADLINE);
}

/// What answers at once, never, and without an end.
const SLOW_SERVER: &str = "
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != '/never':
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'said\\n')
        if self.path != '/now':
            open('/tmp/asked', 'a').write(self.path)
            time.sleep(3600)
http.server.ThreadingHTTPServer(('', 8080), Handler).serve_forever()
";

#[test]
fn an_order_to_sleep_ends_the_requests_in_flight_and_later_ones_wake_it() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("flight");
    sprite.exec_with(&[], &["sh", "-c", "cat > ~/server.py"], SLOW_SERVER.as_bytes()).success();
    sprite.sh("setsid -f python3 ~/server.py </dev/null >/dev/null 2>&1; until curl -sf localhost:8080/now; do sleep 0.1; done");
    let bearer = format!("Authorization: Bearer {}", cluster.token());
    let get = |path: &str| {
        let url = format!("{}{path}", sprite.url());
        cluster.curl(["-H", &bearer, "--include", &url])
    };
    let (never, endless) = std::thread::scope(|scope| {
        let (never, endless) = (scope.spawn(|| get("/never")), scope.spawn(|| get("/endless")));
        eventually("both requests inside", WAKE_DEADLINE, || {
            let asked = sprite.sh("cat /tmp/asked || true");
            if asked.contains("/never") && asked.contains("/endless") { Ok(()) } else { Err(asked) }
        });
        sprite.cli(&["sleep"]).success();
        (never.join().expect("curl is bounded"), endless.join().expect("curl is bounded"))
    });
    let refused = never.success().out();
    assert!(refused.contains("503") && refused.contains("SPR-W04") && refused.contains("retry-after"), "{refused}");
    assert!(endless.out().ends_with("said\n"), "{endless}");
    assert!(!endless.status.is_some_and(|status| status.success()), "a part passes for the whole: {endless}");
    assert_eq!(sprite.status(), "warm", "what was cut off does not wake it");
    let now = get("/now").success().out();
    assert!(now.contains("x-sprite-wake: memory") && now.ends_with("said\n"), "{now}");
}

#[test]
fn a_clock_three_days_back_is_right_after_a_wake() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("clock");
    sprite.sh("sudo date -s '3 days ago' >/dev/null");
    sprite.cli(&["sleep"]).success();
    assert_clock_is_right(&sprite);
}

/// The guest was asked at some moment between these two looks at our own clock; a command may take seconds on a busy host.
#[track_caller]
fn assert_clock_is_right(sprite: &Sprite<'_>) {
    let before = now_s();
    let inside: i64 = sprite.sh("date +%s").parse().expect("seconds");
    let after = now_s();
    assert!((before - 2..=after + 2).contains(&inside), "the clock inside says {inside}, it was {before} to {after}");
}

fn now_s() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("the host's clock is set");
    i64::try_from(since.as_secs()).expect("a date before the year 292 billion")
}

#[test]
fn a_sync_of_a_sleeping_sprite_does_not_wake_it() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("barrier");
    for depth in ["--paused", "--cold"] {
        sprite.cli(&["sleep", depth]).success();
        let state = sprite.record()["state"].clone();
        let (status, reached) = cluster.api("POST", &format!("/v1/sprites/{}/sync", sprite.name), None);
        assert_eq!(status, 200, "{reached}");
        assert!(reached["watermark_at"].is_string() && reached["generation"].is_u64(), "{reached}");
        assert_eq!(sprite.record()["state"], state, "it was woken");
    }
}
