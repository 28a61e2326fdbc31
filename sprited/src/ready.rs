//! `<run>/ready`: written once everything answers, removed when it stops. What `./dev`, `sprited status` and the tests wait for.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::Instant,
};

/// Parts have bound their sockets before this starts, so it is about the first answer only.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// What a running cluster says about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) pid: u32,
    pub(crate) started_at: Timestamp,
    pub(crate) api_url: String,
    pub(crate) domain: String,
    pub(crate) bucket: String,
    pub(crate) instance: String,
    /// `kvm`, or `tcg: <why>`.
    pub(crate) acceleration: String,
    pub(crate) ca_file: PathBuf,
    pub(crate) token_file: PathBuf,
    pub(crate) node_socket: PathBuf,
    pub(crate) coordinator_socket: PathBuf,
    /// What the node agent found at its start that a person should know: what came back, what was lost.
    pub(crate) notices: Vec<String>,
}

/// A part did not answer in time.
#[derive(Debug, thiserror::Error)]
#[error("the {part} did not answer on {address} within {deadline:?}")]
pub(crate) struct NoAnswer {
    part: &'static str,
    address: String,
    deadline: Duration,
    #[source]
    source: io::Error,
}

impl Ready {
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)
    }
}

/// Waits until something speaks HTTP on the coordinator's socket, accepts on the node's, and accepts at the edge.
pub(crate) async fn all_answer(coordinator: &Path, node: &Path, edge: SocketAddr) -> Result<(), NoAnswer> {
    let within = ANSWER_DEADLINE;
    retry(within, "coordinator", coordinator.display().to_string(), async || {
        speaks_http(UnixStream::connect(coordinator).await?).await
    })
    .await?;
    retry(within, "node agent", node.display().to_string(), async || {
        speaks_http(UnixStream::connect(node).await?).await
    })
    .await?;
    retry(within, "router", edge.to_string(), async || TcpStream::connect(edge).await.map(drop)).await
}

async fn retry(
    deadline: Duration,
    part: &'static str,
    address: String,
    attempt: impl AsyncFn() -> io::Result<()>,
) -> Result<(), NoAnswer> {
    let end = Instant::now() + deadline;
    loop {
        let outcome = match tokio::time::timeout_at(end, attempt()).await {
            Ok(outcome) => outcome,
            Err(elapsed) => Err(elapsed.into()),
        };
        match outcome {
            Ok(()) => return Ok(()),
            Err(source) if Instant::now() >= end => return Err(NoAnswer { part, address, deadline, source }),
            Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
        }
    }
}

/// Any status line will do: an API that answers 401 is up.
async fn speaks_http(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut answer = [0; 7];
    stream.read_exact(&mut answer).await?;
    if answer == *b"HTTP/1." { Ok(()) } else { Err(io::Error::other("the answer is not HTTP")) }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_part_that_never_answers_is_named() {
        let deadline = Duration::from_millis(50);
        let nobody = async || UnixStream::connect("/nonexistent/socket").await.map(drop);
        let error = retry(deadline, "coordinator", "there".to_owned(), nobody).await.unwrap_err();
        assert_eq!(error.to_string(), "the coordinator did not answer on there within 50ms");
    }

    #[tokio::test]
    async fn any_http_answer_counts_and_silence_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let answers = tokio::spawn(async move {
            for text in ["HTTP/1.1 401 Unauthorized\r\n\r\n", "SSH-2.0-x\r\n"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 16];
                stream.read_exact(&mut request).await.unwrap();
                stream.write_all(text.as_bytes()).await.unwrap();
            }
        });
        speaks_http(UnixStream::connect(&path).await.unwrap()).await.unwrap();
        speaks_http(UnixStream::connect(&path).await.unwrap()).await.unwrap_err();
        answers.await.unwrap();
    }
}
