//! One host's node agent: runs sprites as microVMs.

pub mod agent;
pub mod data;
pub mod host;
pub mod jail;
pub mod net;
