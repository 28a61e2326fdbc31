//! Moves bytes between a command and its session.
//!
//! ```text
//!  stdout, stderr or terminal ─▶ pump ─▶ Session::print
//!  Session::write ─▶ stdin queue ─▶ feed ─▶ stdin or terminal
//! ```

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
    sync::{mpsc, watch},
};

use super::{ring::Stream, session::Session, terminal::Terminal};

/// Largest message of output.
const PIECE_BYTES: usize = 64 << 10;
/// A command has ended, but something in the background still holds its output: the session is over when nothing came for this long.
const QUIET: Duration = Duration::from_millis(100);
/// It is also over after this much output: more than the command itself can have left in the pipe.
const LEFTOVER_BYTES_MAX: usize = 1 << 20;

/// Ends of a command's streams, from PID 1's side.
#[derive(Debug)]
pub(super) enum Streams {
    Pipes {
        stdin: Option<OwnedFd>,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// Both ends: ours of the programs' side keeps the terminal alive until the command has ended, should it close all of its own.
    Terminal {
        master: OwnedFd,
        slave: OwnedFd,
    },
}

#[derive(Debug)]
pub(super) enum Stdin {
    Data(Bytes),
    Eof,
}

/// The session's part that the service does not see: what has to be run.
#[derive(Debug)]
pub(super) struct Unstarted {
    pub session: Arc<Session>,
    pub ends: Ends,
    pub stdin: mpsc::Receiver<Stdin>,
}

/// What is read from and written to. The session has the terminal too: it is resized, and tells which group is in its foreground.
#[derive(Debug)]
pub(super) enum Ends {
    Pipes { stdin: Option<pipe::Sender>, stdout: pipe::Receiver, stderr: pipe::Receiver },
    Terminal(Arc<Terminal>, OwnedFd),
}

impl Ends {
    pub(super) fn of(streams: Streams) -> io::Result<Self> {
        Ok(match streams {
            Streams::Pipes { stdin, stdout, stderr } => Self::Pipes {
                stdin: stdin.map(pipe::Sender::from_owned_fd).transpose()?,
                stdout: pipe::Receiver::from_owned_fd(stdout)?,
                stderr: pipe::Receiver::from_owned_fd(stderr)?,
            },
            Streams::Terminal { master, slave } => Self::Terminal(Arc::new(Terminal::new(master)?), slave),
        })
    }

    pub(super) fn terminal(&self) -> Option<Arc<Terminal>> {
        match self {
            Self::Pipes { .. } => None,
            Self::Terminal(terminal, _) => Some(Arc::clone(terminal)),
        }
    }
}

impl Unstarted {
    /// Moves bytes until the command has ended and everything it wrote has been passed on. `detached` gets the number of bytes that no client saw.
    ///
    /// `ended` is called before the last message: from then on nobody can attach.
    pub(super) async fn run(self, detached: impl Fn(usize) + Sync, ended: impl FnOnce()) {
        let Self { session, ends, stdin } = self;
        let (over, end) = watch::channel(false);
        let exit = async {
            let exit = session.child.ended().await;
            over.send_replace(true);
            exit.code()
        };
        let code = match ends {
            Ends::Pipes { stdin: sink, stdout, stderr } => {
                let writer = tokio::spawn(feed_pipe(stdin, sink));
                let (code, out, err) = tokio::join!(
                    exit,
                    pump(&session, Stream::Stdout, stdout, end.clone(), &detached),
                    pump(&session, Stream::Stderr, stderr, end, &detached),
                );
                writer.abort();
                for rest in [out, err].into_iter().flatten() {
                    tokio::spawn(discard(rest));
                }
                code
            }
            Ends::Terminal(terminal, slave) => {
                let writer = tokio::spawn(feed_terminal(stdin, Arc::clone(&terminal)));
                let exit = async {
                    let code = exit.await;
                    drop(slave);
                    code
                };
                let (code, _rest) = tokio::join!(exit, pump(&session, Stream::Stdout, &*terminal, end, &detached));
                writer.abort();
                code
            }
        };
        ended();
        session.finish(code);
    }
}

/// Something output is read from.
trait Source {
    /// Appends what is there; waits if there is nothing. 0: the end.
    async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize>;
}

impl Source for pipe::Receiver {
    async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        self.read_buf(buffer).await
    }
}

impl Source for &Terminal {
    async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        Terminal::read(self, buffer).await
    }
}

/// Passes output on until its end, or until the command has ended and its output is quiet. Returns a source that is still held by something.
async fn pump<S: Source>(
    session: &Session,
    stream: Stream,
    mut from: S,
    mut end: watch::Receiver<bool>,
    detached: impl Fn(usize),
) -> Option<S> {
    let mut leftover = 0;
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(PIECE_BYTES);
        let over = *end.borrow_and_update();
        let read = tokio::select! {
            biased;
            read = from.read(&mut buffer) => read,
            // Looks again with the limit of what has ended.
            _ = end.changed(), if !over => continue,
            () = tokio::time::sleep(QUIET), if over => return Some(from),
        };
        let Ok(1..) = read else { return None };
        while !buffer.is_empty() {
            let len = buffer.len().min(PIECE_BYTES);
            let unseen = session.print(stream, buffer.split_to(len).freeze()).await;
            if unseen > 0 {
                detached(unseen);
            }
            leftover += if over { len } else { 0 };
        }
        if leftover > LEFTOVER_BYTES_MAX {
            return Some(from);
        }
    }
}

/// Reads and drops what background processes go on writing, so that they do not die of a closed pipe.
async fn discard(mut from: pipe::Receiver) {
    let mut buffer = BytesMut::with_capacity(PIECE_BYTES / 16);
    while let Ok(1..) = from.read_buf(&mut buffer).await {
        buffer.clear();
    }
}

async fn feed_pipe(mut from: mpsc::Receiver<Stdin>, mut to: Option<pipe::Sender>) {
    while let Some(input) = from.recv().await {
        match (input, &mut to) {
            (Stdin::Data(data), Some(sink)) => {
                if sink.write_all(&data).await.is_err() {
                    // The command has closed its stdin; what comes is dropped, so that its client does not wait.
                    to = None;
                }
            }
            (Stdin::Eof, _) => to = None,
            (Stdin::Data(_), None) => {}
        }
    }
}

async fn feed_terminal(mut from: mpsc::Receiver<Stdin>, terminal: Arc<Terminal>) {
    while let Some(input) = from.recv().await {
        // In a terminal the end of input is a key.
        if let Stdin::Data(data) = input
            && terminal.write_all(&data).await.is_err()
        {
            return;
        }
    }
}
