//! A host that cannot do what is asked of it: at its start it says why and ends, later it refuses and loses nothing.

use std::{fs, net::TcpListener, os::unix::fs::symlink, path::PathBuf, process::Command, time::Duration};

use e2e::{Cluster, Options, eventually, image, unique};
use serde_json::json;

use crate::one_at_a_time;

/// A folder that is gone when this is dropped.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// An image folder of which only these files are there; an initramfs of these is empty.
fn image_with(names: &[&str]) -> Folder {
    let folder = PathBuf::from(format!("/var/tmp/{}", unique("sprites-image")));
    fs::create_dir_all(&folder).expect("the folder can be made");
    for name in names {
        let (from, to) = (image().join(name), folder.join(name));
        if *name == "initrd" { fs::write(to, b"") } else { symlink(from, to) }.expect("the file can be made");
    }
    Folder(folder)
}

/// A tmpfs, unmounted and gone when this is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn of(bytes: u64) -> Self {
        let folder = PathBuf::from(format!("/var/tmp/{}", unique("sprites-disk")));
        fs::create_dir_all(&folder).expect("the folder can be made");
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&folder).status();
        assert!(mounted.expect("mount runs").success(), "a small disk");
        Self(folder)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(&self.0).status());
        drop(fs::remove_dir(&self.0));
    }
}

fn bucket_at(port: u16) -> Options {
    let keys = [("AWS_ACCESS_KEY_ID", "dev"), ("AWS_SECRET_ACCESS_KEY", "devsecret")];
    Options {
        bucket: Some(format!("s3://sprites/fleet?endpoint=http://127.0.0.1:{port}&region=local")),
        environment: keys.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        ..Options::default()
    }
}

#[test]
fn a_missing_or_broken_image_is_named() {
    let _turn = one_at_a_time();
    let with_image = |folder: &Folder| Options { image: Some(folder.0.clone()), ..Options::default() };
    let nothing = Options { image: Some("/nonexistent".into()), ..Options::default() };
    Cluster::start_in_vain(nothing).code(1).says("/nonexistent/rootfs.digest");
    let only_a_digest = image_with(&["rootfs.digest"]);
    Cluster::start_in_vain(with_image(&only_a_digest)).code(1).says("vmlinux").says("build the guest's image again");
    let no_initramfs = image_with(&["rootfs.digest", "vmlinux", "rootfs.ext4", "initrd"]);
    Cluster::start_in_vain(with_image(&no_initramfs)).code(1).says("the golden VM did not boot; its console is in");
}

#[test]
fn a_bucket_that_cannot_be_reached_is_named() {
    let _turn = one_at_a_time();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("it listens").port();
    // Connections are taken by the kernel, and nobody ever answers.
    Cluster::start_in_vain(bucket_at(port)).code(1).says("cannot use the bucket").says("check that it is up");
    drop(listener);
    Cluster::start_in_vain(bucket_at(port)).code(1).says("cannot use the bucket").says("Connection refused");
}

#[test]
fn a_full_disk_is_named() {
    let _turn = one_at_a_time();
    // Nothing at all fits; the base image does not.
    for bytes in [8 << 10, 40 << 20] {
        let disk = SmallDisk::of(bytes);
        let options = Options { folder: Some(disk.0.join("data")), ..Options::default() };
        Cluster::start_in_vain(options).code(1).says("the bucket is full; free space");
    }
}

/// As `/dev/shm` is in many containers.
#[test]
fn a_memory_folder_that_is_too_small_is_named() {
    let _turn = one_at_a_time();
    let disk = SmallDisk::of(64 << 20);
    let flags = vec!["--memory-dir".to_owned(), disk.0.join("memory").display().to_string()];
    let options = Options { flags, ..Options::default() };
    Cluster::start_in_vain(options).code(1).says("MiB free and needs 256").says("--memory-dir");
}

#[test]
fn a_host_without_room_refuses_and_goes_on_when_there_is_some() {
    let _turn = one_at_a_time();
    let cluster = Cluster::start(Options::default());
    let (cold, warm) = (cluster.new_sprite("cold"), cluster.new_sprite("warm"));
    cold.sh("echo kept > ~/file");
    warm.start_counter("/tmp/count");
    let (_, pid) = warm.counter("/tmp/count");
    cold.cli(&["sleep", "--cold"]).success();
    cluster.stop_sprited();

    // More than any machine has.
    cluster.start_sprited_with(&["--memory-reserve-bytes", "1000000000000000"]);
    let name = unique("toomany");
    cluster.sprite(["create", &name, "--skip-console"]).refused().says("no capacity").says("memory");
    let (status, body) = cluster.api("POST", "/v1/sprites", Some(&json!({ "name": name })));
    assert_eq!((status, &body["error"]), (503, &json!("no capacity")), "{body}");
    for sprite in [&cold, &warm] {
        sprite.exec(&["true"]).refused().says("no capacity").says("free memory");
        let bearer = format!("Authorization: Bearer {}", cluster.token());
        let answer = cluster.curl(["-i", "-H", &bearer, &sprite.url()]).success();
        answer.says("503").says("SPR-W01").says("retry-after");
    }
    assert_eq!((cold.status(), warm.status()), ("cold".to_owned(), "warm".to_owned()), "they sleep on");
    cluster.stop_sprited();

    cluster.start_sprited();
    assert_eq!(cold.sh("cat ~/file"), "kept");
    assert_eq!(warm.counter("/tmp/count").1, pid, "its processes were kept");
    eventually("the name that found no room is free", Duration::from_secs(90), || {
        let created = cluster.sprite(["create", &name, "--skip-console"]);
        if created.status.is_some_and(|status| status.success()) { Ok(()) } else { Err(created.to_string()) }
    });
}
