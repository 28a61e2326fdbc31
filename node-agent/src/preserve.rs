//! After a suspend: memory from tmpfs to the disk, then disk and memory to the bucket (ruling 14).
//!
//! Runs behind the suspended sprite and is aborted by a wake. It only reads a finished image. When everything is in the bucket the disk is given up, so
//! that any host may wake the sprite (ruling 28); the image here makes this one the quickest.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use blockstore::store::{MemorySource, Volume};

use crate::{
    files,
    process::{VmNote, blocking},
    resources::Resources,
    vm::change::chain,
};

/// How far it got.
#[derive(Clone, Debug, Default)]
pub(crate) struct Preserved {
    pub(crate) local: Duration,
    pub(crate) bucket: Option<Duration>,
    pub(crate) total: Duration,
    /// What went wrong; the sprite is asleep all the same.
    pub(crate) error: Option<String>,
}

/// Copies a suspended image out. Cancel safe: what is unfinished has another name.
pub(crate) async fn preserve(resources: Arc<Resources>, image: VmNote, volume: Volume) -> Preserved {
    let begun = Instant::now();
    let run = resources.run_dir(image.sprite);
    let copied = {
        let run = run.clone();
        blocking(move || {
            let unfinished = run.folder.join("memory.tmp");
            files::copy_sparse(&run.memory, &unfinished)?;
            std::fs::File::open(&unfinished)?.sync_all()?;
            // A wake meanwhile has taken the state away; then this copy is of a running VM and worth nothing.
            if !run.state().exists() {
                return files::remove_if_there(&unfinished);
            }
            std::fs::rename(&unfinished, run.memory_on_disk())?;
            files::sync_folder(&run.folder)
        })
        .await
    };
    let local = begun.elapsed();
    let error = match copied {
        Ok(()) => None,
        Err(error) => Some(format!("cannot copy memory to the disk: {error}")),
    };
    let pushed = push(&resources, &image, &volume).await;
    let bucket = pushed.is_ok().then(|| begun.elapsed());
    let error = error.or(pushed.err());
    if let Some(error) = &error {
        tracing::warn!(sprite = %image.sprite, error, "the suspended image is not preserved everywhere");
    }
    Preserved { local, bucket, total: begun.elapsed(), error }
}

/// Gives the disk up. Must not be aborted: half-way the volume looks open and is about to close.
pub(crate) async fn give_up(volume: Volume) {
    let id = volume.id();
    if let Err(error) = volume.release().await {
        tracing::warn!(sprite = %id, error = chain(&error), "its disk stays this host's");
    }
}

async fn push(resources: &Resources, image: &VmNote, volume: &Volume) -> Result<(), String> {
    let golden = resources.golden(image.size).await.map_err(|error| chain(&error))?;
    if image.snapshot_key != golden.key {
        let (has, made) = (&golden.key, &image.snapshot_key);
        return Err(format!("its memory belongs to snapshot {made}, this host has {has}"));
    }
    let run = resources.run_dir(image.sprite);
    let source = MemorySource {
        memory_file: run.memory.clone(),
        golden_file: golden.snapshot.memory.clone(),
        state_file: run.state(),
        snapshot_key: golden.image_key(),
    };
    volume.publish_memory(source).await.map_err(|error| format!("cannot push to the bucket: {}", chain(&error)))
}
