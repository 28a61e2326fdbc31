//! One connection to a port of the guest: over its network, or through its agent to what listens on its loopback only (ruling 23).

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use proto::agent::{TunnelInput, TunnelOpen, TunnelOutput, tunnel_input::Input, tunnel_output};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, ReadHalf, WriteHalf},
    sync::mpsc,
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Code, Streaming};

use super::Awake;
use crate::agent::{AgentClient, CallError};

/// Where servers on loopback listen. Some development servers take the first address of `localhost` only, which is the second here.
const LOOPBACK: [&str; 2] = ["127.0.0.1", "::1"];
/// Bytes on their way in one direction of a tunnel.
const PIPE_BYTES: usize = 256 << 10;
const PIECE_BYTES: usize = 64 << 10;
const INPUTS_MAX: usize = 4;
/// A sprite that was just booted may still start its server: first pause between attempts, the longest, and how long altogether.
const RETRY_FIRST: Duration = Duration::from_millis(25);
const RETRY_MAX: Duration = Duration::from_millis(400);
const RETRY_LIMIT: Duration = Duration::from_secs(5);

/// A byte stream to the guest.
pub(super) trait GuestStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> GuestStream for S {}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("nothing listens on port {port}")]
    NothingListens { port: u16 },
    #[error("port {port} does not answer")]
    Silent { port: u16 },
    #[error("cannot connect to port {port}")]
    Network { port: u16, source: io::Error },
    #[error("cannot connect to port {port} through the agent")]
    Agent { port: u16, source: CallError },
    #[error("the sprite was put to sleep, restarted or restored before port {port} answered; connect again")]
    Gone { port: u16 },
}

/// Where in the guest a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// To whatever listens there: the network first, then loopback.
    Any,
    /// To the guest's loopback.
    Loopback,
}

/// Connects to `port`. Retries only after a boot from the disk, when servers may still be starting.
pub(super) async fn dial(awake: &Awake, port: u16, way: Way) -> Result<Box<dyn GuestStream>, DialError> {
    let begun = Instant::now();
    let mut pause = RETRY_FIRST;
    loop {
        let dialed = tokio::select! {
            biased;
            () = awake.ended.cancelled() => return Err(DialError::Gone { port }),
            dialed = dial_once(awake, port, way) => dialed,
        };
        match dialed {
            Ok(stream) => {
                return Ok(Box::new(Mortal { stream, ended: Box::pin(awake.ended.clone().cancelled_owned()) }));
            }
            Err(_) if awake.is_gone() => return Err(DialError::Gone { port }),
            Err(DialError::NothingListens { .. }) if awake.was == "disk" && begun.elapsed() + pause < RETRY_LIMIT => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
            Err(error) => return Err(error),
        }
    }
}

async fn dial_once(awake: &Awake, port: u16, way: Way) -> Result<Box<dyn GuestStream>, DialError> {
    if way == Way::Any {
        match (awake.dial)(port).await {
            Ok(stream) => return Ok(Box::new(stream)),
            // Nothing on the network. Also "host unreachable": whoever is root inside may have broken it, and loopback works all the same.
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable => {}
                io::ErrorKind::TimedOut => return Err(DialError::Silent { port }),
                _ => return Err(DialError::Network { port, source: error }),
            },
        }
    }
    for host in LOOPBACK {
        match tunnel(&awake.agent, host, port).await {
            Ok(stream) => return Ok(Box::new(stream)),
            Err(error) if error.code() == Code::Unavailable && !awake.agent.is_closed() => {}
            Err(error) if error.code() == Code::DeadlineExceeded => return Err(DialError::Silent { port }),
            Err(source) => return Err(DialError::Agent { port, source }),
        }
    }
    Err(DialError::NothingListens { port })
}

/// A connection that breaks when its VM ends. Without that it would wait for ever for a peer that is not there: nobody resets it.
struct Mortal {
    stream: Box<dyn GuestStream>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl AsyncRead for Mortal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // What the guest said before its end is read first.
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Pending => self.ended.as_mut().poll(context).map(|()| Err(io::ErrorKind::ConnectionReset.into())),
            ready @ Poll::Ready(_) => ready,
        }
    }
}

/// Who writes also reads, so that the end is noticed there.
impl AsyncWrite for Mortal {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A connection to the guest's loopback, by way of its agent. A task moves the bytes; it ends when both directions have.
async fn tunnel(agent: &AgentClient, host: &str, port: u16) -> Result<DuplexStream, CallError> {
    let (input, inputs) = mpsc::channel(INPUTS_MAX);
    let open = TunnelOpen { host: host.to_owned(), port: port.into() };
    // There is room: the channel is new.
    drop(input.try_send(TunnelInput { input: Some(Input::Open(open)) }));
    let mut output = agent.tunnel(ReceiverStream::new(inputs)).await?;
    let error = |status: tonic::Status| CallError { call: "Tunnel", source: Box::new(status) };
    match output.message().await.map_err(error)? {
        Some(TunnelOutput { output: Some(tunnel_output::Output::Opened(_)) }) => {}
        Some(_) | None => return Err(error(tonic::Status::internal("the guest did not open the tunnel"))),
    }
    let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
    let (read, write) = tokio::io::split(theirs);
    tokio::spawn(async move {
        // Either direction may end first; an error in one is the end of both.
        if let Err(error) = tokio::try_join!(inward(read, input), outward(output, write)) {
            tracing::trace!(%error, "a tunnel broke");
        }
    });
    Ok(ours)
}

async fn inward(mut from: ReadHalf<DuplexStream>, to: mpsc::Sender<TunnelInput>) -> io::Result<()> {
    let gone = |_closed| io::Error::from(io::ErrorKind::BrokenPipe);
    loop {
        let mut data = bytes::BytesMut::with_capacity(PIECE_BYTES);
        let input = if from.read_buf(&mut data).await? == 0 { Input::Eof(true) } else { Input::Data(data.freeze()) };
        let ended = matches!(input, Input::Eof(_));
        to.send(TunnelInput { input: Some(input) }).await.map_err(gone)?;
        if ended {
            // The sender is kept: its end would end the whole tunnel, and the guest may still have to say something.
            to.closed().await;
            return Ok(());
        }
    }
}

async fn outward(mut from: Streaming<TunnelOutput>, mut to: WriteHalf<DuplexStream>) -> io::Result<()> {
    loop {
        match from.message().await.map_err(io::Error::other)?.and_then(|message| message.output) {
            Some(tunnel_output::Output::Data(data)) => to.write_all(&data).await?,
            Some(tunnel_output::Output::Opened(_)) => {}
            Some(tunnel_output::Output::Eof(_)) => to.shutdown().await?,
            None => {
                to.shutdown().await?;
                // The guest has ended the call: nothing can be sent any more.
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }
}
