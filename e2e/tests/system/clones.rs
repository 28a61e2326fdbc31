//! Many sprites from one golden snapshot: alike in everything but what makes a machine itself (ruling 21).

use std::{collections::HashSet, thread};

use e2e::{Cluster, Sprite, full_size};

/// The number in `./dev soak`; in CI as many as two emulated cores start in a minute.
fn herd() -> usize {
    if full_size() { 20 } else { 8 }
}

#[test]
fn sprites_created_at_once_all_work_and_differ_in_identity() {
    let cluster = Cluster::shared();
    let sprites: Vec<Sprite<'_>> = thread::scope(|scope| {
        let creating: Vec<_> = (0..herd()).map(|_| scope.spawn(|| cluster.new_sprite("herd"))).collect();
        creating.into_iter().map(|thread| thread.join().expect("it is created")).collect()
    });
    let identity = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; findmnt -no UUID /; \
                    head -c 16 /dev/urandom | od -An -tx1; sudo ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key; hostname";
    let identities: Vec<Vec<String>> = thread::scope(|scope| {
        let asking: Vec<_> = sprites
            .iter()
            .map(|sprite| scope.spawn(move || sprite.sh(identity).lines().map(str::to_owned).collect()))
            .collect();
        asking.into_iter().map(|thread| thread.join().expect("it answers")).collect()
    });
    for (line, what) in
        ["boot id", "machine id", "file-system UUID", "random bytes", "ssh host key", "host name"].iter().enumerate()
    {
        let different: HashSet<&String> = identities.iter().map(|identity| &identity[line]).collect();
        assert_eq!(different.len(), sprites.len(), "the {what} repeats: {identities:#?}");
    }
}
