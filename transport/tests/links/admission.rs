//! Caps on connections and sessions, with typed refusals.

use std::time::Duration;

use bytes::Bytes;
use tandem_proto::message::RefuseCode;
use tandem_transport::{Connector, Role, Settings, TransportError};

use crate::setup::{Bed, dial, hello, pair, token, within};

#[tokio::test]
async fn connections_per_device_are_capped() {
    let bed = Bed::new();
    let server = bed.server(Settings { connections_per_device_max: 2, ..Settings::dev() });
    let connector = bed.connector(Settings::dev());
    let first = dial(&server, &connector).await.unwrap();
    let _second = dial(&server, &connector).await.unwrap();
    match dial(&server, &connector).await {
        Err(TransportError::NameInUse { reason }) => {
            assert!(reason.contains("at most 2"), "{reason}");
        }
        other => panic!("{:?}", other.err()),
    }
    assert_eq!(server.refused(), 1);
    // Another device is not concerned, and a place that is given back can be taken.
    let tablet = bed.ca.issue(Role::Edge, "tablet").unwrap();
    let tablet = Connector::new(&tablet, Settings::dev(), hello("tablet")).unwrap();
    let _third = dial(&server, &tablet).await.unwrap();
    drop(first);
    let _fourth = dial(&server, &connector).await.unwrap();
}

#[tokio::test]
async fn connections_altogether_are_capped() {
    let bed = Bed::new();
    let server = bed.server(Settings { connections_max: 1, ..Settings::dev() });
    let connector = bed.connector(Settings::dev());
    let first = dial(&server, &connector).await.unwrap();
    let error = dial(&server, &connector).await.err().unwrap();
    assert!(matches!(error, TransportError::Refused { code: RefuseCode::Busy, .. }), "{error}");
    drop(first);
    let again = within(async {
        loop {
            if let Ok(links) = dial(&server, &connector).await {
                return links;
            }
        }
    });
    again.await;
}

#[tokio::test]
async fn above_the_load_threshold_clients_prove_their_address() {
    let bed = Bed::new();
    let server = bed.server(Settings { retry_above: 0, ..Settings::dev() });
    let connector = bed.connector(Settings::dev());
    let _first = dial(&server, &connector).await.unwrap();
    let _retried = dial(&server, &connector).await.unwrap();
}

#[tokio::test]
async fn sessions_of_a_link_are_capped() {
    let few = Settings { sessions: 2, handshake: Duration::from_millis(500), ..Settings::dev() };
    let pair = pair(few.clone(), few).await;
    let mut open = vec![];
    for i in 0..2 {
        let mut session = pair.edge.open_session().await.unwrap();
        session.tx.send(&token(i), Bytes::new()).await.unwrap();
        open.push((session, within(pair.cloud.accept_session()).await.unwrap()));
    }
    let third = pair.edge.open_session().await;
    assert!(matches!(third, Err(TransportError::Timeout { .. })), "{:?}", third.err());
    drop(open);
    within(pair.edge.open_session()).await.unwrap();
    assert_eq!(pair.server.connections(), 1);
}
