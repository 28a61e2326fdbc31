//! Interactive use. The client runs under `script`, which gives it a terminal as a person has one.

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
};

use e2e::{Cluster, Finished, Sprite};

/// `sprite exec --tty` in a terminal.
fn terminal(sprite: &Sprite<'_>, command: &str) -> Command {
    let client = sprite.exec_command(&["--tty"], &["bash", "-c", command]);
    let quoted: Vec<String> = std::iter::once(client.get_program())
        .chain(client.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''")))
        .collect();
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--echo", "never", "--command", &quoted.join(" "), "/dev/null"]);
    script.env_clear().envs(client.get_envs().filter_map(|(name, value)| Some((name, value?))));
    script
}

fn in_terminal(cluster: &Cluster, sprite: &Sprite<'_>, command: &str) -> Finished {
    cluster.run(terminal(sprite, command), b"")
}

/// Types `keys` once `prompt` is on the screen, as a person does; what came after that, and the exit code.
fn type_at_prompt(sprite: &Sprite<'_>, command: &str, prompt: &str, keys: &[u8]) -> (Option<i32>, String) {
    let mut child =
        terminal(sprite, command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("script runs");
    let (mut screen, mut keyboard) = (child.stdout.take().expect("asked for"), child.stdin.take().expect("asked for"));
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(prompt) {
        let mut byte = [0];
        assert_eq!(screen.read(&mut byte).expect("the screen can be read"), 1, "ended before its prompt");
        seen.push(byte[0]);
    }
    keyboard.write_all(keys).expect("it takes keys");
    let mut rest = String::new();
    screen.read_to_string(&mut rest).expect("the screen is UTF-8");
    (child.wait().expect("it is our child").code(), rest)
}

#[test]
fn a_command_sees_a_terminal_and_gives_its_exit_code() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("tty");
    in_terminal(cluster, &sprite, "test -t 0 && test -t 1 && echo it is; exit 3").code(3).says("it is");
    // Without a terminal in between there is none inside either.
    sprite.exec(&["test", "-t", "1"]).code(1);
    in_terminal(cluster, &sprite, "echo $TERM; locale charmap; echo ünï").success().says("xterm").says("ünï");
}

#[test]
fn keys_reach_the_foreground_process() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("keys");
    let trap = "trap 'echo stopped by hand; exit 5' INT; echo go; while :; do read -r -t 1; done";
    let (code, screen) = type_at_prompt(&sprite, trap, "go", b"\x03");
    assert!(code == Some(5) && screen.contains("stopped by hand"), "{code:?} {screen}");
    let line = "read -p 'name? ' -r name; echo hello $name";
    let (code, screen) = type_at_prompt(&sprite, line, "name? ", "wörld\r".as_bytes());
    assert!(code == Some(0) && screen.contains("hello wörld"), "{code:?} {screen}");
}
