//! `sprited volume`: what the bucket has of a sprite, looked at, checked, and taken out. Works without a cluster, and beside a running one.

use std::{
    fs::File,
    io::IsTerminal as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use blockstore::store::{Archive, Disk, Limits, Summary};
use clap::{Args, Subcommand, ValueEnum};
use nix::fcntl::{Flock, FlockArg};
use proto::id::{SpriteId, SpriteName};

use crate::{
    config::{Config, Settings},
    parts,
};

/// How often progress is said.
const PROGRESS_PERIOD: Duration = Duration::from_millis(500);
/// Nothing is read twice, and the folder may lie in memory.
const SCRATCH_BYTES: u64 = 256 << 20;

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
    /// Reads all that a sprite's disk, checkpoints and memory are made of, and checks it against its hashes; exit code 1 if something is damaged
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
    bucket: BucketArguments,
}

/// Which bucket.
#[derive(Args)]
struct BucketArguments {
    /// Settings in a file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The cluster's data folder, which has the bucket in it unless another one is named [default: /var/lib/sprites]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// `dir:/path` or `s3://bucket/prefix?endpoint=…&region=…`, with AWS_* in the environment
    #[arg(long, value_name = "URL")]
    bucket: Option<String>,
}

impl BucketArguments {
    fn check(self) -> anyhow::Result<Config> {
        let config = Settings::of_bucket(self.config, self.data, self.bucket).check()?;
        if let Some(folder) = config.bucket_url.strip_prefix("dir:")
            && !Path::new(folder).join("v1").is_dir()
        {
            bail!("there is no bucket in {folder}; name it with --bucket, or the cluster's folder with --data");
        }
        Ok(config)
    }
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
    /// What to write [default: qcow2 if the file's name ends so, else raw]; qcow2 needs `qemu-img`
    #[arg(long, value_enum)]
    format: Option<Format>,
    #[command(flatten)]
    bucket: BucketArguments,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

pub(crate) async fn run(arguments: VolumeArguments) -> anyhow::Result<ExitCode> {
    let work = async {
        match arguments.command {
            VolumeCommand::Inspect(of) => inspect(of).await,
            VolumeCommand::Verify(of) => verify(of).await,
            VolumeCommand::Export(wanted) => export(wanted).await,
        }
    };
    // What is half-done is removed when the work is dropped.
    tokio::select! {
        done = work => done,
        signal = ended_by_signal() => {
            eprintln!("✗ interrupted; nothing is left behind");
            Ok(ExitCode::from(128 + signal?))
        }
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
    // Disk contents: for nobody else's eyes.
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&scratch)
        .with_context(|| format!("cannot make the folder {}", scratch.display()))?;
    let scratch = Scratch(scratch);
    let archive = Archive::open(bucket, &scratch.0, &Limits { cache_bytes: SCRATCH_BYTES, ..Limits::default() })?;
    Ok(Opened { archive, id, _scratch: scratch })
}

async fn inspect(of: Of) -> anyhow::Result<ExitCode> {
    let opened = open(&of.sprite, &of.bucket.check()?).await?;
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
        (
            "own packs",
            format!("{}, {} MiB; the rest is the base's or a parent's", summary.packs, summary.pack_bytes >> 20),
        ),
    ];
    let none = || "none".to_owned();
    lines.push(("memory", summary.memory_bytes.map_or_else(none, |bytes| format!("an image of {} MiB", bytes >> 20))));
    lines.extend(summary.parent.map(|parent| ("forked from", parent.to_string())));
    lines.extend(summary.forks.iter().map(|fork| ("fork", fork.to_string())));
    if summary.checkpoints.is_empty() {
        lines.push(("checkpoints", none()));
    }
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
    let opened = open(&of.sprite, &of.bucket.check()?).await?;
    let progress = Progress::new("checked", None);
    let verified = opened.archive.verify(opened.id, |bytes| progress.say(bytes)).await?;
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
    let Export { sprite, file: target, checkpoint, format, bucket } = wanted;
    let config = bucket.check()?;
    let named = target.extension().is_some_and(|ending| ending == "qcow2").then_some(Format::Qcow2);
    let format = format.or(named).unwrap_or(Format::Raw);
    check_target(&target)?;
    let opened = open(&sprite, &config).await?;
    let disk = opened.archive.disk(opened.id, checkpoint.as_deref()).await?;
    let unfinished = Unfinished::beside(&target)?;
    write(&opened.archive, disk, &unfinished).await?;
    finish(&unfinished.path, &target, format).await?;
    let what = checkpoint.map_or_else(|| "its newest push".to_owned(), |checkpoint| format!("checkpoint {checkpoint}"));
    let (size_mib, used_mib) = (disk.size_bytes >> 20, disk.used_bytes() >> 20);
    println!("✓ {sprite} at {what} is in {}: {size_mib} MiB, {used_mib} MiB used", target.display());
    Ok(ExitCode::SUCCESS)
}

/// Before anything is fetched.
fn check_target(target: &Path) -> anyhow::Result<()> {
    let shown = target.display();
    if target == Path::new("-") {
        bail!("a disk image is sparse, so it goes to a file, not to standard output");
    }
    // Also a link that leads nowhere.
    if target.symlink_metadata().is_ok() {
        bail!("{shown} exists already; it is not overwritten");
    }
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        bail!("{shown} cannot be written: there is no folder {}", folder.display());
    }
    Ok(())
}

/// The number of the signal that asks this process to end.
async fn ended_by_signal() -> anyhow::Result<u8> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(tokio::select! {
        _ = interrupt.recv() => 2,
        _ = terminate.recv() => 15,
    })
}

/// An image on its way, beside its target, so that the end is a rename: a file of the target's name is whole. Removed when dropped.
struct Unfinished {
    path: PathBuf,
    /// Locked: what an export that was killed has left is taken over, what another one is writing is not.
    file: Flock<File>,
}

impl Unfinished {
    fn beside(target: &Path) -> anyhow::Result<Self> {
        let path = beside(target);
        let shown = path.display().to_string();
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.with_context(|| format!("cannot write {shown}"))?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| anyhow::Error::new(error).context(format!("another export writes {shown}")))?;
        // It may have been another export's, and be that one's finished image by now.
        let is_still_there = path.metadata().is_ok_and(|there| {
            file.metadata().is_ok_and(|open| (there.dev(), there.ino()) == (open.dev(), open.ino()))
        });
        if !is_still_there {
            bail!("another export has just written {shown}; try again");
        }
        file.set_len(0).with_context(|| format!("cannot write {shown}"))?;
        Ok(Self { path, file })
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After a rename it is gone.
        drop(std::fs::remove_file(&self.path));
    }
}

async fn write(archive: &Archive, disk: Disk, to: &Unfinished) -> anyhow::Result<()> {
    let progress = Progress::new("exported", Some(disk.used_bytes()));
    archive.export(disk, &to.file, |bytes| progress.say(bytes)).await?;
    progress.end();
    to.file.sync_all().with_context(|| format!("cannot write {}", to.path.display()))
}

async fn finish(raw: &Path, target: &Path, format: Format) -> anyhow::Result<()> {
    let shown = target.display();
    if format == Format::Raw {
        return std::fs::rename(raw, target).with_context(|| format!("cannot write {shown}"));
    }
    let mut converting = tokio::process::Command::new("qemu-img");
    converting.args(["convert", "-q", "-f", "raw", "-O", "qcow2"]).args([raw, target]).kill_on_drop(true);
    let half = Half(target);
    let converted = converting.status().await.context("cannot run qemu-img; install qemu-utils, or export raw")?;
    if !converted.success() {
        bail!("qemu-img cannot make a qcow2 of {} ({converted})", raw.display());
    }
    std::mem::forget(half);
    Ok(())
}

/// A target that is not whole yet; removed when dropped.
struct Half<'a>(&'a Path);

impl Drop for Half<'_> {
    fn drop(&mut self) {
        drop(std::fs::remove_file(self.0));
    }
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
