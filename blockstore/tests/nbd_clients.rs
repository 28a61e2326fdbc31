//! Our NBD server under the clients of others: libnbd's tools, QEMU's tools and fio, run from PATH, and a raw socket for what they refuse
//! to send.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

use std::{
    io::{BufRead as _, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use blockstore::nbd::{DeviceError, Export, ExportTable, MemoryDisk, NbdServer};

const SIZE_BYTES: u64 = 256 << 20;

/// A server with a disk `disk` and an empty one `empty`.
struct Site {
    dir: tempfile::TempDir,
    exports: ExportTable,
    disk: MemoryDisk,
    server: Option<NbdServer>,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (exports, disk) = (ExportTable::new(), MemoryDisk::new(SIZE_BYTES));
        exports.insert("disk", Export::Memory(disk.clone()));
        exports.insert("empty", Export::Empty { size_bytes: 64 << 20 });
        let server = NbdServer::bind(&dir.path().join("nbd.sock"), exports.clone()).unwrap();
        Self { dir, exports, disk, server: Some(server) }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Runs a tool without blocking the server's runtime.
async fn tool(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(args);
    let program = program.to_owned();
    let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap();
    ran.unwrap_or_else(|error| {
        panic!("{program}: {error}. Install what these tests need: apt-get install libnbd-bin python3-libnbd qemu-utils fio")
    })
}

async fn run(program: &str, args: &[&str]) -> String {
    let output = tool(program, args).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs a script of libnbd's shell; `h` is connected to `export`. Returns what it printed before its last line, which proves that it ran.
async fn nbdsh(uri: &str, script: &str) -> String {
    let script = format!("{script}\nprint('ran to its end')");
    // The system's Python: libnbd's module is not in others.
    let said = run("/usr/bin/python3", &["-m", "nbd", "--base-allocation", "-u", uri, "-c", &script]).await;
    said.strip_suffix("ran to its end\n").unwrap_or_else(|| panic!("nbdsh did not run its script: {said}")).to_owned()
}

/// Every test also ends: a hang is a failure with a message.
async fn within<T>(seconds: u64, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), work).await.expect("the server or its client hangs")
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_sees_what_we_promise() {
    let site = Site::new();
    let info = within(60, run("nbdinfo", &["--list", &site.uri("")])).await;
    let block_sizes = info.contains("block_size_minimum: 512") && info.contains("block_size_maximum: 33554432");
    assert!(info.contains("export=\"disk\"") && info.contains("export=\"empty\"") && block_sizes, "{info}");
    for can in ["multi-conn", "flush", "fua", "trim", "zero", "fast-zero", "cache", "df", "structured-reply", "write"] {
        within(60, run("nbdinfo", &["--can", can, &site.uri("disk")])).await;
    }
    within(60, run("nbdinfo", &["--is", "read-only", &site.uri("empty")])).await;
    assert_eq!(within(60, run("nbdinfo", &["--size", &site.uri("disk")])).await.trim(), SIZE_BYTES.to_string());
    let refused = tool("nbdinfo", &[&site.uri("nobody")]).await;
    assert!(!refused.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdsh_reads_back_what_it_wrote_zeroed_and_trimmed() {
    let site = Site::new();
    within(
        60,
        nbdsh(
            &site.uri("disk"),
            r#"
h.pwrite(b"x" * 8192, 4096, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(8192, 4096) == b"x" * 8192
assert h.pread(4096, 0) == bytes(4096)
h.zero(512, 4096)
h.zero(512, 4608, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(2048, 4096) == bytes(1024) + b"x" * 1024
h.trim(65536, 0, nbd.CMD_FLAG_FUA)
h.cache(65536, 0)
assert h.pread(65536, 0) == bytes(65536)
# A request may be larger than any buffer, and end at the last byte.
size = h.get_size()
h.pwrite(b"end!" * 1024, size - 4096)
h.zero(size - 4096, 0)
assert h.pread(4096, size - 4096) == b"end!" * 1024
h.pwrite(b"b" * (32 << 20), 0)
assert h.pread(32 << 20, 0) == b"b" * (32 << 20)
"#,
        ),
    )
    .await;
    assert!(site.disk.flushes() >= 3, "FUA and FLUSH must reach the device: {}", site.disk.flushes());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alignment_and_every_wrong_request_is_answered_on_a_connection_that_lives() {
    let site = Site::new();
    within(
        60,
        nbdsh(
            &site.uri("disk"),
            r#"
h.set_strict_mode(0)
import errno
def refused(what, expected):
    try:
        what()
    except nbd.Error as error:
        assert error.errnum == expected, (error.errnum, expected, str(error))
        return
    raise Exception("accepted")
size = h.get_size()
model = bytearray(200000)
for step in range(300):
    offset, length = (step * 7919) % 100000, (step * 104729) % 70001 + 1
    data = bytes([step % 255 + 1]) * length
    if step % 5 == 4:
        h.zero(length, offset)
        data = bytes(length)
    else:
        h.pwrite(data, offset)
    model[offset:offset + length] = data
assert h.pread(200000, 0) == bytes(model)
refused(lambda: h.pread(512, size), errno.EINVAL)
refused(lambda: h.pread(1024, size - 512), errno.EINVAL)
refused(lambda: h.pwrite(b"z" * 1024, size - 512), errno.ENOSPC)
refused(lambda: h.zero(1024, size - 512), errno.ENOSPC)
refused(lambda: h.trim(1024, size - 512), errno.EINVAL)
refused(lambda: h.pread(1, (1 << 63) - 1), errno.EINVAL)
refused(lambda: h.block_status(1024, size, lambda *a: 0), errno.EINVAL)
refused(lambda: h.pwrite(b"z", 0, nbd.CMD_FLAG_REQ_ONE), errno.EINVAL)
h.pwrite(b"", 0)
assert h.pread(200000, 0) == bytes(model)
"#,
        ),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_disk_reads_zeros_and_refuses_writes() {
    let site = Site::new();
    within(
        60,
        nbdsh(
            &site.uri("empty"),
            r#"
h.set_strict_mode(0)
import errno
assert h.pread(1 << 20, 512) == bytes(1 << 20)
for write in [lambda: h.pwrite(b"z" * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)]:
    try:
        write()
        raise Exception("accepted")
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, str(error)
found = []
h.block_status(64 << 20, 0, lambda name, offset, entries, err: found.extend(entries))
assert found == [64 << 20, 3], found
"#,
        ),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn block_status_tells_data_from_holes() {
    let site = Site::new();
    within(
        60,
        nbdsh(
            &site.uri("disk"),
            r#"
h.pwrite(b"x" * 65536, 1 << 20)
found = []
h.block_status(2 << 20, 0, lambda name, offset, entries, err: found.extend(entries))
assert found == [1 << 20, 3, 65536, 0, (1 << 20) - 65536, 3], found
one = []
h.block_status(2 << 20, 0, lambda name, offset, entries, err: one.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert one == [1 << 20, 3], one
"#,
        ),
    )
    .await;
    let map = within(60, run("nbdinfo", &["--map", &site.uri("disk")])).await;
    assert!(map.contains("1048576       65536    0  data"), "{map}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_without_structured_replies_and_of_the_old_handshake_are_served() {
    let site = Site::new();
    let script = format!(
        r#"
import nbd
for go, structured in [(True, False), (False, True), (False, False)]:
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.set_opt_mode(False)
    if not go:
        h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)
    h.set_export_name("disk")
    h.connect_unix("{}")
    h.pwrite(b"k" * 4096, 0)
    assert h.pread(4096, 0) == b"k" * 4096
    h.shutdown()
h = nbd.NBD()
h.set_export_name("empty")
h.set_request_structured_replies(False)
h.connect_unix("{}")
assert h.pread(1 << 20, 0) == bytes(1 << 20)
"#,
        site.socket().display(),
        site.socket().display()
    );
    within(60, run("/usr/bin/python3", &["-c", &script])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_brings_an_image_in_and_out_over_many_connections() {
    let site = Site::new();
    let (image, copy) = (site.path("image"), site.path("copy"));
    let pattern: Vec<u8> = (0..8_000_000_u32).flat_map(|n| (n.wrapping_mul(2_654_435_761)).to_le_bytes()).collect();
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(SIZE_BYTES).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &pattern, 100 << 20).unwrap();
    let path = |path: &Path| path.display().to_string();
    within(120, run("nbdcopy", &["--requests=64", "--connections=4", &path(&image), &site.uri("disk")])).await;
    within(120, run("nbdcopy", &["--requests=64", "--connections=4", &site.uri("disk"), &path(&copy)])).await;
    within(60, run("cmp", &[&path(&image), &path(&copy)])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_verifies_its_patterns() {
    let site = Site::new();
    let uri = site.uri("disk");
    let mut args = vec!["-f", "raw", "-t", "none"];
    for command in [
        "write -P 0x5a 0 1M",
        "read -P 0x5a 0 1M",
        "write -z 64k 64k",
        "read -P 0 64k 64k",
        "read -P 0x5a 0 64k",
        "write -P 0x77 513 1000",
        "read -P 0x77 513 1000",
        "discard 0 64k",
        "read -P 0 0 64k",
        "write -f -P 1 2M 4k",
        "aio_write -P 2 4M 1M",
        "aio_write -P 3 6M 1M",
        "aio_flush",
        "read -P 2 4M 1M",
        "flush",
        "map",
    ] {
        args.extend(["-c", command]);
    }
    args.push(&uri);
    let said = within(120, run("qemu-io", &args)).await;
    assert!(!said.contains("verification failed") && !said.contains("failed"), "{said}");
    let info = within(60, run("qemu-img", &["info", "--output=json", &uri])).await;
    assert!(info.contains(&SIZE_BYTES.to_string()), "{info}");
    within(
        120,
        run(
            "qemu-img",
            &[
                "bench",
                "-f",
                "raw",
                "-w",
                "-c",
                "5000",
                "-d",
                "32",
                "-s",
                "4096",
                "-S",
                "40960",
                "--flush-interval=128",
                "-t",
                "none",
                &uri,
            ],
        ),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_random_reads_and_writes() {
    let site = Site::new();
    let uri = format!("--uri={}", site.uri("disk"));
    within(
        180,
        run(
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                "--rw=randrw",
                "--bsrange=4k-128k",
                "--size=128m",
                "--io_size=256m",
                "--verify=crc32c",
                "--verify_backlog=256",
                "--iodepth=16",
                "--verify_fatal=1",
                "--verify_state_save=0",
            ],
        ),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_the_device_reach_the_client_as_what_they_are() {
    let site = Site::new();
    for (failure, errno) in [
        (DeviceError::NoSpace, "ENOSPC"),
        (DeviceError::Fenced, "ESHUTDOWN"),
        (DeviceError::Integrity, "EIO"),
        (DeviceError::Io, "EIO"),
    ] {
        site.disk.fail_with(Some(failure));
        within(
            60,
            nbdsh(
                &site.uri("disk"),
                &format!(
                    r#"
import errno
for what in [lambda: h.pwrite(b"x" * 512, 0), lambda: h.pread(512, 0), lambda: h.flush(), lambda: h.zero(512, 0)]:
    try:
        what()
        raise Exception("accepted")
    except nbd.Error as error:
        assert error.errno == "{errno}", error.errno
"#
                ),
            ),
        )
        .await;
    }
    site.disk.fail_with(None);
    within(60, nbdsh(&site.uri("disk"), "h.pwrite(b'x' * 512, 0)")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_its_own_connection_and_nothing_else() {
    let site = Site::new();
    let greeting = 18;
    let mut option = b"\0\0\0\x03IHAVEOPT".to_vec();
    option.extend_from_slice(&[0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff]);
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 100], &[0xff; 4096], b"\0\0\0\x03not an option....", &option, b"\0"]
    {
        let socket = site.socket();
        let garbage = garbage.to_vec();
        let talk = tokio::task::spawn_blocking(move || {
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream.read_exact(&mut vec![0; greeting]).unwrap();
            // The server may be gone before all is written.
            drop(stream.write_all(&garbage));
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            // The end of the stream, or a reset: no hang.
            let ended = stream.read_to_end(&mut Vec::new());
            assert!(
                !matches!(&ended, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock),
                "no end after {garbage:?}"
            );
        });
        within(60, talk).await.unwrap();
    }
    within(60, run("nbdinfo", &[&site.uri("disk")])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reconnects_sees_the_new_size() {
    let site = Site::new();
    let ready = site.path("ready");
    let script = format!(
        r#"
size = h.get_size()
open("{}", "w").close()
try:
    while True:
        h.pread(512, 0)
except nbd.Error:
    pass
print(size)
"#,
        ready.display()
    );
    let (uri, exports) = (site.uri("disk"), site.exports.clone());
    let client = tokio::spawn(async move { nbdsh(&uri, &script).await });
    let deadline = Instant::now() + Duration::from_secs(30);
    while !ready.exists() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    exports.insert("disk", Export::Memory(MemoryDisk::new(2 * SIZE_BYTES)));
    assert_eq!(within(30, client).await.unwrap().trim(), SIZE_BYTES.to_string());
    let size = within(30, run("nbdinfo", &["--size", &site.uri("disk")])).await;
    assert_eq!(size.trim(), (2 * SIZE_BYTES).to_string());
    exports.remove("disk");
    assert!(!tool("nbdinfo", &[&site.uri("disk")]).await.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_write_of_a_client_that_left_never_lands_after_its_new_connection() {
    let site = Site::new();
    site.disk.hold(true);
    // A write that the device holds back; then the client is gone.
    let left = format!(
        r#"
import nbd
h = nbd.NBD()
h.set_export_name("disk")
h.connect_unix("{}")
h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"o" * 4096)), 0)
while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
    h.poll(10)
h.poll(200)
"#,
        site.socket().display()
    );
    within(60, run("/usr/bin/python3", &["-c", &left])).await;
    let (uri, disk) = (site.uri("disk"), site.disk.clone());
    let again = tokio::spawn(async move {
        let script = "h.pwrite(b'n' * 4096, 0); assert h.pread(4096, 0) == b'n' * 4096";
        nbdsh(&uri, script).await
    });
    // The new connection waits for the old write, and so for the device.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!again.is_finished(), "a new connection overtook a write of the old one");
    disk.hold(false);
    within(60, again).await.unwrap();
    within(60, nbdsh(&site.uri("disk"), "assert h.pread(4096, 0) == b'n' * 4096")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_connections_go_on_while_one_waits_for_the_device() {
    let site = Site::new();
    site.exports.insert("other", Export::Memory(MemoryDisk::new(1 << 20)));
    site.disk.hold(true);
    let uri = site.uri("disk");
    let waiting = tokio::spawn(async move { nbdsh(&uri, "h.pwrite(b'x' * 512, 0)").await });
    within(30, nbdsh(&site.uri("other"), "h.pwrite(b'x' * 512, 0)")).await;
    within(30, nbdsh(&site.uri("disk"), "assert h.pread(512, 4096) == bytes(512)")).await;
    site.disk.hold(false);
    within(30, waiting).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_goes_on_after_the_server_was_away() {
    let mut site = Site::new();
    let options =
        format!("driver=nbd,server.type=unix,server.path={},export=disk,reconnect-delay=60", site.socket().display());
    let mut qemu = Command::new("qemu-io")
        .args(["--image-opts", &options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("apt-get install qemu-utils");
    let mut input = qemu.stdin.take().unwrap();
    input.write_all(b"write -P 0x11 0 64k\n").unwrap();
    let first = site.disk.clone();
    // Not only on the disk: the answer has to be there, else it is lost with the server.
    let mut output = std::io::BufReader::new(qemu.stdout.take().unwrap());
    let (mut output, mut said) = within(
        60,
        tokio::task::spawn_blocking(move || {
            let mut said = String::new();
            while !said.contains("wrote") {
                assert_ne!(output.read_line(&mut said).unwrap(), 0, "{said}");
            }
            (output, said)
        }),
    )
    .await
    .unwrap();
    // The process of the server is replaced: connections break, and nobody listens for a while. The disk is the same.
    site.server = None;
    input.write_all(b"write -P 0x22 64k 64k\nread -P 0x11 0 64k\nread -P 0x22 64k 64k\nquit\n").unwrap();
    drop(input);
    tokio::time::sleep(Duration::from_secs(1)).await;
    // A connection that ends a moment later than the server may have served all of it.
    let gave_up = qemu.try_wait().unwrap().is_some_and(|status| !status.success());
    assert!(!gave_up, "QEMU gave up while the server was away");
    site.server = Some(NbdServer::bind(&site.socket(), site.exports.clone()).unwrap());
    let (status, said) = within(
        60,
        tokio::task::spawn_blocking(move || {
            output.read_to_string(&mut said).unwrap();
            (qemu.wait().unwrap(), said)
        }),
    )
    .await
    .unwrap();
    assert!(status.success() && !said.contains("failed"), "{said}");
    assert_eq!(first.written_chunks(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_socket_is_replaced_and_a_file_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = NbdServer::bind(&path, ExportTable::new()).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(server);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert!(NbdServer::bind(&path, ExportTable::new()).is_err());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}
