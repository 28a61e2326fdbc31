//! The network of a sprite: the same inside for all, and no way to each other or to the host.

use e2e::Cluster;

#[test]
fn inside_every_sprite_looks_alike_and_walls_stand_outside() {
    let cluster = Cluster::shared();
    let (one, two) = (cluster.new_sprite("net"), cluster.new_sprite("net"));
    two.serve_http("two");
    for sprite in [&one, &two] {
        assert!(sprite.sh("ip -4 -o addr").contains("10.0.0.1/24"));
        assert!(sprite.sh("ip route").contains("default via 10.0.0.2"));
    }
    // Its own address is all it reaches: the neighbour has the same one, and the host's edge is not there.
    assert_eq!(two.sh("curl -s 10.0.0.1:8080"), "two");
    one.exec(&["curl", "-s", "--max-time", "5", "http://10.0.0.1:8080"]).refused();
    let edge = format!("https://10.0.0.2:{}", cluster.port());
    one.exec(&["curl", "-sk", "--max-time", "5", &edge]).refused();
}
