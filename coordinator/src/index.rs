//! What a coordinator knows of all sprites at once, for lists, counters and watchers. Never asked for a single sprite: that is read.
//!
//! ```text
//!  bucket ──LIST v1/sprites, then GET what has another ETag──▶ records ┐
//!  our own writes ──put, remove──────────────────────────────▶        ├─▶ page, counts, changed
//!  node ──WatchRoutes, again from the start when it breaks───▶ states ┘
//! ```
//!
//! # Invariants
//!
//! 1. What this coordinator wrote is seen by its next reader; what another one wrote, after [`AGE_MAX`] at most.
//! 2. A refresh never overwrites or removes what was written after it began.
//! 3. A record counts only once its name object was seen to mean it: what a lost or unfinished create left behind is not listed.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blockstore::bucket::{Bucket, Record, RecordError, Tag};
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use proto::{
    id::{SpriteId, SpriteName},
    node::{SpriteStatus, route_event},
    record::{self, SpriteRecord},
};
use tokio::{sync::watch, time::Instant};

pub(crate) use proto::record::key as record_key;

use crate::{
    names::{NameEntry, Names},
    node::Node,
    refusal::{Refusal, chain},
};

/// A table older than this is refreshed before it is used.
pub(crate) const AGE_MAX: Duration = Duration::from_secs(1);
/// Records read side by side.
const READS_PARALLEL: usize = 16;
/// The store's client for listings is patient; people are not.
const REFRESH_LIMIT: Duration = Duration::from_secs(10);
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(crate) struct Index {
    bucket: Bucket,
    names: Names,
    table: Mutex<Table>,
    /// Held by the one refresh that is under way.
    refreshing: tokio::sync::Mutex<()>,
    /// Rises with each change that a watcher could show.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    sprites: HashMap<SpriteId, Row>,
    refreshed_at: Option<Instant>,
    states: HashMap<SpriteId, SpriteStatus>,
}

#[derive(Debug)]
struct Row {
    /// As LIST showed it when the record was read; `None` after a write of our own.
    tag: Option<Tag>,
    standing: Standing,
    written_at: Option<Instant>,
}

/// What a record is worth.
#[derive(Clone, Debug)]
enum Standing {
    Live(Arc<SpriteRecord>),
    /// Its create is not finished yet.
    Unsettled(Arc<SpriteRecord>),
    /// A destroy that is not finished, or a create whose claim was lost: to be freed.
    Dead(Arc<SpriteRecord>),
    /// Not understood; logged once.
    Unreadable,
}

/// One page of sprites in order of their names.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) sprites: Vec<(Arc<SpriteRecord>, Option<SpriteStatus>)>,
    /// Whether there are more behind the last one.
    pub(crate) has_more: bool,
}

/// How many sprites of an organisation are in which status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) running: usize,
    pub(crate) warm: usize,
    pub(crate) cold: usize,
}

impl Index {
    pub(crate) fn new(bucket: Bucket, names: Names) -> Self {
        let (changed, _) = watch::channel(0);
        Self { bucket, names, table: Mutex::default(), refreshing: tokio::sync::Mutex::default(), changed }
    }

    /// Tells about every change; a receiver that lags misses nothing, because it looks at the table.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn put(&self, record: SpriteRecord) {
        let standing = if record.deleted { Standing::Dead(Arc::new(record)) } else { Standing::Live(Arc::new(record)) };
        let id = standing.record().map(|record| record.id);
        if let Some(id) = id {
            let row = Row { tag: None, standing, written_at: Some(Instant::now()) };
            self.table().sprites.insert(id, row);
            self.announce();
        }
    }

    pub(crate) fn remove(&self, id: SpriteId) {
        let mut table = self.table();
        table.sprites.remove(&id);
        table.states.remove(&id);
        drop(table);
        self.announce();
    }

    /// The last state the node told us, for when it cannot be asked.
    pub(crate) fn state(&self, id: SpriteId) -> Option<SpriteStatus> {
        self.table().states.get(&id).cloned()
    }

    /// Sprites of `org` whose names begin with `prefix` and lie behind `after`.
    pub(crate) fn page(&self, org: &str, prefix: &str, after: Option<&str>, limit: usize) -> Page {
        let table = self.table();
        let wanted = |record: &&Arc<SpriteRecord>| {
            let name = record.name.as_str();
            record.org == org && name.starts_with(prefix) && after.is_none_or(|after| name > after)
        };
        let mut sprites: BTreeMap<&str, &Arc<SpriteRecord>> = BTreeMap::new();
        for record in table.sprites.values().filter_map(|row| row.standing.live()).filter(wanted) {
            sprites.insert(record.name.as_str(), record);
        }
        let has_more = sprites.len() > limit;
        let with_state = |record: &Arc<SpriteRecord>| (Arc::clone(record), table.states.get(&record.id).cloned());
        Page { sprites: sprites.values().take(limit).map(|record| with_state(record)).collect(), has_more }
    }

    pub(crate) fn counts(&self, org: &str) -> Counts {
        let table = self.table();
        let mut counts = Counts::default();
        for record in table.sprites.values().filter_map(|row| row.standing.live()).filter(|record| record.org == org) {
            match crate::view::status_word(table.states.get(&record.id)) {
                "running" => counts.running += 1,
                "warm" => counts.warm += 1,
                _ => counts.cold += 1,
            }
        }
        counts
    }

    /// The record that a create of (`org`, `name`) under the claim of `since` left behind, if it did. Fresh from the bucket.
    pub(crate) async fn born(
        &self,
        org: &str,
        name: &SpriteName,
        since: Timestamp,
    ) -> Result<Option<Arc<SpriteRecord>>, Refusal> {
        self.refresh(Duration::ZERO).await?;
        let table = self.table();
        let mut records = table.sprites.values().filter_map(|row| row.standing.record());
        let is_it =
            |record: &&Arc<SpriteRecord>| record.org == org && record.name == *name && record.created_at == since;
        Ok(records.find(|record| is_it(record) && !record.deleted).cloned())
    }

    /// Records that nobody should see any more but whose sprite may still hold a disk.
    pub(crate) fn dead(&self) -> Vec<Arc<SpriteRecord>> {
        let table = self.table();
        let dead = |row: &Row| match &row.standing {
            Standing::Dead(record) => Some(Arc::clone(record)),
            Standing::Live(_) | Standing::Unsettled(_) | Standing::Unreadable => None,
        };
        table.sprites.values().filter_map(dead).collect()
    }

    /// Makes the table no older than `age_max`. Concurrent calls share one refresh.
    pub(crate) async fn refresh(&self, age_max: Duration) -> Result<(), Refusal> {
        let asked_at = Instant::now();
        let is_fresh = |table: &Table| {
            table.refreshed_at.is_some_and(|at| at >= asked_at || asked_at.duration_since(at) < age_max)
        };
        if is_fresh(&self.table()) {
            return Ok(());
        }
        let refreshed = async {
            let _turn = self.refreshing.lock().await;
            if is_fresh(&self.table()) { Ok(()) } else { self.read_what_changed().await }
        };
        match tokio::time::timeout(REFRESH_LIMIT, refreshed).await {
            Ok(outcome) => Ok(outcome?),
            Err(_elapsed) => Err(Refusal::Unavailable(format!(
                "the bucket did not list the sprites within {REFRESH_LIMIT:?}; check that it is up and reachable"
            ))),
        }
    }

    async fn read_what_changed(&self) -> Result<(), RecordError> {
        let began_at = Instant::now();
        let listed = self.list().await?;
        let stale: Vec<_> = {
            let table = self.table();
            let is_stale = |id: &SpriteId, tag: &Tag| {
                table.sprites.get(id).is_none_or(|row| row.tag.as_ref() != Some(tag) || row.is_unsettled())
            };
            listed.iter().filter(|(id, tag)| is_stale(id, tag)).map(|(id, tag)| (*id, tag.clone())).collect()
        };
        let reads = stale.into_iter().map(|(id, tag)| async move { (id, tag, self.read(id).await) });
        let read: Vec<_> = stream::iter(reads).buffer_unordered(READS_PARALLEL).collect().await;
        self.apply(&listed, read, began_at)
    }

    async fn list(&self) -> Result<HashMap<SpriteId, Tag>, RecordError> {
        let entries = self.bucket.list(record::KEY_PREFIX).await?;
        Ok(entries.into_iter().filter_map(|entry| Some((record::id_of_key(&entry.key)?, entry.tag))).collect())
    }

    /// The record and what it is worth; `None` if it is gone meanwhile.
    async fn read(&self, id: SpriteId) -> Result<Option<Standing>, RecordError> {
        let record = match self.bucket.read_record::<SpriteRecord>(&record_key(id)).await {
            Ok(Some(record)) => Arc::new(record.value),
            Ok(None) => return Ok(None),
            Err(error @ RecordError::Malformed { .. }) => {
                tracing::error!(sprite = %id, "its record is left alone: {}", chain(&error));
                return Ok(Some(Standing::Unreadable));
            }
            Err(error) => return Err(error),
        };
        if record.deleted {
            return Ok(Some(Standing::Dead(record)));
        }
        let name = self.names.read(&record.org, &record.name).await?;
        Ok(Some(standing(record, name.as_ref())))
    }

    fn apply(
        &self,
        listed: &HashMap<SpriteId, Tag>,
        read: Vec<(SpriteId, Tag, Result<Option<Standing>, RecordError>)>,
        began_at: Instant,
    ) -> Result<(), RecordError> {
        let mut table = self.table();
        let mut failure = None;
        let ours = |row: &Row| row.written_at.is_some_and(|at| at >= began_at);
        let before = table.sprites.len();
        table.sprites.retain(|id, row| listed.contains_key(id) || ours(row));
        let mut is_changed = table.sprites.len() != before;
        for (id, tag, answer) in read {
            if table.sprites.get(&id).is_some_and(ours) {
                continue;
            }
            match answer {
                Ok(Some(standing)) => {
                    table.sprites.insert(id, Row { tag: Some(tag), standing, written_at: None });
                    is_changed = true;
                }
                Ok(None) => is_changed |= table.sprites.remove(&id).is_some(),
                Err(error) => failure = Some(error),
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        table.refreshed_at = Some(began_at);
        drop(table);
        if is_changed {
            self.announce();
        }
        Ok(())
    }

    /// Follows the node's states until `stop`.
    pub(crate) async fn follow(self: Arc<Self>, node: Node, mut stop: watch::Receiver<bool>) {
        let following = async {
            loop {
                if let Err(status) = self.follow_once(&node).await {
                    tracing::debug!("the node's states are not to be had: {}", status.message());
                }
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
        };
        tokio::select! {
            () = following => {}
            () = crate::stopped(&mut stop) => {}
        }
    }

    async fn follow_once(&self, node: &Node) -> Result<(), tonic::Status> {
        let mut events = node.watch_routes().await?;
        let mut first = Some(HashMap::new());
        while let Some(event) = events.message().await? {
            match event.event {
                Some(route_event::Event::Sprite(status)) => {
                    let Ok(id) = status.sprite_id.parse::<SpriteId>() else { continue };
                    match &mut first {
                        Some(all) => drop(all.insert(id, status)),
                        None => self.set_state(id, status),
                    }
                }
                Some(route_event::Event::Gone(id)) => {
                    if let Ok(id) = id.parse::<SpriteId>() {
                        self.table().states.remove(&id);
                        self.announce();
                    }
                }
                Some(route_event::Event::Synced(_)) => {
                    if let Some(all) = first.take() {
                        self.table().states = all;
                        self.announce();
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    /// What a call to the node said besides; the stream says it too, but maybe later.
    pub(crate) fn learn(&self, id: SpriteId, status: &SpriteStatus) {
        let is_older = self.state(id).is_some_and(|known| known.since_unix_ms > status.since_unix_ms);
        if !is_older {
            self.set_state(id, status.clone());
        }
    }

    fn set_state(&self, id: SpriteId, status: SpriteStatus) {
        // The numbers in a status change every few seconds; a watcher hears of states only.
        let old = self.table().states.insert(id, status.clone());
        if old.is_none_or(|old| old.state != status.state || old.reason != status.reason) {
            self.announce();
        }
    }

    fn announce(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Row {
    fn is_unsettled(&self) -> bool {
        matches!(self.standing, Standing::Unsettled(_))
    }
}

impl Standing {
    fn live(&self) -> Option<&Arc<SpriteRecord>> {
        match self {
            Self::Live(record) => Some(record),
            Self::Unsettled(_) | Self::Dead(_) | Self::Unreadable => None,
        }
    }

    fn record(&self) -> Option<&Arc<SpriteRecord>> {
        match self {
            Self::Live(record) | Self::Unsettled(record) | Self::Dead(record) => Some(record),
            Self::Unreadable => None,
        }
    }
}

/// Invariant 3.
fn standing(record: Arc<SpriteRecord>, name: Option<&Record<NameEntry>>) -> Standing {
    match name.map(|name| &name.value) {
        Some(NameEntry::Claimed { id, .. }) if *id == record.id => Standing::Live(record),
        Some(NameEntry::Pending { since, .. }) if *since == record.created_at => Standing::Unsettled(record),
        Some(NameEntry::Free { .. } | NameEntry::Pending { .. } | NameEntry::Claimed { .. }) | None => {
            Standing::Dead(record)
        }
    }
}
