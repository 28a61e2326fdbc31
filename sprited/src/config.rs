//! Settings of `sprited`: flags over one optional TOML file over defaults, checked once.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use clap::Args;
use serde::Deserialize;

use crate::data_dir::DataDir;

pub(crate) const DATA_DEFAULT: &str = "/var/lib/sprites";
const PORT_DEFAULT: u16 = 8443;
const DOMAIN_DEFAULT: &str = "sprites.localhost";
const API_HOST_DEFAULT: &str = "api.localhost";
const INSTANCE_DEFAULT: &str = "dev";
/// The node agent puts the instance in front of interface names, of which the kernel allows 15 characters.
const INSTANCE_LEN_MAX: usize = 4;
const ORG_DEFAULT: &str = "local";
/// A CPU model that every x86 server since 2009 has, so that a memory image moves between hosts (ruling 11).
const CPU_MODEL_DEFAULT: &str = "Nehalem";
const POOL_SIZE_DEFAULT: usize = 1;
const MEMORY_RESERVE_BYTES_DEFAULT: u64 = 1 << 30;

/// The settings as written by a person: on the command line or in the file. Nothing is required.
#[derive(Args, Deserialize, Default, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// TOML file with any of these settings (underscores instead of hyphens); flags win over it.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Everything this machine keeps: local disk cache, certificate authority, sockets.
    #[arg(long, value_name = "DIR", env = "SPRITES_DATA")]
    data: Option<PathBuf>,
    /// `dir:/path`, or `s3://bucket/prefix?endpoint=…&region=…` with AWS_* credentials in the environment [default: dir:DATA/bucket]
    #[arg(long, value_name = "URL")]
    bucket: Option<String>,
    /// Address the TLS edge listens on [default: 127.0.0.1]
    #[arg(long, value_name = "IP")]
    listen: Option<IpAddr>,
    /// Port of the TLS edge [default: 8443]
    #[arg(long)]
    port: Option<u16>,
    /// Sprites are reached at `<name>-<oid>.<domain>` [default: sprites.localhost]
    #[arg(long)]
    domain: Option<String>,
    /// Host name of the API [default: api.localhost]
    #[arg(long)]
    api_host: Option<String>,
    /// Keeps the network names of several clusters on one machine apart; at most 4 letters or digits [default: dev]
    #[arg(long)]
    instance: Option<String>,
    /// Folder with `vmlinux`, `initrd`, `rootfs.ext4` and `rootfs.digest`, as `./dev` builds it.
    #[arg(long, value_name = "DIR")]
    image: Option<PathBuf>,
    /// tmpfs folder for the memory of VMs [default: /dev/shm/sprites-INSTANCE]
    #[arg(long, value_name = "DIR")]
    memory_dir: Option<PathBuf>,
    /// Whole anonymous sprites kept ready, so that a create is quick [default: 1]
    #[arg(long)]
    pool_size: Option<usize>,
    /// QEMU CPU model under KVM; the same on all hosts of a cluster [default: Nehalem]
    #[arg(long)]
    cpu_model: Option<String>,
    /// Networks that guests may not reach, besides this host, each other and the server that the bucket's URL names
    #[arg(long, value_name = "CIDR")]
    denied_networks: Option<Vec<String>>,
    /// Memory of the host that VMs leave free [default: 1 GiB]
    #[arg(long, value_name = "BYTES")]
    memory_reserve_bytes: Option<u64>,
}

/// The settings, checked: all paths absolute, all defaults filled in.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) data: DataDir,
    pub(crate) bucket_url: String,
    pub(crate) listen: SocketAddr,
    pub(crate) domain: String,
    pub(crate) api_host: String,
    pub(crate) instance: String,
    pub(crate) image: Option<PathBuf>,
    pub(crate) memory_dir: PathBuf,
    pub(crate) pool_size: usize,
    pub(crate) cpu_model: String,
    pub(crate) denied_networks: Vec<String>,
    pub(crate) memory_reserve_bytes: u64,
    /// The organisation that the first token belongs to.
    pub(crate) org: String,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the settings in {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the settings in {path} are wrong")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("path {path} cannot be made absolute")]
    Path {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("instance {0:?} is not 1 to {INSTANCE_LEN_MAX} lower-case letters or digits")]
    Instance(String),
    #[error("host name {0:?} is not a lower-case DNS name")]
    Host(String),
    #[error("the API's host {api_host} lies under the domain of sprites, {domain}: a sprite could pose as the API")]
    SharedOrigin { api_host: String, domain: String },
}

impl Settings {
    /// For tools that need nothing but the bucket.
    pub(crate) fn of_bucket(config: Option<PathBuf>, data: Option<PathBuf>, bucket: Option<String>) -> Self {
        Self { config, data, bucket, ..Self::default() }
    }

    /// Reads the file, if one is named, and checks everything.
    pub(crate) fn check(self) -> Result<Config, ConfigError> {
        let file = self.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
        let data = absolute(self.data.or(file.data).unwrap_or_else(|| DATA_DEFAULT.into()))?;
        let instance =
            checked_instance(self.instance.or(file.instance).unwrap_or_else(|| INSTANCE_DEFAULT.to_owned()))?;
        let domain = checked_host(self.domain.or(file.domain).unwrap_or_else(|| DOMAIN_DEFAULT.to_owned()))?;
        let api_host = checked_host(self.api_host.or(file.api_host).unwrap_or_else(|| API_HOST_DEFAULT.to_owned()))?;
        if api_host.strip_suffix(&domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')) {
            return Err(ConfigError::SharedOrigin { api_host, domain });
        }
        let memory_dir = match self.memory_dir.or(file.memory_dir) {
            Some(folder) => absolute(folder)?,
            None => PathBuf::from(format!("/dev/shm/sprites-{instance}")),
        };
        let listen_ip = self.listen.or(file.listen).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        Ok(Config {
            bucket_url: self.bucket.or(file.bucket).unwrap_or_else(|| format!("dir:{}", data.join("bucket").display())),
            data: DataDir::at(data),
            listen: SocketAddr::new(listen_ip, self.port.or(file.port).unwrap_or(PORT_DEFAULT)),
            domain,
            api_host,
            instance,
            image: self.image.or(file.image).map(absolute).transpose()?,
            memory_dir,
            pool_size: self.pool_size.or(file.pool_size).unwrap_or(POOL_SIZE_DEFAULT),
            cpu_model: self.cpu_model.or(file.cpu_model).unwrap_or_else(|| CPU_MODEL_DEFAULT.to_owned()),
            denied_networks: self.denied_networks.or(file.denied_networks).unwrap_or_default(),
            memory_reserve_bytes: self
                .memory_reserve_bytes
                .or(file.memory_reserve_bytes)
                .unwrap_or(MEMORY_RESERVE_BYTES_DEFAULT),
            org: ORG_DEFAULT.to_owned(),
        })
    }
}

impl Config {
    pub(crate) fn api_url(&self) -> String {
        format!("https://{}:{}", self.api_host, self.listen.port())
    }
}

fn read_file(path: &Path) -> Result<Settings, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}

pub(crate) fn absolute(path: PathBuf) -> Result<PathBuf, ConfigError> {
    std::path::absolute(&path).map_err(|source| ConfigError::Path { path, source })
}

fn checked_instance(name: String) -> Result<String, ConfigError> {
    let fits = (1..=INSTANCE_LEN_MAX).contains(&name.len());
    if fits && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
        Ok(name)
    } else {
        Err(ConfigError::Instance(name))
    }
}

fn checked_host(name: String) -> Result<String, ConfigError> {
    let label_fits = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    if name.len() <= 253 && name.split('.').all(label_fits) { Ok(name) } else { Err(ConfigError::Host(name)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sprited.toml");
        fs::write(&path, text).unwrap();
        Settings { config: Some(path), ..Settings::default() }.check()
    }

    #[test]
    fn nothing_said_gives_a_local_cluster() {
        let config = Settings::default().check().unwrap();
        assert_eq!(config.api_url(), "https://api.localhost:8443");
        assert_eq!(config.bucket_url, "dir:/var/lib/sprites/bucket");
        assert!(config.listen.ip().is_loopback(), "a development cluster is not for the network");
    }

    #[test]
    fn flags_win_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sprited.toml");
        fs::write(&path, "port = 1\npool_size = 7\n").unwrap();
        let config = Settings { config: Some(path), port: Some(2), ..Settings::default() }.check().unwrap();
        assert_eq!((config.listen.port(), config.pool_size), (2, 7));
    }

    #[test]
    fn a_misspelt_setting_is_refused() {
        assert!(matches!(with_file("prot = 1"), Err(ConfigError::Parse { .. })));
        assert!(matches!(with_file("port = 70000"), Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn names_that_reach_the_kernel_or_a_certificate_are_checked() {
        for instance in ["", "five5", "A", "a/b", "é"] {
            assert!(
                matches!(with_file(&format!("instance = {instance:?}")), Err(ConfigError::Instance(_))),
                "{instance}"
            );
        }
        for domain in ["", "a..b", "-a", "Sprites", "*.x"] {
            assert!(matches!(with_file(&format!("domain = {domain:?}")), Err(ConfigError::Host(_))), "{domain}");
        }
    }

    #[test]
    fn the_api_never_shares_the_sprites_domain() {
        assert!(matches!(with_file("api_host = \"api.sprites.localhost\""), Err(ConfigError::SharedOrigin { .. })));
        assert!(matches!(with_file("api_host = \"sprites.localhost\""), Err(ConfigError::SharedOrigin { .. })));
        assert!(with_file("api_host = \"api-sprites.localhost\"").is_ok());
    }
}
