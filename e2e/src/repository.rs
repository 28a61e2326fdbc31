//! A package repository on a machine of its own: what a sprite reaches through its network as it reaches a mirror in the internet.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{Cluster, eventually};

/// Documentation addresses (RFC 5737): nobody's, and no network that a guest is kept from.
const NETWORK: &str = "203.0.113";
const PORT: u16 = 8000;

/// A web server in a network namespace behind the host. Namespace, cable and process go with it; the cluster's reaper knows them too, by
/// the name of the namespace and the folder in the command line.
pub struct Repository {
    namespace: String,
    address: String,
    server: Child,
}

impl Repository {
    /// Serves `project`, a pure Python project, to `pip`.
    pub fn of_python(cluster: &Cluster, project: &Path) -> Self {
        let index = cluster.folder().join("repository");
        let packer = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/wheel.py");
        run(Command::new("python3").arg(packer).arg(project).arg(&index));
        let instance = cluster.instance();
        let (namespace, cable) = (format!("spr{instance}-repo"), format!("rp{instance}"));
        // Four addresses each; another test run on this machine most likely takes others.
        let first = rand::random_range(0..64) * 4;
        let (host, address) = (format!("{NETWORK}.{}", first + 1), format!("{NETWORK}.{}", first + 2));
        let ip = |line: &str| run(Command::new("ip").args(line.split(' ')));
        ip(&format!("netns add {namespace}"));
        ip(&format!("link add {cable} type veth peer name up0 netns {namespace}"));
        ip(&format!("address add {host}/30 dev {cable}"));
        ip(&format!("link set {cable} up"));
        ip(&format!("-n {namespace} address add {address}/30 dev up0"));
        ip(&format!("-n {namespace} link set up0 up"));
        let server = Command::new("ip")
            .args(["netns", "exec", &namespace, "python3", "-m", "http.server", &PORT.to_string(), "--directory"])
            .arg(&index)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("ip runs");
        let repository = Self { namespace, address, server };
        eventually("an answer of the repository", Duration::from_secs(30), || repository.probe());
        repository
    }

    fn probe(&self) -> Result<(), String> {
        let mut stream = TcpStream::connect((self.address.as_str(), PORT)).map_err(|error| error.to_string())?;
        let mut answer = String::new();
        stream.write_all(b"GET /simple/ HTTP/1.0\r\n\r\n").map_err(|error| error.to_string())?;
        stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
        if answer.starts_with("HTTP/1.0 200") { Ok(()) } else { Err(answer) }
    }

    /// What `pip install` has to be told, besides the package.
    pub fn pip_flags(&self) -> String {
        format!(
            "--index-url http://{0}:{PORT}/simple/ --trusted-host {0} --no-cache-dir --disable-pip-version-check",
            self.address
        )
    }
}

impl Drop for Repository {
    fn drop(&mut self) {
        // Both may be gone already, which is as good.
        drop(self.server.kill());
        drop(self.server.wait());
        drop(Command::new("ip").args(["netns", "delete", &self.namespace]).status());
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
