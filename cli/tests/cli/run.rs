//! Runs `sprite`, bounded in time.

use std::{
    io::{Read, Write as _},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::fake::Fake;

/// No test needs longer; a hang is a failure.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) out: Vec<u8>,
    pub(crate) err: String,
}

impl Finished {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    #[track_caller]
    pub(crate) fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, Some(expected), "stdout {:?}\nstderr {}", self.text(), self.err);
        self
    }

    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(
            self.err.contains(text) || self.text().contains(text),
            "{text:?} is not in\nstdout {:?}\nstderr {}",
            self.text(),
            self.err
        );
        self
    }
}

/// With nothing of the developer's own environment.
pub(crate) fn command(fake: &Fake, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sprite"));
    command.args(arguments).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
        .env("HOME", fake.home())
        .env("SPRITES_API_URL", fake.url())
        .env("SPRITE_TOKEN", "acme/org/tok/secret")
        .env("TERM", "xterm");
    command.current_dir(fake.home());
    command
}

pub(crate) fn sprite(fake: &Fake, arguments: &[&str]) -> Finished {
    with_input(command(fake, arguments), b"")
}

pub(crate) fn with_input(mut command: Command, input: &[u8]) -> Finished {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (out, err) = (collect(child.stdout.take().unwrap()), collect(child.stderr.take().unwrap()));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that ends before it has read everything is no failure.
    thread::spawn(move || drop(stdin.write_all(&input)));
    let code = wait(&mut child).and_then(|status| status.code());
    let out = out.recv_timeout(DEADLINE).unwrap();
    Finished { code, out, err: String::from_utf8_lossy(&err.recv_timeout(DEADLINE).unwrap()).into_owned() }
}

fn collect(mut stream: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::spawn(move || {
        let mut bytes = Vec::new();
        drop(stream.read_to_end(&mut bytes));
        drop(sender.send(bytes));
    });
    receiver
}

/// `None` if it had to be killed.
pub(crate) fn wait(child: &mut Child) -> Option<ExitStatus> {
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        pause();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

/// Between two looks at a state.
pub(crate) fn pause() {
    thread::park_timeout(POLL);
}

#[track_caller]
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        pause();
    }
}
