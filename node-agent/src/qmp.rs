//! QMP: the control socket of one QEMU process.
//!
//! One connection at a time, one command at a time. Every call has a deadline, because a QEMU that is being killed simply stops answering; commands are
//! numbered, so that an answer which comes after its deadline is not taken for that of the next one. Events are skipped: state is asked for.
//!
//! QEMU is not trusted (it may have been taken over from inside): what it sends is bounded.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Mutex,
    time::{Instant, timeout_at},
};

/// How long QEMU may take to answer one command. It answers within milliseconds unless the host is badly overloaded.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// The longest answer is the console's 64 KiB, escaped; a longer line means that this is not QEMU as we know it.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Pause between two looks at something QMP has no event for.
const POLL: Duration = Duration::from_millis(2);

/// Why a QMP command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("cannot reach QEMU's control socket {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("QEMU's control socket broke during {command}")]
    Broken { command: String, source: io::Error },
    #[error("QEMU refused {command}: {message}")]
    Refused { command: String, message: String },
    #[error("QEMU did not answer {command} within {ANSWER_LIMIT:?}")]
    Timeout { command: String },
    #[error("migration ({what}) failed: {message}")]
    Migration { what: &'static str, message: String },
}

/// Connection to one QEMU. Commands are serialised inside.
#[derive(Debug)]
pub struct Qmp(Mutex<Exchange>);

#[derive(Debug)]
struct Exchange {
    from: BufReader<OwnedReadHalf>,
    to: OwnedWriteHalf,
    /// What has come of the line that is being read; it outlives a call that was given up.
    line: Vec<u8>,
    /// Number of the last command.
    last: u64,
    /// A command may have been sent in part, so that no other can follow it.
    cut: bool,
}

impl Qmp {
    /// Connects and negotiates; retries until `limit`, because a fresh QEMU needs a moment to listen.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(source) if Instant::now() >= deadline => {
                    return Err(QmpError::Connect { path: path.into(), source });
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        };
        let (from, to) = stream.into_split();
        let mut exchange = Exchange { from: BufReader::new(from), to, line: Vec::new(), last: 0, cut: false };
        let hello = "greeting";
        match timeout_at(deadline, exchange.next_line()).await {
            Ok(Ok(_greeting)) => {}
            Ok(Err(source)) => return Err(broken(hello, source)),
            Err(_elapsed) => return Err(QmpError::Timeout { command: hello.into() }),
        }
        let qmp = Self(Mutex::new(exchange));
        qmp.run("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs one command and returns its result.
    ///
    /// A call that is cancelled or runs into its deadline may still have its effect. The connection can be used on, unless the command was sent in part.
    pub async fn run(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut exchange = self.0.lock().await;
        let deadline = Instant::now() + ANSWER_LIMIT;
        match timeout_at(deadline, exchange.ask(command, arguments)).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(message))) => Err(QmpError::Refused { command: command.into(), message }),
            Ok(Err(source)) => Err(broken(command, source)),
            Err(_elapsed) => Err(QmpError::Timeout { command: command.into() }),
        }
    }

    /// Stops the vCPUs and drains block I/O.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.run("stop", json!({})).await.map(drop)
    }

    /// Lets the vCPUs run.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.run("cont", json!({})).await.map(drop)
    }

    /// The run state, for example `running`, `paused`, `io-error`, `postmigrate`.
    pub async fn run_state(&self) -> Result<String, QmpError> {
        let status = self.run("query-status", json!({})).await?;
        Ok(status["status"].as_str().unwrap_or("unknown").to_owned())
    }

    /// Memory lies in a shared file that is not written into the migration stream (machine-and-vm.md).
    pub async fn ignore_shared_memory(&self) -> Result<(), QmpError> {
        let capabilities = json!([{ "capability": "x-ignore-shared", "state": true }]);
        self.run("migrate-set-capabilities", json!({ "capabilities": capabilities })).await.map(drop)
    }

    /// Writes the device state of a stopped VM to `file` and waits until it is complete (not yet on disk).
    pub async fn save_state(&self, file: &Path) -> Result<(), QmpError> {
        self.ignore_shared_memory().await?;
        self.run("migrate", json!({ "uri": format!("file:{}", file.display()) })).await?;
        self.migration_done("save").await
    }

    /// Loads device state into a QEMU that was started with `-incoming defer`. The VM stays stopped.
    pub async fn load_state(&self, file: &Path) -> Result<(), QmpError> {
        self.ignore_shared_memory().await?;
        self.run("migrate-incoming", json!({ "uri": format!("file:{}", file.display()) })).await?;
        self.migration_done("load").await
    }

    async fn migration_done(&self, what: &'static str) -> Result<(), QmpError> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let info = self.run("query-migrate", json!({})).await?;
            match info["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let message = info["error-desc"].as_str().unwrap_or("no description").to_owned();
                    return Err(QmpError::Migration { what, message });
                }
                _ if Instant::now() >= deadline => return Err(QmpError::Timeout { command: what.into() }),
                _ => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// The last 64 KiB of the guest's serial console, for people who look into a failure.
    pub async fn console_tail(&self) -> Result<String, QmpError> {
        let text = self.run("ringbuf-read", json!({ "device": "console", "size": 65536 })).await?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }
}

impl Exchange {
    /// The inner result is QEMU's own.
    async fn ask(&mut self, command: &str, arguments: Value) -> io::Result<Result<Value, String>> {
        if self.cut {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "an earlier command was sent only in part"));
        }
        self.last += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": self.last }).to_string();
        line.push('\n');
        self.cut = true;
        self.to.write_all(line.as_bytes()).await?;
        self.cut = false;
        loop {
            let mut message = self.next_line().await?;
            // An event, or the answer to a command that was given up.
            if message["id"] != json!(self.last) {
                continue;
            }
            if let Some(error) = message.get("error") {
                return Ok(Err(error["desc"].as_str().unwrap_or("no description").to_owned()));
            }
            return Ok(Ok(message["return"].take()));
        }
    }

    /// Cancel safe.
    async fn next_line(&mut self) -> io::Result<Value> {
        let room = LINE_BYTES_MAX.saturating_sub(self.line.len()) as u64;
        (&mut self.from).take(room).read_until(b'\n', &mut self.line).await?;
        if self.line.last() != Some(&b'\n') {
            let kind = if self.line.len() >= LINE_BYTES_MAX {
                io::ErrorKind::InvalidData
            } else {
                io::ErrorKind::UnexpectedEof
            };
            return Err(kind.into());
        }
        let message = serde_json::from_slice(&self.line);
        self.line.clear();
        Ok(message?)
    }
}

fn broken(command: &str, source: io::Error) -> QmpError {
    QmpError::Broken { command: command.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A QEMU that greets, and a client that has negotiated with it.
    async fn connected() -> (Qmp, BufReader<UnixStream>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let qemu = async {
            let mut qemu = BufReader::new(listener.accept().await.unwrap().0);
            qemu.write_all(b"{\"QMP\":{}}\n").await.unwrap();
            let id = command(&mut qemu).await;
            answer(&mut qemu, id, "{}").await;
            qemu
        };
        let (qmp, qemu) = tokio::join!(Qmp::connect(&path, Duration::from_secs(5)), qemu);
        (qmp.unwrap(), qemu, folder)
    }

    async fn command(qemu: &mut BufReader<UnixStream>) -> u64 {
        let mut line = String::new();
        qemu.read_line(&mut line).await.unwrap();
        serde_json::from_str::<Value>(&line).unwrap()["id"].as_u64().unwrap()
    }

    async fn answer(qemu: &mut BufReader<UnixStream>, id: u64, value: &str) {
        qemu.write_all(format!("{{\"return\":{value},\"id\":{id}}}\n").as_bytes()).await.unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_comes_late_is_not_taken_for_the_next_one() {
        let (qmp, mut qemu, _folder) = connected().await;
        let given_up = tokio::select! {
            _ = qmp.run("query-status", json!({})) => unreachable!("nobody has answered"),
            id = command(&mut qemu) => id,
        };
        answer(&mut qemu, given_up, "{\"status\":\"running\"}").await;
        qemu.write_all(b"{\"event\":\"STOP\"}\n").await.unwrap();
        let qemu = async {
            let id = command(&mut qemu).await;
            answer(&mut qemu, id, "{\"status\":\"paused\"}").await;
        };
        let (state, ()) = tokio::join!(qmp.run_state(), qemu);
        assert_eq!(state.unwrap(), "paused");
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_an_error_and_not_memory() {
        let (qmp, mut qemu, _folder) = connected().await;
        let flood = async move {
            // Ends when the other side has had enough.
            while qemu.write_all(&[b'x'; 65536]).await.is_ok() {}
        };
        let error = tokio::select! {
            answer = qmp.stop() => answer.unwrap_err(),
            () = flood => unreachable!("the connection lives as long as the client"),
        };
        assert!(matches!(error, QmpError::Broken { .. }), "{error}");
    }
}
