//! The rules, as nftables text: one table on the host, two in each namespace.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
};

use super::{
    GATEWAY_V4, GATEWAY_V6, GUEST_MAC, GUEST_V4, GUEST_V6, Names, NetError, SLOT_ADDRESSES, SLOTS_MAX, ipnet::Cidr,
    system,
};

/// What no guest may reach, whatever is configured: other guests' networks, link-local (cloud metadata), loopback, "this network",
/// multicast and reserved.
const NEVER_V4: &str = "0.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3";
/// Sent back instead of a silent drop, so that a program in the guest fails at once and not after minutes.
const REFUSE: &str = "reject with icmpx type admin-prohibited";

/// The host's table: no guest reaches the host, another guest or a denied network; nobody reaches a guest.
pub(super) fn host_table(names: &Names, denied: &[Cidr], allowed: &[Cidr]) -> String {
    let table = names.table();
    let veths = format!("\"{}*\"", names.veth_prefix());
    let block =
        format!("{}/{}", std::net::Ipv4Addr::from(names.base), 32 - (SLOTS_MAX * SLOT_ADDRESSES).trailing_zeros());
    let mut text = String::new();
    // Declared first, so that the deletion finds it; one transaction replaces the old table without a gap.
    writeln!(text, "table inet {table}\ndelete table inet {table}\ntable inet {table} {{").expect(INTO_STRING);
    let (v4, v6): (Vec<Cidr>, Vec<Cidr>) = denied.iter().copied().partition(Cidr::is_v4);
    set(&mut text, "denied4", "ipv4_addr", &v4, NEVER_V4);
    set(&mut text, "denied6", "ipv6_addr", &v6, "fe80::/10, ff00::/8");
    let (v4, v6): (Vec<Cidr>, Vec<Cidr>) = allowed.iter().copied().partition(Cidr::is_v4);
    set(&mut text, "allowed4", "ipv4_addr", &v4, "");
    set(&mut text, "allowed6", "ipv6_addr", &v6, "");
    write!(
        text,
        "  chain input {{
    type filter hook input priority -10; policy accept;
    iifname != {veths} accept
    ip daddr @allowed4 accept
    ip6 daddr @allowed6 accept
    {REFUSE}
  }}
  chain forward {{
    type filter hook forward priority -10; policy accept;
    iifname {veths} jump from_guest
    oifname {veths} ct state established,related accept
    oifname {veths} drop
  }}
  chain from_guest {{
    ip saddr != {block} drop
    meta nfproto ipv6 {REFUSE}
    oifname {veths} {REFUSE}
    tcp flags syn tcp option maxseg size set rt mtu
    ip daddr @allowed4 accept
    ip daddr @denied4 {REFUSE}
    accept
  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    ip saddr {block} oifname != {veths} masquerade
  }}
}}
"
    )
    .expect(INTO_STRING);
    text
}

const INTO_STRING: &str = "writing to a string cannot fail";

fn set(text: &mut String, name: &str, kind: &str, elements: &[Cidr], fixed: &str) {
    let mut all: Vec<String> = elements.iter().map(ToString::to_string).collect();
    if !fixed.is_empty() {
        all.push(fixed.to_owned());
    }
    let elements = if all.is_empty() { String::new() } else { format!("elements = {{ {} }}", all.join(", ")) };
    writeln!(text, "  set {name} {{ type {kind}; flags interval; auto-merge; {elements}\n  }}").expect(INTO_STRING);
}

/// The tables of one namespace. `uid` is QEMU's user: it lives in the namespace, but the tap is its only way out.
pub(super) fn namespace_tables(uid: u32) -> String {
    format!(
        "table netdev sprite {{
  chain from_tap {{
    type filter hook ingress device \"tap0\" priority -500; policy drop;
    ether saddr != {GUEST_MAC} drop
    ether type arp arp saddr ether {GUEST_MAC} arp saddr ip {{ {GUEST_V4}, 0.0.0.0 }} accept
    ether type ip ip saddr {GUEST_V4} accept
    ether type ip6 ip6 saddr {{ {GUEST_V6}, ::, fe80::/10 }} accept
  }}
}}
table inet sprite {{
  chain input {{
    type filter hook input priority 0; policy drop;
    iifname \"lo\" accept
    ct state established,related accept
    iifname \"tap0\" ip daddr {GATEWAY_V4} meta l4proto {{ tcp, udp }} th dport 53 accept
    iifname \"tap0\" ip daddr {GATEWAY_V4} icmp type echo-request accept
    iifname \"tap0\" ip6 daddr {GATEWAY_V6} icmpv6 type echo-request accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    iifname \"tap0\" {REFUSE}
  }}
  chain output {{
    type filter hook output priority 0; policy accept;
    meta skuid {uid} {REFUSE}
  }}
  chain forward {{
    type filter hook forward priority 0; policy drop;
    iifname \"veth0\" oifname \"tap0\" ct state established,related accept
    meta nfproto ipv6 reject with icmpv6 type no-route
    iifname \"tap0\" oifname \"veth0\" ip saddr {GUEST_V4} ip daddr != {{ 10.0.0.0/24, {NEVER_V4} }} accept
    iifname \"tap0\" {REFUSE}
  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    oifname \"veth0\" masquerade
  }}
}}
"
    )
}

/// Loads rules in the calling thread's namespace, all or nothing.
pub(super) fn load(text: &str) -> Result<(), NetError> {
    run("nft", &["-f", "-"], text)
}

/// Runs a program of the calling thread's namespace with `input` on stdin.
pub(super) fn run(program: &'static str, arguments: &[&str], input: &str) -> Result<(), NetError> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(system("run ip or nft; install iproute2 and nftables (`./dev up` does)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends early says why on stderr.
        drop(stdin.write_all(input.as_bytes()));
    }
    let output = child.wait_with_output().map_err(system("wait for ip or nft"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(NetError::Command { program, stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}
