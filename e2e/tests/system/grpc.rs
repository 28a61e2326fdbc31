//! The public gRPC API, from a client that is not ours.

use std::process::Command;

use e2e::{Cluster, bounded, repository, unique};

#[test]
fn a_stock_grpc_client_walks_through_a_sprites_life() {
    let cluster = Cluster::shared();
    let stubs = cluster.folder().join("stubs");
    std::fs::create_dir_all(&stubs).expect("the folder can be made");
    let mut protoc = Command::new("protoc");
    protoc.arg("-I").arg(repository().join("proto/proto")).arg("--python_out").arg(&stubs).arg("sprites.proto");
    bounded(protoc, b"", e2e::COMMAND_DEADLINE, None).success();

    let name = unique("grpc");
    let mut walk = cluster.client_command("/usr/bin/python3");
    // Debian's grpcio lies in the system's Python, whatever other Python is first in PATH.
    walk.env("PYTHONPATH", &stubs).arg(repository().join("examples/grpc/walk.py")).arg(&name);
    let said = cluster.run(walk, b"").success().out();
    for line in [
        "repeated True",
        "exec (3, b'kept\\n', b'warned\\n')",
        "checkpoint v1 grpc complete",
        "restore complete",
        "file b'one'",
        "forked v1 b'one'",
        "synced True 2",
        "asleep warm",
        "woken running memory",
        &format!("listed ['{name}']"),
        &format!("watched {name} running"),
        "taken ALREADY_EXISTS",
        "destroyed",
    ] {
        assert!(said.contains(line), "{line:?} is missing in:\n{said}");
    }
}
