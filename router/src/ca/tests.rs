use std::{os::unix::fs::PermissionsExt, sync::Arc};

use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{ServerName, UnixTime},
};

use super::*;

fn names() -> ServerNames {
    ServerNames::new(["api.localhost"], "sprites.localhost")
}

fn day(days: i64) -> Timestamp {
    let start: Timestamp = "2026-01-10T12:00:00Z".parse().unwrap();
    start + jiff::SignedDuration::from_hours(24 * days)
}

/// Does a client that trusts `bundle` accept `identity` as `host` at `now`?
fn accepted(bundle: &str, identity: &ServerIdentity, host: &str, now: Timestamp) -> bool {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(bundle.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now.as_second().unsigned_abs()));
    let host = ServerName::try_from(host.to_owned()).unwrap();
    verifier.verify_server_cert(&identity.chain[0], &identity.chain[1..], &host, &[], now).is_ok()
}

#[test]
fn clients_that_trust_the_bundle_accept_every_name_of_the_edge() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::ensure_at(dir.path(), day(0)).unwrap();
    let identity = ca.server_at(&names(), day(0)).unwrap();
    for host in ["api.localhost", "sprites.localhost", "demo-a1b2c3.sprites.localhost", "localhost", "127.0.0.1", "::1"]
    {
        assert!(accepted(ca.bundle(), &identity, host, day(0)), "{host}");
    }
    for host in ["example.org", "a.b.sprites.localhost", "127.0.0.2", "other.localhost"] {
        assert!(!accepted(ca.bundle(), &identity, host, day(0)), "{host}");
    }
}

#[test]
fn keys_are_for_their_owner_only_and_nothing_temporary_stays() {
    let dir = tempfile::tempdir().unwrap();
    Ca::ensure(dir.path()).unwrap().server(&names()).unwrap();
    let mut files: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["ca.key", "ca.pem", "server.key", "server.pem"]);
    for key in ["ca.key", "server.key"] {
        assert_eq!(fs::metadata(dir.path().join(key)).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn a_restart_shows_the_same_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let first = Ca::ensure_at(dir.path(), day(0)).unwrap();
    let chain = first.server_at(&names(), day(0)).unwrap().chain;
    let second = Ca::ensure_at(dir.path(), day(200)).unwrap();
    assert_eq!(second.bundle(), first.bundle());
    assert_eq!(second.server_at(&names(), day(200)).unwrap().chain, chain);
}

#[test]
fn the_server_certificate_is_renewed_at_two_thirds_of_its_life() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::ensure_at(dir.path(), day(0)).unwrap();
    let first = ca.server_at(&names(), day(0)).unwrap();
    assert_eq!(ca.server_at(&names(), day(262)).unwrap().chain, first.chain);
    let renewed = ca.server_at(&names(), day(265)).unwrap();
    assert_ne!(renewed.chain, first.chain);
    assert!(accepted(ca.bundle(), &renewed, "api.localhost", day(500)));
    assert!(!accepted(ca.bundle(), &first, "api.localhost", day(500)));
}

#[test]
fn other_names_or_another_authority_get_another_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::ensure_at(dir.path(), day(0)).unwrap();
    let first = ca.server_at(&names(), day(0)).unwrap();
    let other = ServerNames::new(["api.example.test"], "sprites.example.test");
    let second = ca.server_at(&other, day(0)).unwrap();
    assert_ne!(second.chain, first.chain);
    assert!(accepted(ca.bundle(), &second, "x-a1b2c3.sprites.example.test", day(0)));
    for file in ["ca.pem", "ca.key"] {
        fs::remove_file(dir.path().join(file)).unwrap();
    }
    let anew = Ca::ensure_at(dir.path(), day(0)).unwrap();
    let third = anew.server_at(&other, day(0)).unwrap();
    assert!(accepted(anew.bundle(), &third, "api.example.test", day(0)));
}

#[test]
fn an_old_root_is_renewed_so_that_old_trust_still_holds() {
    let dir = tempfile::tempdir().unwrap();
    let old = Ca::ensure_at(dir.path(), day(0)).unwrap();
    let new = Ca::ensure_at(dir.path(), day(3000)).unwrap();
    assert_ne!(new.bundle(), old.bundle());
    let identity = new.server_at(&names(), day(3000)).unwrap();
    assert!(accepted(old.bundle(), &identity, "api.localhost", day(3000)));
    assert!(accepted(new.bundle(), &identity, "api.localhost", day(3000)));
}

#[test]
fn a_crash_after_the_key_goes_on_with_that_key() {
    let dir = tempfile::tempdir().unwrap();
    Ca::ensure(dir.path()).unwrap();
    let key = fs::read(dir.path().join("ca.key")).unwrap();
    fs::remove_file(dir.path().join("ca.pem")).unwrap();
    Ca::ensure(dir.path()).unwrap();
    assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), key);
}

#[test]
fn a_root_without_its_key_is_reported_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let pem = Ca::ensure(dir.path()).unwrap().bundle().to_owned();
    fs::remove_file(dir.path().join("ca.key")).unwrap();
    assert!(matches!(Ca::ensure(dir.path()), Err(CaError::KeyMissing { .. })));
    let elsewhere = tempfile::tempdir().unwrap();
    Ca::ensure(elsewhere.path()).unwrap();
    fs::copy(elsewhere.path().join("ca.key"), dir.path().join("ca.key")).unwrap();
    assert!(matches!(Ca::ensure(dir.path()), Err(CaError::KeyForeign { .. })));
    assert_eq!(fs::read_to_string(dir.path().join("ca.pem")).unwrap(), pem);
    fs::write(dir.path().join("ca.pem"), "garbage").unwrap();
    assert!(matches!(Ca::ensure(dir.path()), Err(CaError::Unreadable { .. })));
}

#[test]
fn a_broken_server_certificate_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::ensure(dir.path()).unwrap();
    ca.server(&names()).unwrap();
    fs::write(dir.path().join("server.pem"), "garbage").unwrap();
    let identity = ca.server(&names()).unwrap();
    assert!(accepted(ca.bundle(), &identity, "api.localhost", Timestamp::now()));
}
