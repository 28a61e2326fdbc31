//! Where one of our processes listens, as text in configuration and routes.

use std::{fmt, path::PathBuf, str::FromStr};

/// `unix:/path/to.sock`. Hosts over the network (`https://…` with mTLS) come with the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NodeAddress {
    Unix(PathBuf),
}

/// The text is not an address of a form that we can connect to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an address; write unix:/absolute/path")]
pub struct BadAddress {
    text: String,
}

impl FromStr for NodeAddress {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(PathBuf::from(path))),
            _ => Err(BadAddress { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for NodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back() {
        let address: NodeAddress = "unix:/run/sprites/node.sock".parse().unwrap();
        assert_eq!(address.to_string(), "unix:/run/sprites/node.sock");
        for bad in ["", "unix:", "unix:relative", "/run/node.sock", "https://host:1"] {
            assert!(bad.parse::<NodeAddress>().is_err(), "{bad}");
        }
    }
}
