//! After a start of the node agent: find every sprite again, in the state it is in.
//!
//! ```text
//!  vms/<id>/vm.json   process alive?  ──▶ adopt: same QEMU, same guest, it goes on           (running or paused)
//!                     state file whole? ─▶ suspended, its memory waits                       (suspended)
//!                     else, or no folder:
//!                     memory in bucket? ─▶ suspended, its memory is fetched by the wake      (suspended)
//!                     else              ─▶ its disk, by journal or bucket; memory is lost    (cold, and the event says so)
//!  folder, no record                    ─▶ an anonymous sprite of the old pool: freed
//!  QEMU of ours that no note names      ─▶ killed: it would find the disk server of the VM that comes after it
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::fs::MetadataExt as _,
    sync::Arc,
    time::Duration,
};

use blockstore::bucket::{BucketError, RecordError};
use futures_util::{StreamExt as _, future::OptionFuture, stream};
use proto::{id::SpriteId, record::SpriteRecord};

use crate::{
    files,
    host::{Host, record_key},
    pid::Process,
    pool,
    process::{Plan, RunDir, StartError, VmNote, VmProcess, blocking},
    resources::{Resources, Slot},
    vm::{
        Settled,
        change::{Image, Parts, chain, mend_environment},
    },
};

/// Records read and sprites taken up side by side.
const PARALLEL: usize = 8;
/// A bucket that is away for a moment must not cost a living VM its memory.
const DISK_LIMIT: Duration = Duration::from_secs(30);
const DISK_RETRY: Duration = Duration::from_secs(1);
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// In front of what a person has to be told.
const NOTICE: &str = "notice: ";

/// Why the node agent cannot take up its sprites.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    #[error("cannot list the sprites in the bucket")]
    List(#[source] BucketError),
    #[error("cannot read the record of sprite {id}")]
    Record { id: SpriteId, source: RecordError },
    #[error("cannot read the folder of the VMs")]
    Notes(#[source] io::Error),
}

/// What this host wrote down of its VMs. While it lives nobody else gets their slots: a VM that is started in the slot of a living one takes its
/// network away.
pub(crate) struct Noted {
    notes: BTreeMap<SpriteId, VmNote>,
    slots: BTreeMap<SpriteId, Slot>,
}

/// Takes up everything this host has. Sprites that cannot be taken up are logged and left alone. `progress` is told what was lost.
pub(crate) async fn recover(
    resources: &Arc<Resources>,
    host: &Host,
    noted: Noted,
    progress: impl Fn(&str) + Send + Sync,
) -> Result<(), RecoverError> {
    let Noted { mut notes, mut slots } = noted;
    let records = read_records(resources).await?;
    end_strays(resources, &notes).await;
    let mut live = BTreeSet::new();
    let mut anonymous = Vec::new();
    notes.retain(|id, note| {
        let named = records.iter().any(|record| record.id == *id && !record.deleted);
        if named {
            live.extend(note.process.map(|_| note.slot));
        } else {
            anonymous.push(note.clone());
        }
        named
    });
    for note in anonymous {
        free_anonymous(resources, note).await;
    }
    if let Err(error) = resources.network.sweep(live).await {
        tracing::warn!(error = chain(&error), "cannot remove networks that no sprite uses");
    }
    let taken_up = records.into_iter().map(|record| {
        let (note, slot) = (notes.remove(&record.id), slots.remove(&record.id));
        let progress = &progress;
        async move {
            let name = record.name.to_string();
            if let Some(lost) = take_up(resources, host, record, note, slot).await {
                progress(&format!("{NOTICE}{name}: {lost}"));
            }
        }
    });
    stream::iter(taken_up).buffer_unordered(PARALLEL).collect::<()>().await;
    Ok(())
}

/// Reads the notes and takes the slots of the VMs in them.
pub(crate) fn read_notes(resources: &Resources) -> Result<Noted, RecoverError> {
    let notes = all_notes(resources).map_err(RecoverError::Notes)?;
    let living = notes.values().filter(|note| note.process.is_some());
    let slots = living.filter_map(|note| Some((note.sprite, resources.slots.take_number(note.slot)?))).collect();
    Ok(Noted { notes, slots })
}

fn all_notes(resources: &Resources) -> io::Result<BTreeMap<SpriteId, VmNote>> {
    let folder = resources.vms_folder();
    std::fs::create_dir_all(&folder)?;
    let mut notes = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path().join("vm.json");
        match VmNote::read(&path) {
            Ok(note) => drop(notes.insert(note.sprite, note)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "a VM's note is not readable; its memory is not used")
            }
        }
    }
    Ok(notes)
}

async fn read_records(resources: &Resources) -> Result<Vec<SpriteRecord>, RecoverError> {
    let bucket = &resources.config.bucket;
    let entries = bucket.list("v1/sprites/").await.map_err(RecoverError::List)?;
    let ids: Vec<SpriteId> = entries
        .iter()
        .filter_map(|entry| entry.key.strip_prefix("v1/sprites/")?.strip_suffix("/rec")?.parse().ok())
        .collect();
    let reads = ids.into_iter().map(|id| async move {
        match bucket.read_record::<SpriteRecord>(&record_key(id)).await {
            Ok(record) => Ok(record),
            // Of this one sprite; the others must not wait for somebody to mend it.
            Err(error @ RecordError::Malformed { .. }) => {
                tracing::error!(sprite = %id, error = chain(&error), "its record is not readable; left alone");
                Ok(None)
            }
            Err(source) => Err(RecoverError::Record { id, source }),
        }
    });
    let read: Vec<_> = stream::iter(reads).buffer_unordered(PARALLEL).collect().await;
    let mut records = Vec::with_capacity(read.len());
    for record in read {
        records.extend(record?.map(|record| record.value));
    }
    Ok(records)
}

/// Kills every QEMU of ours that no note names: its node agent died between starting it and writing it down, or between its suspend and its end.
async fn end_strays(resources: &Resources, notes: &BTreeMap<SpriteId, VmNote>) {
    let known: BTreeSet<i32> = notes.values().filter_map(|note| note.process).map(|process| process.pid).collect();
    let data = resources.config.data.as_os_str().as_encoded_bytes().to_vec();
    let strays = match blocking(move || our_qemus(&data)).await {
        Ok(pids) => pids.into_iter().filter(|pid| !known.contains(pid)),
        Err(error) => {
            tracing::warn!(%error, "cannot look for VMs that nobody holds");
            return;
        }
    };
    for pid in strays {
        tracing::warn!(pid, "a VM that nobody holds; it is ended");
        let ended = match Process::watch(pid) {
            Ok(process) => process.kill(KILL_LIMIT).await,
            Err(error) => Err(error),
        };
        if let Err(error) = ended
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(pid, %error, "it does not end");
        }
    }
}

/// Processes with a user id of a VM and our data folder in an argument.
fn our_qemus(data: &[u8]) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may end at any time.
        let Ok(status) = entry.metadata() else { continue };
        if Resources::is_vm_uid(status.uid())
            && std::fs::read(entry.path().join("cmdline")).is_ok_and(|line| names_path_below(&line, data))
        {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Whether a command line has a path below `folder`. `/srv/a` is not below `/tmp/srv`, nor `/srv-2/a` below `/srv`.
fn names_path_below(command_line: &[u8], folder: &[u8]) -> bool {
    let in_path = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+".contains(byte);
    command_line.windows(folder.len() + 1).enumerate().any(|(at, part)| {
        part.strip_suffix(b"/") == Some(folder)
            && !at.checked_sub(1).is_some_and(|before| in_path(&command_line[before]))
    })
}

async fn free_anonymous(resources: &Resources, note: VmNote) {
    if let Err(error) = end_noted(&note).await {
        tracing::warn!(sprite = %note.sprite, %error, "an old anonymous VM does not end");
    }
    let parts = Parts { id: note.sprite, size: note.size, record: None, process: None, volume: None, image: None };
    pool::free(resources, parts).await;
}

/// Ends the process of a note, if it lives.
async fn end_noted(note: &VmNote) -> io::Result<()> {
    let Some(known) = note.process else { return Ok(()) };
    match Process::find(known.pid, known.started) {
        Ok(process) => process.kill(KILL_LIMIT).await,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// A sprite as it was found.
struct Found {
    settled: Settled,
    reason: String,
    /// Whether something is lost, so that people have to be told the reason.
    lost: bool,
}

impl Found {
    fn whole(settled: Settled, reason: &str) -> Self {
        Self { settled, reason: reason.to_owned(), lost: false }
    }

    fn lost(reason: String) -> Self {
        Self { settled: Settled::Cold, reason, lost: true }
    }
}

/// Returns what was lost.
async fn take_up(
    resources: &Arc<Resources>,
    host: &Host,
    record: SpriteRecord,
    note: Option<VmNote>,
    slot: Option<Slot>,
) -> Option<String> {
    let id = record.id;
    let mut parts = Parts { id, size: record.size, record: Some(record), process: None, volume: None, image: None };
    if parts.record.as_ref().is_some_and(|record| record.deleted) {
        pool::free(resources, parts).await;
        return None;
    }
    let head = match resources.store.head(id).await {
        Ok(Some(head)) => head,
        Ok(None) => {
            tracing::warn!(sprite = %id, "a record without a disk; left alone");
            return None;
        }
        Err(error) => {
            tracing::error!(sprite = %id, error = chain(&error), "cannot read its head; left alone");
            return None;
        }
    };
    if !head.is_owned_by(&resources.config.node) {
        if let Some(Err(error)) = OptionFuture::from(note.as_ref().map(end_noted)).await {
            tracing::error!(sprite = %id, %error, "another host has its disk, and its VM here does not end");
        }
        // Without memory in the head a local image has been resumed elsewhere (ruling 2).
        parts.image = head.has_memory().then(|| match note {
            Some(note) if note.suspended_lsn.is_some() && image_is_whole(&resources.run_dir(id)) => Image::Local(note),
            Some(_) | None => Image::Bucket,
        });
        let settled = if parts.image.is_some() { Settled::Suspended } else { Settled::Cold };
        host.adopt(parts, settled, "asleep in the bucket", None);
        return None;
    }
    let found = match open_disk(resources, &mut parts).await {
        Ok(()) => take_up_vm(resources, &mut parts, note, slot).await,
        Err(reason) => {
            // Without its disk it stands still, and would find the disk server of the VM that comes after it.
            if let Some(Err(error)) = OptionFuture::from(note.as_ref().map(end_noted)).await {
                tracing::error!(sprite = %id, %error, "its VM does not end");
            }
            Found { settled: Settled::Failed, reason: format!("cannot take up its disk: {reason}"), lost: true }
        }
    };
    let lost = found.lost.then(|| found.reason.clone());
    host.adopt(parts, found.settled, &found.reason, lost.clone());
    lost
}

async fn open_disk(resources: &Resources, parts: &mut Parts) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + DISK_LIMIT;
    loop {
        match resources.store.acquire(parts.id).await {
            Ok(volume) => {
                parts.volume = Some(volume);
                return Ok(());
            }
            Err(error) if tokio::time::Instant::now() >= deadline => {
                tracing::error!(sprite = %parts.id, error = chain(&error), "cannot take up its disk");
                return Err(chain(&error));
            }
            Err(error) => {
                tracing::warn!(sprite = %parts.id, error = chain(&error), "cannot take up its disk yet");
                tokio::time::sleep(DISK_RETRY).await;
            }
        }
    }
}

async fn take_up_vm(resources: &Resources, parts: &mut Parts, note: Option<VmNote>, slot: Option<Slot>) -> Found {
    let run = resources.run_dir(parts.id);
    if let Some(note) = note.as_ref().filter(|note| note.process.is_some()) {
        return take_up_process(resources, parts, note.clone(), slot).await;
    }
    if let Some(note) = note.as_ref().filter(|note| note.suspended_lsn.is_some() && image_is_whole(&run)) {
        parts.image = Some(Image::Local(note.clone()));
        return Found::whole(Settled::Suspended, "suspended; the node agent was restarted");
    }
    if let Some(volume) = &parts.volume
        && volume.memory().is_some()
    {
        parts.image = Some(Image::Bucket);
        return Found::whole(Settled::Suspended, "suspended; its memory is in the bucket");
    }
    let how = match note {
        Some(_) => "its memory was lost in a restart of the host; its disk is whole",
        None => "its files on this host are gone; its disk is as it was last pushed to the bucket",
    };
    Found::lost(how.to_owned())
}

fn image_is_whole(run: &RunDir) -> bool {
    run.state().exists() && (run.memory.exists() || run.memory_on_disk().exists())
}

async fn take_up_process(resources: &Resources, parts: &mut Parts, note: VmNote, slot: Option<Slot>) -> Found {
    let run = resources.run_dir(parts.id);
    let (Some(slot), Some(volume)) = (slot, parts.volume.clone()) else {
        return match end_noted(&note).await {
            Ok(()) => Found::lost("another VM has its network, so it was ended; its disk is whole".into()),
            Err(error) => {
                Found { settled: Settled::Failed, reason: format!("its old VM does not end: {error}"), lost: true }
            }
        };
    };
    let error = match VmProcess::adopt(resources, run.clone(), Plan { note, slot, volume }).await {
        Ok((process, paused)) => {
            if !paused && let Err(error) = mend_environment(&process, parts.record.as_ref()).await {
                tracing::error!(sprite = %parts.id, error = chain(&error), "its environment does not start");
            }
            parts.process = Some(process);
            let settled = if paused { Settled::Paused } else { Settled::Running };
            return Found::whole(settled, "went on while the node agent was restarted");
        }
        Err(error) => error,
    };
    if !matches!(error, StartError::Gone(_)) {
        tracing::warn!(sprite = %parts.id, error = chain(&error), "cannot take up a living VM");
    }
    let dropped = blocking(move || {
        files::remove_if_there(&run.note())?;
        run.drop_image()
    });
    if let Err(error) = dropped.await {
        tracing::warn!(sprite = %parts.id, %error, "cannot remove what is left of its VM");
    }
    Found::lost(format!("its VM was lost ({}); its disk is whole to the last fsync", chain(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_the_data_folder_are_ours() {
        let ours = |line: &str| names_path_below(line.as_bytes(), b"/var/lib/sprites/node");
        assert!(ours("qemu\0-qmp\0unix:/var/lib/sprites/node/vms/x/qmp.sock,server=on"));
        assert!(ours("qemu\0/var/lib/sprites/node/vms"));
        assert!(!ours("qemu\0unix:/tmp/x/var/lib/sprites/node/vms/x/qmp.sock"));
        assert!(!ours("qemu\0unix:/var/lib/sprites/node-2/vms/x/qmp.sock"));
        assert!(!ours(""));
    }
}
