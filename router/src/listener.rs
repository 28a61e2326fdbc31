//! Sockets that take connections, and how many there may be.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;

const BACKLOG: u32 = 4096;
/// Connections of all clients together; further ones are closed at once.
const CONNECTIONS_MAX: u32 = 16_384;
/// Of one client: an address, or a /64 of IPv6, which is what one customer gets.
const CONNECTIONS_PER_CLIENT_MAX: u32 = 2_048;
/// Accepting fails when the process is out of descriptors; closing others takes a moment.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(50);

pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart must not wait for connections of the run before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Counts connections.
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    total: u32,
    per_client: HashMap<IpAddr, u32>,
}

/// One admitted connection, until dropped.
#[derive(Debug)]
pub(crate) struct Admission {
    gate: Arc<Gate>,
    client: IpAddr,
}

impl Gate {
    fn admit(self: &Arc<Self>, ip: IpAddr) -> Option<Admission> {
        let client = client_of(ip);
        let mut count = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let here = count.per_client.get(&client).copied().unwrap_or_default();
        if count.total >= CONNECTIONS_MAX || here >= CONNECTIONS_PER_CLIENT_MAX {
            return None;
        }
        count.total += 1;
        count.per_client.insert(client, here + 1);
        Some(Admission { gate: Arc::clone(self), client })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut count = self.gate.0.lock().unwrap_or_else(PoisonError::into_inner);
        count.total -= 1;
        if let Some(here) = count.per_client.get_mut(&self.client) {
            *here -= 1;
            if *here == 0 {
                count.per_client.remove(&self.client);
            }
        }
    }
}

fn client_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Hands every admitted connection to `take` until `stop` is cancelled.
pub(crate) async fn accept(
    listener: TcpListener,
    gate: Arc<Gate>,
    stop: CancellationToken,
    take: impl Fn(TcpStream, SocketAddr, Admission),
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("accepting a connection failed: {error}");
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                continue;
            }
        };
        // Small writes (a keystroke's echo) must not wait for more.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%from, "a connection was gone at once: {error}");
            continue;
        }
        match gate.admit(from.ip()) {
            Some(admission) => take(stream, from, admission),
            None => tracing::warn!(%from, "refused a connection: too many"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_cannot_take_all_connections_and_places_come_back() {
        let gate = Arc::new(Gate::default());
        let v6 = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, last]);
        let held: Vec<Admission> =
            (0..CONNECTIONS_PER_CLIENT_MAX).map(|n| gate.admit(v6(u16::try_from(n).unwrap())).unwrap()).collect();
        assert!(gate.admit(v6(9999)).is_none(), "addresses of one /64 are one client");
        assert!(gate.admit("192.0.2.1".parse().unwrap()).is_some());
        drop(held);
        assert!(gate.0.lock().unwrap().per_client.is_empty());
        assert!(gate.admit(v6(9999)).is_some());
    }
}
