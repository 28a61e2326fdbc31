//! A real QEMU in a real jail; needs root.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;

const UID: u32 = 1_499_001;
const LIMIT: Duration = Duration::from_secs(30);

/// `examples/jail.rs`, which `cargo test` builds beside the tests.
fn jailer() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let jailer = own.parent().unwrap().parent().unwrap().join("examples/jail");
    assert!(jailer.exists(), "{} is missing: run the tests with `cargo test`", jailer.display());
    jailer
}

fn run_folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(folder.path(), Some(UID), Some(UID)).unwrap();
    folder
}

fn spec(run: &TempDir, program: &str, args: &[&str]) -> JailSpec {
    JailSpec {
        run: run.path().to_owned(),
        program: program.into(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        writable: Vec::new(),
        readable: Vec::new(),
        netns: None,
        uid: UID,
        gid: UID,
        keep_fds: Vec::new(),
        kvm: false,
        limits: Limits::default(),
        watchdog: None,
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LIMIT, "{what} does not come true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn exit_of(spec: &JailSpec) -> Exit {
    until("exit.json appears", || spec.exit_path().exists()).await;
    serde_json::from_slice(&fs::read(spec.exit_path()).unwrap()).unwrap()
}

/// A field of `/proc/<pid>/status`.
fn status(pid: i32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn qemu_is_locked_up_and_its_end_is_written_down() {
    let run = run_folder();
    let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    memory.as_file().set_len(64 << 20).unwrap();
    std::os::unix::fs::chown(memory.path(), Some(UID), Some(UID)).unwrap();
    let qmp = format!("unix:{},server=on,wait=off", run.path().join("qmp.sock").display());
    let object = format!("memory-backend-file,id=mem,size=64M,mem-path={},share=on", memory.path().display());
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let args = [
        "-M",
        "microvm,memory-backend=mem",
        "-m",
        "64M",
        "-object",
        &object,
        "-S",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-accel",
        "tcg",
        "-sandbox",
        sandbox,
        "-qmp",
        &qmp,
    ];
    let mut spec = spec(&run, "/usr/bin/qemu-system-x86_64", &args);
    spec.writable.push(memory.path().to_owned());
    spec.limits = Limits {
        cgroup: Some(format!("test-{}", std::process::id())),
        memory_bytes: Some(1 << 30),
        tasks_max: Some(64),
        cpu_weight: Some(100),
    };
    let jailed = spawn(&jailer(), &spec).await.unwrap();
    let pid = jailed.qemu_pid;
    until("QEMU answers", || std::os::unix::net::UnixStream::connect(run.path().join("qmp.sock")).is_ok()).await;

    assert!(status(pid, "Uid").split_whitespace().all(|uid| uid == UID.to_string()), "{}", status(pid, "Uid"));
    assert_eq!(status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status(pid, set), 16).unwrap(), 0, "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), "2");
    for namespace in ["mnt", "net"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    for hidden in ["root", "home", "etc/shadow", "etc/passwd", "proc", "sys", "dev/kvm", "dev/net", "var", "work"] {
        assert!(!root.join(hidden).exists(), "/{hidden} is visible in the jail");
    }
    assert!(root.join("usr/bin").exists() && root.join("dev/urandom").exists());
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    assert!(tasks >= 1);
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap();
        assert!(!target.starts_with("/root") && !target.starts_with("/work"), "{}", target.display());
    }
    assert_ne!(status(pid, "PPid"), std::process::id().to_string());
    assert_eq!(status(pid, "PPid"), jailed.watcher_pid.to_string());
    assert_ne!(status(jailed.watcher_pid, "PPid"), std::process::id().to_string(), "the watcher is still our child");

    kill(pid);
    assert_eq!(exit_of(&spec).await.signal, Some(9));
    until("the watcher ends", || !Path::new(&format!("/proc/{}/exe", jailed.watcher_pid)).exists()).await;
    for controller in &jailed.cgroups {
        let group = format!("/sys/fs/cgroup/{controller}/sprites/{}", spec.limits.cgroup.as_ref().unwrap());
        assert!(!Path::new(&group).exists(), "{group} is left");
    }
    assert_eq!(fs::metadata(run.path()).unwrap().uid(), UID);
}

#[tokio::test]
async fn a_kept_descriptor_keeps_its_number_and_others_are_gone() {
    use std::os::fd::AsRawFd as _;
    let run = run_folder();
    let kept = tempfile::tempfile().unwrap();
    let lost = tempfile::tempfile().unwrap();
    let (kept_fd, lost_fd) = (kept.as_raw_fd(), lost.as_raw_fd());
    let script = format!("echo hello >&{kept_fd}; if (echo x >&{lost_fd}) 2>/dev/null; then exit 1; else exit 7; fi");
    let mut spec = spec(&run, "/bin/bash", &["-c", &script]);
    spec.keep_fds = vec![kept_fd];
    spawn(&jailer(), &spec).await.unwrap();
    assert_eq!(exit_of(&spec).await.code, Some(7));
    assert_eq!(kept.metadata().unwrap().len(), 6);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error_and_leaves_no_process() {
    let run = run_folder();
    let spec = spec(&run, "/usr/bin/no-such-qemu", &[]);
    let error = spawn(&jailer(), &spec).await.unwrap_err().to_string();
    assert!(error.contains("start QEMU"), "{error}");
    assert!(!spec.exit_path().exists());
}

#[tokio::test]
async fn a_missing_folder_is_named() {
    let run = run_folder();
    let mut spec = spec(&run, "/bin/true", &[]);
    spec.readable.push("/no/such/golden".into());
    let error = spawn(&jailer(), &spec).await.unwrap_err().to_string();
    assert!(error.contains("/no/such/golden"), "{error}");
}

#[tokio::test]
async fn the_log_is_bounded_and_never_blocks_the_program() {
    let run = run_folder();
    let spec = spec(&run, "/bin/sh", &["-c", "echo first; yes | head -c 3000000; exit 3"]);
    spawn(&jailer(), &spec).await.unwrap();
    assert_eq!(exit_of(&spec).await.code, Some(3));
    let log = fs::read(spec.log_path()).unwrap();
    assert!(log.starts_with(b"first\ny\ny"));
    assert_eq!(log.len(), 256 << 10);
}

#[tokio::test]
async fn a_vm_without_heartbeat_is_stopped_until_it_is_back() {
    let run = run_folder();
    let heart = tempfile::tempdir().unwrap();
    let heartbeat = heart.path().join("heartbeat");
    let beat = |at_ms: u64| {
        fs::write(heart.path().join("new"), at_ms.to_string()).unwrap();
        fs::rename(heart.path().join("new"), &heartbeat).unwrap();
    };
    beat(boottime_ms());
    let mut spec = spec(&run, "/bin/sleep", &["1000"]);
    spec.watchdog = Some(Watchdog { heartbeat: heartbeat.clone(), ttl_ms: 1000 });
    let jailed = spawn(&jailer(), &spec).await.unwrap();
    let state = || status(jailed.qemu_pid, "State");
    assert!(!state().starts_with('T'));
    until("the VM is stopped", || state().starts_with('T')).await;
    beat(boottime_ms() + 60_000);
    until("the VM goes on", || state().starts_with('S')).await;
    kill(jailed.qemu_pid);
    assert_eq!(exit_of(&spec).await.signal, Some(9));
}
