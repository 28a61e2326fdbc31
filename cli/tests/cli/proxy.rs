//! Ports of a sprite on this machine.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    process::Stdio,
};

use crate::{
    fake::Fake,
    run::{DEADLINE, command, sprite, with_input},
};

#[test]
fn a_port_is_brought_here() {
    let fake = Fake::start();
    let mut child = command(&fake, &["proxy", "0:5432", "-s", "demo"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let (address, there) = line.trim().split_once(" → ").unwrap();
    assert_eq!(there, "demo:5432");
    for round in 0..3 {
        let mut client = TcpStream::connect(address).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        let sent = format!("{}{round} bye\n", "data ".repeat(100_000));
        client.write_all(sent.as_bytes()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut back = String::new();
        client.read_to_string(&mut back).unwrap();
        assert!(back == sent, "{} bytes of {}", back.len(), sent.len());
    }
    assert!(fake.heard(r#""port":5432"#));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn stdin_and_stdout_can_be_the_connection() {
    let fake = Fake::start();
    let done = with_input(command(&fake, &["proxy", "-W", "10.0.0.1:22", "-s", "demo"]), b"SSH-2.0 bye\n").code(0);
    assert_eq!(done.out, b"SSH-2.0 bye\n");
    assert!(fake.heard(r#"{"host":"10.0.0.1","port":22}"#), "{:?}", fake.log());
    sprite(&fake, &["proxy", "-W", ":1", "-s", "demo"]).code(1).says("connection refused");
    sprite(&fake, &["proxy", "-s", "demo"]).code(2);
}
