//! Packages from a mirror, and containers made with them: what people do first with a machine of their own.

use e2e::Cluster;

/// As a person does it; without what is only recommended, and without translations, which are a third of the lists.
const INSTALL: &str = "sudo apt-get -qq -o Acquire::Languages=none update && \
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends hello docker.io busybox-static >/dev/null";
const START: &str = "sudo service docker start >/dev/null; \
    for i in $(seq 240); do sudo docker info >/tmp/docker-info 2>&1 && exit 0; sleep 0.5; done; \
    cat /tmp/docker-info; sudo tail -n 20 /var/log/docker.log; exit 1";
/// Busybox under the names of its programs, with a page to serve.
const IMPORT: &str = "mkdir -p ~/tiny/bin ~/tiny/www && cp /bin/busybox ~/tiny/bin/ && echo from a container > ~/tiny/www/index.html && \
    for name in sh httpd ip wget; do ln -s busybox ~/tiny/bin/$name; done && tar -C ~/tiny -c . | sudo docker import - tiny >/dev/null";

/// The mirror is the one that the image was built from; a machine that built the image reaches it.
#[test]
fn packages_come_from_the_mirror_and_docker_runs_containers() {
    let cluster = Cluster::shared();
    let sprite = cluster.new_sprite("docker");
    sprite.sh(INSTALL);
    assert_eq!(sprite.sh("hello"), "Hello, world!");

    sprite.sh(START);
    assert_eq!(sprite.sh("sudo docker info --format '{{.Driver}} {{.CgroupVersion}}'"), "overlay2 2");
    sprite.sh(IMPORT);
    // Namespaces of its own, an overlay for a root, and memory bounded by a control group.
    let inside = sprite.sh("sudo docker run --rm --memory 64m tiny /bin/sh -c 'echo pid $$; ip -4 -o addr show eth0; head -n 1 /proc/mounts; cat /sys/fs/cgroup/memory.max'");
    for expected in ["pid 1\n", "inet 172.17.0.", "overlay / overlay", "67108864"] {
        assert!(inside.contains(expected), "{expected:?} is missing in {inside}");
    }
    // In by a published port, from the sprite's URL; out by the sprite's own name server and network.
    sprite.sh("sudo docker run --detach --publish 8080:80 tiny /bin/httpd -f -p 80 -h /www");
    let bearer = format!("Authorization: Bearer {}", cluster.token());
    assert_eq!(cluster.curl(["-H", &bearer, &sprite.url()]).success().out(), "from a container\n");
    sprite.sh(
        "mirror=$(awk '/^deb / { print $2; exit }' /etc/apt/sources.list); suite=$(. /etc/os-release; echo $VERSION_CODENAME); \
         sudo docker run --rm tiny /bin/wget -q -O /dev/null ${mirror%/}/dists/$suite/InRelease",
    );
}
