//! The README's first page does what it says.

use e2e::{Cluster, binary, repository, unique};

/// The commands of the block that begins with `sprite create`, in order.
fn commands(readme: &str) -> Vec<&str> {
    let block = readme
        .split("```console\n")
        .find(|block| block.starts_with("$ sprite create"))
        .expect("the README has a walk through a sprite's life");
    let block = block.split("```").next().expect("split gives at least one piece");
    block.lines().filter_map(|line| line.strip_prefix("$ ")).collect()
}

#[test]
fn every_command_of_the_walk_succeeds() {
    let cluster = Cluster::shared();
    let readme = std::fs::read_to_string(repository().join("README.md")).expect("there is a README");
    let name = unique("hello");
    let commands = commands(&readme);
    assert!(commands.len() >= 8, "{commands:?}");
    let path = std::env::join_paths(
        binary("sprite")
            .parent()
            .map(Into::into)
            .into_iter()
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    )
    .expect("a path without separators in it");
    for line in commands {
        let mut shell = cluster.client_command("bash");
        shell.env("PATH", &path).env("CURL_CA_BUNDLE", cluster.bundle()).args(["-c", &line.replace("hello", &name)]);
        cluster.run(shell, b"").success();
    }
    cluster.sprite(["info", "-s", &name]).refused().says("not found");
}
