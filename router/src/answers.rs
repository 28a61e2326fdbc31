//! What coordinators told us, remembered for a short while.
//!
//! ```text
//!            fresh                    stale
//!  answer ──────────▶ used as it is ─────────▶ asked again; used as it is only while no coordinator answers ──▶ forgotten
//! ```
//!
//! # Invariants
//!
//! 1. *Single flight.* However many requests want a key, at most one question about it is on its way (two, if one of them must not accept what
//!    was asked before).
//! 2. *A question outlives those who ask.* It runs in a task of its own, so that an answer that comes too late for them still counts for the
//!    next ones: a slow coordinator does not keep old answers alive.
//! 3. *Static stability* (ruling 26). An answer outlives its freshness for as long as coordinators are away, up to [`Policy::stale_for`].
//! 4. *Bounded.* Absent keys are remembered apart from known ones: a flood of inventions cannot push out what is true.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tonic::Status;

use crate::control::Unavailable;

/// With an old answer at hand we do not wait long for a coordinator that may be gone. The question goes on.
const PATIENCE_WITH_STALE: Duration = Duration::from_millis(500);
/// How long an old answer is used before coordinators are asked again.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    pub(crate) fresh_for: Duration,
    pub(crate) stale_for: Duration,
    pub(crate) absent_for: Duration,
    /// Of known and of absent keys each. When full, what is over goes, then any.
    pub(crate) capacity: usize,
}

/// "This is it", "there is none", or no coordinator said.
type Outcome<V> = Result<Option<V>, Unavailable>;

/// A cache of coordinators' answers about keys of one kind. Clones share it.
pub(crate) struct Answers<K, V> {
    policy: Policy,
    memory: Arc<Mutex<Memory<K, V>>>,
}

impl<K, V> Clone for Answers<K, V> {
    fn clone(&self) -> Self {
        Self { policy: self.policy, memory: Arc::clone(&self.memory) }
    }
}

struct Memory<K, V> {
    known: HashMap<K, Known<V>>,
    absent: HashMap<K, Instant>,
    flights: HashMap<K, Flight<V>>,
}

struct Known<V> {
    value: V,
    asked_at: Instant,
    ask_again_at: Instant,
    forget_at: Instant,
}

/// A question that is on its way.
struct Flight<V> {
    began_at: Instant,
    answer: watch::Receiver<Option<Outcome<V>>>,
}

impl<K, V> Answers<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    pub(crate) fn new(policy: Policy) -> Self {
        let memory = Memory { known: HashMap::new(), absent: HashMap::new(), flights: HashMap::new() };
        Self { policy, memory: Arc::new(Mutex::new(memory)) }
    }

    /// What is known about `key`; `ask` is called if that is not fresh, or was asked before `not_before`. `None`: there is no such thing.
    ///
    /// An answer that is older than `not_before` is never returned, unless no coordinator answers. What `ask` returns must end by itself:
    /// nobody cancels it.
    pub(crate) async fn get<A>(
        &self,
        key: &K,
        not_before: Option<Instant>,
        ask: impl FnOnce() -> A + Send + 'static,
    ) -> Outcome<V>
    where
        A: Future<Output = Outcome<V>> + Send + 'static,
    {
        let now = Instant::now();
        let stale = {
            let memory = self.lock();
            let recent = |asked_at: Instant| not_before.is_none_or(|limit| asked_at >= limit);
            match memory.known.get(key) {
                Some(known) if now < known.ask_again_at && recent(known.asked_at) => {
                    return Ok(Some(known.value.clone()));
                }
                Some(known) if now < known.forget_at => Some(known.value.clone()),
                _ => {
                    if memory.absent.get(key).is_some_and(|&at| recent(at) && now < at + self.policy.absent_for) {
                        return Ok(None);
                    }
                    None
                }
            }
        };
        let answer = landed(self.ask_once(key, not_before, ask));
        let Some(stale) = stale else {
            return answer.await;
        };
        match timeout(PATIENCE_WITH_STALE, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) | Err(_) => {
                if let Some(known) = self.lock().known.get_mut(key) {
                    known.ask_again_at = known.ask_again_at.max(Instant::now() + PAUSE_AFTER_FAILURE);
                }
                Ok(Some(stale))
            }
        }
    }

    /// Joins the question that is on its way, or sends one off.
    fn ask_once<A>(
        &self,
        key: &K,
        not_before: Option<Instant>,
        ask: impl FnOnce() -> A + Send + 'static,
    ) -> watch::Receiver<Option<Outcome<V>>>
    where
        A: Future<Output = Outcome<V>> + Send + 'static,
    {
        let mut memory = self.lock();
        if let Some(flight) = memory.flights.get(key)
            && not_before.is_none_or(|limit| flight.began_at >= limit)
        {
            return flight.answer.clone();
        }
        let began_at = Instant::now();
        let (tell, answer) = watch::channel(None);
        memory.flights.insert(key.clone(), Flight { began_at, answer: answer.clone() });
        let guard = FlightGuard { answers: self.clone(), key: key.clone(), answer: answer.clone() };
        tokio::spawn(async move {
            let outcome = ask().await;
            if let Ok(found) = &outcome {
                guard.answers.learn(&guard.key, found.clone(), began_at);
            }
            drop(guard);
            tell.send_replace(Some(outcome));
        });
        answer
    }

    /// Remembers what was true at `asked_at`, unless something newer is known.
    pub(crate) fn learn(&self, key: &K, answer: Option<V>, asked_at: Instant) {
        let Policy { fresh_for, stale_for, absent_for, capacity } = self.policy;
        let now = Instant::now();
        let mut memory = self.lock();
        if memory.known.get(key).is_some_and(|known| known.asked_at > asked_at) {
            return;
        }
        match answer {
            Some(value) => {
                memory.absent.remove(key);
                make_room(&mut memory.known, capacity, |known| known.forget_at > now);
                let known =
                    Known { value, asked_at, ask_again_at: asked_at + fresh_for, forget_at: asked_at + stale_for };
                memory.known.insert(key.clone(), known);
            }
            None => {
                memory.known.remove(key);
                make_room(&mut memory.absent, capacity, |&at| at + absent_for > now);
                memory.absent.insert(key.clone(), asked_at);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Memory<K, V>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn landed<V: Clone>(mut answer: watch::Receiver<Option<Outcome<V>>>) -> Outcome<V> {
    let outcome = answer.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
    outcome.unwrap_or_else(|| Err(Status::cancelled("the question was given up").into()))
}

/// Takes a flight out of the table however its task ends.
struct FlightGuard<K: Eq + Hash, V> {
    answers: Answers<K, V>,
    key: K,
    answer: watch::Receiver<Option<Outcome<V>>>,
}

impl<K: Eq + Hash, V> Drop for FlightGuard<K, V> {
    fn drop(&mut self) {
        let mut memory = self.answers.memory.lock().unwrap_or_else(PoisonError::into_inner);
        // A later question, for one who would not accept ours, may have taken the place.
        if memory.flights.get(&self.key).is_some_and(|flight| flight.answer.same_channel(&self.answer)) {
            memory.flights.remove(&self.key);
        }
    }
}

fn make_room<K: Clone + Eq + Hash, T>(map: &mut HashMap<K, T>, capacity: usize, is_valid: impl Fn(&T) -> bool) {
    if map.len() < capacity {
        return;
    }
    map.retain(|_, entry| is_valid(entry));
    // Clearing a share at once keeps the cost of an insert constant on average.
    let excess = (map.len() + capacity / 8 + 1).saturating_sub(capacity);
    let victims: Vec<K> = map.keys().take(excess).cloned().collect();
    for key in victims {
        map.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    const POLICY: Policy = Policy {
        fresh_for: Duration::from_secs(1),
        stale_for: Duration::from_secs(60),
        absent_for: Duration::from_millis(500),
        capacity: 4,
    };

    impl<K, V> Answers<K, V>
    where
        K: Clone + Eq + Hash + Send + 'static,
        V: Clone + Send + Sync + 'static,
    {
        /// Everything was learned by so much earlier.
        fn age(&self, by: Duration) {
            let mut memory = self.lock();
            for known in memory.known.values_mut() {
                known.asked_at -= by;
                known.ask_again_at -= by;
                known.forget_at -= by;
            }
            memory.absent.values_mut().for_each(|asked_at| *asked_at -= by);
        }
    }

    fn gone() -> Result<Option<u32>, Unavailable> {
        Err(Unavailable::from(tonic::Status::unavailable("gone")))
    }

    #[tokio::test]
    async fn an_answer_is_used_while_fresh_and_asked_again_after() {
        let answers = Answers::<&str, u32>::new(POLICY);
        let get = async |value| answers.get(&"k", None, async move || Ok(Some(value))).await.unwrap();
        assert_eq!(get(1).await, Some(1));
        assert_eq!(get(2).await, Some(1));
        answers.age(Duration::from_millis(1001));
        assert_eq!(get(2).await, Some(2));
    }

    #[tokio::test]
    async fn a_caller_who_knows_better_gets_a_newer_answer() {
        let answers = Answers::<&str, u32>::new(POLICY);
        answers.get(&"k", None, async || Ok(Some(1))).await.unwrap();
        answers.age(Duration::from_millis(1));
        let newer = answers.get(&"k", Some(Instant::now()), async || Ok(Some(2))).await.unwrap();
        assert_eq!(newer, Some(2));
    }

    #[tokio::test]
    async fn old_answers_hold_while_coordinators_are_away_but_not_for_ever() {
        let answers = Answers::<&str, u32>::new(POLICY);
        answers.get(&"k", None, async || Ok(Some(1))).await.unwrap();
        answers.age(Duration::from_secs(30));
        assert_eq!(answers.get(&"k", None, async || gone()).await.unwrap(), Some(1));
        // A coordinator that hangs is as good as gone.
        answers.age(Duration::from_secs(2));
        assert_eq!(answers.get(&"k", None, std::future::pending).await.unwrap(), Some(1));
        answers.age(Duration::from_secs(30));
        // Not the question that still hangs.
        answers.get(&"k", Some(Instant::now()), async || gone()).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_slow_coordinator_is_believed_once_it_has_answered() {
        let answers = Answers::<&str, u32>::new(POLICY);
        answers.get(&"k", None, async || Ok(Some(1))).await.unwrap();
        answers.age(Duration::from_secs(2));
        let gate = Arc::new(Semaphore::new(0));
        let of_question = Arc::clone(&gate);
        let slow = async move || {
            let _permit = of_question.acquire().await.unwrap();
            Ok(Some(2))
        };
        assert_eq!(answers.get(&"k", None, slow).await.unwrap(), Some(1), "nobody waits for it");
        gate.add_permits(1);
        while !answers.lock().flights.is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(answers.get(&"k", None, async || gone()).await.unwrap(), Some(2));
    }

    #[tokio::test]
    async fn an_answer_that_must_not_be_used_again_is_not() {
        let answers =
            Answers::<&str, u32>::new(Policy { fresh_for: Duration::ZERO, stale_for: Duration::ZERO, ..POLICY });
        answers.get(&"k", None, async || Ok(Some(1))).await.unwrap();
        answers.get(&"k", None, async || gone()).await.unwrap_err();
        assert_eq!(answers.get(&"k", None, async || Ok(Some(2))).await.unwrap(), Some(2));
    }

    #[tokio::test]
    async fn a_question_that_fails_in_our_own_code_does_not_block_the_next() {
        let answers = Answers::<&str, u32>::new(POLICY);
        answers.get(&"k", None, async || panic!("a bug")).await.unwrap_err();
        assert_eq!(answers.get(&"k", None, async || Ok(Some(1))).await.unwrap(), Some(1));
    }

    #[tokio::test]
    async fn what_was_deleted_is_forgotten_at_once() {
        let answers = Answers::<&str, u32>::new(POLICY);
        answers.get(&"k", None, async || Ok(Some(1))).await.unwrap();
        answers.age(Duration::from_secs(2));
        assert_eq!(answers.get(&"k", None, async || Ok(None)).await.unwrap(), None);
        assert_eq!(answers.get(&"k", None, async || gone()).await.unwrap(), None);
        answers.age(Duration::from_secs(2));
        answers.get(&"k", None, async || gone()).await.unwrap_err();
    }

    #[tokio::test]
    async fn many_who_ask_at_once_cost_one_question() {
        let answers = Arc::new(Answers::<u32, u32>::new(POLICY));
        let (asked, gate) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
        let tasks: Vec<_> = (0..100)
            .map(|_| {
                let (answers, asked, gate) = (Arc::clone(&answers), Arc::clone(&asked), Arc::clone(&gate));
                tokio::spawn(async move {
                    let ask = move || async move {
                        asked.fetch_add(1, Ordering::Relaxed);
                        gate.acquire().await.unwrap().forget();
                        Ok(Some(7))
                    };
                    answers.get(&1, None, ask).await.unwrap()
                })
            })
            .collect();
        while asked.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        // The one that asked goes away; its question goes on. On one thread, tasks begin in order.
        tasks[0].abort();
        gate.add_permits(1);
        for task in tasks.into_iter().skip(1) {
            assert_eq!(task.await.unwrap(), Some(7));
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert!(answers.lock().flights.is_empty());
    }

    #[tokio::test]
    async fn inventions_cannot_push_out_what_is_known() {
        let answers = Answers::<u32, u32>::new(POLICY);
        answers.get(&0, None, async || Ok(Some(0))).await.unwrap();
        for key in 1..1000 {
            answers.get(&key, None, async || Ok(None)).await.unwrap();
        }
        assert!(answers.lock().absent.len() <= POLICY.capacity);
        assert_eq!(answers.get(&0, None, async || gone()).await.unwrap(), Some(0));
        for key in 1..1000 {
            answers.get(&key, None, async move || Ok(Some(key))).await.unwrap();
        }
        assert!(answers.lock().known.len() <= POLICY.capacity);
    }
}
