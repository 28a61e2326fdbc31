//! Network namespaces: making, entering and removing them.
//!
//! A thread's namespace is part of the thread, so everything that has to happen inside one runs on a thread of its own that ends afterwards.

#![expect(unsafe_code, reason = "TUNSETIFF and TUNSETPERSIST have no safe wrapper")]

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use super::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, Names, NetError, rules, system};

/// Where `ip netns` keeps its namespaces, so that an operator finds ours with the same command.
pub(super) const FOLDER: &str = "/run/netns";
const TAP: &str = "tap0";

/// Makes the folder a shared mount of its own, as `ip netns add` does when it is first used on a host. Done later, that would lie over the names we have
/// made, and hold them for ever: "device or resource busy".
pub(super) fn set_up_folder() -> io::Result<()> {
    fs::create_dir_all(FOLDER)?;
    // One at a time; `ip` takes the same lock.
    let folder = File::open(FOLDER)?;
    folder.lock()?;
    let share = || mount(None::<&str>, FOLDER, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    if share() == Err(Errno::EINVAL) {
        mount(Some(FOLDER), FOLDER, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
        share()?;
    }
    Ok(())
}

/// Makes the namespace of a slot with everything in it. The slot must be free.
pub(super) fn create(names: &Names, slot: u32, uid: u32) -> Result<(), NetError> {
    let path = names.netns(slot);
    File::create(&path).map_err(system("create the name of a namespace"))?;
    let made = on_own_thread(|| fill(names, slot, uid, &path)).and_then(|()| set_up_host_end(names, slot));
    if made.is_err() {
        // The first error is the one to tell; what is left is removed by the next attach or sweep.
        drop(remove(names, slot));
    }
    made
}

fn fill(names: &Names, slot: u32, uid: u32, path: &Path) -> Result<(), NetError> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| system("make a network namespace")(errno.into()))?;
    let own = "/proc/thread-self/ns/net";
    mount(Some(own), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|errno| system("name a network namespace")(errno.into()))?;
    make_tap().map_err(system("make the tap"))?;
    let switches = [
        ("/proc/sys/net/ipv4/ip_forward", "1"),
        ("/proc/sys/net/ipv6/conf/all/forwarding", "1"),
        // No address detection: the gateway is there from the first packet, and nobody else can be on this wire.
        ("/proc/sys/net/ipv6/conf/tap0/accept_dad", "0"),
        ("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "0"),
    ];
    for (path, value) in switches {
        // A host without IPv6 has no such switches, and its guests no ULA.
        match fs::write(path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.contains("ipv6") => {}
            result => result.map_err(system("set up a namespace's switches"))?,
        }
    }
    let (address, gateway) = (names.namespace_address(slot), names.host_address(slot));
    let (veth, agent) = (names.veth(slot), std::process::id());
    let has_v6 = Path::new("/proc/sys/net/ipv6").exists();
    let v6 = if has_v6 { format!("addr add {GATEWAY_V6}/64 dev {TAP} nodad\n") } else { String::new() };
    let batch = format!(
        "link set lo up
link set {TAP} address {GATEWAY_MAC}
addr add {GATEWAY_V4}/24 dev {TAP}
link set {TAP} up
{v6}link add veth0 type veth peer name {veth} netns {agent}
addr add {address}/30 dev veth0
link set veth0 up
route add default via {gateway}
"
    );
    rules::run("ip", &["-batch", "-"], &batch)?;
    rules::load(&rules::namespace_tables(uid))
}

fn set_up_host_end(names: &Names, slot: u32) -> Result<(), NetError> {
    let (veth, address) = (names.veth(slot), names.host_address(slot));
    // No IPv6 on the host's end: it would be an address of the host that nobody asked for.
    let switch = format!("/proc/sys/net/ipv6/conf/{veth}/disable_ipv6");
    match fs::write(&switch, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(NetError::System { what: "switch IPv6 off on the host's end", source: error });
        }
        Ok(()) | Err(_) => {}
    }
    rules::run("ip", &["-batch", "-"], &format!("addr add {address}/30 dev {veth}\nlink set {veth} up\n"))
}

/// Removes a slot's namespace and its end on the host. Nothing there is fine.
pub(super) fn remove(names: &Names, slot: u32) -> Result<(), NetError> {
    let veth = names.veth(slot);
    if Path::new("/sys/class/net").join(&veth).exists() {
        match rules::run("ip", &["link", "del", &veth], "") {
            // Went away by itself: the last process of the namespace ended meanwhile.
            Err(NetError::Command { stderr, .. }) if stderr.contains("Cannot find device") => {}
            result => result?,
        }
    }
    let path = names.netns(slot);
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => return Err(system("unmount a namespace")(errno.into())),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(system("remove the name of a namespace")(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Slots that have a namespace or an end on the host.
pub(super) fn found(names: &Names) -> Result<Vec<u32>, NetError> {
    let mut slots = Vec::new();
    for (folder, prefix) in [(FOLDER, names.netns_prefix()), ("/sys/class/net", names.veth_prefix())] {
        for entry in fs::read_dir(folder).map_err(system("list network namespaces"))? {
            let name = entry.map_err(system("list network namespaces"))?.file_name();
            slots.extend(name.to_str().and_then(|name| names.slot_of(name, &prefix)));
        }
    }
    slots.sort_unstable();
    slots.dedup();
    Ok(slots)
}

/// Runs `work` inside the namespace at `path`, on a thread that ends afterwards. Sockets it makes belong to the namespace for ever.
pub(super) fn inside<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    on_own_thread(move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

fn on_own_thread<T: Send, E: Send + From<io::Error>>(work: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_panic| Err(io::Error::other("a thread in a network namespace panicked").into()))
    })
}

impl From<io::Error> for NetError {
    fn from(source: io::Error) -> Self {
        Self::System { what: "run a thread in a network namespace", source }
    }
}

/// A persistent tap: it stays when QEMU ends, so a restarted VM finds the same one.
fn make_tap() -> io::Result<()> {
    let tap = open_tap()?;
    // SAFETY: `tap` is open for the whole call and TUNSETPERSIST takes an integer.
    Errno::result(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST as libc::Ioctl, 1) })?;
    Ok(())
}

/// Opens the tap of the calling thread's namespace. With packet headers for offloads: the guest hands over large segments and unfinished checksums,
/// and the host's network stack finishes them.
pub(super) fn open_tap() -> io::Result<OwnedFd> {
    let tun = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: an ifreq of zeros is valid: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: `tun` is open, and `request` is a valid ifreq that outlives the call; the kernel writes the name back into it.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) })?;
    Ok(tun.into())
}
