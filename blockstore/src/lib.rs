//! blockstore

pub mod bucket;
