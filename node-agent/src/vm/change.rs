//! How each [`Change`] is made. Called by the owner task, one at a time.
//!
//! A change takes the sprite's [`Parts`] and gives them back with where it ended. None of them leaves a sprite without its disk: the volume is only given up
//! when everything in it has reached the bucket.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use blockstore::store::{MemoryTarget, StoreError, Volume};
use proto::{
    agent,
    id::SpriteId,
    record::{DISK_BYTES_DEFAULT, SizeClass, SpriteRecord},
};

use super::{Change, Settled};
use crate::{
    agent::{AgentClient, CallError},
    golden::Golden,
    laps::Laps,
    net,
    process::{Plan, Snapshot, VmNote, VmProcess, blocking},
    resources::{Resources, Slot},
    seed::Seed,
};

/// Ending the user's processes before a restore may take so long; then a fresh VM is the quicker way (ruling 15).
const STOP_ENVIRONMENT_MS: u32 = 500;
/// What is dirty in the guest's page cache goes to the disk before the vCPUs stop, so that the disk alone is enough later; but sleep does not wait for a
/// guest that writes without end.
const SYNC_LIMIT: Duration = Duration::from_secs(2);

/// What the guest may need to take its identity and right time.
const CONFIGURE_LIMIT: Duration = Duration::from_secs(30);
/// Mounting may replay the file system's journal; on a host under load that takes seconds.
const ENVIRONMENT_LIMIT: Duration = Duration::from_secs(60);
/// Growing an ext4 by hundreds of GiB writes its new group descriptors: seconds, on a slow host more.
pub(crate) const GROW_LIMIT: Duration = Duration::from_secs(120);
/// A few files of a disk that was just mounted.
const FORK_SYNC_LIMIT: Duration = Duration::from_secs(30);
/// The guest's promise is [`STOP_ENVIRONMENT_MS`]; one that does not even answer is given up.
const STOP_ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// A guest that does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    #[error("the guest refused")]
    Call(#[from] CallError),
    #[error("the guest did not {0} in time")]
    Silent(&'static str),
}

/// Why no VM was started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BootError {
    /// Nothing is broken: the same may work later.
    #[error("the host has no {0} left for another VM; let some sprites sleep, or add memory")]
    NoRoom(&'static str),
    #[error("{0}")]
    Failed(String),
}

impl BootError {
    fn failed(error: &dyn std::error::Error) -> Self {
        Self::Failed(chain(error))
    }
}

/// What exists of a sprite on this host.
#[derive(Debug)]
pub(crate) struct Parts {
    pub id: SpriteId,
    pub size: SizeClass,
    /// `None` while it waits in the pool.
    pub record: Option<SpriteRecord>,
    pub process: Option<VmProcess>,
    /// `None`, or no longer open: everything is in the bucket, and any host may take it.
    pub volume: Option<Volume>,
    /// A suspended image that has not been loaded yet.
    pub image: Option<Image>,
}

/// Where the memory of a suspended sprite is.
#[derive(Clone, Debug)]
pub(crate) enum Image {
    /// On this host, and later in the bucket as well.
    Local(VmNote),
    /// In the bucket only.
    Bucket,
}

/// Where a change ended, and what people should know.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub settled: Settled,
    /// Why the sprite is in this state.
    pub reason: String,
    /// For a wake: `paused`, `memory` or `disk`.
    pub resumed: Option<&'static str>,
    /// Loss or surprise, kept in the sprite's list of events.
    pub event: Option<String>,
    /// Set when what was asked for was not done.
    pub error: Option<String>,
    /// It was not woken because the host has no room now.
    pub no_room: bool,
    /// How long vCPUs stood still until the device state was saved.
    pub frozen: Option<Duration>,
}

impl Outcome {
    fn new(settled: Settled, reason: impl Into<String>) -> Self {
        Self { settled, reason: reason.into(), resumed: None, event: None, error: None, no_room: false, frozen: None }
    }

    /// Still where it was.
    fn no_room(settled: Settled, what: &'static str) -> Self {
        let reason = BootError::NoRoom(what).to_string();
        Self { error: Some(reason.clone()), no_room: true, ..Self::new(settled, reason) }
    }

    fn failed(reason: String) -> Self {
        Self { error: Some(reason.clone()), ..Self::new(Settled::Failed, reason) }
    }
}

/// Makes one change. Never fails as a call: the outcome says where the sprite is now.
pub(crate) async fn make(resources: Arc<Resources>, mut parts: Parts, change: Change, why: String) -> (Parts, Outcome) {
    let outcome = match change {
        Change::Pause => pause(&mut parts, why).await,
        Change::Unpause => unpause(&resources, &mut parts).await,
        Change::Suspend => suspend(&mut parts, why).await,
        Change::Resume => resume(&resources, &mut parts).await,
        Change::Boot => boot(&resources, &mut parts, "woken from its disk".into()).await,
        Change::GoCold => go_cold(&resources, &mut parts, why).await,
        Change::Restore { checkpoint } => restore(&resources, &mut parts, &checkpoint).await,
        Change::Reboot => {
            end_process(&mut parts).await;
            boot(&resources, &mut parts, "restarted".into()).await
        }
        Change::Destroy => destroy(&resources, &mut parts).await,
    };
    (parts, outcome)
}

async fn pause(parts: &mut Parts, why: String) -> Outcome {
    let Some(process) = &parts.process else { return Outcome::failed("its VM is gone".into()) };
    sync_guest(process).await;
    match process.pause().await {
        Ok(()) => Outcome::new(Settled::Paused, why),
        Err(error) => {
            let reason = format!("QEMU does not obey: {}", chain(&error));
            end_process(parts).await;
            Outcome::failed(reason)
        }
    }
}

async fn sync_guest(process: &VmProcess) {
    match tokio::time::timeout(SYNC_LIMIT, process.agent.sync()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(sprite = %process.note.sprite, error = chain(&error), "the guest cannot sync its disk")
        }
        Err(_elapsed) => {
            tracing::info!(sprite = %process.note.sprite, "the guest is still writing; it sleeps with unwritten pages in memory")
        }
    }
}

async fn unpause(resources: &Resources, parts: &mut Parts) -> Outcome {
    let woken = match &mut parts.process {
        Some(process) => match process.unpause().await {
            Ok(()) => configure(process, parts.record.as_ref(), false).await.map_err(|error| chain(&error)),
            Err(error) => Err(chain(&error)),
        },
        None => Err("its VM is gone".into()),
    };
    match woken {
        Ok(()) => Outcome { resumed: Some("paused"), ..Outcome::new(Settled::Running, "woken") },
        Err(reason) => {
            end_process(parts).await;
            let mut outcome = boot(resources, parts, "started again from its disk".into()).await;
            outcome.event = Some(format!("memory lost: the paused VM could not go on: {reason}"));
            outcome
        }
    }
}

async fn suspend(parts: &mut Parts, why: String) -> Outcome {
    let (Some(process), Some(volume)) = (&mut parts.process, &parts.volume) else {
        return Outcome::failed("its VM is gone".into());
    };
    if process.qmp.run_state().await.is_ok_and(|state| state == "running") {
        sync_guest(process).await;
    }
    let volume = volume.clone();
    match process.suspend(|| volume.status().lsn.0).await {
        Ok(frozen) => {
            parts.image = Some(Image::Local(process.note.clone()));
            end_process(parts).await;
            Outcome { frozen: Some(frozen), ..Outcome::new(Settled::Suspended, why) }
        }
        Err(error) => {
            let reason = format!("cannot suspend: {}", chain(&error));
            tracing::error!(sprite = %parts.id, reason);
            match recover_from_failed_suspend(parts).await {
                Ok(()) => Outcome { error: Some(reason.clone()), ..Outcome::new(Settled::Running, reason) },
                Err(second) => {
                    end_process(parts).await;
                    Outcome::failed(format!("{reason}; then: {second}"))
                }
            }
        }
    }
}

/// The vCPUs still have their state: run on, with a new connection to the agent.
async fn recover_from_failed_suspend(parts: &mut Parts) -> Result<(), String> {
    let process = parts.process.as_mut().ok_or("its VM is gone")?;
    process.unpause().await.map_err(|error| chain(&error))?;
    process.reconnect().await.map_err(|error| chain(&error))?;
    configure(process, parts.record.as_ref(), false).await.map_err(|error| chain(&error))
}

async fn resume(resources: &Resources, parts: &mut Parts) -> Outcome {
    let Some(image) = parts.image.take() else {
        return boot(resources, parts, "woken from its disk".into()).await;
    };
    let slot = match room(resources) {
        Ok(slot) => slot,
        Err(what) => {
            parts.image = Some(image);
            return Outcome::no_room(Settled::Suspended, what);
        }
    };
    let why = match try_resume(resources, parts, image, slot).await {
        Ok(()) => return Outcome { resumed: Some("memory"), ..Outcome::new(Settled::Running, "woken") },
        Err(why) => why,
    };
    tracing::warn!(sprite = %parts.id, why, "booting from the disk instead of resuming");
    end_process(parts).await;
    let mut outcome = boot(resources, parts, "woken from its disk: its memory could not be used".into()).await;
    outcome.event = Some(format!("memory lost: {why}"));
    outcome
}

/// A place for one more VM, or what there is none of.
fn room(resources: &Resources) -> Result<Slot, &'static str> {
    if !resources.has_room() {
        return Err("memory");
    }
    resources.slots.take().ok_or("network slot")
}

async fn try_resume(resources: &Resources, parts: &mut Parts, image: Image, slot: Slot) -> Result<(), String> {
    let mut laps = Laps::begin();
    let volume = open_disk(resources, parts).await.map_err(|error| chain(&error))?;
    let golden = resources.golden(parts.size).await.map_err(|error| chain(&error))?;
    let image = match image {
        Image::Local(note) => note,
        Image::Bucket => fetch(resources, parts, golden, &volume).await?,
    };
    let lsn = volume.status().lsn.0;
    if image.suspended_lsn != Some(lsn) {
        return Err(format!("the image belongs to disk position {:?}, the disk is at {lsn}", image.suspended_lsn));
    }
    volume.retire_memory().await.map_err(|error| chain(&error))?;
    laps.lap("disk and image");
    let plan = Plan { note: image, slot, volume };
    let process =
        VmProcess::resume(resources, resources.run_dir(parts.id), golden, plan).await.map_err(|error| chain(&error))?;
    laps.lap("VM");
    let configured = configure(&process, parts.record.as_ref(), false).await;
    laps.lap("identity");
    tracing::info!(sprite = %parts.id, %laps, "its memory runs again");
    parts.process = Some(process);
    configured.map_err(|error| chain(&error))
}

/// Brings the image from the bucket to where a suspend would have left it.
async fn fetch(resources: &Resources, parts: &Parts, golden: &Golden, volume: &Volume) -> Result<VmNote, String> {
    let run = resources.run_dir(parts.id);
    let info = volume.memory().ok_or("the bucket has no memory of it for its disk as it is")?;
    if info.snapshot_key != golden.image_key() {
        return Err(format!(
            "its memory belongs to snapshot {}, this host has {}",
            info.snapshot_key,
            golden.image_key()
        ));
    }
    let cleared = run.clone();
    let clear = blocking(move || {
        std::fs::create_dir_all(&cleared.folder)?;
        cleared.drop_image()
    });
    clear.await.map_err(|error| error.to_string())?;
    let target = MemoryTarget {
        memory_file: run.memory.clone(),
        golden_file: golden.snapshot.memory.clone(),
        state_file: run.state(),
    };
    let info = volume.fetch_memory(target).await.map_err(|error| chain(&error))?;
    Ok(VmNote {
        sprite: parts.id,
        size: parts.size,
        slot: 0,
        snapshot_key: golden.key.clone(),
        machine_key: resources.model(parts.size).machine_key(),
        process: None,
        loading: false,
        suspended_lsn: Some(info.lsn.0),
        pooled: false,
    })
}

/// A fresh golden VM on the sprite's disk.
pub(crate) async fn boot(resources: &Resources, parts: &mut Parts, why: String) -> Outcome {
    match try_boot(resources, parts, false).await {
        Ok(()) => Outcome { resumed: Some("disk"), ..Outcome::new(Settled::Running, why) },
        Err(BootError::NoRoom(what)) => Outcome::no_room(Settled::Cold, what),
        Err(BootError::Failed(reason)) => {
            end_process(parts).await;
            Outcome::failed(reason)
        }
    }
}

/// The sprite's disk, taken for this host if it is not. One that is open costs nothing.
async fn open_disk(resources: &Resources, parts: &mut Parts) -> Result<Volume, StoreError> {
    let volume = resources.store.acquire(parts.id).await?;
    parts.volume = Some(volume.clone());
    Ok(volume)
}

/// A sprite's first life, as a copy of the seed or, without one, of the golden VM. A fork's disk fits the golden VM only. Says which it was.
pub(crate) async fn begin_life(resources: &Resources, parts: &mut Parts) -> Result<&'static str, BootError> {
    let is_fork = parts.record.as_ref().is_some_and(|record| record.from.is_some());
    let from = if is_fork {
        try_boot(resources, parts, true).await?;
        // What it must not share with its parent is on its disk before anybody may use it: a later start could not tell.
        if let Some(process) = &parts.process {
            sync_or_fail(process).await?;
        }
        "fork"
    } else {
        first_vm(resources, parts).await?
    };
    fill_disk(parts).await?;
    Ok(from)
}

async fn sync_or_fail(process: &VmProcess) -> Result<(), BootError> {
    match tokio::time::timeout(FORK_SYNC_LIMIT, process.agent.sync()).await {
        Ok(synced) => synced.map_err(|error| BootError::failed(&error)),
        Err(_elapsed) => Err(BootError::failed(&GuestError::Silent("write its identity to its disk"))),
    }
}

async fn first_vm(resources: &Resources, parts: &mut Parts) -> Result<&'static str, BootError> {
    if let Some(seed) = resources.seeds.get(parts.size) {
        // The disk gets what the seed has written, so that it fits the memory. With half of it, it would be no file system for the golden VM either.
        let volume = open_disk(resources, parts).await.map_err(|error| BootError::failed(&error))?;
        volume.apply(&seed.disk).await.map_err(|error| BootError::failed(&error))?;
        match try_seed(resources, parts, &seed).await {
            Ok(()) => {
                resources.seeds.worked(parts.size);
                return Ok("seed");
            }
            Err(no_room @ BootError::NoRoom(_)) => return Err(no_room),
            Err(BootError::Failed(reason)) => {
                tracing::warn!(sprite = %parts.id, reason, "a copy of the seed is of no use; starting from the golden VM");
                resources.seeds.give_up(parts.size, &seed).await;
                end_process(parts).await;
            }
        }
    }
    try_boot(resources, parts, true).await?;
    Ok("golden")
}

/// The base's file system has the default size, and that of a checkpoint may have been taken before the disk grew: it grows to all of the disk.
async fn fill_disk(parts: &Parts) -> Result<(), BootError> {
    let (Some(process), Some(volume)) = (&parts.process, &parts.volume) else { return Ok(()) };
    if volume.size_bytes() == DISK_BYTES_DEFAULT {
        return Ok(());
    }
    match tokio::time::timeout(GROW_LIMIT, process.agent.grow_filesystem(volume.size_bytes())).await {
        Ok(grown) => grown.map_err(|error| BootError::failed(&error)),
        Err(_elapsed) => Err(BootError::failed(&GuestError::Silent("grow its file system"))),
    }
}

/// On a disk that has what the seed has written.
async fn try_seed(resources: &Resources, parts: &mut Parts, seed: &Seed) -> Result<(), BootError> {
    let mut laps = Laps::begin();
    let record = parts.record.clone();
    let process = start_copy(resources, parts, &seed.snapshot).await?;
    laps.lap("VM");
    configure(process, record.as_ref(), true).await.map_err(|error| BootError::failed(&error))?;
    laps.lap("identity");
    tracing::info!(sprite = %process.note.sprite, %laps, "a copy of the seed has begun");
    process.start_is_finished().map_err(|error| BootError::failed(&error))
}

/// A golden VM on the disk with its environment started, that is not told who it is: what becomes a seed.
pub(crate) async fn start_nameless(resources: &Resources, parts: &mut Parts) -> Result<(), BootError> {
    let golden = resources.golden(parts.size).await.map_err(|error| BootError::failed(&error))?;
    let process = start_copy(resources, parts, &golden.snapshot).await?;
    let network_only = agent::ConfigureRequest { network: Some(net::guest_network()), ..Default::default() };
    send_configuration(&process.agent, network_only).await.map_err(|error| BootError::failed(&error))?;
    start_environment(&process.agent).await.map_err(|error| BootError::failed(&error))
}

/// Starts a VM on the disk and its environment in it. `fresh` is the sprite's first life.
pub(crate) async fn try_boot(resources: &Resources, parts: &mut Parts, fresh: bool) -> Result<(), BootError> {
    let mut laps = Laps::begin();
    let golden = resources.golden(parts.size).await.map_err(|error| BootError::failed(&error))?;
    let record = parts.record.clone();
    let process = start_copy(resources, parts, &golden.snapshot).await?;
    laps.lap("VM");
    configure(process, record.as_ref(), fresh).await.map_err(|error| BootError::failed(&error))?;
    laps.lap("identity");
    start_environment(&process.agent).await.map_err(|error| BootError::failed(&error))?;
    laps.lap("environment");
    tracing::info!(sprite = %process.note.sprite, %laps, "a golden VM has become this sprite's");
    process.start_is_finished().map_err(|error| BootError::failed(&error))
}

/// A copy of `snapshot` on the sprite's disk; its guest answers.
async fn start_copy<'a>(
    resources: &Resources,
    parts: &'a mut Parts,
    snapshot: &Snapshot,
) -> Result<&'a mut VmProcess, BootError> {
    let slot = room(resources).map_err(BootError::NoRoom)?;
    let volume = open_disk(resources, parts).await.map_err(|error| BootError::failed(&error))?;
    let golden = resources.golden(parts.size).await.map_err(|error| BootError::failed(&error))?;
    let note = VmNote {
        sprite: parts.id,
        size: parts.size,
        slot: slot.number(),
        snapshot_key: golden.key.clone(),
        machine_key: resources.model(parts.size).machine_key(),
        process: None,
        loading: false,
        suspended_lsn: None,
        pooled: parts.record.is_none(),
    };
    let run = resources.run_dir(parts.id);
    let old = run.clone();
    if old.folder.exists() {
        blocking(move || old.drop_image()).await.map_err(|error| BootError::failed(&error))?;
    }
    parts.image = None;
    let plan = Plan { note, slot, volume: volume.clone() };
    let process = VmProcess::start(resources, run, snapshot, plan).await.map_err(|error| BootError::failed(&error))?;
    let process = parts.process.insert(process);
    if volume.size_bytes() != DISK_BYTES_DEFAULT {
        process.announce_disk_size(volume.size_bytes()).await.map_err(|error| BootError::failed(&error))?;
    }
    Ok(process)
}

/// Starts the environment of a VM that was met again, if it does not run: it ended, or a host died while it was starting it.
pub(crate) async fn mend_environment(process: &VmProcess, record: Option<&SpriteRecord>) -> Result<(), GuestError> {
    if process.agent.hello().environment() == agent::EnvironmentState::Started {
        return Ok(());
    }
    tracing::warn!(sprite = %process.note.sprite, "its environment does not run; starting it");
    configure(process, record, false).await?;
    start_environment(&process.agent).await
}

/// Sends identity, time and entropy. Before user code runs, after every start (machine-and-vm.md).
pub(crate) async fn configure(
    process: &VmProcess,
    record: Option<&SpriteRecord>,
    fresh: bool,
) -> Result<(), GuestError> {
    let mut entropy = vec![0; 64];
    rand::Rng::fill(&mut rand::rng(), entropy.as_mut_slice());
    let mut request = agent::ConfigureRequest {
        sprite_id: process.note.sprite.public(),
        name: "sprite".into(),
        version: proto::VERSION.into(),
        entropy,
        fresh_identity: fresh,
        network: Some(net::guest_network()),
        ..Default::default()
    };
    if let Some(record) = record {
        request.name = record.name.to_string();
        request.url.clone_from(&record.url);
        request.org.clone_from(&record.org);
        request.env = record.environment.clone().into_iter().collect();
    }
    send_configuration(&process.agent, request).await
}

async fn send_configuration(agent: &AgentClient, mut request: agent::ConfigureRequest) -> Result<(), GuestError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    request.unix_time_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    match tokio::time::timeout(CONFIGURE_LIMIT, agent.configure(request)).await {
        Ok(answer) => Ok(answer.map(drop)?),
        Err(_elapsed) => Err(GuestError::Silent("take its identity")),
    }
}

/// Mounts the disk and starts the user's environment.
pub(crate) async fn start_environment(agent: &AgentClient) -> Result<(), GuestError> {
    match tokio::time::timeout(ENVIRONMENT_LIMIT, agent.start_environment()).await {
        Ok(answer) => Ok(answer.map(drop)?),
        Err(_elapsed) => Err(GuestError::Silent("start its environment")),
    }
}

/// To the disk only. By way of suspended, so that a bucket that cannot be reached costs nothing.
async fn go_cold(resources: &Resources, parts: &mut Parts, why: String) -> Outcome {
    let mut frozen = None;
    if parts.process.is_some() {
        let suspended = suspend(parts, why.clone()).await;
        if suspended.settled != Settled::Suspended {
            return suspended;
        }
        frozen = suspended.frozen;
    }
    if let Err(why) = give_up_disk(resources, parts).await {
        let reason = format!("cannot push its disk to the bucket: {why}; it stays suspended");
        tracing::warn!(sprite = %parts.id, reason);
        return Outcome { error: Some(reason.clone()), frozen, ..Outcome::new(Settled::Suspended, reason) };
    }
    parts.volume = None;
    parts.image = None;
    let run = resources.run_dir(parts.id);
    if let Err(error) = blocking(move || if run.folder.exists() { run.drop_image() } else { Ok(()) }).await {
        tracing::warn!(sprite = %parts.id, %error, "cannot remove the suspended image");
    }
    Outcome { frozen, ..Outcome::new(Settled::Cold, why) }
}

/// Everything to the bucket, no memory, no owner.
async fn give_up_disk(resources: &Resources, parts: &mut Parts) -> Result<(), String> {
    let volume = open_disk(resources, parts).await.map_err(|error| chain(&error))?;
    if volume.memory().is_some() {
        volume.retire_memory().await.map_err(|error| chain(&error))?;
    }
    volume.release().await.map_err(|error| chain(&error))
}

/// Ruling 15: under the live VM only when nothing provably holds the device, else in a fresh one.
async fn restore(resources: &Resources, parts: &mut Parts, checkpoint: &str) -> Outcome {
    let begun = Instant::now();
    let volume = match open_disk(resources, parts).await {
        Ok(volume) => volume,
        Err(error) => {
            let reason = format!("cannot open its disk: {}", chain(&error));
            end_process(parts).await;
            return Outcome::failed(reason);
        }
    };
    if !volume.checkpoints().await.iter().any(|known| known.id == checkpoint) {
        let settled = if parts.process.is_some() { Settled::Running } else { Settled::Cold };
        let error = Some(format!("there is no checkpoint {checkpoint}"));
        return Outcome { error, ..Outcome::new(settled, "a restore was refused") };
    }
    let in_place = stop_environment(parts).await;
    if !in_place {
        end_process(parts).await;
    }
    if let Err(error) = volume.restore(checkpoint).await {
        let reason = format!("cannot restore {checkpoint}: {}", chain(&error));
        let mut outcome = restart_environment(resources, parts, in_place).await;
        outcome.error = Some(reason);
        return outcome;
    }
    let mut outcome = restart_environment(resources, parts, in_place).await;
    outcome.reason = format!("restored to {checkpoint}");
    let way = if in_place { "in the running VM" } else { "in a fresh VM" };
    outcome.event = Some(format!("restored to {checkpoint} {way} in {} ms", begun.elapsed().as_millis()));
    outcome
}

/// Whether the live VM can take new disk content.
async fn stop_environment(parts: &mut Parts) -> bool {
    let Some(process) = &mut parts.process else { return false };
    if process.qmp.run_state().await.is_ok_and(|state| state == "paused") && process.unpause().await.is_err() {
        return false;
    }
    let stopped = tokio::time::timeout(STOP_ANSWER_LIMIT, process.agent.stop_environment(STOP_ENVIRONMENT_MS)).await;
    match stopped {
        Ok(Ok(answer)) if answer.clean => true,
        Ok(Ok(answer)) => {
            tracing::info!(sprite = %parts.id, holder = answer.holder, "the disk is held inside; using a fresh VM");
            false
        }
        Ok(Err(error)) => {
            tracing::info!(sprite = %parts.id, error = chain(&error), "the environment does not end; using a fresh VM");
            false
        }
        Err(_elapsed) => {
            tracing::info!(sprite = %parts.id, "the guest does not answer; using a fresh VM");
            false
        }
    }
}

async fn restart_environment(resources: &Resources, parts: &mut Parts, in_place: bool) -> Outcome {
    if in_place && let Some(process) = &parts.process {
        match start_environment(&process.agent).await {
            Ok(()) => return Outcome::new(Settled::Running, "restored"),
            Err(error) => {
                tracing::warn!(sprite = %parts.id, error = chain(&error), "the environment does not start again; using a fresh VM")
            }
        }
        end_process(parts).await;
    }
    boot(resources, parts, "restored".into()).await
}

async fn destroy(resources: &Resources, parts: &mut Parts) -> Outcome {
    end_process(parts).await;
    parts.volume = None;
    parts.image = None;
    if let Err(error) = resources.store.destroy(parts.id).await {
        return Outcome::failed(format!("cannot free its disk: {}", chain(&error)));
    }
    let run = resources.run_dir(parts.id);
    if let Err(error) = blocking(move || run.remove()).await {
        tracing::warn!(sprite = %parts.id, %error, "cannot remove its local files");
    }
    Outcome::new(Settled::Destroyed, "destroyed")
}

/// Ends the VM, whatever state it is in, and frees its network. The disk stays open.
pub(crate) async fn end_process(parts: &mut Parts) {
    let Some(process) = parts.process.take() else { return };
    if let Err(error) = process.kill().await {
        tracing::error!(sprite = %parts.id, %error, "QEMU does not end");
    }
    if let Err(error) = process.net.detach().await {
        tracing::warn!(sprite = %parts.id, error = chain(&error), "cannot remove its network; the next sweep will");
    }
}

/// An error with its causes, for a sentence.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
