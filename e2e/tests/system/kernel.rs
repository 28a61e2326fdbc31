//! What only a machine with its own kernel can do: loop devices, FUSE, overlays, tunnels, a firewall of its own.

use std::sync::OnceLock;

use e2e::{Cluster, Sprite};

fn sprite() -> &'static Sprite<'static> {
    static SPRITE: OnceLock<Sprite<'static>> = OnceLock::new();
    SPRITE.get_or_init(|| Cluster::shared().new_sprite("kernel"))
}

#[test]
fn the_running_kernels_modules_are_there_and_read_only() {
    let sprite = sprite();
    sprite.sh("test -e /lib/modules/$(uname -r)/modules.dep");
    sprite.exec(&["sudo", "touch", "/lib/modules/written"]).refused();
    sprite.sh("sudo modprobe dummy && lsmod | grep -q ^dummy");
}

#[test]
fn a_file_is_a_disk() {
    sprite().sh(
        "truncate -s 64M ~/disk && mkfs.ext4 -q ~/disk && mkdir -p ~/mounted && sudo mount -o loop ~/disk ~/mounted && \
         echo kept | sudo tee ~/mounted/file >/dev/null && sudo umount ~/mounted && sudo mount -o loop ~/disk ~/mounted && \
         grep -q kept ~/mounted/file && sudo umount ~/mounted",
    );
}

#[test]
fn overlays_are_mounted() {
    sprite().sh(
        "mkdir -p ~/o/lower ~/o/upper ~/o/work ~/o/merged && echo below > ~/o/lower/file && \
         sudo mount -t overlay overlay -o lowerdir=$HOME/o/lower,upperdir=$HOME/o/upper,workdir=$HOME/o/work ~/o/merged && \
         echo above | sudo tee ~/o/merged/file >/dev/null && grep -q below ~/o/lower/file && grep -q above ~/o/upper/file && \
         sudo umount ~/o/merged",
    );
}

#[test]
fn fuse_and_tun_devices_open() {
    sprite().sh("sudo modprobe fuse; sudo modprobe tun; test -c /dev/fuse && test -c /dev/net/tun && \
         sudo ip tuntap add dev tap9 mode tap && ip link show tap9 >/dev/null && sudo ip link del tap9");
}

#[test]
fn it_has_a_firewall_and_bridges_of_its_own() {
    sprite().sh(
        "sudo nft add table inet mine && sudo nft 'add chain inet mine c { type filter hook output priority 0; }' && \
         sudo nft add rule inet mine c ip daddr 192.0.2.1 drop && sudo nft list table inet mine | grep -q drop && \
         sudo nft delete table inet mine && sudo ip link add br9 type bridge && sudo ip link del br9",
    );
}

#[test]
fn namespaces_nest() {
    assert_eq!(
        sprite()
            .sh("sudo unshare --pid --mount --net --uts --fork --mount-proc sh -c 'hostname inner; hostname; echo $$'"),
        "inner\n1"
    );
}
