//! The kernel calls that have no safe wrapper in our libraries. All `unsafe` of this crate is here and in [`crate::spawn`].

#![expect(unsafe_code, reason = "raw kernel calls; each block says why it is sound")]

use std::{
    ffi::CStr,
    fs::File,
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
    sync::Arc,
};

use nix::libc;
use tokio::io::unix::AsyncFd;

/// `FIFREEZE`, `FITHAW`: `_IOWR('X', 119 | 120, int)`.
const FIFREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;
/// `_IO(0x12, 97)`: writes out and drops a block device's page cache.
const BLKFLSBUF: libc::Ioctl = 0x1261;
/// `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;
/// `_IOW('f', 16, __u64)`: grows ext4 to a number of blocks.
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;
/// `_IOW('f', 44, struct fsuuid)`, `_IOR('f', 44, struct fsuuid)`, since Linux 6.0.
const EXT4_IOC_SETFSUUID: libc::Ioctl = 0x4008_662c;
const EXT4_IOC_GETFSUUID: libc::Ioctl = 0x8008_662c_u32 as libc::Ioctl;
/// `_IOW('f', 43, __u32)`, since Linux 5.14.
const EXT4_IOC_CHECKPOINT: libc::Ioctl = 0x4004_662b;
const LOOP_SET_FD: libc::Ioctl = 0x4c00;
const LOOP_CLR_FD: libc::Ioctl = 0x4c01;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
/// `_IOW('R', 3, int[2])`, `_IO('R', 7)`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// `_IO('T', 0x41)`: the other end of a pseudo terminal, without a path.
const TIOCGPTPEER: libc::Ioctl = 0x5441;

/// Length of what [`add_entropy`] takes.
pub(crate) const ENTROPY_BYTES: usize = 64;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An ioctl whose third argument the kernel takes by value or ignores.
fn plain_ioctl(fd: impl AsFd, request: libc::Ioctl, argument: libc::c_long) -> io::Result<libc::c_int> {
    // SAFETY: the callers' requests take no pointer, so that no memory of ours is touched.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, argument) })
}

/// Loads a kernel module from an open file. One that is loaded already is an error (`EEXIST`).
pub(crate) fn load_module(module: &File) -> io::Result<()> {
    // SAFETY: a valid descriptor, a NUL-terminated string and no flags; the kernel keeps none of them.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Blocks until every writer of the file system stands still. An interrupted or failed call leaves it unfrozen.
pub(crate) fn freeze(root: impl AsFd) -> io::Result<()> {
    plain_ioctl(root, FIFREEZE, 0).map(drop)
}

pub(crate) fn thaw(root: impl AsFd) -> io::Result<()> {
    plain_ioctl(root, FITHAW, 0).map(drop)
}

/// Writes what is in the journal of the mounted ext4 that `root` lies in to its place; the journal is empty then.
pub(crate) fn empty_ext4_journal(root: &File) -> io::Result<()> {
    let flags = 0_u32;
    // SAFETY: the request reads one u32.
    check(unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_CHECKPOINT, &raw const flags) }).map(drop)
}

pub(crate) fn flush_block_device(device: &File) -> io::Result<()> {
    plain_ioctl(device, BLKFLSBUF, 0).map(drop)
}

pub(crate) fn block_device_bytes(device: &File) -> io::Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: the request writes one u64, and `bytes` is one.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) })?;
    Ok(bytes)
}

/// Grows the mounted ext4 that `root` lies in.
pub(crate) fn resize_ext4(root: &File, blocks: u64) -> io::Result<()> {
    // SAFETY: the request reads one u64.
    check(unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) }).map(drop)
}

/// The kernel's `struct fsuuid` with room for what ext4 has.
#[repr(C)]
struct FsUuid {
    len: u32,
    flags: u32,
    uuid: [u8; 16],
}

/// Changes the UUID of the mounted ext4 that `root` lies in. Needs the feature `metadata_csum_seed`.
pub(crate) fn set_ext4_uuid(root: &File, uuid: [u8; 16]) -> io::Result<()> {
    let argument = FsUuid { len: 16, flags: 0, uuid };
    // SAFETY: the request reads the header and `len` bytes behind it, which `argument` holds.
    check(unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_SETFSUUID, &raw const argument) }).map(drop)
}

pub(crate) fn ext4_uuid(root: &File) -> io::Result<[u8; 16]> {
    let mut argument = FsUuid { len: 16, flags: 0, uuid: [0; 16] };
    // SAFETY: the request writes at most `len` bytes behind the header.
    check(unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_GETFSUUID, &raw mut argument) })?;
    Ok(argument.uuid)
}

/// A free loop device's number.
pub(crate) fn free_loop(control: &File) -> io::Result<libc::c_int> {
    plain_ioctl(control, LOOP_CTL_GET_FREE, 0)
}

pub(crate) fn attach_loop(device: &File, file: &File) -> io::Result<()> {
    plain_ioctl(device, LOOP_SET_FD, file.as_raw_fd().into()).map(drop)
}

pub(crate) fn detach_loop(device: &File) -> io::Result<()> {
    plain_ioctl(device, LOOP_CLR_FD, 0).map(drop)
}

pub(crate) fn swapoff(path: &CStr) -> io::Result<()> {
    // SAFETY: a NUL-terminated path that the kernel only reads.
    check(unsafe { libc::swapoff(path.as_ptr()) }).map(drop)
}

#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; ENTROPY_BYTES],
}

/// Mixes the host's entropy in, with credit, and makes the generator use it at once.
pub(crate) fn add_entropy(random: &File, entropy: [u8; ENTROPY_BYTES]) -> io::Result<()> {
    const BYTES: libc::c_int = 64;
    let info = RandPoolInfo { entropy_bits: BYTES * 8, bytes: BYTES, buffer: entropy };
    // SAFETY: the request reads the header and `bytes` bytes behind it, which `info` holds.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    plain_ioctl(random, RNDRESEEDCRNG, 0).map(drop)
}

pub(crate) fn set_terminal_size(terminal: impl AsFd, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request reads one `winsize`.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// The terminal that belongs to the pseudo-terminal master `master`.
pub(crate) fn terminal_of(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let fd = plain_ioctl(master, TIOCGPTPEER, flags.into())?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `struct ifreq` with an address or flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    payload: InterfacePayload,
}

#[repr(C)]
union InterfacePayload {
    address: libc::sockaddr_in,
    flags: libc::c_short,
    index: libc::c_int,
    pad: [u8; 24],
}

fn interface_request(name: &str) -> InterfaceRequest {
    let mut request = InterfaceRequest { name: [0; libc::IFNAMSIZ], payload: InterfacePayload { pad: [0; 24] } };
    let bytes = name.as_bytes();
    let len = bytes.len().min(libc::IFNAMSIZ - 1);
    request.name[..len].copy_from_slice(&bytes[..len]);
    request
}

fn inet(address: std::net::Ipv4Addr) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
        sin_zero: [0; 8],
    }
}

fn interface_ioctl(socket: &OwnedFd, request: libc::Ioctl, argument: &mut InterfaceRequest) -> io::Result<()> {
    // SAFETY: all SIOC?IF* requests read or write one `ifreq`, whose layout and size (40 bytes) `InterfaceRequest` has.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(argument)) }).map(drop)
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

/// Sets the first IPv4 address of an interface.
pub(crate) fn set_address_v4(
    socket: &OwnedFd,
    name: &str,
    address: std::net::Ipv4Addr,
    mask: std::net::Ipv4Addr,
) -> io::Result<()> {
    let mut request = interface_request(name);
    request.payload.address = inet(address);
    interface_ioctl(socket, libc::SIOCSIFADDR, &mut request)?;
    request.payload.address = inet(mask);
    interface_ioctl(socket, libc::SIOCSIFNETMASK, &mut request)
}

/// Switches an interface on.
pub(crate) fn set_up(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = interface_request(name);
    interface_ioctl(socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: the kernel has written the flags.
    let flags = unsafe { request.payload.flags };
    let up = libc::c_short::try_from(libc::IFF_UP).unwrap_or_default();
    if flags & up != 0 {
        return Ok(());
    }
    request.payload.flags = flags | up;
    interface_ioctl(socket, libc::SIOCSIFFLAGS, &mut request)
}

pub(crate) fn interface_index(socket: &OwnedFd, name: &str) -> io::Result<libc::c_int> {
    let mut request = interface_request(name);
    interface_ioctl(socket, libc::SIOCGIFINDEX, &mut request)?;
    // SAFETY: the kernel has written the index.
    Ok(unsafe { request.payload.index })
}

fn sockaddr(address: libc::sockaddr_in) -> libc::sockaddr {
    // SAFETY: both are 16 bytes of plain data, and the kernel reads a `sockaddr` by its family.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
}

/// Adds the IPv4 default route. One that is there already is an error (`EEXIST`).
pub(crate) fn add_default_route_v4(socket: &OwnedFd, gateway: std::net::Ipv4Addr) -> io::Result<()> {
    const RTF_UP: u16 = 1;
    const RTF_GATEWAY: u16 = 2;
    // SAFETY: `rtentry` is plain data, for which zeroes are valid: no device name, no metric.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = sockaddr(inet(std::net::Ipv4Addr::UNSPECIFIED));
    route.rt_genmask = sockaddr(inet(std::net::Ipv4Addr::UNSPECIFIED));
    route.rt_gateway = sockaddr(inet(gateway));
    route.rt_flags = RTF_UP | RTF_GATEWAY;
    // SAFETY: the request reads one `rtentry`, whose only pointer is null.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) }).map(drop)
}

#[repr(C)]
struct AddressV6 {
    address: [u8; 16],
    prefix: u32,
    interface: libc::c_int,
}

/// Adds an IPv6 address. One that is there already is an error (`EEXIST`).
pub(crate) fn add_address_v6(
    socket: &OwnedFd,
    interface: libc::c_int,
    address: std::net::Ipv6Addr,
    prefix: u8,
) -> io::Result<()> {
    let argument = AddressV6 { address: address.octets(), prefix: prefix.into(), interface };
    // SAFETY: on an AF_INET6 socket the request reads one `in6_ifreq`, whose layout `AddressV6` has.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const argument) }).map(drop)
}

#[repr(C)]
struct RouteV6 {
    destination: [u8; 16],
    source: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    destination_len: u16,
    source_len: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    interface: libc::c_int,
}

/// Adds the IPv6 default route. One that is there already is an error (`EEXIST`).
pub(crate) fn add_default_route_v6(
    socket: &OwnedFd,
    interface: libc::c_int,
    gateway: std::net::Ipv6Addr,
) -> io::Result<()> {
    let argument = RouteV6 {
        destination: [0; 16],
        source: [0; 16],
        gateway: gateway.octets(),
        kind: 0,
        destination_len: 0,
        source_len: 0,
        metric: 1,
        info: 0,
        flags: 3,
        interface,
    };
    // SAFETY: on an AF_INET6 socket the request reads one `in6_rtmsg`, whose layout `RouteV6` has.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const argument) }).map(drop)
}

/// Waits until a child has ended, without reaping it. `None`: there are no children now.
pub(crate) fn peek_ended_child() -> io::Result<Option<libc::pid_t>> {
    // SAFETY: `siginfo_t` is plain data that the kernel fills.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is valid for writing one `siginfo_t`.
    match check(unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOWAIT) }) {
        // SAFETY: waitid has filled the fields of a SIGCHLD.
        Ok(_) => Ok(Some(unsafe { info.si_pid() })),
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A detached copy of the mount at `path`, to be put elsewhere with [`attach_mount`], also behind a change of root.
pub(crate) fn clone_mount(path: &CStr) -> io::Result<OwnedFd> {
    const OPEN_TREE_CLONE: libc::c_uint = 1;
    let flags = OPEN_TREE_CLONE | libc::c_uint::try_from(libc::O_CLOEXEC).unwrap_or_default();
    // SAFETY: a NUL-terminated path that the kernel only reads.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    check(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn attach_mount(tree: &OwnedFd, path: &CStr) -> io::Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
    // SAFETY: two NUL-terminated paths that the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a descriptor with the async runtime.
pub(crate) fn watch_fd(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the registration holds a share of the descriptor, which stays open and the same until it is dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}
