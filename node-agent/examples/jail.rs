//! The smallest program that has the jail's subcommand, as `sprited` has it. The jail's tests start it.

use std::path::PathBuf;

fn main() {
    let spec = std::env::args_os().nth(2).map(PathBuf::from);
    node_agent::jail::main(&spec.expect("usage: jail jail SPEC"))
}
