//! The VM's network: addresses and routes, as the host gives them. Walls stand outside (ruling 22); this is only what makes packets find them.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    path::Path,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use proto::agent::Network;

use crate::sys;

const INTERFACE: &str = "eth0";

/// What of a network could not be set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetError {
    #[error("{text:?} is not {what}")]
    Text { what: &'static str, text: String },
    #[error("cannot set the network's {what}")]
    Kernel { what: &'static str, source: io::Error },
}

pub(crate) fn loopback_up() -> io::Result<()> {
    sys::set_up(&datagram(AddressFamily::Inet)?, "lo")
}

fn datagram(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Sets everything `network` names. What is so already stays.
pub(crate) fn configure(network: &Network) -> Result<(), NetError> {
    let kernel = |what: &'static str| move |source: io::Error| NetError::Kernel { what, source };
    if !network.address_v4.is_empty() {
        let (address, prefix) = address_and_prefix::<Ipv4Addr>(&network.address_v4, 32)?;
        let socket = datagram(AddressFamily::Inet).map_err(kernel("socket"))?;
        let mask = Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0));
        sys::set_address_v4(&socket, INTERFACE, address, mask).map_err(kernel("IPv4 address"))?;
        sys::set_up(&socket, INTERFACE).map_err(kernel("interface"))?;
        if !network.gateway_v4.is_empty() {
            let gateway = parse("an IPv4 gateway", &network.gateway_v4)?;
            unless_there(sys::add_default_route_v4(&socket, gateway)).map_err(kernel("IPv4 route"))?;
        }
    }
    if !network.address_v6.is_empty() && Path::new("/proc/net/if_inet6").exists() {
        let (address, prefix) = address_and_prefix::<Ipv6Addr>(&network.address_v6, 128)?;
        // The address is ours alone on this cable: nobody has to be asked, which would take a second.
        // Routes come from the host alone, not from whoever advertises some.
        for setting in ["accept_dad", "accept_ra"] {
            fs::write(format!("/proc/sys/net/ipv6/conf/{INTERFACE}/{setting}"), "0").map_err(kernel(setting))?;
        }
        let socket = datagram(AddressFamily::Inet6).map_err(kernel("socket"))?;
        let index = sys::interface_index(&socket, INTERFACE).map_err(kernel("interface"))?;
        unless_there(sys::add_address_v6(&socket, index, address, prefix)).map_err(kernel("IPv6 address"))?;
        if !network.gateway_v6.is_empty() {
            let gateway = parse("an IPv6 gateway", &network.gateway_v6)?;
            unless_there(sys::add_default_route_v6(&socket, index, gateway)).map_err(kernel("IPv6 route"))?;
        }
    }
    Ok(())
}

fn unless_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn parse<T: std::str::FromStr>(what: &'static str, text: &str) -> Result<T, NetError> {
    text.parse().map_err(|_not_one| NetError::Text { what, text: text.to_owned() })
}

fn address_and_prefix<T: std::str::FromStr>(text: &str, prefix_max: u8) -> Result<(T, u8), NetError> {
    let wrong = || NetError::Text { what: "an address with a prefix length", text: text.to_owned() };
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let prefix: u8 = parse("a prefix length", prefix)?;
    if prefix > prefix_max {
        return Err(wrong());
    }
    Ok((parse("an address", address)?, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_sensible_prefix() {
        assert_eq!(address_and_prefix::<Ipv4Addr>("10.0.0.1/24", 32).unwrap(), (Ipv4Addr::new(10, 0, 0, 1), 24));
        for bad in ["10.0.0.1", "10.0.0.1/33", "10.0.0/24", "/24", "10.0.0.1/", "a/1"] {
            address_and_prefix::<Ipv4Addr>(bad, 32).unwrap_err();
        }
    }
}
