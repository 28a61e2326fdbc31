//! Streams, exit codes, signals and ends of commands.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    fake::Fake,
    run::{command, eventually, sprite, wait, with_input},
};

#[test]
fn both_streams_arrive_apart() {
    let done = sprite(&Fake::start(), &["exec", "-s", "demo", "--", "both"]).code(0);
    assert_eq!((done.text().as_str(), done.err.as_str()), ("out", "err"));
}

#[test]
fn the_exit_code_is_the_commands() {
    let fake = Fake::start();
    for code in [0, 1, 42, 126, 127, 143, 255] {
        sprite(&fake, &["x", "-s", "demo", "exit", &code.to_string()]).code(code);
    }
}

#[test]
fn arguments_arrive_as_they_are_and_options_after_them_are_theirs() {
    let fake = Fake::start();
    let odd = ["a b", "", "$HOME", "ünï 🎈", "new\nline", "-s", "--tty", "--", "100%&=+"];
    let arguments: Vec<&str> = ["exec", "-s", "demo", "--", "echo"].into_iter().chain(odd).collect();
    assert_eq!(sprite(&fake, &arguments).code(0).text(), odd.join(" "));
    assert_eq!(sprite(&fake, &["exec", "-s", "demo", "echo", "-s", "x"]).code(0).text(), "-s x");
    let long = "x".repeat(60_000);
    assert_eq!(sprite(&fake, &["exec", "-s", "demo", "--", "echo", &long]).code(0).text(), long);
    sprite(&fake, &["exec", "-s", "demo", "--", "echo", &"x".repeat(70_000)]).code(2).says("stdin");
}

#[test]
fn folder_and_variables_are_passed() {
    let query = sprite(
        &Fake::start(),
        &["exec", "-s", "demo", "--dir", "/a b", "--env", "A=1,B=t=wo", "--env", "C=x\\,y", "--", "query"],
    )
    .code(0)
    .text();
    for part in ["dir=/a%20b", "env=A%3D1", "env=B%3Dt%3Dwo", "env=C%3Dx%2Cy", "path=query", "stdin=true"] {
        assert!(query.contains(part), "{part} is not in {query}");
    }
    assert!(!query.contains("tty"), "{query}");
    sprite(&Fake::start(), &["exec", "-s", "demo", "--env", "NOVALUE", "--", "true"]).code(2).says("NOVALUE");
}

#[test]
fn input_of_any_size_and_kind_comes_back() {
    let fake = Fake::start();
    let bytes: Vec<u8> = (0..8_u32 << 20).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let done = with_input(command(&fake, &["exec", "-s", "demo", "--", "cat"]), &bytes).code(0);
    assert!(done.out == bytes, "{} bytes came back of {}", done.out.len(), bytes.len());
    assert_eq!(sprite(&fake, &["exec", "-s", "demo", "--", "cat"]).code(0).out, b"");
}

/// Starts a command that says `ready`.
fn ready(fake: &Fake, name: &str, stdin: Stdio) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = command(fake, &["exec", "-s", "demo", "--", name])
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, out)
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
}

#[test]
fn signals_go_to_the_command_which_decides() {
    let fake = Fake::start();
    for (sent, name) in [
        (Signal::SIGINT, "SIGINT"),
        (Signal::SIGTERM, "SIGTERM"),
        (Signal::SIGHUP, "SIGHUP"),
        (Signal::SIGQUIT, "SIGQUIT"),
    ] {
        let (mut child, mut out) = ready(&fake, "trap", Stdio::null());
        signal(&child, sent);
        assert_eq!(wait(&mut child).unwrap().code(), Some(7), "{name}");
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        assert!(rest.contains(name), "{rest}");
    }
}

#[test]
fn a_signal_reaches_a_command_that_does_not_read_its_input() {
    let fake = Fake::start();
    let (mut child, _out) = ready(&fake, "deaf", Stdio::piped());
    let mut stdin = child.stdin.take().unwrap();
    // More than all buffers on the way hold: the stream is stuck.
    std::thread::spawn(move || while stdin.write_all(&[0; 1 << 16]).is_ok() {});
    let status = format!("/proc/{}/io", child.id());
    eventually("the client has read a lot", || {
        let io = std::fs::read_to_string(&status).unwrap();
        let read: u64 = io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap();
        read > 1 << 20
    });
    signal(&child, Signal::SIGINT);
    assert_eq!(wait(&mut child).unwrap().code(), Some(130));
    assert!(fake.heard("kill signal=SIGINT&timeout=0s"), "{:?}", fake.log());
}

#[test]
fn a_second_interrupt_ends_the_client() {
    let fake = Fake::start();
    let (mut child, _out) = ready(&fake, "deaf", Stdio::null());
    signal(&child, Signal::SIGINT);
    // Two signals that are pending together are one.
    eventually("the second one counts", || {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code() == Some(130);
        }
        signal(&child, Signal::SIGINT);
        false
    });
}

#[test]
fn a_reader_that_leaves_ends_the_command() {
    let fake = Fake::start();
    let mut child = command(&fake, &["exec", "-s", "demo", "--", "yes"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut two = [0; 2];
    child.stdout.take().unwrap().read_exact(&mut two).unwrap();
    assert_eq!((&two, wait(&mut child).unwrap().code()), (b"y\n", Some(141)));
    eventually("the server sees it", || fake.heard("left"));
    assert!(fake.heard("SIGPIPE"), "{:?}", fake.log());
}

#[test]
fn a_connection_that_ends_before_the_command_is_no_success() {
    let fake = Fake::start();
    let lost = sprite(&fake, &["exec", "-s", "demo", "--", "vanish"]).code(1).says("ended before the command");
    assert_eq!(lost.text(), "part", "what came is printed");
    sprite(&fake, &["exec", "-s", "demo", "--", "stopped"]).code(1).says("the sprite was stopped");
}

#[test]
fn refusals_are_explained() {
    let fake = Fake::start();
    sprite(&fake, &["exec", "-s", "nobody", "--", "true"]).code(1).says("\"nobody\" not found");
    sprite(&fake, &["exec", "--", "true"]).code(2).says("-s NAME");
    sprite(&fake, &["exec", "-s", "demo"]).code(2);
    sprite(&fake, &["attach", "7", "-s", "demo"]).code(1).says("session not found: 7");
    let mut nowhere = command(&fake, &["exec", "-s", "demo", "--", "true"]);
    nowhere.env("SPRITES_API_URL", "http://localhost:1");
    with_input(nowhere, b"").code(1).says("./dev up");
}

#[test]
fn a_sprite_on_the_move_is_waited_for() {
    let fake = Fake::start();
    assert_eq!(sprite(&fake, &["exec", "-s", "moving", "--", "echo", "hi"]).code(0).text(), "hi");
    assert_eq!(fake.log().len(), 3);
}

#[test]
fn one_request_can_carry_a_command() {
    let fake = Fake::start();
    let done = sprite(&fake, &["exec", "-s", "demo", "--http-post", "--", "both"]).code(5);
    assert_eq!((done.text().as_str(), done.err.as_str()), ("out", "err"));
    let input: Vec<u8> = (0..200_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    let echoed = with_input(command(&fake, &["exec", "-s", "demo", "--http-post", "--", "cat"]), &input).code(5);
    assert!(echoed.out == input, "{} bytes of {}", echoed.out.len(), input.len());
    sprite(&fake, &["exec", "-s", "nobody", "--http-post", "--", "both"]).code(1).says("not found");
}
