//! Who may connect: certificates and HELLOs.

use std::{sync::Arc, time::Duration};

use tandem_proto::ids::Digest;
use tandem_transport::{CloseCode, Connector, PeerIdentity, Role, Server, Settings, TransportError};

use crate::setup::{Bed, dial, hello, loopback, within};

#[tokio::test]
async fn both_sides_know_each_other() {
    let bed = Bed::new();
    let (server, connector) = (bed.server(Settings::dev()), bed.connector(Settings::dev()));
    let (edge, cloud) = dial(&server, &connector).await.unwrap();
    assert_eq!(edge.peer_identity(), bed.cloud.id());
    assert_eq!(cloud.peer_identity(), bed.edge.id());
    assert_eq!((edge.peer_hello().node.as_str(), cloud.peer_hello().node.as_str()), ("big", "phone"));
    assert_eq!(server.connections(), 1);
    let stats = edge.stats();
    assert!(stats.rtt_us > 0 && stats.min_rtt_us <= stats.rtt_us && stats.bytes_sent > 1_000);

    edge.close(CloseCode::Done, "enough");
    let end = within(cloud.closed()).await;
    assert!(matches!(&end, TransportError::Closed { code: CloseCode::Done, reason } if reason == "enough"));
    assert!(within(cloud.accept_session()).await.is_none());
    assert!(within(cloud.accept_bulk()).await.is_none());
    while server.connections() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused() {
    let (bed, other) = (Bed::new(), Bed::new());
    let server = bed.server(Settings::dev());
    // The stranger trusts our CA but is not of it: the server must refuse.
    let disguised = tls_client(&bed, Some(&other));
    let error = raw_connect(&server, disguised).await.unwrap_err();
    assert!(matches!(error, TransportError::Unauthorised { .. }), "{error}");
    // An honest stranger refuses the server.
    let connector = other.connector(Settings::dev());
    let error = within(connector.connect(server.local_addr().unwrap(), "big.tandem")).await;
    assert!(matches!(error, Err(TransportError::Unauthorised { .. })), "{error:?}");
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let error = raw_connect(&server, tls_client(&bed, None)).await.unwrap_err();
    assert!(
        matches!(&error, TransportError::Unauthorised { reason, .. } if reason.contains("no certificate")),
        "{error}"
    );
}

#[tokio::test]
async fn a_wrong_name_or_role_is_refused() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let addr = server.local_addr().unwrap();
    let connector = bed.connector(Settings::dev());
    let error = within(connector.connect(addr, "small.tandem")).await.unwrap_err();
    assert!(matches!(error, TransportError::Unauthorised { .. }), "{error}");

    let only_routers = Connector::new_for(&bed.edge, Settings::dev(), hello("phone"), &[Role::Router]).unwrap();
    let error = within(only_routers.connect(addr, "big.tandem")).await.unwrap_err();
    assert!(matches!(error, TransportError::WrongPeer { .. }), "{error}");

    let no_edges = Server::bind_for(loopback(), &bed.cloud, Settings::dev(), hello("big"), &[Role::Cloud]);
    let no_edges = no_edges.unwrap();
    let error = within(connector.connect(no_edges.local_addr().unwrap(), "big.tandem")).await;
    assert!(matches!(error, Err(TransportError::Unauthorised { .. })), "{error:?}");
}

#[tokio::test]
async fn a_certificate_that_ends_closes_the_link() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let brief = PeerIdentity::new("default", Role::Edge, "brief").unwrap();
    let identity = bed.ca.issue_for(&brief, Duration::from_secs(3)).unwrap();
    let connector = Connector::new(&identity, Settings::dev(), hello("brief")).unwrap();
    let (edge, _cloud) = dial(&server, &connector).await.unwrap();
    let end = within(edge.closed()).await;
    assert!(matches!(&end, TransportError::Unauthorised { reason, .. } if reason.contains("expired")), "{end}");
    let again = within(connector.connect(server.local_addr().unwrap(), "big.tandem")).await;
    assert!(matches!(again, Err(TransportError::Unauthorised { .. })), "{again:?}");
    // A renewed certificate is taken without a new connector.
    connector.set_identity(&bed.edge).unwrap();
    dial(&server, &connector).await.unwrap();
}

#[tokio::test]
async fn revocation_closes_live_links() {
    let bed = Bed::new();
    let (server, connector) = (bed.server(Settings::dev()), bed.connector(Settings::dev()));
    let (edge, _cloud) = dial(&server, &connector).await.unwrap();
    let none = server.close_where(|peer| peer.name == "tablet", CloseCode::Unauthorised, "revoked");
    let one = server.close_where(|peer| peer.name == "phone", CloseCode::Unauthorised, "revoked");
    assert_eq!((none, one), (0, 1));
    let end = within(edge.closed()).await;
    assert!(matches!(&end, TransportError::Unauthorised { reason, .. } if reason == "revoked"), "{end}");
}

#[tokio::test]
async fn hellos_that_do_not_fit_are_typed_errors_on_both_sides() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let addr = server.local_addr().unwrap();
    let mut newer = hello("phone");
    (newer.minor_min, newer.minor_max) = (900, 901);
    let mut other_schema = hello("phone");
    other_schema.schema = Digest::of(b"another schema");
    for (misfit, what) in [(newer, "protocol version"), (other_schema, "message schema")] {
        let connector = Connector::new(&bed.edge, Settings::dev(), misfit).unwrap();
        match within(connector.connect(addr, "big.tandem")).await {
            Err(TransportError::Incompatible { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{what}: {other:?}"),
        }
    }
    // The server is none the worse.
    dial(&server, &bed.connector(Settings::dev())).await.unwrap();
}

#[tokio::test]
async fn another_alpn_is_incompatible_not_lost() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let mut tls = tls_client(&bed, Some(&bed));
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let error = raw_connect(&server, tls).await.unwrap_err();
    assert!(matches!(error, TransportError::Incompatible { what: "protocol (ALPN)", .. }), "{error}");
}

/// A rustls client that trusts `bed`'s CA and shows the certificate of `who`.
pub(crate) fn tls_client(bed: &Bed, who: Option<&Bed>) -> rustls::ClientConfig {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(bed.ca.ca_pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match who.map(|who| &who.edge) {
        None => builder.with_no_client_auth(),
        Some(id) => {
            let cert = CertificateDer::from_pem_slice(id.cert_pem().as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(id.key_pem().as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    config.alpn_protocols = vec![tandem_proto::limits::ALPN.to_vec()];
    config
}

/// A quinn client that speaks no Tandem; waits until the server has taken or refused it.
pub(crate) async fn raw_connect(
    server: &Server,
    tls: rustls::ClientConfig,
) -> Result<(quinn::Endpoint, quinn::Connection), TransportError> {
    let quic = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let mut endpoint = quinn::Endpoint::client(loopback()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(quic)));
    let connecting = endpoint.connect(server.local_addr().unwrap(), "big.tandem").unwrap();
    let conn = within(connecting).await?;
    // A refused client certificate shows only after the handshake, at the first use. A server that
    // has accepted the client raises the stream limit or waits; half a second of that is consent.
    match tokio::time::timeout(Duration::from_millis(500), conn.closed()).await {
        Ok(error) => Err(error.into()),
        Err(_) => Ok((endpoint, conn)),
    }
}
