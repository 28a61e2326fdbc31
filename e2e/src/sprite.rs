//! One sprite of a test, used through the CLI.

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{Cluster, Finished, eventually};

/// Destroyed when dropped, so that a failed test does not fill the machine.
pub struct Sprite<'a> {
    cluster: &'a Cluster,
    pub name: String,
    /// As the host's files and processes have it.
    id: String,
}

impl<'a> Sprite<'a> {
    /// `sprite create NAME --skip-console FLAGS…`
    pub fn create(cluster: &'a Cluster, name: &str, flags: &[&str]) -> Self {
        let mut arguments = vec!["create", name, "--skip-console"];
        arguments.extend(flags);
        cluster.sprite(arguments).success();
        Self::existing(cluster, name)
    }

    /// One that was made in another way.
    pub fn existing(cluster: &'a Cluster, name: &str) -> Self {
        let mut sprite = Self { cluster, name: name.to_owned(), id: String::new() };
        let id = sprite.record()["id"].as_str().expect("a sprite has an id").to_owned();
        id.trim_start_matches("sprite-").clone_into(&mut sprite.id);
        sprite
    }

    /// `sprite exec -s NAME FLAGS… -- COMMAND…`, not run yet.
    pub fn exec_command(&self, flags: &[&str], command: &[&str]) -> Command {
        let mut arguments = vec!["exec", "-s", &self.name];
        arguments.extend(flags);
        arguments.push("--");
        arguments.extend(command);
        self.cluster.sprite_command(arguments)
    }

    pub fn exec(&self, command: &[&str]) -> Finished {
        self.exec_with(&[], command, b"")
    }

    pub fn exec_with(&self, flags: &[&str], command: &[&str], stdin: &[u8]) -> Finished {
        self.cluster.run(self.exec_command(flags, command), stdin)
    }

    /// Runs a shell line that must succeed; its output without the final newline.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        self.exec(&["bash", "-c", line]).success().out().trim_end().to_owned()
    }

    /// `sprite COMMAND… -s NAME`
    pub fn cli(&self, command: &[&str]) -> Finished {
        self.cluster.sprite(command.iter().copied().chain(["-s", &self.name]))
    }

    /// The API's view; does not wake it.
    pub fn record(&self) -> Value {
        let (status, record) = self.cluster.api("GET", &format!("/v1/sprites/{}", self.name), None);
        assert_eq!(status, 200, "{record}");
        record
    }

    pub fn status(&self) -> String {
        self.record()["status"].as_str().unwrap_or_default().to_owned()
    }

    pub fn url(&self) -> String {
        self.record()["url"].as_str().expect("a sprite has a URL").trim_end_matches('/').to_owned()
    }

    /// The pid of its QEMU, by its folder in the command line; `None` when it has none.
    pub fn qemu(&self) -> Option<i32> {
        let pattern = format!("qemu-system.*{}.*{}", self.cluster.folder().display(), self.id);
        let found = Command::new("pgrep").args(["-f", &pattern]).output().expect("pgrep runs");
        String::from_utf8_lossy(&found.stdout).lines().next().and_then(|pid| pid.parse().ok())
    }

    /// `kill -9` of its QEMU, if it has one. That it ends by itself meanwhile is as good.
    #[track_caller]
    pub fn kill_qemu(&self) -> bool {
        let Some(pid) = self.qemu() else { return false };
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => panic!("QEMU {pid} cannot be killed: {error}"),
        }
        eventually("the end of QEMU", Duration::from_secs(20), || {
            if Path::new(&format!("/proc/{pid}/exe")).exists() { Err("it runs".to_owned()) } else { Ok(()) }
        });
        true
    }

    /// Where this host keeps the files of its VM.
    pub fn run_folder(&self) -> PathBuf {
        self.cluster.folder().join("node/vms").join(&self.id)
    }

    #[track_caller]
    pub fn await_status(&self, wanted: &str, deadline: Duration) {
        eventually(&format!("status {wanted} of {}", self.name), deadline, || {
            let status = self.status();
            if status == wanted { Ok(()) } else { Err(status) }
        });
    }

    /// `sprite checkpoint create`; the id it was given.
    #[track_caller]
    pub fn checkpoint(&self, comment: &str) -> String {
        let said = self.cli(&["checkpoint", "create", "--comment", comment]).success();
        let text = said.out() + &said.err();
        text.split(|c: char| !c.is_ascii_alphanumeric())
            .find(|word| {
                word.strip_prefix('v').is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
            })
            .unwrap_or_else(|| panic!("no checkpoint id\n{said}"))
            .to_owned()
    }

    /// Starts a process that outlives its exec session and counts up in `file`, ten times a second, by pid.
    #[track_caller]
    pub fn start_counter(&self, file: &str) {
        let line = format!(
            "setsid -f bash -c 'i=0; while :; do i=$((i+1)); echo \"$i $$\" > {file}.new; mv {file}.new {file}; sleep 0.1; done' \
             </dev/null >/dev/null 2>&1; until [ -s {file} ]; do sleep 0.05; done"
        );
        self.sh(&line);
    }

    /// What the counter says: how far it is, and its pid.
    #[track_caller]
    pub fn counter(&self, file: &str) -> (u64, u64) {
        let text = self.sh(&format!("cat {file}"));
        let mut numbers = text.split_whitespace().map(|word| word.parse().unwrap_or_else(|_| panic!("{text:?}")));
        (numbers.next().expect("a count"), numbers.next().expect("a pid"))
    }

    /// Serves `answer` on the sprite's HTTP port until the sprite loses its processes.
    #[track_caller]
    pub fn serve_http(&self, answer: &str) {
        let line = format!(
            "mkdir -p /tmp/www && cd /tmp/www && echo '{answer}' > index.html && \
             setsid -f python3 -m http.server 8080 </dev/null >/dev/null 2>&1; \
             until curl -s -o /dev/null localhost:8080; do sleep 0.1; done"
        );
        self.sh(&line);
    }
}

impl Drop for Sprite<'_> {
    fn drop(&mut self) {
        let finished = self.cluster.sprite(["destroy", &self.name, "--force"]);
        let gone = finished.status.is_some_and(|status| status.success()) || finished.err().contains("not found");
        // A failing test shows its own failure; a passing one must not leave a sprite behind.
        assert!(gone || thread::panicking(), "{} cannot be destroyed\n{finished}", self.name);
    }
}
