//! Starting a command: its user, its streams, the fork, and what is said when it cannot be.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::PathBuf,
};

use nix::libc;
use proto::agent::{ExecOutput, ExecStart, SessionInfo, exec_output::Output};
use tokio::{io::AsyncReadExt as _, net::unix::pipe, sync::mpsc};
use tonic::Status;

use super::{
    SIZE_DEFAULT,
    pump::Streams,
    resolve::{self, User},
    session::{self, Message},
    terminal,
};
use crate::{
    init::{self, c_string},
    log,
    reaper::{KillOnDrop, Reaper},
    spawn::{self, Program, Report, Step},
    sys,
};

/// `/etc/passwd` and `/etc/group` are read up to here.
const USER_FILE_BYTES_MAX: u64 = 4 << 20;
/// What a command may write ahead of its reader; more than by default, so that the two take turns less often.
const OUTPUT_PIPE_BYTES: i32 = 256 << 10;
const EXIT_NOT_FOUND: i32 = 127;
const EXIT_NOT_EXECUTABLE: i32 = 126;

/// What no program could be given.
pub(super) fn check(start: &ExecStart) -> Result<(), Status> {
    let words = start.argv.iter().chain([&start.path, &start.dir, &start.user]);
    if words.chain(start.env.keys()).chain(start.env.values()).any(|word| word.contains('\0')) {
        return Err(Status::invalid_argument("a NUL byte in the command, its folder or its environment"));
    }
    match start.env.keys().find(|name| name.is_empty() || name.contains('=')) {
        Some(name) => Err(Status::invalid_argument(format!("{name:?} cannot be the name of an environment variable"))),
        None => Ok(()),
    }
}

/// A command that has been forked. Dropped before its session takes it over, it is killed.
#[derive(Debug)]
pub(super) struct Begun {
    pub child: KillOnDrop,
    report: Option<OwnedFd>,
    pub streams: Streams,
    pub command: resolve::Command,
}

impl Begun {
    /// Waits until it runs or has failed.
    pub(super) async fn report(mut self) -> (Report, Self) {
        let mut bytes = Vec::new();
        if let Some(report) = self.report.take() {
            let read = async {
                let mut report = pipe::Receiver::from_owned_fd(report)?;
                report.read_to_end(&mut bytes).await
            };
            if let Err(error) = read.await {
                log!("no report of process {}: {error}", self.child.child().pid);
            }
        }
        (spawn::parse_report(&bytes), self)
    }
}

/// Forks the command. Runs on the environment's own thread.
pub(super) fn begin(
    reaper: &Reaper,
    start: &ExecStart,
    env: &BTreeMap<String, String>,
    cgroup: OwnedFd,
) -> Result<Begun, Status> {
    let (passwd, group) = (read_user_file("/etc/passwd"), read_user_file("/etc/group"));
    let name = if start.user.is_empty() { resolve::USER_DEFAULT } else { &start.user };
    let user = User::find(name, &passwd, &group)
        .ok_or_else(|| Status::invalid_argument(format!("the sprite has no user {name}")))?;
    let mut command = resolve::command(start, &user, env);
    if start.dir.is_empty() && !PathBuf::from(&command.dir).is_dir() {
        command.dir = "/".into();
    }
    let internal = |what: &'static str| move |error: io::Error| Status::internal(format!("{what}: {error}"));
    let (streams, [stdin, stdout, stderr]) = if start.tty {
        open_terminal(start, &user).map_err(internal("no terminal"))?
    } else {
        open_pipes(start.stdin).map_err(internal("no pipes"))?
    };
    let strings =
        |texts: &[String]| texts.iter().map(|text| c_string(text.as_str())).collect::<io::Result<Vec<CString>>>();
    let program = Program {
        candidates: strings(&command.candidates).map_err(internal("the program"))?,
        argv: strings(&command.argv).map_err(internal("the arguments"))?,
        env: strings(&command.env).map_err(internal("the environment"))?,
        dir: Some(c_string(command.dir.as_str()).map_err(internal("the folder"))?),
        stdin,
        stdout,
        stderr,
        tty: start.tty,
        user: user.credentials,
        cgroup: Some(cgroup),
        oom_score_adj: b"0",
        nice: 0,
    };
    let (child, report) = spawn::start(reaper, &program).map_err(|error| {
        Status::resource_exhausted(format!(
            "cannot start a process: {error}; the sprite may be out of memory or processes"
        ))
    })?;
    Ok(Begun { child: KillOnDrop::new(child), report: Some(report), streams, command })
}

/// Empty if it is not there or no plain file.
fn read_user_file(path: &str) -> String {
    let open = || -> io::Result<String> {
        let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Ok(String::new());
        }
        let mut bytes = Vec::new();
        file.take(USER_FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    open().unwrap_or_default()
}

type Opened = (Streams, [OwnedFd; 3]);

fn open_pipes(stdin: bool) -> io::Result<Opened> {
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(io::Error::from);
    let (theirs, ours) = if stdin {
        let (theirs, ours) = pipe()?;
        (theirs, Some(ours))
    } else {
        (File::open("/dev/null")?.into(), None)
    };
    let ((stdout, out), (stderr, err)) = (pipe()?, pipe()?);
    for pipe in [&stdout, &stderr] {
        nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(OUTPUT_PIPE_BYTES))?;
    }
    Ok((Streams::Pipes { stdin: ours, stdout, stderr }, [theirs, out, err]))
}

fn open_terminal(start: &ExecStart, user: &User) -> io::Result<Opened> {
    use nix::sys::termios::{InputFlags, SetArg, tcgetattr, tcsetattr};
    let flags = nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_NOCTTY | nix::fcntl::OFlag::O_CLOEXEC;
    let master = nix::pty::posix_openpt(flags)?;
    nix::pty::unlockpt(&master)?;
    let slave = sys::terminal_of(master.as_fd())?;
    // Its group is that of `tty`, by the mount.
    nix::unistd::fchown(&slave, Some(user.credentials.uid.into()), None)?;
    let mut modes = tcgetattr(&slave)?;
    modes.input_flags.insert(InputFlags::IUTF8);
    tcsetattr(&slave, SetArg::TCSANOW, &modes)?;
    let size = start.size.unwrap_or(SIZE_DEFAULT);
    terminal::set_size(&slave, size)?;
    let theirs = [init::duplicate(&slave)?, init::duplicate(&slave)?, init::duplicate(&slave)?];
    let master = master.as_fd().try_clone_to_owned()?;
    Ok((Streams::Terminal { master, slave }, theirs))
}

/// A command that could not be executed is reported as a shell does: words and an exit code.
pub(super) fn refused(
    id: String,
    start: &ExecStart,
    command: &resolve::Command,
    errno: i32,
) -> mpsc::Receiver<Message> {
    let program = if start.path.is_empty() { command.argv.first() } else { Some(&start.path) };
    let program = program.map_or("", String::as_str);
    let (why, code) = match (errno, program.contains('/')) {
        (libc::ENOENT, false) => ("command not found".to_owned(), EXIT_NOT_FOUND),
        (libc::ENOENT | libc::ENOTDIR, _) => ("No such file or directory".to_owned(), EXIT_NOT_FOUND),
        (libc::EACCES, _) => ("Permission denied".to_owned(), EXIT_NOT_EXECUTABLE),
        (errno, _) => (io::Error::from_raw_os_error(errno).to_string(), EXIT_NOT_EXECUTABLE),
    };
    let size = start.size.unwrap_or(SIZE_DEFAULT);
    let info = SessionInfo {
        session_id: id,
        command: command.argv.join(" "),
        created_unix_ms: session::unix_ms(),
        rows: size.rows,
        cols: size.cols,
        is_owner: true,
        tty: start.tty,
    };
    let text = bytes::Bytes::from(format!("sprite: {program}: {why}{}", if start.tty { "\r\n" } else { "\n" }));
    let text = if start.tty { Output::Stdout(text) } else { Output::Stderr(text) };
    let (queue, messages) = mpsc::channel(3);
    for output in [Output::Info(info), text, Output::Exit(code)] {
        // There is room for three.
        drop(queue.try_send(Ok(ExecOutput { output: Some(output) })));
    }
    messages
}

pub(super) fn failed(step: Step, errno: i32, command: &resolve::Command) -> Status {
    let error = io::Error::from_raw_os_error(errno);
    match step {
        Step::Folder => Status::invalid_argument(format!("cannot run in {}: {error}", command.dir)),
        Step::Exec => {
            Status::invalid_argument(format!("cannot run {}: {error}", command.argv.first().map_or("", String::as_str)))
        }
        Step::User => Status::internal(format!("cannot become the user: {error}")),
        Step::Setup => Status::internal(format!("cannot prepare the process: {error}")),
    }
}
