//! QMP: the control socket of one QEMU process.
//!
//! One connection at a time, one command at a time (QMP answers in order); events that arrive between answers are kept for
//! [`Qmp::events`]. Every call has a deadline, because a QEMU that is being killed simply stops answering.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex, broadcast},
    time::{Instant, timeout_at},
};

/// How long QEMU may take to answer one command. It answers within milliseconds unless the host is badly overloaded.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// A QMP line is small; a longer one means that we do not talk to QEMU.
const EVENTS_KEPT: usize = 64;
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

/// An event QEMU sent by itself, such as `SHUTDOWN` or `BLOCK_IO_ERROR`.
#[derive(Clone, Debug)]
pub struct QmpEvent {
    pub name: String,
    pub data: Value,
}

/// Connection to one QEMU. Commands are serialised inside.
#[derive(Debug)]
pub struct Qmp {
    exchange: Mutex<Exchange>,
    events: broadcast::Sender<QmpEvent>,
}

#[derive(Debug)]
struct Exchange {
    lines: tokio::io::Lines<BufReader<OwnedReadHalf>>,
    to: OwnedWriteHalf,
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
        let mut lines = BufReader::new(from).lines();
        let hello = "greeting";
        match timeout_at(deadline, lines.next_line()).await {
            Ok(Ok(Some(_greeting))) => {}
            Ok(Ok(None)) => return Err(broken(hello, io::ErrorKind::UnexpectedEof.into())),
            Ok(Err(source)) => return Err(broken(hello, source)),
            Err(_elapsed) => return Err(QmpError::Timeout { command: hello.into() }),
        }
        let qmp = Self { exchange: Mutex::new(Exchange { lines, to }), events: broadcast::channel(EVENTS_KEPT).0 };
        qmp.run("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Events from now on. They are only read while a command runs, so look at state as well.
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }

    /// Runs one command and returns its result.
    ///
    /// Not cancel safe: drop the connection after a cancelled call.
    pub async fn run(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut exchange = self.exchange.lock().await;
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        let deadline = Instant::now() + ANSWER_LIMIT;
        let answer = timeout_at(deadline, async {
            exchange.to.write_all(line.as_bytes()).await?;
            self.answer(&mut exchange.lines).await
        });
        let answer = match answer.await {
            Ok(Ok(answer)) => answer,
            Ok(Err(source)) => return Err(broken(command, source)),
            Err(_elapsed) => return Err(QmpError::Timeout { command: command.into() }),
        };
        match answer {
            Ok(value) => Ok(value),
            Err(message) => Err(QmpError::Refused { command: command.into(), message }),
        }
    }

    /// Reads until an answer; events on the way are passed on. The inner result is QEMU's own.
    async fn answer(
        &self,
        lines: &mut tokio::io::Lines<BufReader<OwnedReadHalf>>,
    ) -> io::Result<Result<Value, String>> {
        while let Some(line) = lines.next_line().await? {
            let mut message: Value = serde_json::from_str(&line)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(Ok(value.take()));
            }
            if let Some(error) = message.get("error") {
                return Ok(Err(error["desc"].as_str().unwrap_or("no description").to_owned()));
            }
            if let Some(name) = message["event"].as_str() {
                let event = QmpEvent { name: name.to_owned(), data: message["data"].clone() };
                // Nobody listening is fine: state is looked at as well.
                drop(self.events.send(event));
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
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

fn broken(command: &str, source: io::Error) -> QmpError {
    QmpError::Broken { command: command.to_owned(), source }
}
