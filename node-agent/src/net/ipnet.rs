//! A network in CIDR notation, as it goes into a rule.

use std::{fmt, net::IpAddr, str::FromStr};

/// `192.0.2.0/24` or `2001:db8::/32`; a bare address means itself alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cidr {
    address: IpAddr,
    prefix_bits: u8,
}

/// The text is not a network.
#[derive(Debug)]
pub(super) struct BadCidr;

impl Cidr {
    pub(super) fn is_v4(&self) -> bool {
        self.address.is_ipv4()
    }
}

impl FromStr for Cidr {
    type Err = BadCidr;

    fn from_str(text: &str) -> Result<Self, BadCidr> {
        let (address, prefix) = match text.trim().split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text.trim(), None),
        };
        let address: IpAddr = address.parse().map_err(|_bad| BadCidr)?;
        let bits_max = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match prefix {
            Some(prefix) => prefix.parse().map_err(|_bad| BadCidr)?,
            None => bits_max,
        };
        if prefix_bits > bits_max { Err(BadCidr) } else { Ok(Self { address, prefix_bits }) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_networks_reach_a_rule() {
        let shown = |text: &str| text.parse::<Cidr>().map(|cidr| cidr.to_string()).ok();
        assert_eq!(shown("192.0.2.0/24").as_deref(), Some("192.0.2.0/24"));
        assert_eq!(shown("192.0.2.7").as_deref(), Some("192.0.2.7/32"));
        assert_eq!(shown("2001:db8::/32").as_deref(), Some("2001:db8::/32"));
        for bad in ["", "bucket", "192.0.2.0/33", "192.0.2.0/-1", "192.0.2.0/24; drop", "::/129"] {
            assert_eq!(shown(bad), None, "{bad:?}");
        }
    }
}
