//! `sprited volume`: what the bucket has of a sprite, looked at, checked, and taken out. Works without a cluster, and beside a running one.

use std::{
    fs::File,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use blockstore::store::{Archive, Disk, Limits, Summary};
use clap::{Args, Subcommand, ValueEnum};
use proto::id::{SpriteId, SpriteName};

use crate::{
    config::{Config, Settings},
    parts,
};

/// How often progress is said.
const PROGRESS_PERIOD: Duration = Duration::from_millis(500);
const CHUNK_BYTES: u64 = 64 << 10;

#[derive(Args)]
pub(crate) struct VolumeArguments {
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Shows what the bucket says of a sprite's disk: owner, checkpoints, memory, forks, packs
    #[command(
        after_help = "Example:\n  sprited volume inspect demo --bucket s3://sprites/prod?region=eu-central-1 --json"
    )]
    Inspect(Of),
    /// Reads everything a sprite's disk is made of, and checks it against its hashes; exit code 1 if something is damaged
    #[command(after_help = "Example:\n  sprited volume verify demo")]
    Verify(Of),
    /// Writes a disk image, of the newest push or of a checkpoint
    #[command(after_help = "\
Examples:
  sprited volume export demo demo.raw
  sprited volume export demo --checkpoint v3 --format qcow2 demo-v3.qcow2

Of a running sprite the newest push is what a power failure a moment ago would have left. `sprite sync` before it, or a checkpoint, is better.")]
    Export(Export),
}

#[derive(Args)]
struct Of {
    /// Name or id of the sprite
    sprite: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
struct Export {
    /// Name or id of the sprite
    sprite: String,
    /// The file to write; it must not exist
    file: PathBuf,
    /// The disk at this checkpoint
    #[arg(long)]
    checkpoint: Option<String>,
    /// What to write; qcow2 needs `qemu-img`
    #[arg(long, value_enum, default_value = "raw")]
    format: Format,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

pub(crate) async fn run(arguments: VolumeArguments) -> anyhow::Result<ExitCode> {
    match arguments.command {
        VolumeCommand::Inspect(of) => inspect(of).await,
        VolumeCommand::Verify(of) => verify(of).await,
        VolumeCommand::Export(wanted) => export(wanted).await,
    }
}

/// The bucket's volumes, and the folder for what is fetched, which goes with this.
struct Opened {
    archive: Archive,
    id: SpriteId,
    _scratch: Scratch,
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "a temporary folder is left");
        }
    }
}

async fn open(sprite: &str, config: &Config) -> anyhow::Result<Opened> {
    let bucket = parts::open_bucket(config).await?;
    let id = match sprite.parse::<SpriteId>() {
        Ok(id) => id,
        Err(_not_an_id) => {
            let name: SpriteName =
                sprite.parse().with_context(|| format!("{sprite:?} is no name or id of a sprite"))?;
            let found = coordinator::sprite_of_name(&bucket, &config.org, &name).await?;
            found.with_context(|| format!("there is no sprite {name} in {}", config.bucket_url))?
        }
    };
    let scratch =
        std::env::temp_dir().join(format!("sprited-volume-{}-{:08x}", std::process::id(), rand::random::<u32>()));
    std::fs::create_dir(&scratch).with_context(|| format!("cannot make the folder {}", scratch.display()))?;
    let scratch = Scratch(scratch);
    let archive = Archive::open(bucket, &scratch.0, &Limits::default())?;
    Ok(Opened { archive, id, _scratch: scratch })
}

async fn inspect(of: Of) -> anyhow::Result<ExitCode> {
    let opened = open(&of.sprite, &of.settings.check()?).await?;
    let summary = opened.archive.summary(opened.id).await?;
    if of.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print!("{}", shown(&summary));
    }
    Ok(ExitCode::SUCCESS)
}

fn shown(summary: &Summary) -> String {
    let time = |unix_ms: u64| {
        let time = i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        time.unwrap_or_default().to_string()
    };
    let state = serde_json::to_value(summary.state).unwrap_or_default();
    let owner = summary.node.as_ref().map(|node| format!(" by {node}")).unwrap_or_default();
    let mut lines = vec![
        ("id", summary.id.to_string()),
        ("state", format!("{}{owner}, epoch {}", state.as_str().unwrap_or_default(), summary.epoch)),
        ("generation", summary.generation.to_string()),
        ("pushed until", format!("{} (write {})", time(summary.cut_unix_ms), summary.lsn)),
        ("disk", format!("{} MiB, {} MiB used", summary.size_bytes >> 20, summary.used_bytes >> 20)),
        ("own packs", format!("{}, {} MiB in the bucket", summary.packs, summary.pack_bytes >> 20)),
    ];
    lines.extend(summary.memory_bytes.map(|bytes| ("memory", format!("an image of {} MiB", bytes >> 20))));
    lines.extend(summary.parent.map(|parent| ("forked from", parent.to_string())));
    lines.extend(summary.forks.iter().map(|fork| ("fork", fork.to_string())));
    for checkpoint in &summary.checkpoints {
        let state = match (checkpoint.lost, checkpoint.durable) {
            (true, _) => "lost with its host",
            (false, true) => "in the bucket",
            (false, false) => "not in the bucket yet",
        };
        let used = checkpoint.used_bytes >> 20;
        let created = time(checkpoint.created_unix_ms);
        lines
            .push(("checkpoint", format!("{}  {created}  {used} MiB  {state}  {}", checkpoint.id, checkpoint.comment)));
    }
    lines.into_iter().map(|(what, value)| format!("{what:<14}{}\n", value.trim_end())).collect()
}

async fn verify(of: Of) -> anyhow::Result<ExitCode> {
    let opened = open(&of.sprite, &of.settings.check()?).await?;
    let progress = Progress::new("checked", None);
    let verified = opened.archive.verify(opened.id, |chunks| progress.say(chunks * CHUNK_BYTES)).await?;
    progress.end();
    if of.json {
        println!("{}", serde_json::to_string_pretty(&verified)?);
    } else {
        for what in &verified.damaged {
            println!("✗ {what}");
        }
        let (trees, pages, chunks) = (verified.trees, verified.pages, verified.chunks);
        let read = format!("{trees} trees, {pages} pages, {chunks} chunks");
        if verified.is_whole() {
            println!("✓ {} is whole: {read}", of.sprite);
        } else {
            println!("✗ {} places of {} are damaged or missing, of {read}", verified.damaged_count, of.sprite);
        }
    }
    Ok(if verified.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn export(wanted: Export) -> anyhow::Result<ExitCode> {
    let Export { sprite, file: target, checkpoint, format, settings } = wanted;
    let config = settings.check()?;
    let shown = target.display().to_string();
    if target.exists() {
        bail!("{shown} exists already; it is not overwritten");
    }
    let opened = open(&sprite, &config).await?;
    let disk = opened.archive.disk(opened.id, checkpoint.as_deref()).await?;
    // Beside the target, so that the end is a rename; a file of that name is whole.
    let unfinished = beside(&target);
    let file = File::options().read(true).write(true).create_new(true).open(&unfinished);
    let file = file.with_context(|| format!("cannot write {}", unfinished.display()))?;
    let written = match write(&opened.archive, disk, &file, &unfinished).await {
        Ok(()) => finish(&unfinished, &target, format),
        Err(error) => Err(error),
    };
    if written.is_err() {
        drop(std::fs::remove_file(&unfinished));
    }
    written?;
    println!("✓ {sprite} is in {shown}: {} MiB, {} MiB used", disk.size_bytes >> 20, disk.used_bytes() >> 20);
    Ok(ExitCode::SUCCESS)
}

async fn write(archive: &Archive, disk: Disk, file: &File, path: &Path) -> anyhow::Result<()> {
    let progress = Progress::new("exported", Some(disk.used_bytes()));
    archive.export(disk, file, |bytes| progress.say(bytes)).await?;
    progress.end();
    file.sync_all().with_context(|| format!("cannot write {}", path.display()))
}

fn finish(raw: &Path, target: &Path, format: Format) -> anyhow::Result<()> {
    if format == Format::Raw {
        return std::fs::rename(raw, target).with_context(|| format!("cannot write {}", target.display()));
    }
    let converted = Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .args([raw, target])
        .status()
        .context("cannot run qemu-img; install qemu-utils, or export raw")?;
    if !converted.success() {
        drop(std::fs::remove_file(target));
        bail!("qemu-img cannot make a qcow2 of {} ({converted})", raw.display());
    }
    std::fs::remove_file(raw).with_context(|| format!("cannot remove {}", raw.display()))
}

fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".unfinished");
    name.into()
}

/// Says on a terminal how far long work is.
struct Progress {
    what: &'static str,
    of_bytes: Option<u64>,
    said: std::sync::Mutex<Option<Instant>>,
    is_shown: bool,
}

impl Progress {
    fn new(what: &'static str, of_bytes: Option<u64>) -> Self {
        Self { what, of_bytes, said: std::sync::Mutex::new(None), is_shown: std::io::stderr().is_terminal() }
    }

    fn say(&self, bytes: u64) {
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !self.is_shown || said.is_some_and(|said| said.elapsed() < PROGRESS_PERIOD) {
            return;
        }
        *said = Some(Instant::now());
        let of = self.of_bytes.map(|of| format!(" of {}", of >> 20)).unwrap_or_default();
        eprint!("\r· {} {}{of} MiB ", self.what, bytes >> 20);
    }

    fn end(&self) {
        if self.is_shown {
            eprint!("\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_image_lies_beside_its_target() {
        assert_eq!(beside(Path::new("/a/demo.raw")), Path::new("/a/demo.raw.unfinished"));
    }
}
