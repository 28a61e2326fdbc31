//! Taking a checkpoint of a running sprite: frozen only for the seal (ruling 16).
//!
//! ```text
//!  syncfs ──▶ FIFREEZE (≤ 200 ms) ──▶ bell: the guest reads its disk, we seal (O(1), in memory) ──▶ thaw ──▶ journal synced ──▶ returned ──▶ … push … ──▶ durable
//!            └─────────────────────────────────── pause ──────────────────────────────────────┘
//! ```
//! The guest says "now" with a read of its disk, and not with a message: under load two messages take longer than all the rest. An agent of an older
//! guest does not know that; it is told to thaw. If the file system cannot be frozen in time, the cut is what a power failure would leave, and the
//! checkpoint says so.

use std::time::{Duration, Instant};

use blockstore::store::{Checkpoint, CheckpointError, CheckpointMeta, Consistency, SealOnRead, Volume};
use proto::{agent::FreezeReply, public};
use tokio::time::timeout;

use crate::{agent::AgentClient, vm::change::chain};

/// How long a freeze may take before the cut is taken crash-consistent.
const FREEZE_LIMIT_MS: u32 = 200;
/// The guest thaws by itself after this, should the host die in between.
const FROZEN_LIMIT_MS: u32 = 2000;
/// Before the freeze everything dirty is written, which takes what it takes; a guest that needs longer is stuck.
const FREEZE_ANSWER_LIMIT: Duration = Duration::from_secs(60);
const THAW_ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A checkpoint and what taking it cost.
#[derive(Clone, Debug)]
pub struct Taken {
    pub checkpoint: Checkpoint,
    /// How long the guest's writes stood still.
    pub pause: Duration,
    /// From the request until the checkpoint was listed.
    pub returned: Duration,
}

/// Seals the disk as it is now. The sprite goes on running.
///
/// # Errors
///
/// When the seal could not be recorded; then no checkpoint exists and no number is used up.
pub async fn take(
    agent: &AgentClient,
    volume: &Volume,
    comment: String,
    is_auto: bool,
) -> Result<Taken, CheckpointError> {
    let begun = Instant::now();
    let meta = |consistency| CheckpointMeta { comment: comment.clone(), consistency, is_auto };
    let bell = volume.seal_on_read(meta(Consistency::Filesystem)).await?;
    let frozen = freeze(agent, volume, &bell).await;
    let (sealed, pause) = match (bell.finish().await, frozen) {
        (Some(sealed), Some(frozen)) if frozen.rung => (sealed, Duration::from_micros(frozen.frozen_us)),
        (stray, frozen) => {
            let sealed = match frozen {
                Some(frozen) if !frozen.rung => {
                    seal_and_thaw(agent, volume, meta(Consistency::Filesystem), frozen.freeze_us).await
                }
                _ => seal_running(volume, meta(Consistency::Crash)).await,
            };
            // Read by somebody else, or after the guest had given up: nobody knows of what state that one is.
            if let Some(Ok(stray)) = stray
                && let Err(error) = volume.delete_checkpoint(&stray.id).await
            {
                tracing::warn!(sprite = %volume.id(), id = stray.id, error = chain(&error), "a checkpoint too many is left");
            }
            sealed
        }
    };
    Ok(Taken { checkpoint: sealed?, pause, returned: begun.elapsed() })
}

/// What the guest answered, if it was frozen.
async fn freeze(agent: &AgentClient, volume: &Volume, bell: &SealOnRead) -> Option<FreezeReply> {
    let sprite = volume.id();
    let call = agent.freeze(FREEZE_LIMIT_MS, FROZEN_LIMIT_MS, bell.read_bytes());
    match timeout(FREEZE_ANSWER_LIMIT, call).await {
        Err(_elapsed) => {
            tracing::warn!(%sprite, "the guest does not answer; the checkpoint is crash-consistent");
            None
        }
        Ok(Ok(answer)) if answer.frozen => {
            let FreezeReply { sync_ms, freeze_us, frozen_us, rung, .. } = answer;
            tracing::debug!(%sprite, sync_ms, freeze_us, frozen_us, rung, "frozen");
            Some(answer)
        }
        Ok(Ok(answer)) => {
            tracing::info!(%sprite, reason = answer.reason, "not frozen; the checkpoint is crash-consistent");
            None
        }
        Ok(Err(error)) => {
            tracing::warn!(%sprite, error = chain(&error), "not frozen; the checkpoint is crash-consistent");
            None
        }
    }
}

type Sealed = (Result<Checkpoint, CheckpointError>, Duration);

/// Of a guest that stands still until it is told.
async fn seal_and_thaw(agent: &AgentClient, volume: &Volume, meta: CheckpointMeta, freeze_us: u64) -> Sealed {
    let (sealed, mut pause) = seal_running(volume, meta).await;
    pause += Duration::from_micros(freeze_us);
    match timeout(THAW_ANSWER_LIMIT, agent.thaw()).await {
        Ok(Ok(answer)) => pause = Duration::from_micros(answer.frozen_us),
        Err(_elapsed) => tracing::warn!(sprite = %volume.id(), "the guest does not answer; it thaws by itself"),
        Ok(Err(error)) => {
            tracing::warn!(sprite = %volume.id(), error = chain(&error), "cannot thaw; the guest does it by itself")
        }
    }
    (sealed, pause)
}

/// Of a guest that goes on writing.
async fn seal_running(volume: &Volume, meta: CheckpointMeta) -> Sealed {
    let stopped = Instant::now();
    (volume.seal_checkpoint(meta).await, stopped.elapsed())
}

/// The form the APIs show.
pub fn to_public(checkpoint: &Checkpoint) -> public::Checkpoint {
    public::Checkpoint {
        id: checkpoint.id.clone(),
        create_unix_ms: checkpoint.created_unix_ms,
        comment: checkpoint.comment.clone(),
        durable: checkpoint.durable,
        lost: checkpoint.lost,
        consistency: match checkpoint.consistency {
            Consistency::Filesystem => "filesystem",
            Consistency::Crash => "crash",
        }
        .to_owned(),
        is_current_base: checkpoint.is_current_base,
        source_id: String::new(),
    }
}

/// The lines of a successful create, as the dialect's clients read them (sprites-api.md §8).
pub fn events(taken: &Taken) -> Vec<public::CheckpointEvent> {
    let id = &taken.checkpoint.id;
    let info = |data: String| public::CheckpointEvent { kind: "info".into(), data, ..Default::default() };
    vec![
        info("Creating checkpoint...".into()),
        info(format!("  ID: {id}")),
        public::CheckpointEvent {
            kind: "complete".into(),
            data: format!("Checkpoint {id} created successfully"),
            checkpoint: Some(to_public(&taken.checkpoint)),
            pause_us: u64::try_from(taken.pause.as_micros()).unwrap_or(u64::MAX),
            returned_ms: u64::try_from(taken.returned.as_millis()).unwrap_or(u64::MAX),
            durable_ms: 0,
        },
    ]
}
