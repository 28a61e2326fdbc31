//! TLS of the edge: one certificate for now, shown only to those who ask for a name of ours (or for none).

use std::sync::Arc;

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::{
    ca::ServerIdentity,
    host::{HostKind, Hosts},
};

/// The key and the certificate cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the server certificate cannot be used")]
    Identity(#[source] rustls::Error),
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
}

pub(crate) fn server_config(identity: ServerIdentity, hosts: Hosts) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let key = provider.key_provider.load_private_key(identity.key).map_err(TlsError::Identity)?;
    let certified = CertifiedKey::new(identity.chain, key);
    certified.keys_match().map_err(TlsError::Identity)?;
    let resolver = OneCertificate { certified: Arc::new(certified), hosts };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(TlsError::Setup)?;
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct OneCertificate {
    certified: Arc<CertifiedKey>,
    hosts: Hosts,
}

impl ResolvesServerCert for OneCertificate {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let ours = match hello.server_name().map(str::to_ascii_lowercase).as_deref() {
            // By address; the host header decides. `localhost` reaches us, and is told so.
            None | Some("localhost") => true,
            Some(name) => self.hosts.classify(name) != HostKind::Foreign,
        };
        ours.then(|| Arc::clone(&self.certified))
    }
}
