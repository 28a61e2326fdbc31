//! What the API can do, once. REST (`rest`), gRPC (`grpc`) and the edge's questions (`control`) only translate.
//!
//! | module | what |
//! |---|---|
//! | here | look-ups, list, settings |
//! | [`create`] | name, sprite and their crash-safe order |
//! | [`destroy`] | the same backwards, and the sweep of what was left |
//! | [`life`] | sleep, wake, restart, resize, checkpoints |
//!
//! # Invariants
//!
//! 1. A single sprite is always read from the bucket; the index serves lists only.
//! 2. What changes something runs to its end also when its caller goes away ([`Service::detached`]).

use std::{sync::Arc, time::Duration};

use blockstore::bucket::{Bucket, Record, RecordError};
use proto::{
    id::{SpriteId, SpriteName},
    node::SpriteStatus,
    record::{SizeClass, SpriteRecord, UrlSettings},
};
use tokio::sync::watch;

use crate::{
    index::{AGE_MAX, Counts, Index, record_key},
    names::{NameEntry, Names, now},
    node::Node,
    refusal::{Refusal, chain},
    tokens::{Caller, Tokens},
    view::View,
};

pub(crate) mod create;
mod destroy;
mod life;
mod settings;

pub(crate) use life::CheckpointEvents;
pub(crate) use settings::{Environment, IdleTimeout, WakeTimers, labels, request_id};

/// Most sprites on a page; asking for more is not refused, it gets this many.
pub(crate) const PAGE_MAX: usize = 50;
/// Lost races of a change until we give up; each means that somebody else got on.
const RACES_MAX: u32 = 16;

/// The service functions. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Service(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bucket: Bucket,
    names: Names,
    index: Arc<Index>,
    tokens: Tokens,
    node: Node,
    domain: String,
    port: u16,
    stop: watch::Receiver<bool>,
}

/// What a service is made of.
pub(crate) struct Parts {
    pub(crate) bucket: Bucket,
    pub(crate) node: Node,
    pub(crate) domain: String,
    pub(crate) port: u16,
    pub(crate) stop: watch::Receiver<bool>,
}

/// What a create asks for, checked.
#[derive(Clone, Debug)]
pub(crate) struct NewSprite {
    pub(crate) name: SpriteName,
    /// The default: medium, or what the sprite has that it is forked from.
    pub(crate) size: Option<SizeClass>,
    pub(crate) disk_bytes: Option<u64>,
    pub(crate) from: Option<ForkSource>,
    pub(crate) labels: Vec<String>,
    pub(crate) environment: Environment,
    pub(crate) url_settings: UrlSettings,
    pub(crate) idle_timeout: Option<IdleTimeout>,
    pub(crate) always_on: bool,
    /// Wait a while for room instead of refusing.
    pub(crate) wait_for_capacity: bool,
    /// A sprite of that name that was made under the same id is the answer, not a refusal.
    pub(crate) request_id: Option<String>,
}

/// What a new sprite's disk begins as.
#[derive(Clone, Debug)]
pub(crate) struct ForkSource {
    pub(crate) sprite: String,
    /// `None`: as it is now.
    pub(crate) checkpoint: Option<String>,
}

/// A change of settings. `None`: stays as it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Update {
    pub(crate) url_auth: Option<proto::record::UrlAuth>,
    pub(crate) private_access: Option<String>,
    pub(crate) labels: Option<Vec<String>>,
    pub(crate) idle_timeout: Option<IdleTimeout>,
    pub(crate) always_on: Option<bool>,
    pub(crate) wake: WakeTimers,
}

/// One page of a list.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) sprites: Vec<View>,
    /// The name that the next page begins behind, if there is one.
    pub(crate) next: Option<SpriteName>,
    pub(crate) counts: Counts,
}

impl Service {
    /// Must be called inside a Tokio runtime.
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { bucket, node, domain, port, stop } = parts;
        let names = Names::new(bucket.clone());
        let index = Arc::new(Index::new(bucket.clone(), names.clone()));
        let tokens = Tokens::new(bucket.clone());
        Self(Arc::new(Inner { bucket, names, index, tokens, node, domain, port, stop }))
    }

    pub(crate) fn index(&self) -> &Arc<Index> {
        &self.0.index
    }

    pub(crate) fn node(&self) -> &Node {
        &self.0.node
    }

    /// Set when the coordinator ends: endless answers end then.
    pub(crate) fn stop(&self) -> watch::Receiver<bool> {
        self.0.stop.clone()
    }

    /// Whose token it is.
    pub(crate) async fn authenticate(&self, token: Option<&str>) -> Result<Caller, Refusal> {
        let token = token.ok_or(Refusal::Unauthenticated)?;
        self.0.tokens.authenticate(token).await?.ok_or(Refusal::Unauthenticated)
    }

    /// The sprite and how it is. Does not wake it.
    pub(crate) async fn get(&self, org: &str, name: &str) -> Result<View, Refusal> {
        let record = self.record(org, name).await?.value;
        Ok(self.view(record).await)
    }

    pub(crate) async fn view(&self, record: SpriteRecord) -> View {
        let status = self.status(record.id).await;
        View { record: Arc::new(record), status }
    }

    /// Asked of the node; when it does not answer, what it said last.
    pub(crate) async fn status(&self, id: SpriteId) -> Option<SpriteStatus> {
        match self.node().status(id).await {
            Ok(status) => {
                self.index().learn(id, &status);
                Some(status)
            }
            Err(status) => {
                tracing::debug!(sprite = %id, "its state cannot be asked: {}", status.message());
                self.index().state(id).map(|mut known| {
                    known.reason = format!("its host does not answer; last known: {}", known.reason);
                    known
                })
            }
        }
    }

    /// Sprites in order of their names, behind `after`.
    pub(crate) async fn list(
        &self,
        org: &str,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Listed, Refusal> {
        self.index().refresh(AGE_MAX).await?;
        let page = self.index().page(org, prefix, after, limit.clamp(1, PAGE_MAX));
        let last = page.sprites.last().map(|(record, _)| record.name.clone());
        let sprites = page.sprites.into_iter().map(|(record, status)| View { record, status }).collect();
        Ok(Listed { sprites, next: last.filter(|_| page.has_more), counts: self.index().counts(org) })
    }

    /// Every sprite whose name begins with `prefix`.
    pub(crate) fn all(&self, org: &str, prefix: &str) -> Vec<View> {
        let page = self.index().page(org, prefix, None, usize::MAX);
        page.sprites.into_iter().map(|(record, status)| View { record, status }).collect()
    }

    /// Changes settings and tells the node.
    pub(crate) async fn update(&self, org: &str, name: &str, update: Update) -> Result<View, Refusal> {
        let (service, org, name) = (self.clone(), org.to_owned(), name.to_owned());
        Self::detached(async move {
            let change = move |record: &mut SpriteRecord| update.apply(record);
            let record = service.change(&org, &name, change).await?;
            Ok(service.view(record).await)
        })
        .await
    }

    /// Applies `change` to the record, again after each lost race, and has the node read it.
    async fn change(&self, org: &str, name: &str, change: impl Fn(&mut SpriteRecord)) -> Result<SpriteRecord, Refusal> {
        for _ in 0..RACES_MAX {
            let old = self.record(org, name).await?;
            let mut new = old.value.clone();
            change(&mut new);
            new.updated_at = now();
            match self.0.bucket.update_record(&old, new).await {
                Ok(record) => {
                    self.index().put(record.value.clone());
                    if let Err(status) = self.node().reload(record.value.id).await {
                        // It reads the record when it takes the sprite up again.
                        tracing::warn!(sprite = %record.value.id, "the node did not take the new settings: {}", status.message());
                    }
                    return Ok(record.value);
                }
                Err(RecordError::Conflict { .. } | RecordError::Superseded { .. }) => {}
                Err(RecordError::Gone { .. }) => return Err(Refusal::NotFound { name: name.to_owned() }),
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::Conflict(format!("{name} is being changed by many at once; try again")))
    }

    /// The record behind a name, for changing it.
    async fn record(&self, org: &str, name: &str) -> Result<Record<SpriteRecord>, Refusal> {
        let not_found = || Refusal::NotFound { name: name.to_owned() };
        let parsed = name.parse::<SpriteName>().map_err(|_no_sprite_has_it| not_found())?;
        let id = self.id(org, &parsed).await?.ok_or_else(not_found)?;
        let record = self.0.bucket.read_record::<SpriteRecord>(&record_key(id)).await?;
        record.filter(|record| !record.value.deleted).ok_or_else(not_found)
    }

    /// The id that a name means. Resolves a claim that its maker gave up.
    async fn id(&self, org: &str, name: &SpriteName) -> Result<Option<SpriteId>, Refusal> {
        let entry = self.0.names.read(org, name).await?;
        match entry {
            None => Ok(None),
            Some(entry) => match entry.value {
                NameEntry::Free { .. } => Ok(None),
                NameEntry::Claimed { id, .. } => Ok(Some(id)),
                NameEntry::Pending { .. } if entry.value.is_abandoned(now()) => self.resolve(org, name, &entry).await,
                NameEntry::Pending { .. } => Ok(None),
            },
        }
    }

    /// Ends a claim whose maker is gone: the sprite it made has the name, or nobody (ruling 1).
    async fn resolve(
        &self,
        org: &str,
        name: &SpriteName,
        entry: &Record<NameEntry>,
    ) -> Result<Option<SpriteId>, Refusal> {
        let NameEntry::Pending { since, .. } = entry.value else { return Ok(None) };
        let born = self.index().born(org, name, since).await?.map(|record| record.id);
        tracing::info!(%name, ?born, "a create was given up; its name is resolved");
        let end = match born {
            Some(id) => NameEntry::Claimed { id, since },
            None => NameEntry::Free { since: now() },
        };
        self.0.names.replace(entry, end).await?;
        Ok(born)
    }

    /// The sprite's public address.
    fn url(&self, name: &SpriteName, oid: &str) -> String {
        let Inner { domain, port, .. } = &*self.0;
        match port {
            443 => format!("https://{name}-{oid}.{domain}"),
            port => format!("https://{name}-{oid}.{domain}:{port}"),
        }
    }

    /// Whose label it is: organisation and name.
    pub(crate) async fn label(&self, label: &str) -> Result<Option<(String, SpriteName)>, Refusal> {
        Ok(self.0.names.label(label).await?.map(|entry| (entry.org, entry.name)))
    }

    /// Runs `work` to its end, whatever becomes of the caller.
    async fn detached<T: Send + 'static>(
        work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
    ) -> Result<T, Refusal> {
        match tokio::spawn(work).await {
            Ok(outcome) => outcome,
            Err(error) => Err(Refusal::Failed(format!("the coordinator broke down over this call: {error}"))),
        }
    }

    /// Keeps the index's states up to date and frees what crashes left behind, until the coordinator stops.
    pub(crate) async fn background(self) {
        let follow = Arc::clone(self.index()).follow(self.node().clone(), self.stop());
        tokio::join!(follow, self.sweep_on());
    }

    async fn sweep_on(&self) {
        const SWEEP_PERIOD: Duration = Duration::from_secs(30);
        let mut stop = self.stop();
        loop {
            if let Err(error) = self.sweep().await {
                tracing::debug!("nothing swept: {}", chain(&error));
            }
            tokio::select! {
                () = tokio::time::sleep(SWEEP_PERIOD) => {}
                () = crate::stopped(&mut stop) => return,
            }
        }
    }
}

impl Update {
    fn apply(&self, record: &mut SpriteRecord) {
        if let Some(auth) = self.url_auth {
            record.url_settings.auth = auth;
        }
        if let Some(access) = &self.private_access {
            record.url_settings.private_access = Some(access.clone());
        }
        if let Some(labels) = &self.labels {
            record.labels.clone_from(labels);
        }
        if let Some(timeout) = self.idle_timeout {
            record.idle.pause_after_ms = timeout.pause_after_ms();
        }
        if let Some(always_on) = self.always_on {
            record.always_on = always_on;
        }
        if let Some(at) = &self.wake.at {
            record.wake_at.clone_from(at);
        }
        if let Some(every_ms) = self.wake.every_ms {
            record.wake_every_ms = every_ms;
            // A new period begins now.
            record.finish_wakes(now());
        }
    }
}
