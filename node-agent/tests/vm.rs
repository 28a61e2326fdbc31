//! Real VMs on a real disk in a bucket, through the node agent's own socket. Needs root, QEMU and the guest image: `SPRITES_IMAGE` names its folder,
//! as `./dev image` prints it; without it every test here says that it is skipped.
//!
//! The node agent runs as a process of its own (`examples/node.rs`), so that it can be killed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use blockstore::bucket::{Bucket, Record};
use proto::{
    node::{
        CreateCheckpointRequest, CreateRequest, DescribeRequest, DestroyRequest, ListCheckpointsRequest, ReloadRequest,
        ResizeRequest, RestoreCheckpointRequest, SleepReply, SleepRequest, SpriteStatus, StatusRequest, WakeReply,
        WakeRequest, node_client::NodeClient,
    },
    record::{DISK_BYTES_DEFAULT, IdlePolicy, SpriteRecord},
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};
use tonic::transport::{Channel, Endpoint};

/// A first start imports the base image and boots the golden VM.
const START_LIMIT: Duration = Duration::from_secs(420);
const STEP_LIMIT: Duration = Duration::from_secs(120);

fn image() -> Option<PathBuf> {
    let image = std::env::var_os("SPRITES_IMAGE").map(PathBuf::from);
    if image.is_none() {
        eprintln!("SKIPPED: SPRITES_IMAGE is not set; `./dev image` prints it");
    }
    image
}

/// A node agent with its own folder, bucket and network names. Everything goes away with it.
struct Node {
    folder: tempfile::TempDir,
    instance: &'static str,
    child: Child,
    client: NodeClient<Channel>,
}

impl Node {
    async fn start(image: PathBuf, instance: &'static str, pool_size: usize) -> Self {
        let folder = tempfile::Builder::new().prefix("node-").tempdir_in("/var/tmp").unwrap();
        let settings = json!({ "folder": folder.path(), "image": image, "instance": instance, "pool_size": pool_size });
        std::fs::write(folder.path().join("config.json"), settings.to_string()).unwrap();
        let (child, client) = launch(&folder).await;
        Self { folder, instance, child, client }
    }

    async fn restart(&mut self) {
        (self.child, self.client) = launch(&self.folder).await;
    }

    fn signal(&mut self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        self.child.wait().unwrap();
    }

    async fn create(&mut self, name: &str, change: impl FnOnce(&mut SpriteRecord)) -> Sprite {
        let mut record: SpriteRecord = serde_json::from_value(json!({
            "id": uuid::Uuid::nil(), "name": name, "org": "local", "oid": "aaaaaa", "url": format!("https://{name}-aaaaaa.sprites.localhost:8443"),
            "created_at": jiff::Timestamp::now(), "updated_at": jiff::Timestamp::now(), "size": "m", "disk_bytes": DISK_BYTES_DEFAULT,
        }))
        .unwrap();
        // Tests say themselves when something sleeps.
        record.idle = IdlePolicy { pause_after_ms: None, ..IdlePolicy::default() };
        change(&mut record);
        let request =
            CreateRequest { name: name.to_owned(), rec: serde_json::to_vec(&record).unwrap(), ..Default::default() };
        let reply = self.client.create(request).await.unwrap().into_inner();
        Sprite { id: reply.sprite_id, from: reply.from }
    }

    async fn status(&mut self, sprite: &Sprite) -> SpriteStatus {
        self.client.status(StatusRequest { sprite_id: sprite.id.clone() }).await.unwrap().into_inner()
    }

    async fn record(&self, sprite: &Sprite) -> (Bucket, Record<SpriteRecord>) {
        let bucket = Bucket::open(&format!("dir:{}", self.folder.path().join("bucket").display())).await.unwrap();
        let record = bucket.read_record(&format!("v1/sprites/{}/rec", sprite.id)).await.unwrap().unwrap();
        (bucket, record)
    }

    async fn sleep(&mut self, sprite: &Sprite, to: &str) -> SleepReply {
        self.client.sleep(SleepRequest { sprite_id: sprite.id.clone(), to: to.into() }).await.unwrap().into_inner()
    }

    async fn wake(&mut self, sprite: &Sprite) -> WakeReply {
        self.client.wake(WakeRequest { sprite_id: sprite.id.clone() }).await.unwrap().into_inner()
    }

    async fn destroy(&mut self, sprite: &Sprite) {
        self.client.destroy(DestroyRequest { sprite_id: sprite.id.clone() }).await.unwrap();
    }

    async fn checkpoint(&mut self, sprite: &Sprite) -> (String, u64) {
        let request =
            CreateCheckpointRequest { sprite_id: sprite.id.clone(), comment: "a test".into(), durable: false };
        let mut events = self.client.create_checkpoint(request).await.unwrap().into_inner();
        let mut last = None;
        while let Some(event) = events.message().await.unwrap() {
            last = Some(event);
        }
        let last = last.expect("an end");
        assert_eq!(last.kind, "complete", "{}", last.data);
        (last.checkpoint.expect("a checkpoint").id, last.pause_us)
    }

    async fn restore(&mut self, sprite: &Sprite, checkpoint: &str) {
        let request = RestoreCheckpointRequest { sprite_id: sprite.id.clone(), checkpoint: checkpoint.into() };
        let mut events = self.client.restore_checkpoint(request).await.unwrap().into_inner();
        let mut last = None;
        while let Some(event) = events.message().await.unwrap() {
            last = Some(event);
        }
        let last = last.expect("an end");
        assert_eq!(last.kind, "complete", "{}", last.data);
    }

    /// A request on the data plane, and its whole answer.
    async fn http(&self, sprite: &Sprite, request: &str) -> Vec<u8> {
        let exchange = async {
            let mut stream = UnixStream::connect(self.folder.path().join("node.sock")).await.unwrap();
            let (line, rest) = request.split_once('\n').unwrap_or((request, ""));
            let head = format!("{line}\nhost: test\nx-sprite-id: {}\nconnection: close\n{rest}\n", sprite.id);
            stream.write_all(head.replace('\n', "\r\n").as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            answer
        };
        tokio::time::timeout(STEP_LIMIT, exchange).await.expect("an answer in time")
    }

    /// Runs a shell line over HTTP exec.
    async fn sh(&self, sprite: &Sprite, line: &str) -> Ran {
        let line: String = line.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let request = format!("POST /v1/sprites/x/exec?cmd=bash&cmd=-c&cmd={line} HTTP/1.1\ncontent-length: 0\n");
        let answer = self.http(sprite, &request).await;
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        Ran::parse(&answer)
    }

    async fn out(&self, sprite: &Sprite, line: &str) -> String {
        let ran = self.sh(sprite, line).await;
        assert_eq!(ran.code, 0, "{line}: {} {}", ran.out, ran.err);
        ran.out.trim_end().to_owned()
    }

    async fn await_state(&mut self, sprite: &Sprite, state: &str) -> SpriteStatus {
        let begun = Instant::now();
        loop {
            let status = self.status(sprite).await;
            if status.state == state {
                return status;
            }
            assert!(begun.elapsed() < STEP_LIMIT, "{} does not come: {status:?}", state);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn memory_folder(&self) -> PathBuf {
        PathBuf::from(format!("/dev/shm/sprites-{}", self.instance))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        // QEMUs outlive it by design.
        let folder = self.folder.path().as_os_str().as_encoded_bytes().to_vec();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if line.starts_with(b"/usr/bin/qemu-system") && line.windows(folder.len()).any(|part| part == folder) {
                drop(Command::new("kill").args(["-KILL", &pid.to_string()]).status());
            }
        }
        drop(std::fs::remove_dir_all(self.memory_folder()));
        for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!("spr{}-", self.instance)) {
                drop(Command::new("ip").args(["netns", "delete", &name]).status());
            }
        }
        let table = format!("sprites{}", self.instance);
        drop(Command::new("nft").args(["delete", "table", "inet", &table]).stderr(Stdio::null()).status());
    }
}

struct Sprite {
    id: String,
    from: String,
}

/// What a command did.
#[derive(Debug)]
struct Ran {
    code: u8,
    out: String,
    err: String,
}

impl Ran {
    /// Takes the chunks apart.
    fn parse(answer: &[u8]) -> Self {
        let at = answer.windows(4).position(|part| part == b"\r\n\r\n").expect("a head") + 4;
        let mut rest = &answer[at..];
        let mut streams: HashMap<u8, Vec<u8>> = HashMap::new();
        loop {
            let end = rest.windows(2).position(|part| part == b"\r\n").expect("a chunk size");
            let len = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
            if len == 0 {
                break;
            }
            let chunk = &rest[end + 2..end + 2 + len];
            streams.entry(chunk[0]).or_default().extend(&chunk[1..]);
            rest = &rest[end + 2 + len + 2..];
        }
        let mut text = |stream: u8| String::from_utf8_lossy(&streams.remove(&stream).unwrap_or_default()).into_owned();
        let (out, err) = (text(1), text(2));
        Self { code: streams[&3][0], out, err }
    }
}

async fn launch(folder: &tempfile::TempDir) -> (Child, NodeClient<Channel>) {
    let own = std::env::current_exe().unwrap();
    let program = own.parent().unwrap().parent().unwrap().join("examples/node");
    let mut child = Command::new(program)
        .arg(folder.path().join("config.json"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("`cargo test` builds the example");
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (ready, heard) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut ready = Some(ready);
        for line in lines.map_while(Result::ok) {
            println!("node: {line}");
            if line == "ready"
                && let Some(ready) = ready.take()
            {
                ready.send(()).expect("the start is awaited");
            }
        }
    });
    tokio::time::timeout(START_LIMIT, heard).await.expect("it is ready in time").expect("it starts");
    let socket = folder.path().join("node.sock");
    let connector = tower::service_fn(move |_uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://node").connect_with_connector(connector).await.unwrap();
    (child, NodeClient::new(channel))
}

/// Prints how long a step took.
async fn timed<T>(what: &str, step: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let value = tokio::time::timeout(STEP_LIMIT, step).await.unwrap_or_else(|_| panic!("{what} takes for ever"));
    println!("{what}: {} ms", begun.elapsed().as_millis());
    value
}

const COUNTER: &str = "nohup setsid bash -c 'i=0; while :; do i=$((i+1)); echo $i >/tmp/c.new; mv /tmp/c.new /tmp/c; sleep 0.1; done' >/dev/null 2>&1 & echo $! >/tmp/pid; sync";

/// Pid and count of [`COUNTER`], which must be alive.
async fn counter(node: &Node, sprite: &Sprite) -> (String, u64) {
    let pid = node.out(sprite, "kill -0 $(cat /tmp/pid) && cat /tmp/pid").await;
    let count = node.out(sprite, "for i in $(seq 50); do [ -s /tmp/c ] && break; sleep 0.1; done; cat /tmp/c").await;
    (pid, count.parse().unwrap())
}

#[tokio::test]
async fn a_sprite_lives_through_everything() {
    let Some(image) = image() else { return };
    let mut node = timed("start", Node::start(image, "vt1", 0)).await;
    let sprite = timed("create", node.create("whole", |_| {})).await;
    // The seed is being made.
    assert!(["golden", "seed"].contains(&sprite.from.as_str()), "{}", sprite.from);
    let ran = timed("echo", node.sh(&sprite, "echo hi; echo oops >&2; exit 3")).await;
    assert_eq!((ran.out.as_str(), ran.err.as_str(), ran.code), ("hi\n", "oops\n", 3));
    timed("echo again", node.sh(&sprite, "true")).await;
    println!("{}", node.out(&sprite, "id; uname -a; df -h /; free -m; cat /etc/hostname; ip addr | grep inet").await);

    node.out(&sprite, "echo one > ~/file; sync").await;
    let (checkpoint, pause_us) = timed("checkpoint", node.checkpoint(&sprite)).await;
    println!("pause: {pause_us} us");
    assert_eq!(checkpoint, "v1");
    node.out(&sprite, "echo two > ~/file; sudo rm -rf /usr/share/zoneinfo").await;
    timed("restore", node.restore(&sprite, "v1")).await;
    assert_eq!(
        timed("after restore", node.out(&sprite, "cat ~/file; ls -d /usr/share/zoneinfo")).await,
        "one\n/usr/share/zoneinfo"
    );
    println!("{:?}", node.status(&sprite).await.events);

    node.out(&sprite, COUNTER).await;
    let (pid, count) = counter(&node, &sprite).await;
    for (to, resumed) in [("paused", "paused"), ("suspended", "memory"), ("suspended", "memory")] {
        let report = timed(&format!("sleep {to}"), node.sleep(&sprite, to)).await;
        println!("  frozen {} local {} bucket {} ms", report.frozen_ms, report.local_ms, report.bucket_ms);
        assert_eq!(node.status(&sprite).await.state, to);
        let woken = timed(&format!("wake from {to}"), node.wake(&sprite)).await;
        assert_eq!(woken.resumed, resumed, "{:?}", node.status(&sprite).await);
        let (same, later) = timed("  counter", counter(&node, &sprite)).await;
        assert_eq!(same, pid, "after {to}");
        assert!(later >= count);
        let before = jiff::Timestamp::now().as_second();
        let inside: i64 = node.out(&sprite, "date +%s").await.parse().unwrap();
        let after = jiff::Timestamp::now().as_second();
        assert!((before - 1..=after + 1).contains(&inside), "{inside} is not between {before} and {after}");
    }
    timed("sleep cold", node.sleep(&sprite, "cold")).await;
    assert_eq!(node.status(&sprite).await.state, "cold");
    let woken = timed("wake from cold", node.wake(&sprite)).await;
    assert_eq!(woken.resumed, "disk");
    assert_eq!(node.out(&sprite, "cat ~/file; kill -0 $(cat /tmp/pid) 2>/dev/null || echo gone").await, "one\ngone");

    node.client.resize(ResizeRequest { sprite_id: sprite.id.clone(), disk_bytes: 120 << 30 }).await.unwrap();
    let size: u64 = node.out(&sprite, "df --output=size -B1G / | tail -1").await.trim().parse().unwrap();
    assert!(size > 110, "{size} GiB");
    timed("destroy", node.destroy(&sprite)).await;
    assert!(node.client.status(StatusRequest { sprite_id: sprite.id.clone() }).await.is_err());
    let left: Vec<_> = std::fs::read_dir(node.folder.path().join("node/vms")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    node.signal("TERM");
}

/// Writes and syncs 4 KiB at a time for so many seconds; then prints how often, and the longest time between two, in milliseconds.
const WRITER: &str = include_str!("../../bench/writer.py");

/// Far above the goal (30 ms, measured by the bench on a calm machine); a freeze that waits for a message, for a push or for the disk's size is longer.
const PAUSE_MAX: Duration = Duration::from_millis(400);

#[tokio::test]
async fn a_checkpoint_stops_a_busy_writer_for_a_moment() {
    let Some(image) = image() else { return };
    let mut node = Node::start(image, "vt5", 0).await;
    let sprite = node.create("busy", |_| {}).await;
    node.out(&sprite, &format!("cat >/tmp/w.py <<'E'\n{WRITER}\nE")).await;
    println!("alone: {}", node.out(&sprite, "python3 /tmp/w.py 3").await);
    node.out(&sprite, "nohup python3 /tmp/w.py 12 >/tmp/w.out 2>&1 & echo $! >/tmp/w.pid").await;
    let mut pauses = Vec::new();
    for _ in 0..7 {
        let (id, pause_us) = timed("checkpoint", node.checkpoint(&sprite)).await;
        println!("pause of {id}: {pause_us} us");
        pauses.push(Duration::from_micros(pause_us));
    }
    let written = node.out(&sprite, "while kill -0 $(cat /tmp/w.pid) 2>/dev/null; do sleep 0.2; done; cat /tmp/w.out");
    println!("with checkpoints: {}", written.await);
    let request = ListCheckpointsRequest { sprite_id: sprite.id.clone() };
    let listed = node.client.list_checkpoints(request).await.unwrap().into_inner().checkpoints;
    assert_eq!(listed.len(), pauses.len(), "{listed:?}");
    // On a machine under load some freezes come too late; they say so.
    let (frozen, mut pauses): (Vec<_>, Vec<_>) =
        listed.iter().zip(pauses).filter(|(checkpoint, _)| checkpoint.consistency == "filesystem").unzip();
    pauses.sort_unstable();
    assert!(!pauses.is_empty(), "{listed:?}");
    assert!(pauses[0] > Duration::ZERO && pauses[pauses.len() / 2] < PAUSE_MAX, "{pauses:?}");
    // What was sealed mounts, and the writer's file is there.
    timed("restore", node.restore(&sprite, &frozen[0].id)).await;
    node.out(&sprite, "ls -l ~/w").await;
    node.destroy(&sprite).await;
}

#[tokio::test]
async fn the_url_reaches_the_network_and_loopback_and_says_when_nobody_is_there() {
    let Some(image) = image() else { return };
    let mut node = Node::start(image, "vt2", 0).await;
    let sprite = node.create("web", |_| {}).await;
    let get = "GET /where HTTP/1.1\nx-sprite-port: 8080\n";
    let answer = String::from_utf8(node.http(&sprite, get).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("SPR-P01"), "{answer}");
    for address in ["0.0.0.0", "127.0.0.1", "::1"] {
        node.out(&sprite, &format!("mkdir -p /tmp/www; cd /tmp/www; echo {address} >where; nohup setsid python3 -m http.server 8080 --bind {address} >/dev/null 2>&1 & echo $! >/tmp/web; for i in $(seq 100); do ss -tln | grep -q :8080 && break; sleep 0.1; done")).await;
        let answer = String::from_utf8(timed(address, node.http(&sprite, get)).await).unwrap();
        assert!(answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains(address), "{answer}");
        node.sleep(&sprite, "suspended").await;
        let answer = String::from_utf8(timed("  woken by a request", node.http(&sprite, get)).await).unwrap();
        assert!(answer.contains("x-sprite-wake: memory") && answer.contains(address), "{answer}");
        node.out(&sprite, "kill $(cat /tmp/web); while ss -tln | grep -q :8080; do sleep 0.1; done").await;
    }
}

#[tokio::test]
async fn vms_outlive_a_node_agent_that_is_killed() {
    let Some(image) = image() else { return };
    let mut node = Node::start(image, "vt3", 0).await;
    let (running, paused, suspended) = (
        node.create("running", |_| {}).await,
        node.create("paused", |_| {}).await,
        node.create("suspended", |_| {}).await,
    );
    let mut counters = Vec::new();
    for sprite in [&running, &paused, &suspended] {
        node.out(sprite, COUNTER).await;
        counters.push(counter(&node, sprite).await.0);
    }
    node.out(&running, "echo fsynced >~/file; sync ~/file").await;
    node.sleep(&paused, "paused").await;
    node.sleep(&suspended, "suspended").await;
    let before = [node.status(&running).await.qemu_pid, node.status(&paused).await.qemu_pid];
    node.signal("KILL");
    timed("start again", node.restart()).await;
    assert_eq!(node.status(&running).await.state, "running");
    assert_eq!(node.status(&paused).await.state, "paused", "nobody asked for it");
    assert_eq!(node.status(&suspended).await.state, "suspended");
    assert_eq!(
        [node.status(&running).await.qemu_pid, node.status(&paused).await.qemu_pid],
        before,
        "the same processes"
    );
    for (sprite, pid) in [&running, &paused, &suspended].into_iter().zip(&counters) {
        assert_eq!(counter(&node, sprite).await.0, *pid, "{:?}", node.status(sprite).await);
    }
    assert_eq!(node.out(&running, "cat ~/file").await, "fsynced");

    // Put away in order, and the node's folder lost: memory comes from the bucket.
    node.signal("TERM");
    std::fs::remove_dir_all(node.folder.path().join("node")).unwrap();
    std::fs::remove_dir_all(node.memory_folder()).unwrap();
    // Meanwhile a timer of one of them has passed.
    let (bucket, mut record) = node.record(&paused).await;
    record.value.wake_at = vec![jiff::Timestamp::now()];
    bucket.update_record(&record, record.value.clone()).await.unwrap();
    node.restart().await;
    node.await_state(&paused, "running").await;
    let begun = Instant::now();
    while !node.record(&paused).await.1.value.wake_at.is_empty() {
        assert!(begun.elapsed() < STEP_LIMIT, "the next start would wake it again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(node.status(&running).await.state, "suspended", "{:?}", node.status(&running).await);
    let woken = timed("wake from the bucket", node.wake(&running)).await;
    assert_eq!(woken.resumed, "memory", "{:?}", node.status(&running).await);
    assert_eq!(counter(&node, &running).await.0, counters[0], "its processes go on");
    assert_eq!(node.out(&running, "cat ~/file").await, "fsynced");

    // QEMU killed behind our back: the next request boots from the disk.
    let pid = node.status(&running).await.qemu_pid;
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
    node.await_state(&running, "failed").await;
    assert_eq!(node.out(&running, "cat ~/file").await, "fsynced");
    for sprite in [&running, &paused, &suspended] {
        node.destroy(sprite).await;
    }
}

#[tokio::test]
async fn idle_sprites_fall_asleep_and_timers_wake_them() {
    let Some(image) = image() else { return };
    let mut node = Node::start(image, "vt4", 1).await;
    let idle = IdlePolicy { pause_after_ms: Some(1500), suspend_after_ms: 1500, cold_after_ms: 3000 };
    let sprite = node.create("idle", |record| record.idle = idle).await;
    let begun = Instant::now();
    node.out(&sprite, "sleep 4").await;
    assert!(begun.elapsed() >= Duration::from_secs(4));
    assert_eq!(node.status(&sprite).await.state, "running", "a connected command is activity, silent or not");
    for state in ["paused", "suspended", "cold"] {
        let status = node.await_state(&sprite, state).await;
        assert!(status.reason.starts_with("idle for"), "{}", status.reason);
    }
    let began_pool = Instant::now();
    loop {
        if node.client.describe(DescribeRequest {}).await.unwrap().into_inner().pool == 1 {
            break;
        }
        assert!(began_pool.elapsed() < STEP_LIMIT, "the pool does not fill");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let timed_one = timed(
        "create from the pool",
        node.create("timed", |record| {
            record.idle = idle;
            record.wake_every_ms = Some(8000);
        }),
    )
    .await;
    assert_eq!(timed_one.from, "pool");
    assert_eq!(timed("first exec", node.out(&timed_one, "hostname")).await, "timed");
    for _ in 0..2 {
        node.await_state(&timed_one, "suspended").await;
        node.await_state(&timed_one, "running").await;
    }
    let always = node
        .create("always", |record| {
            record.idle = idle;
            record.always_on = true;
        })
        .await;
    let pid = node.status(&always).await.qemu_pid;
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
    node.await_state(&always, "failed").await;
    node.await_state(&always, "running").await;
    node.client.reload(ReloadRequest { sprite_id: always.id.clone() }).await.unwrap();
}

#[tokio::test]
async fn copies_of_the_seed_differ_and_their_disks_fit() {
    let Some(image) = image() else { return };
    let mut node = timed("start", Node::start(image, "vt9", 0)).await;
    let mut sprites = Vec::new();
    let begun = Instant::now();
    while sprites.len() < 2 {
        let sprite = timed("create", node.create(&format!("copy{}", sprites.len()), |_| {})).await;
        if sprite.from == "seed" {
            sprites.push(sprite);
        } else {
            assert!(begun.elapsed() < STEP_LIMIT, "there is no seed");
            node.destroy(&sprite).await;
        }
    }
    let identity = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; findmnt -no UUID /; head -c 16 /dev/urandom | od -An -tx1; hostname; cat /etc/hostname";
    let (one, two) = (node.out(&sprites[0], identity).await, node.out(&sprites[1], identity).await);
    for (one, two) in one.lines().zip(two.lines()) {
        assert_ne!(one, two);
    }
    assert!(one.ends_with("copy0\ncopy0") && two.ends_with("copy1\ncopy1"), "{one}\n{two}");
    // What the guest has in memory of its disk is what the disk holds, which a VM sees that has nothing in memory.
    let sprite = &sprites[0];
    let state = "find /etc /usr/bin -xdev -type f -print0 | sort -z | sudo xargs -0 sha256sum | sha256sum; cat ~/file; sudo dmesg | grep -ci 'ext4-fs.*error' || true";
    node.out(sprite, "echo mine > ~/file; sync").await;
    let before = timed("read it all", node.out(sprite, state)).await;
    assert_eq!(node.sleep(sprite, "cold").await.status.unwrap().state, "cold");
    assert_eq!(before, timed("read it all after a cold wake", node.out(sprite, state)).await);
    assert!(before.ends_with("mine\n0"), "{before}");
}
