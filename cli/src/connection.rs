//! From an API's URL to a byte stream: names, TCP, TLS with the system's roots.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::Uri;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::failure::{Failure, chain};

/// Resolve, connect and shake hands.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Three unanswered ones end a connection.
const PROBE_EVERY: Duration = Duration::from_secs(15);

pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

pub(crate) type Stream = Box<dyn Duplex>;

/// Where the API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// As configured, without a final `/`.
    pub(crate) url: String,
    tls: bool,
    host: String,
    port: u16,
    /// For `Host`: with the port only if it is not the scheme's.
    pub(crate) authority: String,
    /// Before every request target; mostly empty.
    pub(crate) prefix: String,
}

impl Origin {
    /// # Errors
    ///
    /// The text is not `http://…` or `https://…`.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let bad = |why: &str| {
            Failure::usage(format!("the API's URL {text:?} {why}")).advise("it looks like https://api.localhost:8443")
        };
        let url = text.trim_end_matches('/');
        let uri: Uri = url.parse().map_err(|_not_a_url| bad("is not a URL"))?;
        let (tls, default_port) = match uri.scheme_str() {
            Some("https") => (true, 443),
            Some("http") => (false, 80),
            _ => return Err(bad("begins with neither https:// nor http://")),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| bad("has no host"))?;
        if uri.query().is_some() {
            return Err(bad("has a query"));
        }
        let port = uri.port_u16().unwrap_or(default_port);
        let authority = if port == default_port { host.to_owned() } else { format!("{host}:{port}") };
        let prefix = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { url: url.to_owned(), tls, host: host.trim_matches(['[', ']']).to_owned(), port, authority, prefix })
    }
}

/// What it takes to connect; the roots are read once.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    pub(crate) origin: Origin,
    tls: Option<Arc<ClientConfig>>,
}

impl Dialer {
    pub(crate) fn new(origin: Origin) -> Result<Self, Failure> {
        let tls = if origin.tls { Some(Arc::new(tls_config()?)) } else { None };
        Ok(Self { origin, tls })
    }

    pub(crate) async fn dial(&self) -> Result<Stream, Failure> {
        match tokio::time::timeout(CONNECT_LIMIT, self.connect()).await {
            Ok(done) => done,
            Err(_elapsed) => Err(self.unreachable(&format!("no answer within {} s", CONNECT_LIMIT.as_secs()))),
        }
    }

    async fn connect(&self) -> Result<Stream, Failure> {
        let tcp = self.connect_tcp().await.map_err(|error| self.unreachable(&error.to_string()))?;
        let Some(config) = &self.tls else { return Ok(Box::new(tcp)) };
        let name =
            ServerName::try_from(self.origin.host.clone()).map_err(|error| self.unreachable(&error.to_string()))?;
        let tls =
            TlsConnector::from(Arc::clone(config)).connect(name, tcp).await.map_err(|error| self.untrusted(&error))?;
        Ok(Box::new(tls))
    }

    async fn connect_tcp(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{} has no address", self.origin.host));
        for address in addresses(&self.origin.host, self.origin.port).await? {
            match TcpStream::connect(address).await {
                Ok(tcp) => {
                    // Without it every keystroke waits for the one before.
                    tcp.set_nodelay(true)?;
                    notice_a_dead_peer(&tcp)?;
                    return Ok(tcp);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn unreachable(&self, why: &str) -> Failure {
        Failure::new(format!("cannot reach {}: {why}", self.origin.url))
            .advise("is the cluster up? `./dev up` starts a local one; SPRITES_API_URL says where it is (`eval \"$(./dev env)\"` sets it)")
    }

    fn untrusted(&self, error: &io::Error) -> Failure {
        let failure = Failure::new(format!("no TLS connection to {}: {}", self.origin.url, chain(error)));
        failure.advise("for a local cluster, `eval \"$(./dev env)\"` sets SSL_CERT_FILE to a bundle with its certificate authority")
    }
}

/// Some streams may be silent for hours; a host that lost power never says so.
fn notice_a_dead_peer(tcp: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(tcp);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(PROBE_EVERY).with_interval(PROBE_EVERY).with_retries(2))?;
    socket.set_tcp_user_timeout(Some(PROBE_EVERY * 3))
}

/// Names below `localhost` are this machine (RFC 6761), whether or not the system's resolver knows it.
async fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let is_local = host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost");
    if is_local {
        let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        return Ok(loopback.map(|address| SocketAddr::new(address, port)).to_vec());
    }
    Ok(tokio::net::lookup_host((host, port)).await?.collect())
}

fn tls_config() -> Result<ClientConfig, Failure> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (usable, _unusable) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        let why = found.errors.first().map(|error| format!(": {error}")).unwrap_or_default();
        return Err(Failure::new(format!("no certificate authorities to trust{why}"))
            .advise("install ca-certificates, or point SSL_CERT_FILE at a PEM bundle"));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Failure::new(format!("TLS is not usable: {error}")))?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    // WebSockets and one-frame-per-chunk answers both need it.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let origin = Origin::parse("https://api.localhost:8443/").unwrap();
        assert_eq!(
            (origin.url.as_str(), origin.authority.as_str()),
            ("https://api.localhost:8443", "api.localhost:8443")
        );
        assert_eq!(
            (origin.tls, origin.host.as_str(), origin.port, origin.prefix.as_str()),
            (true, "api.localhost", 8443, "")
        );
        let origin = Origin::parse("http://[::1]/some/prefix/").unwrap();
        assert_eq!((origin.host.as_str(), origin.port, origin.authority.as_str()), ("::1", 80, "[::1]"));
        assert_eq!(origin.prefix, "/some/prefix");
        for bad in ["", "api.localhost", "ftp://x", "https://", "https://x?y=1", "https://a b"] {
            assert_eq!(Origin::parse(bad).unwrap_err().code, 2, "{bad:?}");
        }
    }

    #[tokio::test]
    async fn names_below_localhost_need_no_resolver() {
        let found = addresses("api.sprites.LOCALHOST", 1).await.unwrap();
        assert!(found.len() == 2 && found.iter().all(|address| address.ip().is_loopback()));
    }
}
