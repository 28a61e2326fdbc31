//! A person at a terminal: a real pseudo-terminal around a program, keys, and what is on the screen.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::pty::{Winsize, openpty};

use crate::eventually;

/// For a program under emulation to draw what is waited for.
const SCREEN_DEADLINE: Duration = Duration::from_secs(90);

/// A program with a terminal of its own; it is killed when this is dropped.
pub struct Terminal {
    child: Child,
    keyboard: File,
    /// Kept, so that its settings and size can be changed as a window's are.
    slave: OwnedFd,
    shown: Arc<Mutex<Vec<u8>>>,
    /// Where in the drawn text the last thing ends that was waited for.
    seen: usize,
}

impl Terminal {
    /// Starts `wanted` in a window of 30 rows of 100 columns.
    pub fn open(wanted: &Command) -> Self {
        let size = Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).expect("a pseudo-terminal");
        let end = || Stdio::from(pty.slave.try_clone().expect("a second handle"));
        // It makes the terminal the controlling one, so that a resize is signalled, and then becomes the program.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(wanted.get_program()).args(wanted.get_args());
        command.env_clear().envs(wanted.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if let Some(folder) = wanted.get_current_dir() {
            command.current_dir(folder);
        }
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("setsid runs");
        let keyboard = File::from(pty.master.try_clone().expect("a second handle"));
        let mut screen = File::from(pty.master);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let drawn = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(len @ 1..) = screen.read(&mut piece) {
                lock(&drawn).extend_from_slice(&piece[..len]);
            }
        });
        Self { child, keyboard, slave: pty.slave, shown, seen: 0 }
    }

    /// Waits until `text` is drawn, after everything that was waited for before.
    #[track_caller]
    pub fn shows(&mut self, text: &str) {
        self.seen = eventually(&format!("{text:?} on the screen"), SCREEN_DEADLINE, || {
            let drawn = self.text();
            let later = drawn.get(self.seen..).unwrap_or_default();
            later.find(text).map(|at| self.seen + at + text.len()).ok_or_else(|| later.to_owned())
        });
    }

    /// Everything that was drawn so far, without control sequences.
    pub fn text(&self) -> String {
        plain(&lock(&self.shown))
    }

    pub fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("it takes keys");
    }

    /// As a person who drags the window's corner.
    pub fn resize(&self, rows: u16, cols: u16) {
        let mut stty = Command::new("stty");
        stty.args(["rows", &rows.to_string(), "cols", &cols.to_string()]);
        stty.stdin(self.slave.try_clone().expect("a second handle"));
        assert!(stty.status().expect("stty runs").success(), "the window has another size");
    }

    #[track_caller]
    pub fn ends_with(&mut self, code: i32) {
        let status = eventually("the program's end", SCREEN_DEADLINE, || {
            self.child.try_wait().expect("it is our child").ok_or_else(|| plain(&lock(&self.shown)))
        });
        assert_eq!(status.code(), Some(code), "{}", self.text());
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // One that has ended is as good.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a terminal prints of it: escape sequences (ECMA-48) are left out, as far as full-screen programs use them.
fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::new();
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        if char != '\x1b' {
            out.push(char);
            continue;
        }
        match rest.next() {
            // CSI: parameters, then one letter.
            Some('[') => drop(rest.find(|char| matches!(char, '@'..='~'))),
            // OSC and DCS: to BEL or ST, whose backslash is swallowed with the next escape.
            Some(']' | 'P') => drop(rest.find(|char| matches!(char, '\x07' | '\x1b'))),
            // A character set has one more letter.
            Some('(' | ')') => drop(rest.next()),
            Some(_) | None => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_is_read_without_what_moves_the_cursor() {
        assert_eq!(plain("\x1b[?1049h\x1b[1;30Hünï\x1b(B\x1b[m\x1b]0;title\x07 end\x1b=".as_bytes()), "ünï end");
        assert_eq!(plain(b"cut \x1b[3"), "cut ");
    }
}
