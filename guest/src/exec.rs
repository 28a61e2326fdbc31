//! Commands in the environment, and the sessions clients have with them.
//!
//! A session outlives its clients and the control channel: one with a terminal for ever, one without for as long as its client asked for, counted only
//! while a host is connected.
//!
//! Here is the table of all sessions. [`start`] forks a command, [`session`] is one command and its clients, [`pump`] moves its bytes, [`client`] serves one
//! client, and [`kill`] ends what is to end.

mod client;
mod kill;
mod pump;
mod rate;
mod resolve;
mod ring;
mod session;
mod signals;
mod start;
mod terminal;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::libc;
use proto::agent::{
    ExecAttach, ExecInput, ExecStart, KillEvent, KillSessionRequest, Session as Listed, TerminalSize, exec_input::Input,
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tonic::Status;

use self::{
    session::{About, Attached, Message, Session},
    start::Begun,
};
use crate::{
    cgroup,
    environment::{Environment, NotRunning},
    identity,
    ports::Ports,
    reaper::Reaper,
    spawn::{Report, Step},
};

/// Sessions at a time, including those that are about to start.
const SESSIONS_MAX: usize = 512;
/// Ended sessions that can still be told apart from ones that never were.
const ENDED_MAX: usize = 256;
/// Letters and digits of an id, without those that look alike.
const ID_ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const ID_LEN: usize = 8;
/// How exactly the time without a client is counted.
const LINGER_STEP: Duration = Duration::from_millis(100);
/// How long one client may keep the others of its session waiting, and with them the command. A laptop that changes its network is back sooner.
const STALLED_MAX: Duration = Duration::from_secs(10);
const SIZE_DEFAULT: TerminalSize = TerminalSize { rows: 24, cols: 80 };

/// All sessions of this VM.
#[derive(Debug)]
pub(crate) struct Sessions {
    environment: Arc<Environment>,
    reaper: Reaper,
    ports: Ports,
    table: Mutex<Table>,
    places: Arc<Semaphore>,
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

/// Why there is no such session.
enum Gone {
    Ended,
    Unknown,
}

/// Sessions that count, for the host's idle policy (ruling 28).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub attached: usize,
    pub detached: usize,
    pub detached_output_bytes: u64,
}

/// What a client is connected to.
enum Connected {
    To(Attached),
    /// There is no session: only these words and an exit code.
    Refused(mpsc::Receiver<Message>),
}

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
            places: Arc::new(Semaphore::new(SESSIONS_MAX)),
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
        let connected = match first.and_then(|first| first.input) {
            Some(Input::Start(start)) => self.start(start, env).await?,
            Some(Input::Attach(attach)) => self.attach(&attach)?,
            _ => return Err(Status::invalid_argument("the first input has to be start or attach")),
        };
        let Attached { attachment, backlog, messages } = match connected {
            Connected::To(attached) => attached,
            Connected::Refused(messages) => return Ok(messages),
        };
        let (forward, out) = mpsc::channel(1);
        let ports = self.ports.clone();
        tokio::spawn(async move {
            // Whichever ends first is the disconnect: the attachment is dropped.
            tokio::select! {
                () = client::take_inputs(&attachment, inputs) => {}
                () = client::pass_on(backlog, messages, &forward, &ports) => {}
                () = forward.closed() => {}
            }
        });
        Ok(out)
    }

    fn attach(&self, attach: &ExecAttach) -> Result<Connected, Status> {
        let session = self.find(&attach.session_id).map_err(|_gone| not_found(&attach.session_id))?;
        let attached = session.attach(attach.size).ok_or_else(|| not_found(&attach.session_id))?;
        self.changed.notify_waiters();
        Ok(Connected::To(attached))
    }

    fn find(&self, id: &str) -> Result<Arc<Session>, Gone> {
        let table = self.table();
        table
            .living
            .get(id)
            .cloned()
            .ok_or_else(|| if table.ended.iter().any(|ended| ended == id) { Gone::Ended } else { Gone::Unknown })
    }

    async fn start(self: &Arc<Self>, start: ExecStart, env: BTreeMap<String, String>) -> Result<Connected, Status> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_none_left| {
            Status::resource_exhausted(format!("{SESSIONS_MAX} sessions run already; end some"))
        })?;
        start::check(&start)?;
        let id = new_id().map_err(|error| Status::internal(format!("no random numbers: {error}")))?;
        let (report, begun) = self.begin(start.clone(), env).await?;
        match report {
            Report::Running { pid, candidate } => self.register(id, &start, begun, (pid, candidate), place),
            Report::Failed { step: Step::Exec, errno } if errno != libc::E2BIG => {
                Ok(Connected::Refused(start::refused(id, &start, &begun.command, errno)))
            }
            Report::Failed { step, errno } => Err(start::failed(step, errno, &begun.command)),
            Report::Nothing => Err(Status::internal(
                "the command's process died before it could start; the sprite may be out of memory",
            )),
        }
    }

    /// Forks the command, and waits until it runs or has failed.
    async fn begin(&self, start: ExecStart, env: BTreeMap<String, String>) -> Result<(Report, Begun), Status> {
        // Opened here: the environment's root does not show the machine's control groups.
        let cgroup =
            tokio::task::spawn_blocking(cgroup::sessions).await.map_err(|error| Status::internal(error.to_string()))?;
        let cgroup = cgroup.map_err(|error| Status::internal(format!("no control group for the command: {error}")))?;
        let reaper = self.reaper.clone();
        let begun = self.environment.inside(move || start::begin(&reaper, &start, &env, cgroup.into())).await;
        let begun = begun.map_err(|NotRunning| Status::unavailable(NotRunning.to_string()))??;
        Ok(begun.report().await)
    }

    fn register(
        self: &Arc<Self>,
        id: String,
        start: &ExecStart,
        begun: Begun,
        (pid, candidate): (i32, usize),
        place: OwnedSemaphorePermit,
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
            stalled_max: STALLED_MAX,
            size: start.size.unwrap_or(SIZE_DEFAULT),
        };
        let unstarted = Session::over(about, child.child().clone(), streams)
            .map_err(|error| Status::internal(format!("the command's streams: {error}")))?;
        child.keep();
        let session = Arc::clone(&unstarted.session);
        let attached = session.attach(start.size);
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
                drop(place);
                sessions.changed.notify_waiters();
            }
        });
        tokio::spawn(Arc::clone(self).mind(session));
        let attached = attached.ok_or_else(|| Status::internal("the session ended before it began"))?;
        Ok(Connected::To(attached))
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
                    kill::end(&session).await;
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
            .ok_or_else(|| Status::invalid_argument(format!("{name:?} is not a signal; try SIGTERM")))?;
        let session = self.find(&request.session_id).map_err(|gone| match gone {
            Gone::Ended => Status::failed_precondition("the session has ended already"),
            Gone::Unknown => not_found(&request.session_id),
        })?;
        let (events, out) = mpsc::channel(8);
        tokio::spawn(async move {
            kill::kill(&session, signal, Duration::from_millis(request.timeout_ms.into()), &events).await;
        });
        Ok(out)
    }
}

fn not_found(id: &str) -> Status {
    Status::not_found(format!("session not found: {id}"))
}

fn new_id() -> io::Result<String> {
    let bytes: [u8; ID_LEN] = identity::random()?;
    Ok(bytes.iter().map(|byte| char::from(ID_ALPHABET[usize::from(*byte) % ID_ALPHABET.len()])).collect())
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn starts_under_way_count_as_sessions() {
        let reaper = Reaper::default();
        let environment = Arc::new(Environment::new(reaper.clone()));
        let sessions = Sessions::new(environment, reaper, Ports::default(), watch::channel(true).1);
        let start = async || sessions.start(ExecStart::default(), BTreeMap::new()).await.map(|_| ()).unwrap_err();
        let all = u32::try_from(SESSIONS_MAX).unwrap();
        let places = Arc::clone(&sessions.places).try_acquire_many_owned(all).unwrap();
        assert_eq!(start().await.code(), Code::ResourceExhausted);
        drop(places);
        // There is no environment here.
        assert_ne!(start().await.code(), Code::ResourceExhausted);
        assert_eq!(sessions.places.available_permits(), SESSIONS_MAX, "a start that failed gives its place back");
    }
}
