//! What a sprite's network is made of: a namespace, a tap in it, packet filters, and names that resolve.

use std::{
    fs::OpenOptions,
    net::{SocketAddr, ToSocketAddrs},
};

use super::{Finding, output_of};

pub(super) fn examine() -> Vec<Finding> {
    vec![tun(), namespaces(), packet_filter(), forwarding(), names()]
}

fn tun() -> Finding {
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::ok("tun", "/dev/net/tun opens"),
        Err(error) => {
            Finding::fail("tun", format!("/dev/net/tun: {error}"), "modprobe tun; in a container: pass the device in")
        }
    }
}

fn namespaces() -> Finding {
    match output_of("unshare", &["--net", "ip", "link", "show", "lo"]) {
        Ok(_) => Finding::ok("namespaces", "a network namespace can be made"),
        Err(error) => Finding::fail(
            "namespaces",
            error,
            "run as root on a kernel with network namespaces; apt-get install iproute2",
        ),
    }
}

fn packet_filter() -> Finding {
    // In a namespace of its own, so that the host's rules are neither needed nor touched.
    let rule = "add table ip doctor; add chain ip doctor c { type nat hook postrouting priority 100; }; add rule ip doctor c masquerade";
    match output_of("unshare", &["--net", "nft", rule]) {
        Ok(_) => Finding::ok("nftables", "tables, NAT and masquerade work"),
        Err(error) => {
            Finding::fail("nftables", error, "apt-get install nftables; the kernel needs nf_tables and nft_masq")
        }
    }
}

fn forwarding() -> Finding {
    match output_of("ip", &["route", "show", "default"]) {
        Ok(routes) if !routes.is_empty() => Finding::ok("uplink", routes.lines().next().unwrap_or_default().trim()),
        Ok(_) => Finding::warn("uplink", "no default route", "sprites will have no internet; everything else works"),
        Err(error) => Finding::fail("uplink", error, "apt-get install iproute2"),
    }
}

fn names() -> Finding {
    const CHECK: &str = "names";
    const NAME: &str = "doctor-probe.sprites.localhost";
    match (NAME, 443).to_socket_addrs() {
        Ok(addresses) if addresses.clone().all(|address: SocketAddr| address.ip().is_loopback()) => {
            Finding::ok(CHECK, "*.sprites.localhost resolves to this machine")
        }
        Ok(addresses) => {
            let elsewhere: Vec<String> = addresses.map(|address| address.ip().to_string()).collect();
            Finding::warn(
                CHECK,
                format!("{NAME} resolves to {}", elsewhere.join(", ")),
                "put `myhostname` before `dns` in /etc/nsswitch.conf",
            )
        }
        Err(error) => Finding::warn(
            CHECK,
            format!("{NAME}: {error}"),
            "apt-get install libnss-myhostname; `./dev up` does it. Not needed with --domain and real DNS",
        ),
    }
}
