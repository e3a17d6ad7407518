use std::time::Duration;

use tandem_proto::message::RefuseCode;

use super::*;

fn unauthorised(fault: TlsFault) -> TransportError {
    TransportError::Unauthorised { fault, reason: "R".into() }
}

fn no_target(cause: NoTarget) -> TransportError {
    TransportError::NoTarget { cause, reason: "R".into() }
}

fn unknown(known: &[&str]) -> TransportError {
    let known = known.iter().map(|name| (*name).to_owned()).collect();
    no_target(NoTarget::UnknownModel { model: "big".into(), known })
}

#[test]
fn each_error_has_a_word_and_an_advice() {
    let table = [
        (unauthorised(TlsFault::WrongName), "wrong_server_name", "NAME.tandem@host:port", true),
        (unauthorised(TlsFault::PeerUntrusted), "untrusted_ca", "copy the `ca` folder", true),
        (unauthorised(TlsFault::OwnUntrusted), "untrusted_ca", "copy the `ca` folder", true),
        (unauthorised(TlsFault::PeerOutOfDate), "certificate_expired", "clocks", true),
        (unauthorised(TlsFault::OwnOutOfDate), "certificate_expired", "clocks", true),
        (unauthorised(TlsFault::Other), "tls_failed", "same CA", true),
        (no_target(NoTarget::RouterCertificate(TlsFault::WrongName)), "wrong_server_name", "--name", true),
        (no_target(NoTarget::RouterCertificate(TlsFault::PeerUntrusted)), "untrusted_ca", "copy the `ca` folder", true),
        (no_target(NoTarget::RouterUnreachable), "router_unreachable", "--router", false),
        (no_target(NoTarget::RouterDenied), "router_denied", "--identity", true),
        (no_target(NoTarget::UnknownHost { address: "a:1".into() }), "unknown_host", "name server", false),
        (unknown(&["demo-cloud"]), "unknown_model", "--cloud-model demo-cloud", true),
        (unknown(&[]), "no_cloud_node", "tandem cloud --router", false),
        (no_target(NoTarget::NoNode), "no_cloud_node", "add a cloud node", false),
        (no_target(NoTarget::Other), "router_failed", "--router", true),
        (TransportError::NameInUse { reason: "R".into() }, "name_in_use", "--name", true),
        (
            TransportError::WrongPeer { found: "a router".into(), expected: "cloud".into() },
            "wrong_peer",
            "--router",
            true,
        ),
        (
            TransportError::Incompatible { what: "w", here: "1".into(), there: "2".into() },
            "incompatible",
            "same version",
            true,
        ),
        (TransportError::Refused { code: RefuseCode::Busy, reason: "R".into() }, "cloud_busy", "wait", false),
        (TransportError::Timeout { what: "w", ms: 1 }, "cloud_unreachable", "UDP", false),
        (TransportError::Lost { reason: "R".into() }, "link_lost", "by itself", false),
    ];
    let page = include_str!("../../../docs/cloud-problems.md");
    for (error, code, advice, lasting) in table {
        let got = diagnose(&error);
        assert!(page.contains(&format!("`{code}`")), "docs/cloud-problems.md does not explain {code}");
        assert_eq!((got.code, got.lasting), (code, lasting), "{error}");
        assert!(got.what_to_do.contains(advice), "{error}: {}", got.what_to_do);
        assert!(!got.line().contains('\n'), "{}", got.line());
    }
}

#[test]
fn a_cloud_that_is_not_there_yet_is_no_failure_for_a_while() {
    let waiting = |error: TransportError| DialState::Waiting { failures: 1, error, wait: Duration::from_millis(1) };
    let slow = TransportError::Timeout { what: "w", ms: 1 };
    let wrong = unauthorised(TlsFault::WrongName);
    let table = [
        (DialState::Up, true, LinkState::Connected, None),
        (DialState::Cut, true, LinkState::Cut, None),
        (DialState::Dialing { failures: 0, error: None }, false, LinkState::Connecting, None),
        (waiting(slow.clone()), true, LinkState::Connecting, Some("cloud_unreachable")),
        (waiting(slow.clone()), false, LinkState::Failed, Some("cloud_unreachable")),
        (DialState::Dialing { failures: 9, error: Some(slow) }, false, LinkState::Failed, Some("cloud_unreachable")),
        (waiting(wrong), true, LinkState::Failed, Some("wrong_server_name")),
    ];
    for (dial, patient, state, code) in table {
        let got = CloudState::of_dialing(&dial, patient);
        assert_eq!((got.state, got.code.as_deref()), (state, code), "{dial:?}");
        assert_eq!(got.failure().is_some(), state == LinkState::Failed, "{got:?}");
    }
}
