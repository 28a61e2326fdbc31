//! blockstore

pub mod bucket;
pub mod nbd;
