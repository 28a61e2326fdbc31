//! One TCP connection to an address inside the guest, for the host: also to what listens on loopback only (ruling 23).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use proto::agent::{TunnelInput, TunnelOpen, TunnelOpened, TunnelOutput, tunnel_input::Input, tunnel_output::Output};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};
use tonic::{Status, Streaming};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const PIECE_BYTES: usize = 64 << 10;
/// Messages on their way to the host.
const QUEUE: usize = 4;

type Message = Result<TunnelOutput, Status>;

/// Connects, then moves bytes until both directions have ended, or the host gives up.
pub(crate) async fn open(mut inputs: Streaming<TunnelInput>) -> Result<mpsc::Receiver<Message>, Status> {
    let Some(TunnelInput { input: Some(Input::Open(target)) }) = inputs.message().await? else {
        return Err(Status::invalid_argument("the first input has to be open"));
    };
    let stream = connect(&target).await?;
    let opened = TunnelOpened { target: stream.peer_addr().map(|peer| peer.to_string()).unwrap_or_default() };
    // Small answers must not wait for more; fails only on a stream that is broken, as the next read tells.
    drop(stream.set_nodelay(true));
    let (queue, messages) = mpsc::channel(QUEUE);
    // There is room: the queue is new.
    drop(queue.try_send(Ok(TunnelOutput { output: Some(Output::Opened(opened)) })));
    let (read, write) = stream.into_split();
    tokio::spawn(async move {
        let outward = async {
            outward(read, &queue).await;
            Ok(())
        };
        tokio::select! {
            // Ends with the second direction, or at once when the host has left.
            _ = async { tokio::try_join!(outward, inward(inputs, write)) } => {}
            () = queue.closed() => {}
        }
    });
    Ok(messages)
}

async fn connect(target: &TunnelOpen) -> Result<TcpStream, Status> {
    let port = u16::try_from(target.port).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| Status::invalid_argument(format!("{} is not a port", target.port)))?;
    let addresses = addresses(&target.host)
        .ok_or_else(|| Status::invalid_argument(format!("{:?} is not an address", target.host)))?;
    let mut refusal = Status::unavailable("connection refused");
    for address in addresses {
        match tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(SocketAddr::new(address, port))).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Ok(Err(error)) => refusal = Status::unavailable(format!("cannot connect to port {port}: {error}")),
            Err(_elapsed) => refusal = Status::deadline_exceeded(format!("port {port} does not answer")),
        }
    }
    Err(refusal)
}

/// Both loopbacks, if one is meant: a server may listen on either.
fn addresses(host: &str) -> Option<Vec<IpAddr>> {
    let (v4, v6) = (IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST));
    if host.is_empty() || host.eq_ignore_ascii_case("localhost") {
        return Some(vec![v4, v6]);
    }
    let address: IpAddr = host.trim_matches(['[', ']']).parse().ok()?;
    Some(if address == v4 { vec![v4, v6] } else { vec![address] })
}

async fn outward(mut from: OwnedReadHalf, to: &mpsc::Sender<Message>) {
    loop {
        let mut data = BytesMut::with_capacity(PIECE_BYTES);
        // A connection that breaks ends like one that is closed; the other direction fails with it.
        let output = match from.read_buf(&mut data).await {
            Ok(1..) => Output::Data(data.freeze()),
            Ok(0) | Err(_) => Output::Eof(true),
        };
        let ended = matches!(output, Output::Eof(_));
        if to.send(Ok(TunnelOutput { output: Some(output) })).await.is_err() || ended {
            return;
        }
    }
}

/// The host has ended the call without an end of its data.
struct Left;

async fn inward(mut from: Streaming<TunnelInput>, mut to: OwnedWriteHalf) -> Result<(), Left> {
    let mut write = async |data: Bytes| to.write_all(&data).await;
    loop {
        match from.message().await {
            Ok(Some(TunnelInput { input: Some(Input::Data(data)) })) => {
                if write(data).await.is_err() {
                    return Ok(());
                }
            }
            Ok(Some(TunnelInput { input: Some(Input::Eof(_)) })) => break,
            Ok(Some(TunnelInput { input: Some(Input::Open(_)) | None })) => {}
            Ok(None) | Err(_) => return Err(Left),
        }
    }
    drop(to.shutdown().await);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_means_either() {
        for host in ["", "localhost", "127.0.0.1"] {
            assert_eq!(addresses(host).unwrap().len(), 2, "{host:?}");
        }
        assert_eq!(addresses("10.0.0.1").unwrap(), [IpAddr::from([10, 0, 0, 1])]);
        assert_eq!(addresses("[fdf::1]").unwrap().len(), 1);
        assert_eq!(addresses("example.com"), None, "names are the host's business");
    }
}
