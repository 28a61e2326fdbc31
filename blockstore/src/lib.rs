//! The block store: durable disks for sprites in a bucket (`bucket`), as thin volumes (`store`), served over NBD (`nbd`).

pub mod bucket;
pub mod nbd;
pub mod store;
