//! Lines for the kernel's console, which the host keeps as a ring. PID 1 must not die of a console that cannot be written, so `eprintln!` is not used.

/// Writes one line to the console.
macro_rules! log {
    ($($text:tt)*) => {
        $crate::log::line(format_args!($($text)*))
    };
}
pub(crate) use log;

pub(crate) fn line(text: std::fmt::Arguments<'_>) {
    use std::io::Write as _;
    // Nobody could be told.
    drop(writeln!(std::io::stderr(), "sprite: {text}"));
}
