//! What the guest tells the host without being asked: activity (ruling 28), the end of the environment, and requests of programs inside.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use proto::agent::{Activity, AnswerRequest, EnvironmentEnded, GuestEvent, HostRequest, guest_event::Event};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tonic::Status;

use crate::{environment::Environment, exec::Sessions, tasks::Tasks};

/// Events on their way to the host.
const EVENTS_MAX: usize = 64;
/// Requests of programs inside that wait for the host.
const REQUESTS_MAX: usize = 64;
/// Pieces of one answer that its reader has not taken yet.
const PIECES_MAX: usize = 8;
/// Activity is reported again after this while anything counts.
const REPEAT: Duration = Duration::from_secs(5);
/// Output of sessions without a client is looked at this often.
const OUTPUT_POLL: Duration = Duration::from_secs(1);

type Message = Result<GuestEvent, Status>;

/// Nobody can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AskError {
    #[error("the sprite's host is not connected; try again in a moment")]
    NoHost,
    #[error("{REQUESTS_MAX} requests wait for the host already; try again in a moment")]
    TooMany,
}

/// The way to the host.
#[derive(Debug)]
pub(crate) struct Hub {
    sessions: Arc<Sessions>,
    environment: Arc<Environment>,
    tasks: Mutex<Tasks>,
    tasks_changed: Notify,
    /// To the newest Watch stream.
    host: Mutex<Option<mpsc::Sender<Message>>>,
    waiting: Mutex<HashMap<u64, Waiting>>,
    next_request: AtomicU64,
}

/// A request that the host has not answered in full.
#[derive(Debug)]
struct Waiting {
    answer: mpsc::Sender<AnswerRequest>,
    /// The stream it was sent on. When that ends the answer is lost: another session of the host does not know of it.
    host: mpsc::Sender<Message>,
}

/// An answer that comes in pieces; without one that is `done`, the end of the channel means that the host has gone. Dropping it gives it up.
#[derive(Debug)]
pub(crate) struct Answer {
    pub pieces: mpsc::Receiver<AnswerRequest>,
    _place: Place,
}

#[derive(Debug)]
struct Place {
    hub: Arc<Hub>,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.hub.waiting().remove(&self.id);
    }
}

impl Hub {
    pub(crate) fn new(sessions: Arc<Sessions>, environment: Arc<Environment>) -> Arc<Self> {
        Arc::new(Self {
            sessions,
            environment,
            tasks: Mutex::default(),
            tasks_changed: Notify::new(),
            host: Mutex::default(),
            waiting: Mutex::default(),
            next_request: AtomicU64::new(1),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on the tasks; the host hears of what it changes.
    pub(crate) fn with_tasks<T>(&self, work: impl FnOnce(&mut Tasks, u64) -> T) -> T {
        let done = work(&mut self.tasks.lock().unwrap_or_else(PoisonError::into_inner), now_ms());
        self.tasks_changed.notify_waiters();
        done
    }

    fn activity(&self) -> Activity {
        let counts = self.sessions.counts();
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        Activity {
            attached_sessions: u32::try_from(counts.attached).unwrap_or(u32::MAX),
            detached_sessions: u32::try_from(counts.detached).unwrap_or(u32::MAX),
            detached_output_bytes: counts.detached_output_bytes,
            tasks_until_unix_ms: tasks.until_ms(now_ms()),
        }
    }

    /// A stream for the host. The one before gets no more requests.
    pub(crate) fn watch(self: &Arc<Self>) -> mpsc::Receiver<Message> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        *self.host.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
        let hub = Arc::clone(self);
        tokio::spawn(async move {
            hub.tell(sender.clone()).await;
            hub.gone(&sender);
        });
        events
    }

    /// A stream has ended: who waits for an answer to a request that went there hears of it at once.
    fn gone(&self, host: &mpsc::Sender<Message>) {
        let mut newest = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.as_ref().is_some_and(|newest| newest.same_channel(host)) {
            *newest = None;
        }
        drop(newest);
        self.waiting().retain(|_, waiting| !waiting.host.same_channel(host));
    }

    async fn tell(&self, host: mpsc::Sender<Message>) {
        let mut ended = self.environment.ended();
        let mut told: Option<Activity> = None;
        let mut told_at = Instant::now();
        loop {
            // Registered before the look, so that no change between the two is missed.
            let (mut sessions, mut tasks) =
                (Box::pin(self.sessions.changed().notified()), Box::pin(self.tasks_changed.notified()));
            sessions.as_mut().enable();
            tasks.as_mut().enable();
            let activity = self.activity();
            let counts = activity.attached_sessions > 0 || activity.tasks_until_unix_ms > 0;
            if told.as_ref() != Some(&activity) || counts && told_at.elapsed() >= REPEAT {
                if send(&host, Event::Activity(activity)).await.is_err() {
                    return;
                }
                (told, told_at) = (Some(activity), Instant::now());
            }
            let next = if activity.detached_sessions > 0 { OUTPUT_POLL } else { REPEAT };
            tokio::select! {
                () = sessions => {}
                () = tasks => {}
                () = tokio::time::sleep(next) => {}
                () = host.closed() => return,
                reason = next_end(&mut ended) => {
                    if send(&host, Event::Ended(EnvironmentEnded { reason })).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Asks the host. The answer comes through [`Hub::answer`].
    pub(crate) async fn ask(self: &Arc<Self>, method: &str, path: &str, body: Vec<u8>) -> Result<Answer, AskError> {
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(AskError::NoHost)?;
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, pieces) = mpsc::channel(PIECES_MAX);
        {
            let mut waiting = self.waiting();
            if waiting.len() >= REQUESTS_MAX {
                return Err(AskError::TooMany);
            }
            waiting.insert(id, Waiting { answer: sender, host: host.clone() });
        }
        let answer = Answer { pieces, _place: Place { hub: Arc::clone(self), id } };
        let request = HostRequest { id, method: method.to_owned(), path: path.to_owned(), body };
        match send(&host, Event::Request(request)).await {
            Ok(()) => Ok(answer),
            Err(Gone) => Err(AskError::NoHost),
        }
    }

    /// A piece of the host's answer. One that nobody waits for any more is dropped.
    pub(crate) async fn answer(&self, piece: AnswerRequest) {
        let sender = {
            let mut waiting = self.waiting();
            if piece.done {
                waiting.remove(&piece.id).map(|waiting| waiting.answer)
            } else {
                waiting.get(&piece.id).map(|waiting| waiting.answer.clone())
            }
        };
        if let Some(sender) = sender {
            drop(sender.send(piece).await);
        }
    }
}

struct Gone;

async fn send(host: &mpsc::Sender<Message>, event: Event) -> Result<(), Gone> {
    host.send(Ok(GuestEvent { event: Some(event) })).await.map_err(|_closed| Gone)
}

async fn next_end(ended: &mut watch::Receiver<Option<String>>) -> String {
    loop {
        if ended.changed().await.is_err() {
            return std::future::pending().await;
        }
        if let Some(reason) = ended.borrow_and_update().clone() {
            return reason;
        }
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{ports::Ports, reaper::Reaper};

    pub(crate) const LIMIT: Duration = Duration::from_secs(10);

    /// One without an environment.
    pub(crate) fn hub() -> (Arc<Hub>, Arc<Sessions>, Arc<Environment>) {
        let reaper = Reaper::default();
        let environment = Arc::new(Environment::new(reaper.clone()));
        let sessions = Sessions::new(Arc::clone(&environment), reaper, Ports::default(), watch::channel(true).1);
        (Hub::new(Arc::clone(&sessions), Arc::clone(&environment)), sessions, environment)
    }

    /// The next request that the host gets.
    pub(crate) async fn request(events: &mut mpsc::Receiver<Message>) -> HostRequest {
        loop {
            let event = tokio::time::timeout(LIMIT, events.recv()).await.unwrap().unwrap().unwrap();
            if let Some(Event::Request(request)) = event.event {
                return request;
            }
        }
    }

    fn piece(id: u64, done: bool) -> AnswerRequest {
        AnswerRequest { id, done, ..AnswerRequest::default() }
    }

    #[tokio::test]
    async fn an_answer_is_lost_with_the_session_that_was_asked_and_only_then() {
        let (hub, ..) = hub();
        assert_eq!(hub.ask("GET", "/", vec![]).await.unwrap_err(), AskError::NoHost);
        let mut old = hub.watch();
        let mut lost = hub.ask("POST", "/old", vec![]).await.unwrap();
        request(&mut old).await;
        let mut new = hub.watch();
        let mut kept = hub.ask("POST", "/new", vec![]).await.unwrap();
        let kept_id = request(&mut new).await.id;
        drop(old);
        let end = tokio::time::timeout(LIMIT, lost.pieces.recv()).await;
        assert_eq!(end.expect("waits for a session that is over"), None);
        hub.answer(piece(kept_id, true)).await;
        assert_eq!(kept.pieces.recv().await, Some(piece(kept_id, true)));
        assert!(hub.waiting().is_empty());
        drop(new);
        let gone = async { while hub.ask("GET", "/", vec![]).await.is_ok() {} };
        tokio::time::timeout(LIMIT, gone).await.expect("requests go to a host that has left");
    }
}
