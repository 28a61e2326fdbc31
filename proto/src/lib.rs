//! Wire messages between our processes, and the ids they carry. No logic.
//!
//! | module | who talks |
//! |---|---|
//! | [`agent`] | node agent → PID 1 in the VM, over virtio-serial after [`resync`] |
//! | [`node`] | coordinator and router → node agent |
//! | [`control`] | router → coordinator |
//! | [`public`] | users' own gRPC clients → coordinator |

pub mod id;
mod not_here;
pub mod paths;
pub mod record;
pub mod resync;
pub mod token;

/// The generated modules refer to each other by package, so they are nested as their packages are.
#[allow(
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::large_enum_variant,
    clippy::too_many_lines,
    reason = "generated code"
)]
mod generated {
    pub mod sprites {
        pub mod v1 {
            tonic::include_proto!("sprites.v1");
        }
        pub mod agent {
            pub mod v1 {
                tonic::include_proto!("sprites.agent.v1");
            }
        }
        pub mod node {
            pub mod v1 {
                tonic::include_proto!("sprites.node.v1");
            }
        }
        pub mod control {
            pub mod v1 {
                tonic::include_proto!("sprites.control.v1");
            }
        }
    }
}

pub use not_here::{is_not_here, not_here};

pub use generated::sprites::{agent::v1 as agent, control::v1 as control, node::v1 as node, v1 as public};

/// All descriptors, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Our version, as `sprite --version`, `Sprite-Version` and every handshake say it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
