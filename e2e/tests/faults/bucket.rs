//! The bucket as a real S3 server, which goes away and comes back.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use e2e::{Cluster, Options, eventually};

use crate::one_at_a_time;

/// `dev-s3` on a port of its own; ended when dropped.
struct S3 {
    folder: std::path::PathBuf,
    port: u16,
    server: Option<Child>,
}

impl S3 {
    fn start() -> Self {
        let folder = std::path::PathBuf::from(format!("/var/tmp/{}", e2e::unique("sprites-s3")));
        std::fs::create_dir_all(&folder).expect("the folder can be made");
        let port = e2e::free_port();
        let mut s3 = Self { folder, port, server: None };
        s3.up();
        s3
    }

    fn up(&mut self) {
        let mut command = Command::new(e2e::binary("dev-s3"));
        command.arg("--root").arg(&self.folder).args(["--listen", &format!("127.0.0.1:{}", self.port)]);
        self.server = Some(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("dev-s3 starts"));
        eventually("dev-s3 accepts", Duration::from_secs(20), || {
            std::net::TcpStream::connect(("127.0.0.1", self.port)).map(drop).map_err(|error| error.to_string())
        });
    }

    fn down(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().expect("it is our child");
            server.wait().expect("it was killed");
        }
    }

    fn options(&self) -> Options {
        Options {
            bucket: Some(format!("s3://sprites/fleet?endpoint=http://127.0.0.1:{}&region=local", self.port)),
            environment: vec![
                ("AWS_ACCESS_KEY_ID".to_owned(), "dev".to_owned()),
                ("AWS_SECRET_ACCESS_KEY".to_owned(), "devsecret".to_owned()),
            ],
            ..Options::default()
        }
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.down();
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

#[test]
fn an_s3_bucket_replaces_the_nodes_folder_and_may_be_away_for_a_while() {
    let _turn = one_at_a_time();
    let mut s3 = S3::start();
    let cluster = Cluster::start(s3.options());
    let sprite = cluster.new_sprite("s3");
    sprite.sh("head -c 20M /dev/urandom > ~/data && sha256sum ~/data > ~/sum && sync");

    // Away: the guest goes on, and what needs the bucket is refused with what to do, not hung.
    s3.down();
    sprite.sh("echo written meanwhile > ~/meanwhile && sync");
    cluster.sprite(["create", &e2e::unique("nobucket"), "--skip-console"]).refused().says("bucket");
    assert_eq!(sprite.sh("cat ~/meanwhile"), "written meanwhile");
    s3.up();

    sprite.cli(&["sleep", "--cold"]).success();
    cluster.stop_sprited();
    cluster.delete_node_folder();
    cluster.start_sprited();
    sprite.sh("sha256sum --check --status ~/sum");
    assert_eq!(sprite.sh("cat ~/meanwhile"), "written meanwhile");
}
