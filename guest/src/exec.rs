//! Commands in the environment, and the sessions clients have with them.
//!
//! A session outlives its clients and the control channel: one with a terminal for ever, one without for as long as its client asked for, counted only
//! while a host is connected.

mod resolve;
mod ring;
mod session;
mod signals;

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::CString,
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::{libc, sys::signal::Signal};
use proto::agent::{
    ExecAttach, ExecInput, ExecOutput, ExecStart, KillEvent, KillSessionRequest, Session as Listed, SessionInfo,
    TerminalSize, exec_input::Input, exec_output::Output,
};
use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe,
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tonic::Status;

use self::{
    resolve::User,
    session::{About, Attachment, Message, Session, Stdin, Streams},
};
use crate::{
    cgroup,
    environment::{Environment, NotRunning},
    identity, init,
    init::c_string,
    log,
    ports::{self, Listening, Ports},
    reaper::{Child, Exit, Reaper},
    spawn::{self, Program, Report, Step},
    sys,
};

/// Sessions at a time.
const SESSIONS_MAX: usize = 512;
/// Ended sessions that are still told from ones that never were.
const ENDED_MAX: usize = 256;
/// Letters and digits of an id, without those that look alike.
const ID_ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const ID_LEN: usize = 8;
/// `/etc/passwd` and `/etc/group` are read up to here.
const USER_FILE_BYTES_MAX: u64 = 4 << 20;
/// How exactly the time without a client is counted.
const LINGER_STEP: Duration = Duration::from_millis(100);
/// From the polite signal to SIGKILL, for a command whose time without a client is over.
const END_GRACE: Duration = Duration::from_secs(2);
/// A killed command's exit is waited for so long; longer means that the kernel holds it.
const KILLED_LIMIT: Duration = Duration::from_secs(5);
/// What a command may write ahead of its reader; more than by default, so that the two take turns less often.
const OUTPUT_PIPE_BYTES: i32 = 256 << 10;
/// A client is told of ports once its command has run for so long; most end before.
const PORTS_AFTER: Duration = Duration::from_millis(500);
const SIZE_DEFAULT: TerminalSize = TerminalSize { rows: 24, cols: 80 };
const EXIT_NOT_FOUND: i32 = 127;
const EXIT_NOT_EXECUTABLE: i32 = 126;

/// All sessions of this VM.
#[derive(Debug)]
pub(crate) struct Sessions {
    environment: Arc<Environment>,
    reaper: Reaper,
    ports: Ports,
    table: Mutex<Table>,
    /// Whether a host is connected.
    host: watch::Receiver<bool>,
    detached_output_bytes: AtomicU64,
    /// Rung when the number of clients or sessions changed.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    living: BTreeMap<String, Arc<Session>>,
    ended: VecDeque<String>,
}

/// Sessions that count, for the host's idle policy (ruling 28).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub attached: usize,
    pub detached: usize,
    pub detached_output_bytes: u64,
}

/// What a client is connected to: its place, and its messages.
type Connected = (Option<Attachment>, mpsc::Receiver<Message>);

impl Sessions {
    pub(crate) fn new(
        environment: Arc<Environment>,
        reaper: Reaper,
        ports: Ports,
        host: watch::Receiver<bool>,
    ) -> Arc<Self> {
        Arc::new(Self {
            environment,
            reaper,
            ports,
            table: Mutex::default(),
            host,
            detached_output_bytes: AtomicU64::new(0),
            changed: Notify::new(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rung when [`Sessions::counts`] may have changed, except for output.
    pub(crate) fn changed(&self) -> &Notify {
        &self.changed
    }

    pub(crate) fn counts(&self) -> Counts {
        let table = self.table();
        let attached = table.living.values().filter(|session| *session.attached().borrow() > 0).count();
        Counts {
            attached,
            detached: table.living.len() - attached,
            detached_output_bytes: self.detached_output_bytes.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn list(&self) -> Vec<Listed> {
        let sessions: Vec<_> = self.table().living.values().cloned().collect();
        sessions.iter().map(|session| session.listed()).collect()
    }

    /// Starts or attaches, and serves the client until one of both ends.
    pub(crate) async fn serve(
        self: &Arc<Self>,
        first: Option<ExecInput>,
        env: BTreeMap<String, String>,
        inputs: tonic::Streaming<ExecInput>,
    ) -> Result<mpsc::Receiver<Message>, Status> {
        let (attachment, messages) = match first.and_then(|first| first.input) {
            Some(Input::Start(start)) => self.start(start, env).await?,
            Some(Input::Attach(attach)) => self.attach(&attach)?,
            _ => return Err(Status::invalid_argument("the first input has to be start or attach")),
        };
        let Some(attachment) = attachment else { return Ok(messages) };
        let (forward, out) = mpsc::channel(1);
        let ports = self.ports.clone();
        tokio::spawn(async move {
            // Whichever ends first is the disconnect: the attachment is dropped.
            tokio::select! {
                () = take_inputs(&attachment, inputs) => {}
                () = pass_on(messages, &forward, &ports) => {}
                () = forward.closed() => {}
            }
        });
        Ok(out)
    }

    fn attach(&self, attach: &ExecAttach) -> Result<Connected, Status> {
        let session = self.find(&attach.session_id).map_err(|_ended| not_found(&attach.session_id))?;
        let (attachment, messages) = session.attach(attach.size).ok_or_else(|| not_found(&attach.session_id))?;
        self.changed.notify_waiters();
        Ok((Some(attachment), messages))
    }

    /// A living session; otherwise whether there ever was one.
    fn find(&self, id: &str) -> Result<Arc<Session>, bool> {
        let table = self.table();
        table.living.get(id).cloned().ok_or_else(|| table.ended.iter().any(|ended| ended == id))
    }

    async fn start(self: &Arc<Self>, start: ExecStart, env: BTreeMap<String, String>) -> Result<Connected, Status> {
        if self.table().living.len() >= SESSIONS_MAX {
            return Err(Status::resource_exhausted(format!("{SESSIONS_MAX} sessions run already; end some")));
        }
        check(&start)?;
        let id = new_id().map_err(|error| Status::internal(format!("no random numbers: {error}")))?;
        // Opened here: the environment's root does not show the machine's control groups.
        let cgroup =
            tokio::task::spawn_blocking(cgroup::sessions).await.map_err(|error| Status::internal(error.to_string()))?;
        let cgroup = cgroup.map_err(|error| Status::internal(format!("no control group for the command: {error}")))?;
        let reaper = self.reaper.clone();
        let wanted = start.clone();
        let begun = self.environment.inside(move || begin(&reaper, &wanted, &env, cgroup.into())).await;
        let begun = begun.map_err(|NotRunning| Status::unavailable(NotRunning.to_string()))??;
        let (report, begun) = begun.report().await;
        match report {
            Report::Running { pid, candidate } => self.register(id, &start, begun, pid, candidate),
            Report::Failed { step: Step::Exec, errno } if errno != libc::E2BIG => {
                Ok((None, refused(id, &start, &begun.command, errno)))
            }
            Report::Failed { step, errno } => Err(failed(step, errno, &begun.command)),
            Report::Nothing => Err(Status::internal(
                "the command's process died before it could start; the sprite may be out of memory",
            )),
        }
    }

    fn register(
        self: &Arc<Self>,
        id: String,
        start: &ExecStart,
        begun: Begun,
        pid: i32,
        candidate: usize,
    ) -> Result<Connected, Status> {
        let Begun { child, streams, command, .. } = begun;
        let program = command.candidates.get(candidate).map_or("", String::as_str);
        let about = About {
            id: id.clone(),
            command: std::iter::once(program)
                .chain(command.argv.iter().skip(1).map(String::as_str))
                .collect::<Vec<_>>()
                .join(" "),
            workdir: command.dir,
            tty: start.tty,
            pid: u32::try_from(pid).unwrap_or_default(),
            max_run: u64::try_from(start.max_run_after_disconnect_ms).ok().map(Duration::from_millis),
            size: start.size.unwrap_or(SIZE_DEFAULT),
        };
        let unstarted = Session::over(about, child, streams)
            .map_err(|error| Status::internal(format!("the command's streams: {error}")))?;
        let session = Arc::clone(&unstarted.session);
        let connected = session.attach(start.size);
        self.table().living.insert(id, Arc::clone(&session));
        self.changed.notify_waiters();
        let sessions = Arc::clone(self);
        tokio::spawn({
            let session = Arc::clone(&session);
            async move {
                let detached = |bytes: usize| {
                    sessions
                        .detached_output_bytes
                        .fetch_add(u64::try_from(bytes).unwrap_or_default(), Ordering::Relaxed);
                };
                unstarted.run(detached, || sessions.forget(&session.about.id)).await;
                sessions.changed.notify_waiters();
            }
        });
        tokio::spawn(Arc::clone(self).mind(session));
        let (attachment, messages) = connected.ok_or_else(|| Status::internal("the session ended before it began"))?;
        Ok((Some(attachment), messages))
    }

    fn forget(&self, id: &str) {
        let mut table = self.table();
        table.living.remove(id);
        table.ended.push_back(id.to_owned());
        if table.ended.len() > ENDED_MAX {
            table.ended.pop_front();
        }
    }

    /// Tells of clients that come and go, and ends a session that had none for too long.
    async fn mind(self: Arc<Self>, session: Arc<Session>) {
        let mut attached = session.attached();
        loop {
            self.changed.notify_waiters();
            let alone = *attached.borrow_and_update() == 0;
            let limit = session.about.max_run.filter(|_| alone);
            tokio::select! {
                _ = session.child.ended() => return,
                changed = attached.changed() => if changed.is_err() { return },
                () = self.count_down(limit) => {
                    end(&session).await;
                    return;
                }
            }
        }
    }

    /// Ends when a host was connected for `limit` altogether; never without a limit.
    async fn count_down(&self, limit: Option<Duration>) {
        let Some(mut left) = limit else { return std::future::pending().await };
        let mut host = self.host.clone();
        while !left.is_zero() {
            if host.wait_for(|connected| *connected).await.is_err() {
                return;
            }
            let step = left.min(LINGER_STEP);
            tokio::time::sleep(step).await;
            left -= step;
        }
    }

    /// Sends a signal and, if `timeout_ms` is not zero, kills what does not end.
    pub(crate) fn kill(
        &self,
        request: KillSessionRequest,
    ) -> Result<mpsc::Receiver<Result<KillEvent, Status>>, Status> {
        let name = if request.signal.is_empty() { "SIGTERM" } else { &request.signal };
        let signal = signals::parse(name)
            .ok_or_else(|| Status::invalid_argument(format!("{name} is no signal; try SIGTERM")))?;
        let session = self.find(&request.session_id).map_err(|ended| {
            if ended {
                Status::failed_precondition("the session has ended already")
            } else {
                not_found(&request.session_id)
            }
        })?;
        let (events, out) = mpsc::channel(8);
        tokio::spawn(async move {
            kill(&session, signal, Duration::from_millis(request.timeout_ms.into()), &events).await;
        });
        Ok(out)
    }
}

impl Sessions {
    /// Runs a command of ours as root, without a session and without its output.
    pub(crate) async fn run_quietly(&self, argv: &[&str]) -> Result<Exit, Status> {
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        let start = ExecStart { argv, user: "root".into(), dir: "/".into(), ..ExecStart::default() };
        let cgroup =
            tokio::task::spawn_blocking(cgroup::sessions).await.map_err(|error| Status::internal(error.to_string()))?;
        let cgroup = cgroup.map_err(|error| Status::internal(error.to_string()))?;
        let reaper = self.reaper.clone();
        let begun = self.environment.inside(move || begin(&reaper, &start, &BTreeMap::new(), cgroup.into())).await;
        let begun = begun.map_err(|NotRunning| Status::unavailable(NotRunning.to_string()))??;
        let (_report, begun) = begun.report().await;
        Ok(begun.child.ended().await)
    }
}

fn not_found(id: &str) -> Status {
    Status::not_found(format!("session not found: {id}"))
}

fn check(start: &ExecStart) -> Result<(), Status> {
    let words = start.argv.iter().chain([&start.path, &start.dir, &start.user]);
    if words.chain(start.env.keys()).chain(start.env.values()).any(|word| word.contains('\0')) {
        return Err(Status::invalid_argument("a NUL byte in the command, its folder or its environment"));
    }
    match start.env.keys().find(|name| name.is_empty() || name.contains('=')) {
        Some(name) => Err(Status::invalid_argument(format!("{name:?} is no name of an environment variable"))),
        None => Ok(()),
    }
}

fn new_id() -> io::Result<String> {
    let bytes: [u8; ID_LEN] = identity::random()?;
    Ok(bytes.iter().map(|byte| char::from(ID_ALPHABET[usize::from(*byte) % ID_ALPHABET.len()])).collect())
}

/// A command that has been forked.
#[derive(Debug)]
struct Begun {
    child: Child,
    report: Option<OwnedFd>,
    streams: Streams,
    command: resolve::Command,
    /// Kills the process unless its session takes it over.
    guard: KillOnDrop,
}

#[derive(Debug)]
struct KillOnDrop(Option<Child>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(child) = self.0.take()
            && let Err(error) = child.signal(Signal::SIGKILL)
        {
            log!("cannot end process {}: {error}", child.pid);
        }
    }
}

impl Begun {
    /// Waits until it runs or has failed. Dropped before, the process is killed.
    async fn report(mut self) -> (Report, Self) {
        let mut bytes = Vec::new();
        if let Some(report) = self.report.take() {
            let read = async {
                let mut report = pipe::Receiver::from_owned_fd(report)?;
                report.read_to_end(&mut bytes).await
            };
            if let Err(error) = read.await {
                log!("no report of process {}: {error}", self.child.pid);
            }
        }
        self.guard.0 = None;
        (spawn::parse_report(&bytes), self)
    }
}

/// Forks the command. Runs on the environment's own thread.
fn begin(reaper: &Reaper, start: &ExecStart, env: &BTreeMap<String, String>, cgroup: OwnedFd) -> Result<Begun, Status> {
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
    Ok(Begun { guard: KillOnDrop(Some(child.clone())), child, report: Some(report), streams, command })
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
    let side = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX).max(1);
    sys::set_terminal_size(&slave, side(size.rows), side(size.cols))?;
    let theirs = [init::duplicate(&slave)?, init::duplicate(&slave)?, init::duplicate(&slave)?];
    let master = master.as_fd().try_clone_to_owned()?;
    Ok((Streams::Terminal { master, slave }, theirs))
}

/// A command that could not be executed is told as a shell does: words and an exit code.
fn refused(id: String, start: &ExecStart, command: &resolve::Command, errno: i32) -> mpsc::Receiver<Message> {
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

fn failed(step: Step, errno: i32, command: &resolve::Command) -> Status {
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

/// Passes the session's messages to its client, and what ports are opened and closed meanwhile.
async fn pass_on(mut messages: mpsc::Receiver<Message>, to: &mpsc::Sender<Message>, ports: &Ports) {
    let mut watching = None;
    let begin = tokio::time::sleep(PORTS_AFTER);
    tokio::pin!(begin);
    loop {
        let news = tokio::select! {
            biased;
            message = messages.recv() => match message {
                Some(message) => vec![message],
                None => return,
            },
            () = &mut begin, if watching.is_none() => {
                let mut listening = ports.watch().await;
                let known = Arc::clone(&listening.borrow_and_update());
                watching = Some((listening, known));
                continue;
            }
            news = port_news(&mut watching) => news,
        };
        for message in news {
            if to.send(message).await.is_err() {
                return;
            }
        }
    }
}

async fn port_news(watching: &mut Option<(watch::Receiver<Listening>, Listening)>) -> Vec<Message> {
    let Some((listening, known)) = watching else { return std::future::pending().await };
    if listening.changed().await.is_err() {
        return std::future::pending().await;
    }
    let now = Arc::clone(&listening.borrow_and_update());
    let events = ports::changes(known, &now);
    *known = now;
    events.into_iter().map(|event| Ok(ExecOutput { output: Some(Output::Port(event)) })).collect()
}

/// Ends when the client has left.
async fn take_inputs(attachment: &Attachment, mut inputs: tonic::Streaming<ExecInput>) {
    let session = attachment.session();
    while let Ok(Some(ExecInput { input })) = inputs.message().await {
        match input {
            Some(Input::Stdin(data)) => session.write(Stdin::Data(data)).await,
            Some(Input::StdinEof(true)) => session.write(Stdin::Eof).await,
            Some(Input::Resize(size)) => attachment.resize(size),
            Some(Input::Signal(name)) => match signals::parse(&name) {
                Some(signal) => {
                    if let Err(error) = session.signal(signal) {
                        log!("{name} to session {}: {error}", session.about.id);
                    }
                }
                None => log!("session {}: {name:?} is no signal", session.about.id),
            },
            Some(Input::StdinEof(false) | Input::Start(_) | Input::Attach(_)) | None => {}
        }
    }
}

/// The end of a session that had no client for too long.
async fn end(session: &Session) {
    // A shell lets its terminal's hang-up through to its jobs.
    let polite = if session.about.tty { Signal::SIGHUP } else { Signal::SIGTERM };
    for signal in [polite, Signal::SIGKILL] {
        if let Err(error) = session.signal_all(signal) {
            log!("cannot end session {}: {error}", session.about.id);
        }
        if tokio::time::timeout(END_GRACE, session.child.ended()).await.is_ok() {
            return;
        }
    }
}

type KillEvents = mpsc::Sender<Result<KillEvent, Status>>;

async fn kill(session: &Session, signal: Signal, timeout: Duration, events: &KillEvents) {
    // A client that does not listen does not stop the killing.
    let tell = |event: KillEvent| {
        let sent = events.send(Ok(event));
        async move { drop(sent.await) }
    };
    let pid = session.about.pid;
    let event = |kind: &str, message: String| KillEvent { r#type: kind.into(), message, pid, ..KillEvent::default() };
    if let Err(error) = session.signal_all(signal) {
        tell(event("error", format!("cannot send {signal}: {error}"))).await;
        tell(event("complete", String::new())).await;
        return;
    }
    tell(KillEvent { signal: signal.to_string(), ..event("signal", format!("Sent {signal} to process {pid}")) }).await;
    if timeout.is_zero() {
        tell(event("complete", String::new())).await;
        return;
    }
    let begun = Instant::now();
    let mut ended = tokio::time::timeout(timeout, session.child.ended()).await.ok();
    if ended.is_some() {
        tell(event("exited", format!("Process {pid} exited after {} ms", begun.elapsed().as_millis()))).await;
    } else {
        tell(event("timeout", format!("Process {pid} still runs after {} ms", timeout.as_millis()))).await;
        let sent = session.signal_all(Signal::SIGKILL);
        ended = tokio::time::timeout(KILLED_LIMIT, session.child.ended()).await.ok();
        match (sent, ended) {
            (Ok(()), Some(_)) => {
                tell(KillEvent { signal: "SIGKILL".into(), ..event("killed", format!("Killed process {pid}")) }).await
            }
            (Err(error), _) => tell(event("error", format!("cannot send SIGKILL: {error}"))).await,
            (Ok(()), None) => {
                tell(event("error", format!("process {pid} does not end: the kernel waits for something"))).await
            }
        }
    }
    tell(KillEvent { exit_code: ended.map(Exit::code), ..event("complete", String::new()) }).await;
}
