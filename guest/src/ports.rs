//! Which TCP ports programs listen on.
//!
//! The kernel does not report changes, so `/proc/net/tcp` is read every second, by one task, and only while somebody watches.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::agent::PortEvent;
use tokio::sync::watch;

const POLL: Duration = Duration::from_secs(1);
/// Listening sockets that are looked at.
const PORTS_MAX: usize = 1024;
/// `TCP_LISTEN` as the kernel prints it.
const LISTEN: &str = "0A";

/// A listening socket: its port and address.
pub(crate) type Key = (u16, IpAddr);
/// All listening sockets and the processes they belong to (0: unknown).
pub(crate) type Listening = Arc<BTreeMap<Key, u32>>;

/// Cheap to clone. In the slot is a receiver of the task that polls; without a task it is empty.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ports(Arc<Mutex<Option<watch::Receiver<Listening>>>>);

impl Ports {
    /// What is listened on now, and from now on. The first value is there when this returns.
    pub(crate) async fn watch(&self) -> watch::Receiver<Listening> {
        if let Some(running) = self.slot().clone() {
            return running;
        }
        let first = scan(Listening::default()).await;
        let mut slot = self.slot();
        if let Some(running) = slot.clone() {
            return running;
        }
        let (sender, receiver) = watch::channel(first);
        *slot = Some(receiver.clone());
        tokio::spawn(self.clone().poll(sender));
        receiver
    }

    fn slot(&self) -> MutexGuard<'_, Option<watch::Receiver<Listening>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn poll(self, sender: watch::Sender<Listening>) {
        while !self.retire(&sender) {
            tokio::time::sleep(POLL).await;
            let known = Arc::clone(&sender.borrow());
            let now = scan(Arc::clone(&known)).await;
            sender.send_if_modified(|last| {
                let changed = *last != now;
                *last = now;
                changed
            });
        }
    }

    /// Empties the slot if its receiver is the only one left. Under the slot's lock, so that nobody takes a copy of what gets no more news.
    fn retire(&self, sender: &watch::Sender<Listening>) -> bool {
        let mut slot = self.slot();
        let alone = sender.receiver_count() <= 1;
        if alone {
            *slot = None;
        }
        alone
    }
}

/// The events between two states.
pub(crate) fn changes(before: &Listening, after: &Listening) -> Vec<PortEvent> {
    let event = |(port, address): &Key, pid: u32, open: bool| PortEvent {
        open,
        port: (*port).into(),
        address: address.to_string(),
        pid,
    };
    let closed = before.iter().filter(|(key, _)| !after.contains_key(key)).map(|(key, pid)| event(key, *pid, false));
    let opened = after.iter().filter(|(key, _)| !before.contains_key(key)).map(|(key, pid)| event(key, *pid, true));
    closed.chain(opened).collect()
}

async fn scan(known: Listening) -> Listening {
    let unchanged = Arc::clone(&known);
    tokio::task::spawn_blocking(move || Arc::new(scan_now(&known))).await.unwrap_or(unchanged)
}

fn scan_now(known: &BTreeMap<Key, u32>) -> BTreeMap<Key, u32> {
    let mut sockets = BTreeMap::new();
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        // Without IPv6 there is no second file.
        let text = fs::read_to_string(file).unwrap_or_default();
        sockets.extend(parse(&text));
        if sockets.len() >= PORTS_MAX {
            break;
        }
    }
    let new: Vec<u64> = sockets.iter().filter(|(key, _)| !known.contains_key(key)).map(|(_, inode)| *inode).collect();
    let owners = if new.is_empty() { BTreeMap::new() } else { owners(&new) };
    let pid = |key: &Key, inode: &u64| known.get(key).or_else(|| owners.get(inode)).copied().unwrap_or_default();
    sockets.iter().map(|(key, inode)| (*key, pid(key, inode))).collect()
}

/// Listening sockets and their inodes.
fn parse(text: &str) -> BTreeMap<Key, u64> {
    let socket = |line: &str| {
        let mut words = line.split_whitespace();
        let (local, state) = (words.nth(1)?, words.nth(1)?);
        let inode: u64 = words.nth(5)?.parse().ok()?;
        let (address, port) = local.split_once(':')?;
        (state == LISTEN).then_some(())?;
        Some(((u16::from_str_radix(port, 16).ok()?, parse_address(address)?), inode))
    };
    text.lines().skip(1).filter_map(socket).take(PORTS_MAX).collect()
}

/// The kernel prints each 32 bits of an address as a number of this machine.
fn parse_address(text: &str) -> Option<IpAddr> {
    let words = text.as_bytes().chunks(8).map(|word| {
        let word = std::str::from_utf8(word).ok().filter(|word| word.len() == 8)?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    });
    let bytes: Vec<u8> = words.collect::<Option<Vec<_>>>()?.concat();
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => {
            let address = Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?);
            // `::ffff:0:0` is how a socket for both families listens on IPv4.
            Some(address.to_ipv4_mapped().map_or(address.into(), IpAddr::V4))
        }
        _ => None,
    }
}

/// Which processes hold sockets, by their number inside the environment.
fn owners(inodes: &[u64]) -> BTreeMap<u64, u32> {
    let mut owners = BTreeMap::new();
    let Ok(processes) = fs::read_dir("/proc") else { return owners };
    for process in
        processes.filter_map(Result::ok).filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
    {
        let Ok(fds) = fs::read_dir(process.path().join("fd")) else { continue };
        for link in fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()) {
            let inode = link.to_str().and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            if let Some(inode) = inode.filter(|inode| inodes.contains(inode)) {
                let status = fs::read_to_string(process.path().join("status")).unwrap_or_default();
                owners.entry(inode).or_insert_with(|| inner_pid(&status));
            }
        }
    }
    owners
}

fn inner_pid(status: &str) -> u32 {
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    pids.and_then(|pids| pids.split_whitespace().last()?.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 1 0000000000000000 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 777 1 0000000000000000 100 0 0 10 0
   2: 0100000A:0050 0200000A:A0B2 01 00000000:00000000 00:00000000 00000000     0        0 999 1 0000000000000000 20 4 30 10 -1
garbage
";
    const TCP6: &str = "header
   0: 00000000000000000000000001000000:0BB8 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 5 1 0 100 0 0 10 0
   1: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 6 1 0 100 0 0 10 0
";

    #[test]
    fn listening_sockets_are_found_and_connections_are_not() {
        let expected: BTreeMap<Key, u64> =
            [((8080, Ipv4Addr::LOCALHOST.into()), 12345), ((22, Ipv4Addr::UNSPECIFIED.into()), 777)].into();
        assert_eq!(parse(TCP), expected);
        let expected: BTreeMap<Key, u64> =
            [((3000, Ipv6Addr::LOCALHOST.into()), 5), ((80, Ipv6Addr::UNSPECIFIED.into()), 6)].into();
        assert_eq!(parse(TCP6), expected);
    }

    #[test]
    fn changes_are_openings_and_closings() {
        let at = |port: u16| (port, IpAddr::V4(Ipv4Addr::LOCALHOST));
        let before: Listening = Arc::new([(at(1), 10), (at(2), 20)].into());
        let after: Listening = Arc::new([(at(2), 20), (at(3), 30)].into());
        let told: Vec<_> =
            changes(&before, &after).into_iter().map(|event| (event.open, event.port, event.pid)).collect();
        assert_eq!(told, [(false, 1, 10), (true, 3, 30)]);
        assert_eq!(changes(&after, &after), []);
    }

    #[tokio::test]
    async fn a_port_of_our_own_is_seen_with_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Ports::default().watch().await.borrow().get(&(port, Ipv4Addr::LOCALHOST.into())).copied();
        assert_eq!(seen, Some(std::process::id()));
    }

    #[tokio::test]
    async fn polling_ends_only_once_nobody_can_join_it() {
        let ports = Ports::default();
        let (sender, receiver) = watch::channel(Listening::default());
        *ports.slot() = Some(receiver);
        let joined = ports.watch().await;
        assert!(!ports.retire(&sender));
        drop(joined);
        assert!(ports.retire(&sender));
        // The task has decided to end, but still lives: whoever comes now begins anew.
        let later = ports.watch().await;
        drop(sender);
        assert!(later.has_changed().is_ok(), "a watcher was given a receiver that hears nothing any more");
    }

    #[test]
    fn the_innermost_pid_is_reported() {
        assert_eq!(inner_pid("Name:\tx\nNSpid:\t4021\t17\n"), 17);
        assert_eq!(inner_pid("Name:\tx\n"), 0);
    }
}
