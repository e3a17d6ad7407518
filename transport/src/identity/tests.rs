use std::{fs, time::Duration};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn ca() -> (tempfile::TempDir, DevCa) {
    let dir = tempfile::tempdir().unwrap();
    let ca = DevCa::open_or_create(dir.path()).unwrap();
    (dir, ca)
}

#[test]
fn a_second_opening_finds_the_same_ca() {
    let (dir, first) = ca();
    let second = DevCa::open_or_create(dir.path()).unwrap();
    assert_eq!(first.ca_pem(), second.ca_pem());
    let identity = second.issue(Role::Edge, "phone").unwrap();
    Identity::from_pem(identity.cert_pem(), identity.key_pem(), first.ca_pem()).unwrap();
}

#[cfg(unix)]
#[test]
fn files_are_readable_by_the_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, ca) = ca();
    ca.issue(Role::Cloud, "big").unwrap().save(dir.path().join("id")).unwrap();
    for name in ["ca.pem", "ca.key", "id/cert.pem", "id/key.pem", "id/trust.pem"] {
        let mode = fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "a temporary file was left behind: {left:?}");
}

#[test]
fn openers_that_race_end_with_one_ca() {
    let dir = tempfile::tempdir().unwrap();
    let open = || DevCa::open_or_create(dir.path()).unwrap().ca_pem().to_owned();
    let pems: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(pems.iter().all(|pem| *pem == pems[0]));
}

#[test]
fn save_and_load_keep_everything() {
    let (dir, ca) = ca();
    let saved = ca.issue(Role::Router, "r1").unwrap();
    saved.save(dir.path().join("r1")).unwrap();
    let loaded = Identity::load(dir.path().join("r1")).unwrap();
    assert_eq!(loaded.id().to_string(), "spiffe://tandem/default/router/r1");
    assert_eq!(loaded.cert_pem(), saved.cert_pem());
    assert_eq!(loaded.not_after(), saved.not_after());
    assert!(!format!("{loaded:?}").contains("PRIVATE"));
}

#[test]
fn faulty_identities_are_typed_errors() {
    let (_dir, ca) = ca();
    let (_other_dir, other) = self::ca();
    let id = PeerIdentity::new("acme", Role::Edge, "phone").unwrap();
    let good = ca.issue_for(&id, HOUR).unwrap();
    assert_eq!(good.id(), &id);
    let stranger = other.issue_for(&id, HOUR).unwrap();
    let check = Identity::from_pem;

    assert!(matches!(check(good.cert_pem(), good.key_pem(), other.ca_pem()), Err(IdentityError::WrongCa { .. })));
    assert!(matches!(check(good.cert_pem(), stranger.key_pem(), ca.ca_pem()), Err(IdentityError::KeyMismatch { .. })));
    let (old_cert, old_key) = ca.sign(&id, SystemTime::now() - HOUR / 2).unwrap();
    assert!(matches!(check(&old_cert, &old_key, ca.ca_pem()), Err(IdentityError::Expired { .. })));
    assert!(matches!(check("no pem", good.key_pem(), ca.ca_pem()), Err(IdentityError::Malformed { .. })));
    assert!(matches!(check(good.cert_pem(), "no pem", ca.ca_pem()), Err(IdentityError::Malformed { .. })));
    // The CA itself names no node.
    assert!(matches!(check(ca.ca_pem(), good.key_pem(), ca.ca_pem()), Err(IdentityError::NoSpiffeId { .. })));
    assert!(matches!(Identity::load("/nonexistent"), Err(IdentityError::Unreadable { .. })));
}

#[test]
fn names_that_could_be_misread_are_refused() {
    for name in ["", "a/b", "A", "a b", "-a", "a-", "ä", &"x".repeat(64)] {
        assert!(PeerIdentity::new("default", Role::Edge, name).is_err(), "{name:?}");
        assert!(PeerIdentity::new(name, Role::Edge, "a").is_err(), "{name:?}");
    }
    for uri in [
        "",
        "spiffe://tandem/default/edge",
        "spiffe://other/default/edge/a",
        "spiffe://tandem/default/king/a",
        "spiffe://tandem/default/edge/a/b",
        "https://tandem/default/edge/a",
    ] {
        assert!(uri.parse::<PeerIdentity>().is_err(), "{uri}");
    }
    let id: PeerIdentity = "spiffe://tandem/acme/cloud/n-1".parse().unwrap();
    assert_eq!((id.role, id.dns_name().as_str()), (Role::Cloud, "n-1.tandem"));
}

#[test]
fn a_certificate_is_renewed_at_half_of_its_time_and_after_a_clock_set_back() {
    let (_dir, ca) = ca();
    let identity = ca.issue_for(&PeerIdentity::new("acme", Role::Edge, "phone").unwrap(), 10 * 24 * HOUR).unwrap();
    // Valid from a day ago: 11 days in all.
    let table = [(0, false), (3, false), (5, true), (10, true), (31, true)];
    for (days, due) in table {
        assert_eq!(identity.renewal_is_due(SystemTime::now() + days * 24 * HOUR), due, "in {days} days");
    }
    assert!(identity.renewal_is_due(SystemTime::now() - 2 * 24 * HOUR), "not valid yet by a clock that was set back");
}
