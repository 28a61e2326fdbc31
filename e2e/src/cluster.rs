//! One private cluster: `sprited dev` with its own data folder, port and instance.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{COMMAND_DEADLINE, Finished, Sprite, bounded, eventually, free_port, random_text};

/// Importing the base image and booting the golden VM, without hardware virtualisation.
const START_DEADLINE: Duration = Duration::from_secs(420);
/// Every sprite suspended and pushed.
const STOP_DEADLINE: Duration = Duration::from_secs(330);
/// To say why it does not start, on a busy machine.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(120);

/// What a test wants otherwise than usual.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The bucket's URL; default: a folder beside the node's data.
    pub bucket: Option<String>,
    /// More flags for `sprited dev`.
    pub flags: Vec<String>,
    /// Another guest image than the one under test.
    pub image: Option<PathBuf>,
    /// Another place for its data, which need not exist.
    pub folder: Option<PathBuf>,
    /// More environment, for example AWS_*.
    pub environment: Vec<(String, String)>,
}

/// A running (or just stopped) cluster.
pub struct Cluster {
    folder: PathBuf,
    port: u16,
    instance: String,
    options: Options,
    /// Holds the pipe whose end tells it that this process is gone.
    reaper: Child,
}

impl Cluster {
    /// The cluster that all tests of this process share.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(|| Self::start(Options::default()))
    }

    /// Starts a cluster and waits until it is ready.
    pub fn start(options: Options) -> Self {
        let cluster = Self::prepare(options);
        cluster.start_sprited();
        cluster
    }

    /// Starts `sprited` where it cannot start, until it has ended by itself.
    pub fn start_in_vain(options: Options) -> Finished {
        let cluster = Self::prepare(options);
        bounded(cluster.sprited(&[]), b"", REFUSAL_DEADLINE, None)
    }

    fn prepare(options: Options) -> Self {
        let instance = format!("e{}", random_text(3));
        let folder = options.folder.clone().unwrap_or_else(|| PathBuf::from(format!("/var/tmp/sprites-{instance}")));
        fs::create_dir_all(folder.join("home")).expect("the data folder can be made");
        let port = free_port();
        let reaper = start_reaper(&folder, &instance);
        Self { folder, port, instance, options, reaper }
    }

    /// `sprited dev` with this cluster's settings, and `flags` for this time only.
    fn sprited(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(binary("sprited"));
        let image = self.options.image.as_deref().unwrap_or_else(|| image());
        command.arg("dev").arg("--data").arg(&self.folder).arg("--image").arg(image);
        command.args(["--port", &self.port.to_string(), "--instance", &self.instance]);
        if let Some(bucket) = &self.options.bucket {
            command.args(["--bucket", bucket]);
        }
        command.args(&self.options.flags).args(flags).envs(self.options.environment.iter().cloned());
        command
    }

    /// Starts `sprited` (again) and waits until it is ready.
    pub fn start_sprited(&self) {
        self.start_sprited_with(&[]);
    }

    /// As [`Self::start_sprited`], with more flags for this time.
    pub fn start_sprited_with(&self, flags: &[&str]) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("the log can be written");
        let mut command = self.sprited(flags);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log).process_group(0);
        let mut child = command.spawn().expect("sprited starts");
        let pid = child.id();
        eventually("sprited ready", START_DEADLINE, || {
            if let Some(status) = child.try_wait().expect("it is our child") {
                panic!("sprited ended with {status}\n{}", self.log_tail());
            }
            match self.ready() {
                Some(ready) if ready["pid"] == pid => Ok(()),
                Some(_) | None => Err(self.log_tail()),
            }
        });
        // Reaped when it ends, so that nobody mistakes a zombie for a running sprited.
        std::thread::spawn(move || drop(child.wait()));
        self.write_bundle();
    }

    /// What `sprited` says about itself, once it is ready.
    pub fn ready(&self) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.folder.join("run/ready")).ok()?).ok()
    }

    pub fn pid(&self) -> Option<i32> {
        self.ready()?["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
    }

    /// `kill -9` of `sprited`; its VMs go on.
    pub fn kill_sprited(&self) {
        let pid = self.pid().expect("it runs");
        self.signal(pid, Signal::SIGKILL);
        // Else the next start's `ready` could not be told from this one's.
        fs::remove_file(self.folder.join("run/ready")).expect("it was ready");
        await_end(pid, Duration::from_secs(30));
    }

    /// `./dev down`: every sprite suspended and pushed.
    pub fn stop_sprited(&self) {
        let pid = self.pid().expect("it runs");
        self.signal(pid, Signal::SIGTERM);
        await_end(pid, STOP_DEADLINE);
    }

    fn signal(&self, pid: i32, signal: Signal) {
        let sent = kill(Pid::from_raw(pid), signal);
        assert!(sent.is_ok(), "pid {pid}: {sent:?}\n{}", self.log_tail());
    }

    /// The local state that the bucket must be able to replace. Only while stopped.
    pub fn delete_node_folder(&self) {
        assert!(self.pid().is_none(), "sprited runs");
        fs::remove_dir_all(self.folder.join("node")).expect("the node's folder can be removed");
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the names of its namespaces and network devices have in them.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn api_url(&self) -> String {
        format!("https://api.localhost:{}", self.port)
    }

    pub fn token(&self) -> String {
        fs::read_to_string(self.folder.join("token")).expect("sprited made a token").trim().to_owned()
    }

    pub fn log(&self) -> PathBuf {
        self.folder.join("sprited.log")
    }

    fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// System + local CA in one file.
    pub fn bundle(&self) -> PathBuf {
        self.folder.join("ca-bundle.pem")
    }

    /// System + local CA, as `./dev env` sets it.
    fn write_bundle(&self) {
        let ready = self.ready().expect("it is ready");
        let ca = ready["ca_file"].as_str().expect("the CA's path");
        let system = fs::read("/etc/ssl/certs/ca-certificates.crt").unwrap_or_default();
        let local = fs::read(ca).unwrap_or_else(|error| panic!("{ca}: {error}"));
        fs::write(self.bundle(), [system, local].concat()).expect("the bundle can be written");
    }

    /// The `sprite` binary with a user's environment, to be run by the caller.
    pub fn sprite_command<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.client_command(binary("sprite"));
        command.args(arguments);
        command
    }

    /// Any program with the environment that `./dev env` gives a user's shell, and nothing else.
    pub fn client_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let home = self.folder.join("home");
        let mut command = Command::new(program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", &home).current_dir(home);
        command.env("SPRITES_API_URL", self.api_url()).env("SPRITE_TOKEN", self.token());
        command.env("SSL_CERT_FILE", self.bundle()).env("TERM", "xterm").env("LANG", "C.UTF-8");
        command
    }

    /// Runs `sprite ARGUMENTS…` without input.
    pub fn sprite<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Finished {
        self.run(self.sprite_command(arguments), b"")
    }

    /// Runs any command with `stdin`, bounded, showing this cluster's log when an expectation fails.
    pub fn run(&self, command: Command, stdin: &[u8]) -> Finished {
        bounded(command, stdin, COMMAND_DEADLINE, Some(self.log()))
    }

    /// curl that trusts the local CA and prints only the body.
    pub fn curl<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Finished {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--max-time", "120", "--cacert"]).arg(self.bundle()).args(arguments);
        self.run(command, b"")
    }

    /// One call of the REST API: status and body (null when it is not JSON).
    pub fn api(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let bearer = format!("Authorization: Bearer {}", self.token());
        let mut arguments = vec!["-X".to_owned(), method.to_owned(), "-H".to_owned(), bearer];
        if let Some(body) = body {
            arguments.extend([
                "-H".to_owned(),
                "Content-Type: application/json".to_owned(),
                "-d".to_owned(),
                body.to_string(),
            ]);
        }
        arguments.extend(["-w".to_owned(), "\n%{http_code}".to_owned(), format!("{}{path}", self.api_url())]);
        let answer = self.curl(arguments).success().out();
        let (body, status) = answer.rsplit_once('\n').expect("curl was told to print the status");
        (status.parse().expect("a status is a number"), serde_json::from_str(body).unwrap_or(Value::Null))
    }

    /// A new sprite of its own for one test, destroyed when the value goes.
    pub fn new_sprite(&self, stem: &str) -> Sprite<'_> {
        Sprite::create(self, &crate::unique(stem), &[])
    }
}

impl Drop for Cluster {
    /// For a test's own cluster. The shared one is never dropped; its pipe closes when the process ends.
    fn drop(&mut self) {
        drop(self.reaper.stdin.take());
        // It bounds itself; the next test's cluster gets a quiet machine.
        drop(self.reaper.wait());
    }
}

fn await_end(pid: i32, deadline: Duration) {
    eventually("the end of sprited", deadline, || {
        if Path::new(&format!("/proc/{pid}")).exists() { Err("it runs".to_owned()) } else { Ok(()) }
    });
}

fn start_reaper(folder: &Path, instance: &str) -> Child {
    // Not the file's path: the clone that the tests were built from may be gone.
    Command::new("bash")
        .args(["-c", include_str!("../reaper.sh"), "reaper.sh"])
        .arg(folder)
        .arg(instance)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("bash runs")
}

/// The root of the repository these tests were built from.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate lies in the repository")
}

/// One of our own binaries.
pub fn binary(name: &str) -> PathBuf {
    let folder = std::env::var_os("SPRITES_BIN").map_or_else(
        || {
            let own = std::env::current_exe().expect("a test knows its binary");
            own.ancestors().nth(2).expect("target/debug/deps/test").to_owned()
        },
        PathBuf::from,
    );
    let path = folder.join(name);
    assert!(path.exists(), "{} is not built; ./dev build", path.display());
    path
}

/// The guest image; built by `./dev image` when nobody says where it is.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        if let Some(folder) = std::env::var_os("SPRITES_IMAGE") {
            return folder.into();
        }
        let output =
            Command::new(repository().join("dev")).arg("image").stderr(Stdio::inherit()).output().expect("./dev runs");
        assert!(output.status.success(), "./dev image failed");
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    })
}
