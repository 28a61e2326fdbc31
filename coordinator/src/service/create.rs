//! Making a sprite.
//!
//! ```text
//!  check ─▶ label ─▶ name pending ─▶ node: a whole sprite, with `rec` ─▶ name claimed ─▶ 201
//!                        │                      ├─ refused ─▶ name free
//!                        │                      └─ no answer ─▶ did it leave a `rec`? then claimed, else the claim runs out
//!                        └── crash: whoever looks after 60 s resolves the claim by the `rec` (`names`)
//! ```
//!
//! A caller that does not know whether its create was done repeats it with the same `request_id`: the record keeps it as long as the sprite lives, so
//! that any coordinator gives the sprite that was made, or waits for the one that is being made.

use std::time::Duration;

use blockstore::bucket::{Record, RecordError};
use futures_util::StreamExt as _;
use proto::{
    id::{SpriteId, SpriteName},
    paths::CURRENT_CHECKPOINT,
    record::{DISK_BYTES_DEFAULT, ForkedFrom, IdlePolicy, SizeClass, SpriteRecord},
};
use tokio::time::Instant;

use super::{ForkSource, NewSprite, Service, settings};
use crate::{
    index::record_key,
    names::{Claim, Claimed, NameEntry, RENEW_PERIOD, now},
    node::CreateFailure,
    refusal::{Refusal, chain},
    view::{SPRITES_PER_ORG_MAX, View},
};

/// How long a create that may wait for room waits: the strictest client gives up after 30 s.
const CAPACITY_WAIT: Duration = Duration::from_secs(25);
const CAPACITY_PAUSE: Duration = Duration::from_secs(1);
/// A quota may overshoot by what other coordinators made in this time.
const QUOTA_AGE_MAX: Duration = Duration::from_secs(30);
const QUOTA_PATIENCE: Duration = Duration::from_secs(2);
/// A name that is being freed is waited for by trying again.
const CLAIM_ATTEMPTS: u32 = 3;
/// A repeated create waits so long for the first one, which may itself have been given up: its claim is free after 60 s.
const FIRST_WAIT: Duration = Duration::from_secs(90);
const FIRST_PAUSE: Duration = Duration::from_millis(250);

impl Service {
    /// Makes a sprite. Returns when commands can run in it.
    pub(crate) async fn create(&self, org: &str, new: NewSprite) -> Result<View, Refusal> {
        let (service, org) = (self.clone(), org.to_owned());
        Self::detached(async move { service.create_here(&org, new).await }).await
    }

    async fn create_here(&self, org: &str, new: NewSprite) -> Result<View, Refusal> {
        self.check_quota(org).await?;
        let environment = settings::environment(new.environment.clone())?;
        let mut claim = match self.claim_or_find(org, &new).await? {
            Start::Here(claim) => claim,
            Start::Done(view) => return Ok(*view),
        };
        let made = self.make(org, &new, environment, &mut claim).await;
        let (id, record) = match made {
            Ok(made) => made,
            Err(Failure::Nothing(refusal)) => {
                if let Err(error) = self.0.names.release(claim).await {
                    tracing::warn!(name = %new.name, "its name stays busy for a minute: {}", chain(&error));
                }
                return Err(refusal);
            }
            Err(Failure::Unclear(refusal)) => return Err(refusal),
        };
        if let Err(error) = self.0.names.settle(&claim, id).await {
            // The record stays: whoever looks finds out whose the name is, and the sweep frees what has none.
            return Err(match error {
                RecordError::Conflict { .. } => Refusal::NameBusy { name: new.name.to_string() },
                error => error.into(),
            });
        }
        tracing::info!(sprite = %id, name = %new.name, org, "created");
        self.index().put(record.clone());
        Ok(self.view(record).await)
    }

    /// By what is known when the bucket cannot be listed: the claim that follows finds out whether it is there at all.
    async fn check_quota(&self, org: &str) -> Result<(), Refusal> {
        let refreshed = tokio::time::timeout(QUOTA_PATIENCE, self.index().refresh(QUOTA_AGE_MAX)).await;
        if !matches!(refreshed, Ok(Ok(()))) {
            tracing::debug!("a quota is checked against an old list");
        }
        let counts = self.index().counts(org);
        let current = counts.running + counts.warm + counts.cold;
        if current >= SPRITES_PER_ORG_MAX {
            return Err(Refusal::TooManySprites { current, max: SPRITES_PER_ORG_MAX });
        }
        Ok(())
    }

    /// Takes the name, or finds the sprite that the same request has made before.
    async fn claim_or_find(&self, org: &str, new: &NewSprite) -> Result<Start, Refusal> {
        let give_up_at = Instant::now() + FIRST_WAIT;
        loop {
            let refusal = match self.claim(org, &new.name).await {
                Ok(claim) => return Ok(Start::Here(claim)),
                Err(refusal) if new.request_id.is_none() => return Err(refusal),
                Err(refusal) => refusal,
            };
            match &refusal {
                Refusal::NameTaken { name } => {
                    let found = self.get(org, name).await?;
                    let is_same = found.record.request_id == new.request_id;
                    return if is_same { Ok(Start::Done(Box::new(found))) } else { Err(refusal) };
                }
                Refusal::NameBusy { .. } if Instant::now() < give_up_at => tokio::time::sleep(FIRST_PAUSE).await,
                _ => return Err(refusal),
            }
        }
    }

    /// Takes the name, out of the way of whatever a crash left on it.
    async fn claim(&self, org: &str, name: &SpriteName) -> Result<Claim, Refusal> {
        for _ in 0..CLAIM_ATTEMPTS {
            let taken = match self.0.names.claim(org, name).await? {
                Claimed::Ours(claim) => return Ok(claim),
                Claimed::Taken(entry) => entry,
            };
            if !self.clear(org, name, &taken).await? {
                let name = name.to_string();
                return Err(match taken.value {
                    NameEntry::Claimed { .. } => Refusal::NameTaken { name },
                    NameEntry::Pending { .. } | NameEntry::Free { .. } => Refusal::NameBusy { name },
                });
            }
        }
        Err(Refusal::NameBusy { name: name.to_string() })
    }

    /// Ends what holds the name without a right to it. Says whether the name may be free now.
    async fn clear(&self, org: &str, name: &SpriteName, taken: &Record<NameEntry>) -> Result<bool, Refusal> {
        match &taken.value {
            NameEntry::Free { .. } => Ok(true),
            NameEntry::Pending { .. } if taken.value.is_abandoned(now()) => {
                Ok(self.resolve(org, name, taken).await?.is_none())
            }
            NameEntry::Pending { .. } => Ok(false),
            NameEntry::Claimed { id, since } => {
                match self.0.bucket.read_record::<SpriteRecord>(&record_key(*id)).await? {
                    Some(record) if !record.value.deleted => Ok(false),
                    // A destroy that did not get to its end.
                    Some(record) => self.finish_destroy(&record.value).await.map(|()| true),
                    None => {
                        self.0.names.free(org, name, *id, *since).await?;
                        Ok(true)
                    }
                }
            }
        }
    }

    async fn make(
        &self,
        org: &str,
        new: &NewSprite,
        environment: settings::Environment,
        claim: &mut Claim,
    ) -> Result<(SpriteId, SpriteRecord), Failure> {
        let parent = match &new.from {
            Some(source) => {
                let found = self.holding(claim, self.fork_source(org, &new.name, source)).await;
                Some(found.map_err(Failure::Nothing)?)
            }
            None => None,
        };
        let (default_size, default_disk_bytes) = match &parent {
            Some((parent, _)) => (parent.size, parent.disk_bytes),
            None => (SizeClass::default(), DISK_BYTES_DEFAULT),
        };
        let oid = self.0.names.claim_label(org, &new.name).await.map_err(Failure::Nothing)?;
        let mut idle = IdlePolicy::default();
        if let Some(timeout) = new.idle_timeout {
            idle.pause_after_ms = timeout.pause_after_ms();
        }
        let mut record = SpriteRecord {
            // The node chooses it: it may have a whole sprite in stock.
            id: SpriteId::generate(),
            name: new.name.clone(),
            org: org.to_owned(),
            url: self.url(&new.name, &oid),
            oid,
            created_at: claim.since,
            updated_at: claim.since,
            size: new.size.unwrap_or(default_size),
            disk_bytes: new.disk_bytes.unwrap_or(default_disk_bytes),
            labels: new.labels.clone(),
            environment,
            url_settings: new.url_settings.clone(),
            idle,
            always_on: new.always_on,
            wake_at: Vec::new(),
            wake_every_ms: None,
            wakes_done: None,
            request_id: new.request_id.clone(),
            from: parent.map(|(_, from)| from),
            deleted: false,
        };
        record.id = self.make_at_node(&record, new.wait_for_capacity, claim).await?;
        Ok((record.id, record))
    }

    /// The sprite to fork, and its checkpoint: one that is taken now if none is named.
    async fn fork_source(
        &self,
        org: &str,
        child: &SpriteName,
        source: &ForkSource,
    ) -> Result<(SpriteRecord, ForkedFrom), Refusal> {
        let parent = self.record(org, &source.sprite).await?.value;
        let checkpoint = match &source.checkpoint {
            Some(checkpoint) if checkpoint != CURRENT_CHECKPOINT => {
                let known = self.node().checkpoints(parent.id).await?;
                if !known.iter().any(|known| known.id == *checkpoint) {
                    return Err(Refusal::CheckpointNotFound { id: checkpoint.clone() });
                }
                checkpoint.clone()
            }
            Some(_) | None => {
                let mut events =
                    self.create_checkpoint(org, &source.sprite, format!("forked as {child}"), false).await?;
                let mut taken = None;
                while let Some(event) = events.next().await {
                    taken = event?.checkpoint.map(|checkpoint| checkpoint.id).or(taken);
                }
                taken.ok_or_else(|| Refusal::Failed(format!("{} gave no checkpoint to fork", source.sprite)))?
            }
        };
        let from = ForkedFrom { id: parent.id, name: parent.name.clone(), checkpoint };
        Ok((parent, from))
    }

    /// Waits for `work` and keeps the claim of the name alive meanwhile.
    async fn holding<T>(&self, claim: &mut Claim, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                answer = &mut work => return answer,
                () = tokio::time::sleep(RENEW_PERIOD) => {
                    if let Err(error) = self.0.names.renew(claim).await {
                        tracing::warn!("a claim cannot be renewed: {}", chain(&error));
                    }
                }
            }
        }
    }

    /// Has the node make it.
    async fn make_at_node(&self, record: &SpriteRecord, wait: bool, claim: &mut Claim) -> Result<SpriteId, Failure> {
        let give_up_at = Instant::now() + CAPACITY_WAIT;
        loop {
            match self.holding(claim, self.node().create(record)).await {
                Ok(reply) => {
                    return reply.sprite_id.parse().map_err(|error| {
                        Failure::Unclear(Refusal::Failed(format!("the host named the new sprite strangely: {error}")))
                    });
                }
                Err(CreateFailure::Refused(status)) => {
                    let is_full = status.code() == tonic::Code::ResourceExhausted;
                    if !(is_full && wait && Instant::now() < give_up_at) {
                        return Err(Failure::Nothing(status.into()));
                    }
                    tokio::time::sleep(CAPACITY_PAUSE).await;
                }
                Err(CreateFailure::Unclear(status)) => {
                    return match self.index().born(&record.org, &record.name, claim.since).await {
                        Ok(Some(born)) => Ok(born.id),
                        Ok(None) | Err(_) => Err(Failure::Unclear(status.into())),
                    };
                }
            }
        }
    }
}

/// How a create begins.
enum Start {
    /// With the name ours.
    Here(Claim),
    /// The same request has made it before.
    Done(Box<View>),
}

/// Why there is no new sprite.
enum Failure {
    /// Nothing was made.
    Nothing(Refusal),
    /// Something may have been, or may yet be: the claim has to stay until it runs out.
    Unclear(Refusal),
}
