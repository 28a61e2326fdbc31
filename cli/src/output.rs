//! The two streams: answers on stdout, everything about them on stderr. A reader that has left does not make us panic.

use std::{
    fmt::Display,
    future::Future,
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use crate::failure::Failure;

/// Work that is done sooner shows no spinner: flicker tells nothing.
const SPINNER_AFTER: Duration = Duration::from_millis(400);
const SPINNER_TICK: Duration = Duration::from_millis(100);

/// One line of answer.
pub(crate) fn answer(line: impl Display) -> Result<(), Failure> {
    raw(format!("{line}\n").as_bytes())
}

pub(crate) fn json(value: &Value) -> Result<(), Failure> {
    answer(format!("{value:#}"))
}

pub(crate) fn raw(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| Failure::of_output(&error))
}

/// Something about the answer. Nobody may be listening, which changes nothing.
pub(crate) fn note(line: impl Display) {
    drop(writeln!(io::stderr(), "{line}"));
}

pub(crate) fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Runs `work`; if it takes a while and somebody watches, a spinner says what is going on.
pub(crate) async fn with_spinner<T>(text: impl Into<String>, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    if !io::stderr().is_terminal() {
        return work.await;
    }
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = tokio::time::sleep(SPINNER_AFTER) => {}
    }
    let spinner = Spinner::start(text);
    let done = work.await;
    drop(spinner);
    done
}

/// Shown on stderr if that is a terminal, gone when dropped.
#[derive(Debug)]
pub(crate) struct Spinner(Option<ProgressBar>);

impl Spinner {
    pub(crate) fn start(text: impl Into<String>) -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")
            .unwrap_or_else(|_bad| ProgressStyle::default_spinner());
        bar.set_style(style);
        bar.set_message(text.into());
        bar.enable_steady_tick(SPINNER_TICK);
        Self(Some(bar))
    }

    /// What is going on now; a line of its own where there is no spinner.
    pub(crate) fn say(&self, text: &str) {
        match &self.0 {
            Some(bar) => bar.set_message(text.to_owned()),
            None => note(text),
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
