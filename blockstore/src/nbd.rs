//! Our NBD server: the block devices that VMs see, over unix sockets.
//!
//! ```text
//!  unix socket ─▶ server      accepts, checks the peer                       one task per socket
//!                   └▶ connection   handshake, then requests and replies     one task per connection
//!                        ├ codec       bytes ⇄ messages, no I/O (`codec` requests, `options` handshake)
//!                        └ export      what a name stands for: a volume, an empty disk, a disk in memory
//! ```
//!
//! # Invariants
//!
//! 1. A request that can be answered is answered, however wrong; only lost framing (a bad magic) ends a connection.
//! 2. No memory is taken because a client named a length: only the payload of a valid write, at most [`codec::PAYLOAD_BYTES_MAX`], and only
//!    while the connection is within its budget of requests and bytes (`connection`).
//! 3. FLUSH covers every write answered on *any* connection, because all connections of an export share its device. So multi-conn holds.
//! 4. A new connection to an export is served only when no change of a dead one can still reach the device (`export`). A client that
//!    reconnects sends its unanswered writes again; an old copy that lands later would undo newer data.
//! 5. Transient trouble stalls a request; EIO is for data proven lost (ruling 17).

pub mod codec;
mod connection;
mod export;
mod memory;
pub mod options;
mod server;

pub use export::{DeviceError, Export, ExportTable, Extent, ExtentKind};
pub use memory::MemoryDisk;
pub use server::{NbdServer, SocketOwner};
