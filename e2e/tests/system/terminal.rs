//! Interactive use. The client runs under `script`, which gives it a terminal as a person has one.

use std::process::Command;

use e2e::{Cluster, Finished, Sprite};

/// Runs `sprite exec --tty` in a terminal and types `keys`.
fn in_terminal(cluster: &Cluster, sprite: &Sprite<'_>, command: &str, keys: &[u8]) -> Finished {
    let client = sprite.exec_command(&["--tty"], &["bash", "-c", command]);
    let quoted: Vec<String> = std::iter::once(client.get_program())
        .chain(client.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''")))
        .collect();
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--echo", "never", "--command", &quoted.join(" "), "/dev/null"]);
    script.env_clear().envs(client.get_envs().filter_map(|(name, value)| Some((name, value?))));
    cluster.run(script, keys)
}

#[test]
fn a_command_sees_a_terminal_and_gives_its_exit_code() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("tty");
    in_terminal(cluster, &sprite, "test -t 0 && test -t 1 && echo it is; exit 3", b"").code(3).says("it is");
    // Without a terminal in between there is none inside either.
    sprite.exec(&["test", "-t", "1"]).code(1);
    in_terminal(cluster, &sprite, "echo $TERM; locale charmap; echo ünï", b"").success().says("xterm").says("ünï");
    in_terminal(
        cluster,
        &sprite,
        "trap 'echo stopped by hand; exit 5' INT; echo go; while :; do read -r -t 1; done",
        b"\x03",
    )
    .code(5)
    .says("stopped by hand");
}
