//! The local certificate authority of one machine, for `sprited dev`: its root, and the edge's server certificate.
//!
//! ```text
//!  <dir>/ca.pem       what clients trust          <dir>/server.pem   chain that the edge shows
//!        ca.key       0600                              server.key   0600
//! ```
//!
//! # Invariants
//!
//! 1. *Trust lasts.* The root's key is made once. A root that grows old is signed again with the same key and name, so that a client which
//!    trusts an earlier `ca.pem` still accepts the edge until that one ends.
//! 2. *Keys first.* A key is on disk before the certificate that needs it, each file whole or absent. A root certificate without its key is
//!    reported, never replaced: silently making another would break every client that trusts it.
//! 3. *Renewed at start.* A certificate is renewed at two thirds of its life, when the edge starts. It lives for 397 days, the most that every
//!    browser accepts, so an edge must be restarted at least every 132 days.
//!
//! # Not here
//!
//! Public certificates (ACME) and the identities of our own processes: later issues, each with its own store.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use jiff::{Span, Timestamp, civil::Date, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, string::Ia5String,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

/// Ten years: trusting a root is work for a person.
const ROOT_LIFE_DAYS: i64 = 3650;
/// The most that every browser accepts.
const SERVER_LIFE_DAYS: i64 = 397;
/// Clients with a slow clock must accept a new certificate too.
const BACKDATED_DAYS: i64 = 1;

/// A certificate authority in a folder.
pub struct Ca {
    dir: PathBuf,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// Names the root's key; what a server certificate must point at.
    key_id: Vec<u8>,
}

/// The names and addresses a server certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerNames {
    /// Lower case, sorted, each once. May begin with `*.`.
    dns: Vec<String>,
    ips: Vec<IpAddr>,
}

/// What a TLS server shows and signs with.
pub struct ServerIdentity {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// Why the authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("{doing} {path} failed")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{path} is there but its key {key} is not; restore the key, or remove the folder to start a new authority that every client must trust anew"
    )]
    KeyMissing { path: PathBuf, key: PathBuf },
    #[error("the key {key} does not belong to the certificate {path}; restore the right one, or remove the folder")]
    KeyForeign { path: PathBuf, key: PathBuf },
    #[error("{path} does not hold a certificate or key that we can read: {what}; remove it to have it made again")]
    Unreadable { path: PathBuf, what: String },
    #[error("{name:?} cannot stand in a certificate")]
    BadName { name: String },
    #[error("signing the certificate for {what} failed")]
    Sign {
        what: &'static str,
        #[source]
        source: rcgen::Error,
    },
}

impl ServerNames {
    /// What an edge is reached by: the API's hosts, the sprite domain and everything one label below it, and this machine's loopback.
    pub fn new<'a>(api_hosts: impl IntoIterator<Item = &'a str>, sprite_domain: &str) -> Self {
        let mut dns: Vec<String> = api_hosts.into_iter().map(str::to_ascii_lowercase).collect();
        let domain = sprite_domain.to_ascii_lowercase();
        dns.push(format!("*.{domain}"));
        dns.push(domain);
        dns.push("localhost".to_owned());
        dns.sort();
        dns.dedup();
        Self { dns, ips: vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] }
    }
}

impl Ca {
    /// Opens the authority in `dir`, making it first if there is none.
    ///
    /// # Errors
    ///
    /// Nothing was changed, unless writing failed halfway; calling again then goes on where it stopped.
    pub fn ensure(dir: &Path) -> Result<Self, CaError> {
        Self::ensure_at(dir, Timestamp::now())
    }

    fn ensure_at(dir: &Path, now: Timestamp) -> Result<Self, CaError> {
        fs::create_dir_all(dir).map_err(|source| CaError::Io { doing: "making", path: dir.to_owned(), source })?;
        let (path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        let stored = read(&path)?;
        let key = match (read(&key_path)?, &stored) {
            (Some(pem), _) => key_from_pem(&key_path, &pem)?,
            (None, Some(_)) => return Err(CaError::KeyMissing { path, key: key_path }),
            (None, None) => new_key(&key_path)?,
        };
        if let Some(pem) = &stored {
            let facts = Facts::of(&path, pem)?;
            if facts.public_key != key.public_key_raw() {
                return Err(CaError::KeyForeign { path, key: key_path });
            }
            if !facts.life.renewal_due(now) {
                return Self::open(dir, pem.clone(), key, &path);
            }
        }
        let sign_error = |source| CaError::Sign { what: "the authority itself", source };
        let pem = root_params(now).self_signed(&key).map_err(sign_error)?.pem();
        write(&path, 0o644, pem.as_bytes())?;
        Self::open(dir, pem, key, &path)
    }

    fn open(dir: &Path, pem: String, key: KeyPair, path: &Path) -> Result<Self, CaError> {
        let unreadable = |source: rcgen::Error| CaError::Unreadable { path: path.to_owned(), what: source.to_string() };
        let key_id = Facts::of(path, &pem)?.key_id;
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(unreadable)?;
        Ok(Self { dir: dir.to_owned(), pem, issuer, key_id })
    }

    /// The certificate (PEM) that a client has to trust.
    pub fn bundle(&self) -> &str {
        &self.pem
    }

    /// The file with [`bundle`](Self::bundle).
    pub fn path(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// The edge's certificate for exactly `names`: the stored one while it is young and fits, else a new one.
    pub fn server(&self, names: &ServerNames) -> Result<ServerIdentity, CaError> {
        self.server_at(names, Timestamp::now())
    }

    fn server_at(&self, names: &ServerNames, now: Timestamp) -> Result<ServerIdentity, CaError> {
        let (path, key_path) = (self.dir.join("server.pem"), self.dir.join("server.key"));
        if let (Some(pem), Some(key_pem)) = (read(&path)?, read(&key_path)?)
            && let (Ok(facts), Ok(key)) = (Facts::of(&path, &pem), key_from_pem(&key_path, &key_pem))
            && facts.public_key == key.public_key_raw()
            && facts.issuer_key_id.as_deref() == Some(&self.key_id)
            && facts.names == *names
            && !facts.life.renewal_due(now)
        {
            return self.identity(&path, &pem, &key);
        }
        let key = new_key(&key_path)?;
        let sign_error = |source| CaError::Sign { what: "the edge", source };
        let pem = server_params(names, now)?.signed_by(&key, &self.issuer).map_err(sign_error)?.pem();
        write(&path, 0o644, pem.as_bytes())?;
        self.identity(&path, &pem, &key)
    }

    fn identity(&self, path: &Path, pem: &str, key: &KeyPair) -> Result<ServerIdentity, CaError> {
        let unreadable = |error: rustls::pki_types::pem::Error| CaError::Unreadable {
            path: path.to_owned(),
            what: error.to_string(),
        };
        let chain = vec![CertificateDer::from_pem_slice(pem.as_bytes()).map_err(unreadable)?];
        Ok(ServerIdentity { chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() })
    }
}

/// How long a certificate is valid.
#[derive(Clone, Copy)]
struct Life {
    begin_s: i64,
    end_s: i64,
}

impl Life {
    fn renewal_due(self, now: Timestamp) -> bool {
        now.as_second() >= self.begin_s + (self.end_s - self.begin_s) / 3 * 2
    }
}

/// What we need to know of a stored certificate.
struct Facts {
    life: Life,
    public_key: Vec<u8>,
    key_id: Vec<u8>,
    issuer_key_id: Option<Vec<u8>>,
    names: ServerNames,
}

impl Facts {
    fn of(path: &Path, pem: &str) -> Result<Self, CaError> {
        let unreadable = |what: String| CaError::Unreadable { path: path.to_owned(), what };
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| unreadable(e.to_string()))?;
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|e| unreadable(e.to_string()))?;
        let validity = certificate.validity();
        let life = Life { begin_s: validity.not_before.timestamp(), end_s: validity.not_after.timestamp() };
        let mut facts = Self {
            life,
            public_key: certificate.public_key().subject_public_key.data.to_vec(),
            key_id: Vec::new(),
            issuer_key_id: None,
            names: ServerNames { dns: Vec::new(), ips: Vec::new() },
        };
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(id) => facts.key_id = id.0.to_vec(),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    facts.issuer_key_id = id.key_identifier.as_ref().map(|id| id.0.to_vec());
                }
                ParsedExtension::SubjectAlternativeName(alternatives) => {
                    alternatives.general_names.iter().for_each(|name| facts.names.add(name));
                }
                _ => {}
            }
        }
        facts.names.dns.sort();
        Ok(facts)
    }
}

impl ServerNames {
    fn add(&mut self, name: &GeneralName<'_>) {
        match name {
            GeneralName::DNSName(name) => self.dns.push((*name).to_owned()),
            GeneralName::IPAddress(bytes) => {
                let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                self.ips.extend(v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)));
            }
            _ => {}
        }
    }
}

fn root_params(now: Timestamp) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Sprites local authority");
    set_life(&mut params, now, ROOT_LIFE_DAYS);
    params
}

fn server_params(names: &ServerNames, now: Timestamp) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    for name in &names.dns {
        let text = Ia5String::try_from(name.as_str()).map_err(|_not_ascii| CaError::BadName { name: name.clone() })?;
        params.subject_alt_names.push(SanType::DnsName(text));
    }
    params.subject_alt_names.extend(names.ips.iter().copied().map(SanType::IpAddress));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Sprites edge");
    set_life(&mut params, now, SERVER_LIFE_DAYS);
    Ok(params)
}

fn set_life(params: &mut CertificateParams, now: Timestamp, days: i64) {
    let today = now.to_zoned(TimeZone::UTC).date();
    let moment = |date: Date| rcgen::date_time_ymd(date.year().into(), small(date.month()), small(date.day()));
    params.not_before = moment(today.saturating_sub(Span::new().days(BACKDATED_DAYS)));
    params.not_after = moment(today.saturating_add(Span::new().days(days - BACKDATED_DAYS)));
}

/// Months and days of a [`Date`] are positive.
fn small(number: i8) -> u8 {
    number.unsigned_abs()
}

fn new_key(path: &Path) -> Result<KeyPair, CaError> {
    let key = KeyPair::generate().map_err(|source| CaError::Sign { what: "a new key", source })?;
    write(path, 0o600, key.serialize_pem().as_bytes())?;
    Ok(key)
}

fn key_from_pem(path: &Path, pem: &str) -> Result<KeyPair, CaError> {
    KeyPair::from_pem(pem).map_err(|error| CaError::Unreadable { path: path.to_owned(), what: error.to_string() })
}

fn read(path: &Path) -> Result<Option<String>, CaError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CaError::Io { doing: "reading", path: path.to_owned(), source }),
    }
}

/// Writes a file whole or not at all, and durably: a root that clients already trust must not be lost to a power cut.
fn write(path: &Path, mode: u32, content: &[u8]) -> Result<(), CaError> {
    let error = |source| CaError::Io { doing: "writing", path: path.to_owned(), source };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    // A left-over of a crash could be open to others; its mode would stay.
    match fs::remove_file(&temporary) {
        Err(gone) if gone.kind() != io::ErrorKind::NotFound => return Err(error(gone)),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).map_err(error)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(error)?;
    fs::rename(&temporary, path).map_err(error)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(error)
}

#[cfg(test)]
mod tests;
