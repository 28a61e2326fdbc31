//! `sprited jail SPEC`: becomes one jailed QEMU. Called by the node agent only, so it is not in the help.

use std::{ffi::OsString, path::Path, process::ExitCode};

pub(crate) fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(spec), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: sprited jail SPEC   (the node agent calls this; there is nothing to do by hand)");
        return ExitCode::from(2);
    };
    node_agent::jail::main(Path::new(&spec))
}
