//! The user's terminal: its size, raw mode, and giving it back whatever happens.
//!
//! # Invariants
//!
//! 1. Once [`RawMode::enter`] succeeded, the terminal gets its settings back by drop, by [`restore`] before the process exits, and by the panic hook
//!    that calls it. Restoring twice is harmless.

use std::{
    io::{self, IsTerminal as _, Write as _},
    os::fd::AsRawFd as _,
    sync::{Mutex, PoisonError},
};

use nix::sys::termios::{self, SetArg, Termios};

/// What the terminal had before raw mode; the process has one terminal.
static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

struct Saved {
    settings: Termios,
    /// A full-screen program was shown when last looked at.
    alternate: bool,
}

/// Cursor and colours as a shell expects them, mouse reports and bracketed paste off, main screen.
const LEAVE_FULL_SCREEN: &[u8] =
    b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1004l\x1b[?1l\x1b>\x1b[<u\x1b[?1049l\x1b[?25h\x1b[0m";
const ALTERNATE_ON: &[u8] = b"\x1b[?1049h";
const ALTERNATE_OFF: &[u8] = b"\x1b[?1049l";

/// Keys go through as they are, Ctrl-C included.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Of the terminal on stdin. `None` if there is none: then nothing has to be raw.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let settings = termios::tcgetattr(&stdin)?;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Saved { settings, alternate: false });
        let guard = Self(());
        guard.again()?;
        Ok(Some(guard))
    }

    /// After the process was stopped and the shell has set the terminal as it likes it.
    pub(crate) fn again(&self) -> io::Result<()> {
        let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(saved) = saved.as_ref() else { return Ok(()) };
        let mut raw = saved.settings.clone();
        termios::cfmakeraw(&mut raw);
        Ok(termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back. Does nothing if it was not taken.
pub(crate) fn restore() {
    let Some(saved) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    if saved.alternate {
        let mut stdout = io::stdout();
        drop(stdout.write_all(LEAVE_FULL_SCREEN).and_then(|()| stdout.flush()));
    }
    // If the terminal is gone there is nothing to restore.
    termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &saved.settings).ok();
}

/// Looks at what is printed, to know whether a full-screen program is left behind when the connection ends before it.
#[derive(Debug, Default)]
pub(crate) struct ScreenWatch {
    /// The end of what was seen before: a sequence may be cut anywhere.
    tail: Vec<u8>,
    alternate: bool,
}

impl ScreenWatch {
    pub(crate) fn see(&mut self, data: &[u8]) {
        self.tail.extend_from_slice(data);
        let last = |sequence: &[u8]| self.tail.windows(sequence.len()).rposition(|window| window == sequence);
        let now = match (last(ALTERNATE_ON), last(ALTERNATE_OFF)) {
            (None, None) => self.alternate,
            (on, off) => on > off,
        };
        let keep = self.tail.len().min(ALTERNATE_ON.len() - 1);
        self.tail.drain(..self.tail.len() - keep);
        if now != self.alternate {
            self.alternate = now;
            if let Some(saved) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                saved.alternate = now;
            }
        }
    }
}

/// Rows and columns of the terminal on stdout, or else on stdin.
pub(crate) fn size() -> Option<(u16, u16)> {
    size_of(io::stdout().as_raw_fd()).or_else(|| size_of(io::stdin().as_raw_fd()))
}

fn size_of(fd: i32) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    #[expect(unsafe_code, reason = "neither std nor nix has a call for it")]
    // SAFETY: TIOCGWINSZ writes one `winsize` to the pointer, which is to a live one, and fails on anything that is not a terminal.
    let result = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Ctrl-\, as a byte or as terminals with the extended keyboard protocol send it: where it begins in what was typed.
pub(crate) fn detach_key(typed: &[u8]) -> Option<usize> {
    const KEY: u8 = 0x1c;
    const EXTENDED: &[u8] = b"\x1b[92;5u";
    let byte = typed.iter().position(|&byte| byte == KEY);
    let extended = typed.windows(EXTENDED.len()).position(|window| window == EXTENDED);
    byte.into_iter().chain(extended).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_screen_program_is_noticed_however_its_bytes_are_cut() {
        let mut watch = ScreenWatch::default();
        watch.see(b"vim starts \x1b[?10");
        assert!(!watch.alternate);
        watch.see(b"49h");
        assert!(watch.alternate);
        for byte in b"text\x1b[?1049l" {
            watch.see(&[*byte]);
        }
        assert!(!watch.alternate);
        watch.see(b"\x1b[?1049h in, out \x1b[?1049l and in again \x1b[?1049h");
        assert!(watch.alternate);
    }

    #[test]
    fn the_detach_key_is_found_in_what_was_typed() {
        assert_eq!(detach_key(b"ls\r"), None);
        assert_eq!(detach_key(b"ls\x1c"), Some(2));
        assert_eq!(detach_key(b"a\x1b[92;5ub\x1c"), Some(1));
        assert_eq!(detach_key("ünï".as_bytes()), None);
    }
}
