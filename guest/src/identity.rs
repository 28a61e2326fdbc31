//! Who this VM is, and what time it is. The host says so after every restore, before user code runs (machine-and-vm.md).
//!
//! Clones of one golden VM must differ (ruling 21): machine-id, ssh host keys and the file system's UUID are made new in a sprite's first life, from the
//! kernel's random generator *after* the host's entropy went into it. The kernel's boot_id makes itself at its first
//! read, which is the user's: PID 1 never reads it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    libc,
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};
use proto::agent::{ConfigureRequest, Network};
use ssh_key::{LineEnding, PrivateKey, private::Ed25519Keypair};

use crate::{environment::DEVICE, log, sys};

/// A file of ours that is read back before it is written; users may have put anything there.
const FILE_BYTES_MAX: u64 = 64 << 10;
const HOSTS: &str = "/etc/hosts";
const MACHINE_ID: &str = "/etc/machine-id";
const SSH: &str = "/etc/ssh";

/// What the host has told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub sprite_id: String,
    pub name: String,
    pub url: String,
    pub org: String,
    pub version: String,
    pub env: BTreeMap<String, String>,
    pub dns: String,
}

impl From<ConfigureRequest> for Identity {
    fn from(request: ConfigureRequest) -> Self {
        Self {
            sprite_id: request.sprite_id,
            name: request.name,
            url: request.url,
            org: request.org,
            version: request.version,
            env: request.env.into_iter().collect(),
            dns: request.network.unwrap_or_default().dns,
        }
    }
}

/// What was not done of a configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigureError {
    #[error("cannot set the clock: {0}")]
    Clock(#[source] io::Error),
    #[error("entropy has to be {wanted} bytes, not {0}", wanted = sys::ENTROPY_BYTES)]
    EntropyLength(usize),
    #[error("cannot reseed the random generator: {0}")]
    Entropy(#[source] io::Error),
    #[error("cannot set the hostname: {0}")]
    Hostname(#[source] io::Error),
    #[error(transparent)]
    Network(#[from] crate::net::NetError),
}

/// Why a sprite has no SSH host key of its own.
#[derive(Debug, thiserror::Error)]
enum HostKeyError {
    #[error(transparent)]
    File(#[from] io::Error),
    #[error("cannot write it as OpenSSH does: {0}")]
    Format(#[from] ssh_key::Error),
}

/// What concerns the machine, whether the environment runs or not; the network only if there is a new one. Returns how far the clock was off, in ms.
pub(crate) fn configure_machine(request: &ConfigureRequest, network: Option<&Network>) -> Result<i64, ConfigureError> {
    let off = set_clock(request.unix_time_ns).map_err(ConfigureError::Clock)?;
    if !request.entropy.is_empty() {
        let entropy = request.entropy.as_slice().try_into();
        let entropy = entropy.map_err(|_wrong| ConfigureError::EntropyLength(request.entropy.len()))?;
        let reseed = || sys::add_entropy(&fs::OpenOptions::new().write(true).open("/dev/urandom")?, entropy);
        reseed().map_err(ConfigureError::Entropy)?;
    }
    if !request.name.is_empty() {
        nix::unistd::sethostname(&request.name).map_err(io::Error::from).map_err(ConfigureError::Hostname)?;
    }
    if let Some(network) = network {
        crate::net::configure(network)?;
    }
    Ok(off)
}

fn set_clock(unix_time_ns: u64) -> io::Result<i64> {
    if unix_time_ns == 0 {
        return Ok(0);
    }
    let right = Duration::from_nanos(unix_time_ns);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(right))?;
    let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    Ok(millis(now).saturating_sub(millis(right)))
}

pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // The kernel's generator, not one of this process: that one is the same in all clones of a golden VM.
    rand::TryRngCore::try_fill_bytes(&mut rand::rngs::OsRng, &mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A new UUID for the mounted file system. Done from outside of the environment.
pub(crate) fn renew_filesystem_uuid(volume: &File) -> io::Result<()> {
    let mut uuid: [u8; 16] = random()?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    sys::set_ext4_uuid(volume, uuid)
}

/// Writes the sprite's name and resolver where programs look for them, and in its first life what it must not share. Runs inside the environment.
///
/// What a first life did not get to the disk, because the host died within the seconds that the file system keeps it back, a later start makes up for.
pub(crate) fn write_files(identity: &Identity, old_name: Option<&str>, fresh: bool) {
    let name = &identity.name;
    let mut files = Vec::new();
    if !name.is_empty() {
        files.push(("/etc/hostname", format!("{name}\n")));
        // It is the user's once it is there, unless it is as we have written it; the other files follow the host at each start.
        let present = read_plain(Path::new(HOSTS)).ok();
        if fresh || present.is_none() || present == old_name.map(|name| hosts(name).into_bytes()) {
            files.push((HOSTS, hosts(name)));
        }
    }
    if !identity.dns.is_empty() {
        files.push(("/etc/resolv.conf", format!("nameserver {}\n", identity.dns)));
    }
    if fresh || read_plain(Path::new(MACHINE_ID)).is_ok_and(|id| id.is_empty()) {
        match random::<16>() {
            Ok(id) => files.push((MACHINE_ID, format!("{}\n", hex(&id)))),
            Err(error) => log!("no new machine-id: {error}"),
        }
    }
    for (path, text) in files {
        if let Err(error) = write_if_different(Path::new(path), text.as_bytes()) {
            log!("{path}: {error}");
        }
    }
    if let Err(error) = renew_host_key(Path::new(SSH), name, fresh) {
        log!("no SSH host key: {error}");
    }
}

fn hosts(name: &str) -> String {
    format!(
        "127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
    )
}

/// Replaces a file as a whole, whatever it was; the same content is left alone, so that nothing is written for nothing.
fn write_if_different(path: &Path, content: &[u8]) -> io::Result<()> {
    if read_plain(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    write_whole(path, content, 0o644)
}

/// A reader sees the old file or the new one. What is in its place is replaced, not followed.
fn write_whole(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let beside = path.with_extension("sprite-new");
    drop(fs::remove_file(&beside));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(content)?;
    fs::rename(&beside, path)
}

/// Reads a regular file; anything else could block.
fn read_plain(path: &Path) -> io::Result<Vec<u8>> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut content = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, FILE_BYTES_MAX), &mut content)?;
    Ok(content)
}

/// Makes the SSH host key, if there is a server for it and it has none; a `fresh` sprite's is new in any case. Runs inside the environment.
///
/// Ed25519 is the one kind that every client of the last ten years knows. Made here and not by `ssh-keygen`, whose start under emulation costs more
/// than the rest of a sprite's identity, so that nobody ever meets a sprite without its key.
fn renew_host_key(ssh: &Path, host: &str, fresh: bool) -> Result<(), HostKeyError> {
    let (private, public) = (ssh.join("ssh_host_ed25519_key"), ssh.join("ssh_host_ed25519_key.pub"));
    if !ssh.join("sshd_config").exists() || !fresh && private.exists() {
        return Ok(());
    }
    let mut key = PrivateKey::from(Ed25519Keypair::from_seed(&random()?));
    key.set_comment(format!("root@{host}"));
    write_whole(&public, format!("{}\n", key.public_key().to_openssh()?).as_bytes(), 0o644)?;
    write_whole(&private, key.to_openssh(LineEnding::LF)?.as_bytes(), 0o600)?;
    if fresh {
        drop_other_host_keys(ssh, &[&private, &public])?;
    }
    Ok(())
}

/// Those that came with the disk, of whatever kind. What cannot be removed is no reason to keep the rest.
fn drop_other_host_keys(ssh: &Path, own: &[&Path]) -> io::Result<()> {
    for entry in fs::read_dir(ssh)? {
        let path = entry?.path();
        let is_key = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ssh_host_"));
        if is_key
            && !own.contains(&path.as_path())
            && let Err(error) = fs::remove_file(&path)
        {
            log!("{}: {error}", path.display());
        }
    }
    Ok(())
}

/// Tells programs the disk's UUID as udev would: without it only root can ask. Runs inside the environment.
pub(crate) fn write_device_record(uuid: [u8; 16]) -> io::Result<()> {
    let number = fs::metadata(DEVICE)?.rdev();
    let (major, minor) = (libc::major(number), libc::minor(number));
    let text = hyphenated(&uuid);
    let folder = Path::new("/run/udev/data");
    fs::create_dir_all(folder)?;
    let record = format!(
        "E:ID_FS_UUID={text}\nE:ID_FS_UUID_ENC={text}\nE:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem\nE:ID_FS_VERSION=1.0\n"
    );
    let path = folder.join(format!("b{major}:{minor}"));
    fs::write(&path, record)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
}

fn hyphenated(uuid: &[u8; 16]) -> String {
    let hex = hex(uuid);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_written_as_blkid_does() {
        let bytes = [0x5e, 0x00, 0xff, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13];
        assert_eq!(hyphenated(&bytes), "5e00ff01-0203-0405-0607-08090a0b0c0d");
    }

    #[test]
    fn a_file_is_replaced_whole_and_only_when_it_differs() {
        let folder = std::env::temp_dir().join(format!("sprite-identity-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("hostname");
        write_if_different(&file, b"one\n").unwrap();
        let inode = fs::metadata(&file).unwrap().ino();
        write_if_different(&file, b"one\n").unwrap();
        assert_eq!(fs::metadata(&file).unwrap().ino(), inode, "written although nothing changed");
        // A link or a pipe in its place is replaced, not followed or waited for.
        let target = folder.join("target");
        fs::write(&target, "kept").unwrap();
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&target, &file).unwrap();
        write_if_different(&file, b"two\n").unwrap();
        assert_eq!((fs::read(&file).unwrap(), fs::read(&target).unwrap()), (b"two\n".to_vec(), b"kept".to_vec()));
        fs::remove_file(&file).unwrap();
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        write_if_different(&file, b"three\n").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"three\n");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_server_gets_its_host_key_once_and_openssh_reads_it() {
        let folder = std::env::temp_dir().join(format!("sprite-ssh-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let private = folder.join("ssh_host_ed25519_key");
        renew_host_key(&folder, "demo", true).unwrap();
        assert!(!private.exists(), "made where there is no server");
        fs::write(folder.join("sshd_config"), "").unwrap();
        fs::write(folder.join("ssh_host_rsa_key"), "of the image").unwrap();
        fs::write(&private, "of the parent").unwrap();
        fs::create_dir(folder.join("ssh_host_backup")).unwrap();
        renew_host_key(&folder, "demo", true).unwrap();
        assert!(!folder.join("ssh_host_rsa_key").exists(), "the image's key stayed");
        let first = fs::read_to_string(&private).unwrap();
        assert_eq!(fs::metadata(&private).unwrap().permissions().mode() & 0o777, 0o600);
        let read = PrivateKey::from_openssh(&first).unwrap();
        let public = fs::read_to_string(folder.join("ssh_host_ed25519_key.pub")).unwrap();
        assert_eq!(public, format!("{}\n", read.public_key().to_openssh().unwrap()));
        assert!(public.starts_with("ssh-ed25519 ") && public.ends_with(" root@demo\n"), "{public}");
        // A later start leaves it alone, and makes one that was lost.
        renew_host_key(&folder, "demo", false).unwrap();
        assert_eq!(fs::read_to_string(&private).unwrap(), first);
        fs::remove_file(&private).unwrap();
        renew_host_key(&folder, "demo", false).unwrap();
        assert_ne!(fs::read_to_string(&private).unwrap(), first);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn random_bytes_differ() {
        assert_ne!(random::<16>().unwrap(), random::<16>().unwrap());
    }
}
