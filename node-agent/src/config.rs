//! What a node agent is told at start.

use std::path::PathBuf;

use blockstore::bucket::Bucket;

use crate::{net::NetworkConfig, qemu::Accel};

/// Settings of one node agent. Paths are absolute.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this host in the bucket.
    pub node: String,
    pub bucket: Bucket,
    /// Durable local state: `store/`, `golden/`, `vms/`.
    pub data: PathBuf,
    /// Where VM memory lies: a folder on tmpfs (ruling 14).
    pub memory: PathBuf,
    /// Kernel, initramfs and base image.
    pub image: ImageFiles,
    pub accel: Accel,
    /// Whole anonymous sprites kept ready, of the default size.
    pub pool_size: usize,
    /// The binary that has the `jail` subcommand.
    pub sprited: PathBuf,
    /// Separates the network names of several node agents on one host; at most 4 characters.
    pub instance: String,
    /// What guests may not reach besides the host and each other, for example the bucket.
    pub denied_networks: Vec<String>,
    /// Memory that has to stay free on the host for a VM to be started.
    pub memory_reserve_bytes: u64,
}

impl Config {
    /// What the host's network is set up with.
    pub fn network(&self) -> NetworkConfig {
        NetworkConfig {
            instance: self.instance.clone(),
            denied: self.denied_networks.clone(),
            ..NetworkConfig::default()
        }
    }
}

/// The guest's pieces, built by `guest/image`.
#[derive(Clone, Debug)]
pub struct ImageFiles {
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// Raw sparse ext4 of a new sprite's disk.
    pub rootfs: PathBuf,
    /// Digest of the recipe the root file system was built from.
    pub rootfs_digest: String,
}
