//! The network of one VM, and what all VMs of a host share of it (rulings 22, 23).
//!
//! ```text
//!  guest                 namespace spr-<slot>                          host
//!  eth0 10.0.0.1 ══tap══ tap0 10.0.0.2   veth0 100.64.x.y+2 ──veth── spv-<slot> 100.64.x.y+1 ──▶ uplink
//!                        anti-spoofing   masquerade                  denied networks, masquerade
//!                        DNS relay :53   (`rules`)                   (`rules`)
//! ```
//!
//! Every guest has the same address, MAC, gateway and gateway MAC, so that one snapshot fits every namespace. The walls stand outside the VM: nothing
//! here trusts the guest or the QEMU process behind the tap.
//!
//! # Invariants
//!
//! 1. Only IPv4 from 10.0.0.1, IPv6 from the guest's own addresses and their ARP, with the guest's MAC, leave the tap.
//! 2. A guest reaches no address of the host, no other guest, no link-local address and no denied network; new connections into a guest exist
//!    only from inside its namespace ([`SpriteNet::connect`]).
//! 3. Namespaces and their taps outlive the node agent, so a VM keeps its network while the node agent is down; what no VM owns any more is
//!    removed by [`Network::sweep`].
//!
//! # Not here
//!
//! Outbound IPv6: the guest has a ULA, and the namespace answers "no route" at once, so programs fall back to IPv4.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::Cidr;
use tokio::net::{TcpSocket, TcpStream};

pub mod dns;
mod ipnet;
mod namespace;
mod rules;
#[cfg(test)]
mod tests;

/// The guest's end, the same in every namespace.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Gateway and name server of the guest.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd5b, 0x1e, 0, 0, 0, 0, 0, 1);
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd5b, 0x1e, 0, 0, 0, 0, 0, 2);
/// MAC of the guest's network card. `qemu` gives it to every VM.
pub const GUEST_MAC: &str = "52:54:00:5b:1e:01";
/// MAC of the tap. Fixed, because a resumed guest still has it in its neighbour table.
const GATEWAY_MAC: &str = "52:54:00:5b:1e:02";

/// Networks of all slots: 4 addresses each out of 100.64.0.0/10, [`SLOTS_MAX`] slots for each of 256 instances.
const POOL_BASE: u32 = u32::from_be_bytes([100, 64, 0, 0]);
const SLOTS_MAX: u32 = 4096;
const SLOT_ADDRESSES: u32 = 4;
const BLOCKS: u32 = 256;
const BLOCK_ADDRESSES: u32 = SLOTS_MAX * SLOT_ADDRESSES;
/// Of the host's end of every VM's network, whatever the instance.
const VETH_PREFIX: &str = "spv";
/// Interface names have at most 15 characters: `spv`, the instance, `-`, and four digits.
const INSTANCE_LEN_MAX: usize = 4;
/// A guest that does not answer a SYN from its own gateway within this is not there.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What a host's network is set up with.
#[derive(Clone, Debug, Default)]
pub struct NetworkConfig {
    /// Separates several node agents on one host; at most [`INSTANCE_LEN_MAX`] letters or digits.
    pub instance: String,
    /// Networks (`a.b.c.d/n`, or one address) that guests may not reach besides the host and each other, for example the bucket.
    pub denied: Vec<String>,
    /// Exceptions from everything above, for example a package mirror on the host itself.
    pub allowed: Vec<String>,
    /// Name servers for the guests' queries. Empty: those of the host's `/etc/resolv.conf`.
    pub resolvers: Vec<SocketAddr>,
}

/// Why a network could not be made or removed. Everything is idempotent: try again.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error(
        "instance {0:?} does not fit into interface names; use at most {INSTANCE_LEN_MAX} lower-case letters or digits"
    )]
    BadInstance(String),
    #[error("no addresses are left for instance {0:?}: other instances on this host use all blocks of 100.64.0.0/10")]
    NoBlock(String),
    #[error("{text:?} is not a network; write it as 192.0.2.0/24")]
    BadNetwork { text: String },
    #[error("slot {slot} is not below {SLOTS_MAX}")]
    BadSlot { slot: u32 },
    #[error("cannot {what}")]
    System { what: &'static str, source: io::Error },
    #[error("{program} failed: {stderr}")]
    Command { program: &'static str, stderr: String },
    #[error("there is no namespace {0}")]
    Missing(PathBuf),
}

fn system(what: &'static str) -> impl Fn(io::Error) -> NetError {
    move |source| NetError::System { what, source }
}

/// What the guest is told about its network.
pub fn guest_network() -> proto::agent::Network {
    proto::agent::Network {
        address_v4: format!("{GUEST_V4}/24"),
        gateway_v4: GATEWAY_V4.to_string(),
        dns: GATEWAY_V4.to_string(),
        address_v6: format!("{GUEST_V6}/64"),
        gateway_v6: GATEWAY_V6.to_string(),
    }
}

/// Whether `ip` belongs to the guest itself, so that a tunnel into it may go there.
pub fn is_guest_address(ip: IpAddr) -> bool {
    ip == IpAddr::V4(GUEST_V4) || ip == IpAddr::V6(GUEST_V6) || ip.is_loopback() || ip.is_unspecified()
}

/// The host's part. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Network(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    names: Names,
    resolvers: dns::Resolvers,
}

/// Names and addresses of one node agent's networks.
#[derive(Clone, Debug)]
struct Names {
    instance: String,
    /// First address of the instance's block.
    base: u32,
}

/// An interface of this host and its address, if it has one.
type Interface = (String, Option<Ipv4Addr>);

impl Names {
    fn new(instance: &str, interfaces: &[Interface]) -> Result<Self, NetError> {
        let fits = instance.len() <= INSTANCE_LEN_MAX
            && instance.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if !fits {
            return Err(NetError::BadInstance(instance.to_owned()));
        }
        let mut names = Self { instance: instance.to_owned(), base: POOL_BASE };
        let block = names.choose_block(interfaces).ok_or_else(|| NetError::NoBlock(instance.to_owned()))?;
        names.base += block * BLOCK_ADDRESSES;
        Ok(names)
    }

    /// The block in which VMs of an earlier start of this instance live; else one that no other instance uses, beginning with the one its name hashes to.
    /// The unnamed instance begins with block 0.
    fn choose_block(&self, interfaces: &[Interface]) -> Option<u32> {
        let prefix = self.veth_prefix();
        let (mut own, mut others) = (None, [false; BLOCKS as usize]);
        for (name, address) in interfaces.iter().filter(|(name, _)| name.starts_with(VETH_PREFIX)) {
            let block =
                address.and_then(|address| u32::from(address).checked_sub(POOL_BASE)).map(|at| at / BLOCK_ADDRESSES);
            let Some(block) = block.filter(|block| *block < BLOCKS) else { continue };
            if name.starts_with(&prefix) { own = Some(block) } else { others[block as usize] = true }
        }
        let hash =
            self.instance.bytes().fold(0_u32, |hash, byte| (hash.wrapping_mul(31) + u32::from(byte)) % (BLOCKS - 1));
        let first = if self.instance.is_empty() { 0 } else { 1 + hash };
        own.or_else(|| (0..BLOCKS).map(|step| (first + step) % BLOCKS).find(|block| !others[*block as usize]))
    }

    fn table(&self) -> String {
        format!("sprites{}", self.instance)
    }

    fn netns_prefix(&self) -> String {
        format!("spr{}-", self.instance)
    }

    fn netns(&self, slot: u32) -> PathBuf {
        Path::new(namespace::FOLDER).join(format!("{}{slot}", self.netns_prefix()))
    }

    fn veth_prefix(&self) -> String {
        format!("{VETH_PREFIX}{}-", self.instance)
    }

    fn veth(&self, slot: u32) -> String {
        format!("{}{slot}", self.veth_prefix())
    }

    /// Address of the veth's host end; the other end has the next one.
    fn host_address(&self, slot: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.base + slot * SLOT_ADDRESSES + 1)
    }

    fn namespace_address(&self, slot: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.base + slot * SLOT_ADDRESSES + 2)
    }

    fn slot_of(&self, name: &str, prefix: &str) -> Option<u32> {
        name.strip_prefix(prefix)?.parse().ok()
    }
}

impl Network {
    /// Sets up what all guests share: forwarding and the host's table of rules. Repeating it replaces the table; networks of living VMs stay.
    pub async fn start(config: NetworkConfig) -> Result<Self, NetError> {
        let names = Names::new(&config.instance, &interfaces().map_err(system("list the host's interfaces"))?)?;
        let denied = parse_all(&config.denied)?;
        let allowed = parse_all(&config.allowed)?;
        let table = rules::host_table(&names, &denied, &allowed);
        blocking(move || {
            namespace::set_up_folder().map_err(system("set up the folder of network namespaces"))?;
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(system("switch IPv4 forwarding on"))?;
            rules::load(&table)
        })
        .await?;
        let resolvers = dns::Resolvers::new(config.resolvers);
        Ok(Self(Arc::new(Shared { names, resolvers })))
    }

    /// A fresh network for the VM in `slot`, whose QEMU runs as `uid`. What was left of an earlier one in this slot is removed.
    pub async fn attach(&self, slot: u32, uid: u32) -> Result<SpriteNet, NetError> {
        self.check(slot)?;
        let names = self.0.names.clone();
        blocking(move || {
            namespace::remove(&names, slot)?;
            namespace::create(&names, slot, uid)
        })
        .await?;
        self.open(slot)
    }

    /// Takes up the network of a VM that lived on while the node agent was down. Its interfaces are left as they are.
    pub async fn reattach(&self, slot: u32) -> Result<SpriteNet, NetError> {
        self.check(slot)?;
        let path = self.0.names.netns(slot);
        if !path.exists() {
            return Err(NetError::Missing(path));
        }
        self.open(slot)
    }

    /// Removes every network of this instance whose slot is not in `live`. Returns how many.
    pub async fn sweep(&self, live: impl IntoIterator<Item = u32>) -> Result<usize, NetError> {
        let live: Vec<u32> = live.into_iter().collect();
        let names = self.0.names.clone();
        blocking(move || {
            let dead: Vec<u32> = namespace::found(&names)?.into_iter().filter(|slot| !live.contains(slot)).collect();
            for slot in &dead {
                namespace::remove(&names, *slot)?;
            }
            Ok(dead.len())
        })
        .await
    }

    /// Removes the host's part as well. For a host that stops being one; VMs lose their network.
    pub async fn stop(&self) -> Result<(), NetError> {
        self.sweep([]).await?;
        let table = self.0.names.table();
        blocking(move || rules::load(&format!("table inet {table}\ndelete table inet {table}\n"))).await
    }

    fn open(&self, slot: u32) -> Result<SpriteNet, NetError> {
        let path = self.0.names.netns(slot);
        let relay = dns::Relay::start(&path, self.0.resolvers.clone())
            .map_err(system("start the name server of a namespace"))?;
        Ok(SpriteNet { network: self.clone(), slot, path, relay })
    }

    fn check(&self, slot: u32) -> Result<(), NetError> {
        if slot < SLOTS_MAX { Ok(()) } else { Err(NetError::BadSlot { slot }) }
    }
}

/// One VM's network. Dropping it ends the name server only: the VM may live on.
#[derive(Debug)]
pub struct SpriteNet {
    network: Network,
    slot: u32,
    path: PathBuf,
    relay: dns::Relay,
}

impl SpriteNet {
    /// A descriptor of the tap for QEMU (`-netdev tap,fd=…`). Only one can be open at a time.
    pub fn open_tap(&self) -> Result<OwnedFd, NetError> {
        namespace::inside(&self.path, namespace::open_tap).map_err(system("open the tap"))
    }

    /// The namespace, for the jail to enter.
    pub fn netns_path(&self) -> &Path {
        &self.path
    }

    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Connects to a port of the guest from inside the namespace, as the guest's gateway.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused`: nothing listens there, or only on the guest's loopback. `TimedOut` after [`CONNECT_LIMIT`].
    pub async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let path = self.path.clone();
        let socket = tokio::task::spawn_blocking(move || {
            namespace::inside(&path, || {
                let socket = TcpSocket::new_v4()?;
                socket.set_nodelay(true)?;
                Ok(socket)
            })
        })
        .await
        .map_err(io::Error::other)??;
        let address = SocketAddr::from((GUEST_V4, port));
        tokio::time::timeout(CONNECT_LIMIT, socket.connect(address))
            .await
            .map_err(|_elapsed| io::ErrorKind::TimedOut)?
    }

    /// Removes the namespace and everything in it. The VM must be gone.
    pub async fn detach(&self) -> Result<(), NetError> {
        self.relay.stop();
        let (names, slot) = (self.network.0.names.clone(), self.slot);
        blocking(move || namespace::remove(&names, slot)).await
    }
}

fn interfaces() -> io::Result<Vec<Interface>> {
    let all = nix::ifaddrs::getifaddrs()?;
    Ok(all
        .map(|interface| {
            let address = interface.address.and_then(|address| Some(address.as_sockaddr_in()?.ip()));
            (interface.interface_name, address)
        })
        .collect())
}

fn parse_all(texts: &[String]) -> Result<Vec<Cidr>, NetError> {
    texts.iter().map(|text| text.parse().map_err(|_bad| NetError::BadNetwork { text: text.clone() })).collect()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetError> + Send + 'static,
) -> Result<T, NetError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panicked) => Err(NetError::System { what: "finish work on a network", source: io::Error::other(panicked) }),
    }
}
