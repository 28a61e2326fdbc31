//! After a start of the node agent: find every sprite again, in the state it is in.
//!
//! ```text
//!  vms/<id>/vm.json   process alive?  ──▶ adopt: same QEMU, same guest, it goes on           (running)
//!                     state file whole? ─▶ suspended, its memory waits                       (suspended)
//!                     else              ─▶ its disk, by journal or bucket; memory is lost    (cold, and the event says so)
//!  bucket, no folder                    ─▶ its disk in the bucket                            (cold)
//!  folder, no record                    ─▶ an anonymous sprite of the old pool: freed
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

use blockstore::bucket::{BucketError, RecordError};
use futures_util::{StreamExt as _, stream};
use proto::{id::SpriteId, record::SpriteRecord};

use crate::{
    files,
    host::{Host, record_key},
    pool,
    process::{Plan, StartError, VmNote, VmProcess, blocking},
    resources::Resources,
    vm::{
        Settled,
        change::{Parts, chain},
    },
};

/// Records read and sprites taken up side by side.
const PARALLEL: usize = 8;

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

/// Takes up everything this host has. Sprites that cannot be taken up are logged and left alone.
pub(crate) async fn recover(resources: &Arc<Resources>, host: &Host) -> Result<(), RecoverError> {
    let mut notes = read_notes(resources).map_err(RecoverError::Notes)?;
    let records = read_records(resources).await?;
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
    if let Err(error) = resources.network.sweep(&live).await {
        tracing::warn!(error = chain(&error), "cannot remove networks that no sprite uses");
    }
    let taken_up = records.into_iter().map(|record| {
        let note = notes.remove(&record.id);
        take_up(resources, host, record, note)
    });
    stream::iter(taken_up).buffer_unordered(PARALLEL).collect::<()>().await;
    Ok(())
}

fn read_notes(resources: &Resources) -> io::Result<BTreeMap<SpriteId, VmNote>> {
    let folder = resources.vms_folder();
    std::fs::create_dir_all(&folder)?;
    let mut notes = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path().join("vm.json");
        match VmNote::read(&path) {
            Ok(note) => drop(notes.insert(note.sprite, note)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(path = %path.display(), %error, "a VM's note is not readable; its memory is not used"),
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
        let record = bucket.read_record::<SpriteRecord>(&record_key(id)).await;
        record.map_err(|source| RecoverError::Record { id, source })
    });
    let read: Vec<_> = stream::iter(reads).buffer_unordered(PARALLEL).collect().await;
    let mut records = Vec::with_capacity(read.len());
    for record in read {
        records.extend(record?.map(|record| record.value));
    }
    Ok(records)
}

async fn free_anonymous(resources: &Resources, note: VmNote) {
    if let Some(known) = note.process
        && let Ok(process) = crate::pid::Process::find(known.pid, known.started)
        && let Err(error) = process.kill(std::time::Duration::from_secs(10)).await
    {
        tracing::warn!(pid = known.pid, %error, "an old anonymous VM does not end");
    }
    let parts = Parts { id: note.sprite, size: note.size, record: None, process: None, volume: None, image: None };
    pool::free(resources, parts).await;
}

async fn take_up(resources: &Arc<Resources>, host: &Host, record: SpriteRecord, note: Option<VmNote>) {
    let id = record.id;
    let mut parts = Parts { id, size: record.size, record: Some(record), process: None, volume: None, image: None };
    if parts.record.as_ref().is_some_and(|record| record.deleted) {
        pool::free(resources, parts).await;
        return;
    }
    let ours = match resources.store.head(id).await {
        Ok(Some(head)) => head.is_owned_by(&resources.config.node),
        Ok(None) => {
            tracing::warn!(sprite = %id, "a record without a disk; left alone");
            return;
        }
        Err(error) => {
            tracing::error!(sprite = %id, error = chain(&error), "cannot read its head; left alone");
            return;
        }
    };
    if !ours {
        return host.adopt(parts, Settled::Cold, "asleep in the bucket");
    }
    match resources.store.acquire(id).await {
        Ok(volume) => parts.volume = Some(volume),
        Err(error) => {
            tracing::error!(sprite = %id, error = chain(&error), "cannot take up its disk");
            return host.adopt(parts, Settled::Failed, &format!("cannot take up its disk: {}", chain(&error)));
        }
    }
    let (settled, reason) = match note {
        Some(note) => take_up_vm(resources, &mut parts, note).await,
        None => (Settled::Cold, "the node agent was restarted".to_owned()),
    };
    host.adopt(parts, settled, &reason);
}

async fn take_up_vm(resources: &Resources, parts: &mut Parts, note: VmNote) -> (Settled, String) {
    let run = resources.run_dir(parts.id);
    if note.process.is_some() {
        return take_up_process(resources, parts, note).await;
    }
    let whole = run.state().exists() && (run.memory.exists() || run.memory_on_disk().exists());
    if note.suspended_lsn.is_some() && whole {
        parts.image = Some(note);
        return (Settled::Suspended, "suspended; the node agent was restarted".into());
    }
    (Settled::Cold, "its memory was lost in a restart of the host; its disk is whole".into())
}

async fn take_up_process(resources: &Resources, parts: &mut Parts, note: VmNote) -> (Settled, String) {
    let run = resources.run_dir(parts.id);
    let Some(slot) = resources.slots.take_number(note.slot) else {
        return (Settled::Cold, "another VM has its network; its disk is whole".into());
    };
    let Some(volume) = parts.volume.clone() else { return (Settled::Cold, "its disk is not open".into()) };
    match VmProcess::adopt(resources, run.clone(), Plan { note, slot, volume }).await {
        Ok(process) => {
            parts.process = Some(process);
            (Settled::Running, "went on running while the node agent was restarted".into())
        }
        Err(error) => {
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
            (Settled::Cold, format!("its VM was lost ({}); its disk is whole to the last fsync", chain(&error)))
        }
    }
}
