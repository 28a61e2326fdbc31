//! The guest's name server: a relay that listens on the gateway inside the namespace and asks the host's name servers.
//!
//! The two sockets are made inside the namespace and served from the node agent's own runtime; queries upstream leave from the host. A relay, not a
//! resolver: messages pass unchanged, except names that must not leave the machine ([`message::special`]), which are answered here.
//!
//! Bounds: [`QUERIES_MAX`] questions of one guest are under way at a time; further ones over UDP are dropped (the guest asks again) and over TCP wait.
//! Every question has an end: an answer, or SERVFAIL after [`TRIES_MAX`] name servers were asked for [`TRY_LIMIT`] each.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::AbortHandle,
};

use super::{GATEWAY_V4, namespace};

pub mod message;

const PORT: u16 = 53;
const QUERIES_MAX: usize = 128;
const CONNECTIONS_MAX: usize = 16;
/// An idle TCP connection of the guest is closed after this.
const CONNECTION_IDLE: Duration = Duration::from_secs(30);
const TRY_LIMIT: Duration = Duration::from_millis(2500);
const TRIES_MAX: usize = 3;
const ERROR_PAUSE: Duration = Duration::from_millis(50);
/// Largest message, by the two-byte length of DNS over TCP.
const MESSAGE_BYTES_MAX: usize = 65535;
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The host's name servers may change, for example with its DHCP lease.
const RESOLVERS_FRESH: Duration = Duration::from_secs(5);
/// As in the C library: more are ignored.
const RESOLVERS_MAX: usize = 3;

/// The name servers to ask: given ones, or the host's. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Resolvers(Arc<Source>);

#[derive(Debug)]
enum Source {
    Given(Vec<SocketAddr>),
    Host(Mutex<HostResolvers>),
}

#[derive(Debug)]
struct HostResolvers {
    servers: Vec<SocketAddr>,
    looked: Option<Instant>,
    changed: Option<SystemTime>,
}

impl Resolvers {
    /// `given` if there are any, else those of the host's `/etc/resolv.conf`, read again when it changes.
    pub fn new(given: Vec<SocketAddr>) -> Self {
        let source = if given.is_empty() {
            Source::Host(Mutex::new(HostResolvers { servers: Vec::new(), looked: None, changed: None }))
        } else {
            Source::Given(given)
        };
        Self(Arc::new(source))
    }

    fn current(&self) -> Vec<SocketAddr> {
        match &*self.0 {
            Source::Given(servers) => servers.clone(),
            Source::Host(host) => host.lock().unwrap_or_else(PoisonError::into_inner).current(),
        }
    }
}

impl HostResolvers {
    fn current(&mut self) -> Vec<SocketAddr> {
        if self.looked.is_none_or(|looked| looked.elapsed() >= RESOLVERS_FRESH) {
            self.looked = Some(Instant::now());
            let changed = std::fs::metadata(RESOLV_CONF).and_then(|file| file.modified()).ok();
            if self.changed != changed || changed.is_none() {
                match std::fs::read_to_string(RESOLV_CONF) {
                    Ok(text) => {
                        self.servers = parse_resolv_conf(&text);
                        self.changed = changed;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot read {RESOLV_CONF}; guests go on with the name servers of before")
                    }
                }
            }
        }
        self.servers.clone()
    }
}

fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and_then(|_| words.next())?;
        Some(SocketAddr::new(address.parse().ok()?, PORT))
    });
    servers.take(RESOLVERS_MAX).collect()
}

/// A running relay. Dropping it ends it.
#[derive(Debug)]
pub struct Relay {
    tasks: [AbortHandle; 2],
}

impl Relay {
    /// Starts the relay of the namespace at `path`.
    pub fn start(path: &Path, resolvers: Resolvers) -> io::Result<Self> {
        let (udp, tcp) = namespace::inside(path, || {
            let udp = std::net::UdpSocket::bind((GATEWAY_V4, PORT))?;
            let tcp = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            // A node agent that was restarted finds old connections of the guest in TIME_WAIT.
            tcp.set_reuse_address(true)?;
            tcp.bind(&SocketAddr::from((GATEWAY_V4, PORT)).into())?;
            tcp.listen(libc::SOMAXCONN)?;
            Ok((udp, std::net::TcpListener::from(tcp)))
        })?;
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        let queries = Arc::new(Semaphore::new(QUERIES_MAX));
        let udp = serve_udp(UdpSocket::from_std(udp)?, resolvers.clone(), Arc::clone(&queries));
        let tcp = serve_tcp(TcpListener::from_std(tcp)?, resolvers, queries);
        Ok(Self { tasks: [tokio::spawn(udp).abort_handle(), tokio::spawn(tcp).abort_handle()] })
    }

    pub fn stop(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn serve_udp(socket: UdpSocket, resolvers: Resolvers, queries: Arc<Semaphore>) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    // Answers end with the relay.
    let mut under_way = tokio::task::JoinSet::new();
    loop {
        let (len, guest) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An ICMP error of an earlier answer is reported here, and the socket is fine; one that lasts must not take the processor.
            Err(error) => {
                tracing::trace!(%error, "the name server cannot receive a query");
                tokio::time::sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        while under_way.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&queries).try_acquire_owned() else { continue };
        let (query, socket, resolvers) = (buffer[..len].to_vec(), Arc::clone(&socket), resolvers.clone());
        under_way.spawn(async move {
            if let Some(answer) = answer(&query, &resolvers, Transport::Udp).await {
                // The guest may have gone to sleep meanwhile.
                drop(socket.send_to(&answer, guest).await);
            }
            drop(permit);
        });
    }
}

async fn serve_tcp(listener: TcpListener, resolvers: Resolvers, queries: Arc<Semaphore>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut open = tokio::task::JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _guest)) => stream,
            Err(error) => {
                tracing::debug!(%error, "the name server cannot accept a connection");
                tokio::time::sleep(TRY_LIMIT).await;
                continue;
            }
        };
        while open.try_join_next().is_some() {}
        let (resolvers, queries) = (resolvers.clone(), Arc::clone(&queries));
        open.spawn(async move {
            if let Err(error) = serve_connection(stream, &resolvers, &queries).await {
                tracing::trace!(%error, "a guest's connection to its name server ended");
            }
            drop(permit);
        });
    }
}

async fn serve_connection(mut stream: TcpStream, resolvers: &Resolvers, queries: &Semaphore) -> io::Result<()> {
    while let Some(query) = idle_limit(CONNECTION_IDLE, read_message(&mut stream)).await? {
        let _permit = queries.acquire().await.map_err(io::Error::other)?;
        let Some(answer) = answer(&query, resolvers, Transport::Tcp).await else { return Ok(()) };
        idle_limit(CONNECTION_IDLE, write_message(&mut stream, &answer)).await?;
    }
    Ok(())
}

async fn idle_limit<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let len = match stream.read_u16().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        len => usize::from(len?),
    };
    let mut message = vec![0; len];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = len.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

#[derive(Clone, Copy, Debug)]
enum Transport {
    Udp,
    Tcp,
}

/// The answer to one query; `None` for what is not a query at all.
async fn answer(query: &[u8], resolvers: &Resolvers, transport: Transport) -> Option<Vec<u8>> {
    let question = message::question(query)?;
    if let Some(special) = message::special(&question) {
        return Some(message::local_answer(query, &question, special));
    }
    for server in resolvers.current().into_iter().take(TRIES_MAX) {
        let asked = match transport {
            Transport::Udp => tokio::time::timeout(TRY_LIMIT, ask_udp(server, query)).await,
            Transport::Tcp => tokio::time::timeout(TRY_LIMIT, ask_tcp(server, query)).await,
        };
        match asked {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => tracing::debug!(%server, %error, "a name server does not answer"),
            Err(_elapsed) => tracing::debug!(%server, "a name server does not answer in time"),
        }
    }
    Some(message::failure(query, &question))
}

async fn ask_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any = if server.is_ipv4() {
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
    } else {
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
    };
    // A socket for each question has a random port, and being connected it takes only packets of this server.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let len = socket.recv(&mut buffer).await?;
        if message::answers(query, &buffer[..len]) {
            return Ok(buffer[..len].to_vec());
        }
    }
}

async fn ask_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    if message::answers(query, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_three_name_servers_of_the_host_are_asked() {
        let text = "# comment\nsearch example.com\nnameserver 192.0.2.1\nnameserver ::1 \nnameserver bad\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n";
        let expected: Vec<SocketAddr> =
            ["192.0.2.1:53", "[::1]:53", "192.0.2.3:53"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(parse_resolv_conf(text), expected);
    }
}
