//! Volumes: thin disks whose truth is in the bucket and whose newest writes are in a local journal.
//!
//! ```text
//!            write ▼                            ▲ read
//!   journal (segments on disk) ──▶ overlay: active layer ▸ frozen layers ▸ base = manifest tree
//!                                     │ freeze: O(1)                          │ frames
//!                                     ▼                                       ▼
//!   owner task: push = packs in parallel, then one CAS of the head    cache (RAM, disk) ▸ bucket
//! ```
//!
//! | module | what |
//! |---|---|
//! | `types` | numbers, settings, errors: what callers see |
//! | `head` | the one object that decides (rulings 1 and 2) |
//! | `frame`, `pack`, `page`, `tree` | format on the bucket: compressed chunks, packs, the manifest as a Merkle tree |
//! | `segment`, `journal`, `lost` | format on the local disk: the log a FLUSH makes durable, and what becomes of one that is not ours any more |
//! | `extent`, `core` | which bytes are newer than the manifest, and where |
//! | `cache`, `fetch` | frames near at hand; one request for a missing run of them |
//! | `device`, `volume`, `open` | what NBD and the node agent call |
//! | `owner`, `push` | one task per volume: everything that changes the head |
//! | `compact` | fewer packs for the same content; dead ones deleted |
//! | `patch` | what one volume has that another lacks, as bytes |
//! | `memory`, `base` | memory images and base images: the same trees from files |
//!
//! # Invariants
//!
//! 1. *Only a CAS of the head makes anything in the bucket count*, and only the owner task of the volume does one. Packs are named by epoch and
//!    number, never rewritten; an owner that lost its epoch can make orphans, nothing else.
//! 2. *Any state anybody can see is a prefix of the writes*: what recovery finds, what a push commits, what a checkpoint keeps. Writes are numbered
//!    ([`Lsn`]) in the order in which they enter the overlay, under one lock.
//! 3. *A FLUSH that returned is on the local disk.* An `fdatasync` that failed poisons the volume: it is never tried again and called a success.
//! 4. *Nothing unverified is returned*: every frame and page is compared with the hash its parent names, up to the root in the head.
//! 5. *No lock is held across I/O*, except the journal's own (its writers wait for the log anyway). Blocking I/O runs on blocking threads.
//!
//! # Not here
//!
//! Garbage collection across volumes, encryption, prefetch hints: later issues. The formats have the room: kinds of frames, flags in pages and packs.

mod archive;
mod base;
mod cache;
mod compact;
mod core;
mod device;
mod extent;
mod fetch;
mod fork;
mod frame;
mod head;
mod journal;
mod lost;
mod memory;
mod open;
mod owner;
mod pack;
mod page;
mod patch;
mod push;
mod segment;
mod tree;
mod types;
mod volume;

pub use archive::{Archive, ArchiveError, CheckpointSummary, Disk, Summary, Verified};
pub use base::BaseId;
pub use head::{Head, HeadState};
pub use open::Store;
pub use patch::{PATCH_BYTES_MAX, Patch};
pub use types::{
    BaseError, Checkpoint, CheckpointError, CheckpointMeta, Consistency, Epoch, ForkError, Generation, Limits, Lsn,
    MemoryError, MemoryInfo, MemorySource, MemoryTarget, StoreConfig, StoreError, VolumeError, VolumeStatus,
};
pub use volume::{SealOnRead, Volume};

#[cfg(test)]
mod tests;
