//! Commands in a sprite: streams, exit codes, signals, several at once. One sprite for all of them, as commands do not disturb each other.

use std::{process::Stdio, sync::OnceLock, thread, time::Duration};

use e2e::{COMMAND_DEADLINE, Cluster, Sprite, eventually};

fn sprite() -> &'static Sprite<'static> {
    static SPRITE: OnceLock<Sprite<'static>> = OnceLock::new();
    SPRITE.get_or_init(|| Cluster::shared().new_sprite("exec"))
}

#[test]
fn both_streams_arrive_apart_and_whole() {
    let finished = sprite().exec(&["sh", "-c", "printf out; printf err >&2"]).success();
    assert_eq!((finished.out().as_str(), finished.err().as_str()), ("out", "err"));
}

#[test]
fn the_exit_code_is_the_commands() {
    for (line, code) in
        [("exit 0", 0), ("exit 1", 1), ("exit 42", 42), ("no-such-command-at-all", 127), ("kill -TERM $$", 128 + 15)]
    {
        sprite().exec(&["bash", "-c", line]).code(code);
    }
    sprite().exec(&["/no/such/file"]).code(127);
    sprite().exec(&["/etc/passwd"]).code(126);
}

#[test]
fn binary_stdin_comes_back_unchanged() {
    let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let echoed = sprite().exec_with(&[], &["cat"], &bytes).success();
    assert!(echoed.stdout == bytes, "{} bytes came back of {}", echoed.stdout.len(), bytes.len());
}

#[test]
fn closed_stdin_is_seen_as_such() {
    assert_eq!(sprite().exec_with(&[], &["wc", "-c"], b"").success().out().trim(), "0");
}

#[test]
fn arguments_are_passed_as_they_are() {
    let odd = ["a b", "", "$HOME", "*", "'\"\\", "ünïcode 🎈", "new\nline"];
    let mut command = vec!["printf", "<%s>"];
    command.extend(odd);
    let expected: String = odd.iter().map(|word| format!("<{word}>")).collect();
    assert_eq!(sprite().exec(&command).success().out(), expected);
    let long = "x".repeat(60_000);
    assert_eq!(sprite().exec(&["printf", "%s", &long]).success().out(), long);
}

#[test]
fn folder_and_environment_are_as_asked() {
    let finished = sprite()
        .exec_with(&["--dir", "/usr/share", "--env", "A=1,B=two"], &["sh", "-c", "pwd; echo $A $B"], b"")
        .success();
    assert_eq!(finished.out(), "/usr/share\n1 two\n");
    sprite().exec_with(&["--dir", "/no/such/folder"], &["true"], b"").refused();
}

#[test]
fn a_short_command_never_loses_its_output() {
    for round in 0..20 {
        assert_eq!(sprite().exec(&["echo", &round.to_string()]).success().out(), format!("{round}\n"));
    }
}

#[test]
fn several_commands_run_at_once() {
    let outputs: Vec<String> = thread::scope(|scope| {
        let running: Vec<_> = (0..8)
            .map(|i| scope.spawn(move || sprite().exec(&["sh", "-c", &format!("sleep 1; echo {i}")]).success().out()))
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(outputs, (0..8).map(|i| format!("{i}\n")).collect::<Vec<_>>());
}

#[test]
fn an_interrupted_client_interrupts_the_command() {
    let file = format!("/tmp/{}", e2e::unique("caught"));
    let line = format!("trap 'echo caught > {file}; exit 7' INT; echo ready; while :; do sleep 0.1; done");
    let mut client =
        sprite().exec_command(&[], &["bash", "-c", &line]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut first_line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(client.stdout.as_mut().unwrap()), &mut first_line)
        .unwrap();
    assert_eq!(first_line, "ready\n");
    assert!(std::process::Command::new("kill").args(["-INT", &client.id().to_string()]).status().unwrap().success());
    eventually("the trap", COMMAND_DEADLINE, || match sprite().exec(&["cat", &file]).out().as_str() {
        "caught\n" => Ok(()),
        other => Err(other.to_owned()),
    });
    eventually("the client's end", Duration::from_secs(30), || {
        client.try_wait().unwrap().map(drop).ok_or_else(|| "it runs".to_owned())
    });
}

#[test]
fn ten_megabytes_of_output_arrive_whole() {
    let finished = sprite().exec(&["sh", "-c", "yes sprite | head -c 10000000"]).success();
    assert_eq!(finished.stdout.len(), 10_000_000);
}
