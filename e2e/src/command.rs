//! One command, bounded in time, with everything that a failure has to show.

use std::{
    fmt,
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

/// More output than this is a test's mistake, or ours.
const OUTPUT_BYTES_MAX: u64 = 256 << 20;
const LOG_LINES_SHOWN: usize = 60;

/// A command that ended, or was ended at its deadline.
pub struct Finished {
    command: String,
    pub status: Option<ExitStatus>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    log: Option<PathBuf>,
}

/// Runs `command` with `stdin`, for at most `deadline`. `log` is shown when an expectation fails.
pub fn bounded(mut command: Command, stdin: &[u8], deadline: Duration, log: Option<PathBuf>) -> Finished {
    let text = format!("{command:?}");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{text} does not start: {error}"));
    let stdout = collect(child.stdout.take().expect("it was asked for"));
    let stderr = collect(child.stderr.take().expect("it was asked for"));
    let mut pipe = child.stdin.take().expect("it was asked for");
    let input = stdin.to_vec();
    // A command may end before it has read everything; that is its own business, so a broken pipe is no failure.
    let feeder = thread::spawn(move || drop(pipe.write_all(&input)));
    let status = wait(&mut child, deadline);
    drop(feeder);
    let of = |stream: mpsc::Receiver<Vec<u8>>| stream.recv_timeout(Duration::from_secs(5)).unwrap_or_default();
    Finished { command: text, status, stdout: of(stdout), stderr: of(stderr), log }
}

fn collect(stream: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still worth showing.
        drop(stream.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes));
        drop(sender.send(bytes));
    });
    receiver
}

fn wait(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    let end = std::time::Instant::now() + deadline;
    loop {
        match child.try_wait().expect("it is our child") {
            Some(status) => return Some(status),
            None if std::time::Instant::now() >= end => {
                child.kill().expect("it is our child");
                child.wait().expect("it was killed");
                return None;
            }
            None => crate::wait::pause(Duration::from_millis(10)),
        }
    }
}

impl Finished {
    /// # Panics
    /// When the command did not end with 0.
    #[track_caller]
    pub fn success(self) -> Self {
        self.code(0)
    }

    /// # Panics
    /// When the command ended otherwise than with `expected`.
    #[track_caller]
    pub fn code(self, expected: i32) -> Self {
        assert_eq!(self.status.and_then(|status| status.code()), Some(expected), "exit code\n{self}");
        self
    }

    /// # Panics
    /// When the command succeeded, or had to be killed: a refusal must not hang.
    #[track_caller]
    pub fn refused(self) -> Self {
        assert!(self.status.is_some_and(|status| !status.success()), "a refusal was expected\n{self}");
        self
    }

    /// # Panics
    /// When neither stream has `text` in it.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.out().contains(text) || self.err().contains(text), "{text:?} was expected\n{self}");
        self
    }

    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "command  {}", self.command)?;
        match self.status {
            None => writeln!(f, "status   killed at its deadline")?,
            Some(status) => match status.signal() {
                Some(signal) => writeln!(f, "status   signal {signal}")?,
                None => writeln!(f, "status   exit code {}", status.code().unwrap_or_default())?,
            },
        }
        writeln!(f, "--- stdout\n{}\n--- stderr\n{}", shortened(&self.out()), shortened(&self.err()))?;
        if let Some(log) = &self.log {
            let text = std::fs::read_to_string(log).unwrap_or_else(|error| error.to_string());
            let lines: Vec<&str> = text.lines().collect();
            writeln!(f, "--- the end of {}", log.display())?;
            lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].iter().try_for_each(|line| writeln!(f, "{line}"))?;
        }
        Ok(())
    }
}

fn shortened(text: &str) -> String {
    const SHOWN: usize = 4000;
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}… ({} bytes in all)", &text[..at], text.len()),
        None => text.to_owned(),
    }
}
