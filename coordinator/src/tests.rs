//! The service through its outer doors, over a real bucket folder and a node that makes no VMs.

mod create;
mod fake_node;
mod grpc;
mod lists;
mod rest;
mod rig;
