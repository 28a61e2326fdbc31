//! Interactive use, in a real pseudo-terminal.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use nix::{
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{LocalFlags, tcgetattr},
    },
    unistd::Pid,
};

use crate::{
    fake::Fake,
    run::{command, eventually, wait},
};

/// `sprite` with a terminal of its own.
struct Terminal {
    child: Child,
    keyboard: File,
    slave: OwnedFd,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn start(fake: &Fake, arguments: &[&str]) -> Self {
        let size = Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).unwrap();
        let wanted = command(fake, arguments);
        // It makes the terminal the controlling one, so that a resize is signalled, and then becomes `sprite`.
        let mut command = Command::new("setsid");
        command.args(["--ctty"]).arg(wanted.get_program()).args(wanted.get_args());
        command
            .env_clear()
            .envs(wanted.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .current_dir(fake.home());
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let (keyboard, mut screen) = (File::from(pty.master.try_clone().unwrap()), File::from(pty.master));
        let shown = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&shown);
        thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(len @ 1..) = screen.read(&mut piece) {
                seen.lock().unwrap().extend_from_slice(&piece[..len]);
            }
        });
        Self { child, keyboard, slave: pty.slave, shown }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    #[track_caller]
    fn await_text(&self, text: &str) {
        eventually(text, || self.text().contains(text));
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave)
            .unwrap()
            .local_flags
            .intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    #[track_caller]
    fn ends_with(&mut self, code: i32) {
        assert_eq!(wait(&mut self.child).unwrap().code(), Some(code), "{}", self.text());
        assert!(!self.is_raw(), "the terminal was not given back");
    }
}

#[test]
fn keys_resizes_and_the_exit_code_go_through() {
    let fake = Fake::start();
    let mut terminal = Terminal::start(&fake, &["exec", "--tty", "-s", "demo", "--env", "LANG=C", "shell"]);
    terminal.await_text("$ ");
    eventually("raw mode", || terminal.is_raw());
    assert!(fake.heard("tty=true&rows=30&cols=100"), "{:?}", fake.log());
    assert!(fake.heard("env=TERM%3Dxterm") && !fake.heard("LANG%3DC.UTF-8"));
    terminal.press("ünï\x03\x1a".as_bytes());
    eventually("the keys", || fake.heard(r"\x03\x1a"));
    let mut stty = Command::new("stty")
        .args(["rows", "50", "cols", "132"])
        .stdin(terminal.slave.try_clone().unwrap())
        .spawn()
        .unwrap();
    assert!(stty.wait().unwrap().success());
    eventually("the new size", || fake.heard(r#"said {"cols":132,"rows":50,"type":"resize"}"#));
    terminal.press(b"q");
    terminal.ends_with(3);
}

#[test]
fn a_console_can_be_left_and_found_again() {
    let fake = Fake::start();
    let mut terminal = Terminal::start(&fake, &["console", "demo"]);
    // The fake has no bash; which command is asked for is seen in its log.
    eventually("a shell is asked for", || fake.heard("cmd=bash&cmd=-l"));
    terminal.ends_with(1);

    let mut terminal = Terminal::start(&fake, &["attach", "-s", "demo"]);
    terminal.await_text("$ ");
    eventually("raw mode", || terminal.is_raw());
    terminal.press(b"ls\x1c");
    terminal.await_text("sprite attach 42 -s demo");
    terminal.ends_with(0);
    eventually("the server sees it", || fake.heard("left"));
    assert!(fake.heard(r#"typed b"ls""#), "{:?}", fake.log());
}

#[test]
fn a_killed_client_gives_the_terminal_back() {
    let fake = Fake::start();
    let mut terminal = Terminal::start(&fake, &["attach", "42", "-s", "demo"]);
    eventually("raw mode", || terminal.is_raw());
    terminal.await_text("$ ");
    kill(Pid::from_raw(terminal.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    terminal.ends_with(143);
}

#[test]
fn a_console_without_a_terminal_is_refused() {
    crate::run::sprite(&Fake::start(), &["console", "demo"]).code(2).says("terminal");
}

#[test]
fn destroying_asks_for_the_name() {
    let fake = Fake::start();
    let mut terminal = Terminal::start(&fake, &["destroy", "demo"]);
    terminal.await_text("Type its name");
    terminal.press(b"no\n");
    terminal.ends_with(2);
    assert!(!fake.heard("DELETE"));
    let mut terminal = Terminal::start(&fake, &["destroy", "demo"]);
    terminal.await_text("Type its name");
    terminal.press(b"demo\n");
    terminal.ends_with(0);
    assert!(fake.heard("DELETE"));
}
