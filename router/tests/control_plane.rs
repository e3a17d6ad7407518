//! The control plane over loopback with mutual TLS: nodes register and report, edges place.

use std::{path::Path, time::Duration};

use tandem_proto::ids::Digest;
use tandem_router::{
    client::{ClientError, Registration, RegistrationState, RouterClient, TicketCache, TicketSource, place_for},
    control::{PlaceCommand, Refusal},
    node::{LoadReport, ModelCard, NodeCard},
    placement::PlacementConfig,
    server::{ServerConfig, ServerError, Serving, serve},
    tls::TlsPem,
};
use tandem_transport::identity::{DevCa, PeerIdentity, Role};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

struct Fleet {
    ca: DevCa,
    folder: tempfile::TempDir,
}

struct Running {
    serving: Serving,
    shutdown: CancellationToken,
}

impl Running {
    fn endpoint(&self) -> String {
        self.serving.address().to_string()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.serving.join().await.unwrap();
    }
}

impl Fleet {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { ca: DevCa::open_or_create(folder.path().join("ca")).unwrap(), folder }
    }

    fn tls(&self, role: Role, name: &str) -> TlsPem {
        pem(&self.ca, role, name)
    }

    fn state(&self) -> std::path::PathBuf {
        self.folder.path().join("router")
    }

    async fn router(&self, state_dir: Option<&Path>, placement: PlacementConfig) -> Result<Running, ServerError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let shutdown = CancellationToken::new();
        let tls = self.tls(Role::Router, "router");
        let config = ServerConfig { tls, state_dir: state_dir.map(Into::into), placement };
        Ok(Running { serving: serve(listener, config, shutdown.clone()).await?, shutdown })
    }

    async fn plain_router(&self) -> Running {
        self.router(None, PlacementConfig::default()).await.unwrap()
    }

    fn client(&self, role: Role, name: &str, routers: &[&Running]) -> RouterClient {
        let endpoints: Vec<_> = routers.iter().map(|router| router.endpoint()).collect();
        RouterClient::connect(&endpoints, &self.tls(role, name)).unwrap()
    }
}

fn pem(ca: &DevCa, role: Role, name: &str) -> TlsPem {
    let identity = ca.issue(role, name).unwrap();
    TlsPem { certificate: identity.cert_pem().into(), key: identity.key_pem().into(), ca: identity.ca_pem().into() }
}

fn card(name: &str, boot_epoch: u64) -> NodeCard {
    NodeCard {
        name: name.into(),
        address: "127.0.0.1:7443".into(),
        server_name: format!("{name}.tandem"),
        region: String::new(),
        models: vec![ModelCard { name: "tandem-cloud".into(), digest: Digest::of(b"weights") }],
        boot_epoch,
    }
}

fn idle() -> LoadReport {
    LoadReport { sessions_max: 8, ..LoadReport::default() }
}

#[tokio::test]
async fn a_node_registers_and_an_edge_gets_a_ticket() {
    let fleet = Fleet::new();
    let router = fleet.plain_router().await;
    let cloud = fleet.client(Role::Cloud, "cloud-a", &[&router]);
    let edge = fleet.client(Role::Edge, "phone", &[&router]);

    assert_eq!(cloud.register(&card("cloud-a", 1), &idle()).await.unwrap(), Duration::from_secs(1));
    let busy = LoadReport { sessions: 3, ..idle() };
    assert!(cloud.heartbeat("cloud-a", 1, &busy).await.unwrap().known);
    assert!(!cloud.heartbeat("cloud-a", 2, &busy).await.unwrap().known, "another start must register");

    let ticket = edge.place(&place_for("tandem-cloud")).await.unwrap();
    assert_eq!((ticket.node.as_str(), ticket.address.as_str()), ("cloud-a", "127.0.0.1:7443"));
    assert_eq!(ticket.server_name, "cloud-a.tandem");
    assert!(ticket.expires_in_ms > 0 && !ticket.reasons.is_empty());
    let by_digest = edge.place(&place_for(&Digest::of(b"weights").to_string())).await.unwrap();
    assert_eq!(by_digest.node, "cloud-a");
    assert_eq!(edge.place(&place_for("tandem-cloud")).await.unwrap().epoch, ticket.epoch, "same node, same epoch");

    let status = edge.status().await.unwrap();
    assert_eq!(status.nodes.len(), 1);
    assert_eq!((status.nodes[0].load.sessions, status.nodes[0].alive), (3, true));
    assert_eq!((status.devices, status.nodes[0].devices), (2, 2), "one ticket per model asked for");
    router.stop().await;
}

/// Of four nodes the far one, the loaded one and the one that holds nothing of the prompt are passed over,
/// although each comes first by its name; and each is taken where the others are worse.
#[tokio::test]
async fn the_far_the_loaded_and_the_cold_node_are_not_chosen() {
    let fleet = Fleet::new();
    let router = fleet.plain_router().await;
    let prompt: Vec<Digest> = (0..8_u8).map(|block| Digest::of(&[block])).collect();
    let mut held = prompt.clone();
    held.sort_unstable();
    let warm = LoadReport { prefixes: held, tokens_per_second: 2000, ..idle() };
    let queued = LoadReport { queued_tokens: 900, ..warm.clone() };
    let nodes = [
        ("a-far", "sea", warm.clone()),
        ("b-loaded", "home", queued),
        ("c-cold", "home", LoadReport { prefixes: vec![], ..warm.clone() }),
        ("d-good", "home", warm.clone()),
    ];
    for (name, region, load) in &nodes {
        let cloud = fleet.client(Role::Cloud, name, &[&router]);
        cloud.register(&NodeCard { region: (*region).into(), ..card(name, 1) }, load).await.unwrap();
    }
    let place = |edge: &str, avoid: &[&str]| {
        let client = fleet.client(Role::Edge, edge, &[&router]);
        let avoid = avoid.iter().map(|name| (*name).to_owned()).collect();
        let place = PlaceCommand { region: "home".into(), prefix: prompt.clone(), avoid, ..place_for("tandem-cloud") };
        async move { client.place(&place).await.unwrap() }
    };
    let ticket = place("phone", &[]).await;
    assert_eq!(ticket.node, "d-good", "{:?}", ticket.reasons);
    // 60 ms of sea, 128 ms of prefill for 256 tokens, 450 ms of queue.
    assert_eq!(place("tablet", &["d-good"]).await.node, "a-far");
    assert_eq!(place("watch", &["d-good", "a-far"]).await.node, "c-cold");
    // A device that has measured the way across the sea knows better than the region's name.
    let near = PlaceCommand {
        region: "home".into(),
        prefix: prompt.clone(),
        latencies_us: [("a-far".to_owned(), 900)].into(),
        ..place_for("tandem-cloud")
    };
    assert_eq!(fleet.client(Role::Edge, "laptop", &[&router]).place(&near).await.unwrap().node, "a-far");
    router.stop().await;
}

#[tokio::test]
async fn an_unknown_model_is_refused_with_the_known_ones() {
    let fleet = Fleet::new();
    let router = fleet.plain_router().await;
    let cloud = fleet.client(Role::Cloud, "cloud-a", &[&router]);
    cloud.register(&card("cloud-a", 1), &idle()).await.unwrap();
    let edge = fleet.client(Role::Edge, "phone", &[&router]);
    let refused = edge.place(&place_for("gpt-9")).await.unwrap_err();
    let ClientError::Refused(Refusal::UnknownModel { model, known }) = &refused else { panic!("{refused:?}") };
    assert_eq!((model.as_str(), known.as_slice()), ("gpt-9", ["tandem-cloud".to_owned()].as_slice()));
    assert!(refused.to_string().contains("tandem-cloud"), "{refused}");
    assert!(!refused.is_temporary());
    router.stop().await;
}

#[tokio::test]
async fn epochs_and_owners_survive_a_restart() {
    let fleet = Fleet::new();
    let folder = fleet.state();
    let config = PlacementConfig::default;
    let mut last = 0;
    for start in 0..4 {
        let router = fleet.router(Some(&folder), config()).await.unwrap();
        let cloud = fleet.client(Role::Cloud, "cloud-a", &[&router]);
        if start == 0 {
            cloud.register(&card("cloud-a", 1), &idle()).await.unwrap();
        }
        let known = cloud.heartbeat("cloud-a", 1, &idle()).await.unwrap().known;
        assert!(known, "a registration that was answered is on disk");
        let edge = fleet.client(Role::Edge, "phone", &[&router]);
        let epoch = edge.place(&place_for("tandem-cloud")).await.unwrap().epoch.0;
        if start > 0 {
            assert_eq!(epoch, last, "an orderly restart keeps the owner");
        }
        let other = fleet.client(Role::Edge, &format!("tablet-{start}"), &[&router]);
        let fresh = other.place(&place_for("tandem-cloud")).await.unwrap().epoch.0;
        assert!(fresh > epoch, "{fresh} after {epoch}");
        last = epoch;
        router.stop().await;
    }
}

#[tokio::test]
async fn a_second_router_on_the_same_state_is_refused() {
    let fleet = Fleet::new();
    let first = fleet.router(Some(&fleet.state()), PlacementConfig::default()).await.unwrap();
    let second = fleet.router(Some(&fleet.state()), PlacementConfig::default()).await;
    let error = second.err().expect("two routers on one state").to_string();
    assert!(error.contains("in use by another router"), "{error}");
    first.stop().await;
}

#[tokio::test]
async fn strangers_and_wrong_roles_are_refused() {
    let fleet = Fleet::new();
    let router = fleet.plain_router().await;
    let edge = fleet.client(Role::Edge, "phone", &[&router]);
    let cloud = fleet.client(Role::Cloud, "cloud-a", &[&router]);

    let denied = |error: ClientError| assert!(matches!(error, ClientError::Denied(_)), "{error:?}");
    denied(edge.register(&card("phone", 1), &idle()).await.unwrap_err());
    denied(cloud.register(&card("cloud-b", 1), &idle()).await.unwrap_err());
    denied(cloud.place(&place_for("tandem-cloud")).await.unwrap_err());
    denied(edge.drain("cloud-a", true).await.unwrap_err());
    let as_other = PlaceCommand { device: "laptop".into(), ..place_for("tandem-cloud") };
    denied(edge.place(&as_other).await.unwrap_err());

    // A certificate of another CA, with this fleet's CA to check the router by.
    let strangers = Fleet::new();
    let stranger = TlsPem { ca: fleet.ca.ca_pem().into(), ..strangers.tls(Role::Edge, "phone") };
    let client = RouterClient::connect(&[router.endpoint()], &stranger).unwrap();
    let error = client.status().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    // A client that trusts another CA does not talk to this router either.
    let client = RouterClient::connect(&[router.endpoint()], &strangers.tls(Role::Edge, "phone")).unwrap();
    assert!(client.status().await.is_err());
    assert!(edge.status().await.is_ok());
    router.stop().await;
}

#[tokio::test]
async fn silent_and_draining_nodes_get_nobody() {
    let fleet = Fleet::new();
    let stale_ms = 40;
    let router = fleet.router(None, PlacementConfig { stale_ms, ..PlacementConfig::default() }).await.unwrap();
    let cloud = fleet.client(Role::Cloud, "cloud-a", &[&router]);
    let edge = fleet.client(Role::Edge, "phone", &[&router]);
    cloud.register(&card("cloud-a", 1), &idle()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(3 * stale_ms)).await;
    let error = edge.place(&place_for("tandem-cloud")).await.unwrap_err();
    let ClientError::Refused(Refusal::NoNode { excluded, .. }) = &error else { panic!("{error:?}") };
    assert!(excluded[0].1.contains("no heartbeat"), "{excluded:?}");
    assert!(error.is_temporary());

    let operator = fleet.client(Role::Operator, "ops", &[&router]);
    assert!(operator.drain("cloud-a", true).await.unwrap());
    assert!(!operator.drain("cloud-z", true).await.unwrap());
    assert!(cloud.heartbeat("cloud-a", 1, &idle()).await.unwrap().draining);
    let error = edge.place(&place_for("tandem-cloud")).await.unwrap_err();
    let ClientError::Refused(Refusal::NoNode { excluded, .. }) = &error else { panic!("{error:?}") };
    assert!(excluded[0].1.contains("draining") || excluded[0].1.contains("no heartbeat"), "{excluded:?}");
    router.stop().await;
}

#[tokio::test]
async fn the_registration_comes_back_after_a_router_that_forgot() {
    let fleet = Fleet::new();
    let first = fleet.plain_router().await;
    let address = first.serving.address();
    let client = fleet.client(Role::Cloud, "cloud-a", &[&first]);
    let registration = Registration::new(client, card("cloud-a", 1)).every(Duration::from_millis(20));
    let mut state = registration.state();
    let end = CancellationToken::new();
    let task = tokio::spawn(registration.run(idle, end.clone()));
    state.wait_for(|state| matches!(state, RegistrationState::Registered { .. })).await.unwrap();

    first.stop().await;
    state.wait_for(|state| matches!(state, RegistrationState::Away { .. })).await.unwrap();
    // The same address, an empty state.
    let listener = TcpListener::bind(address).await.unwrap();
    let shutdown = CancellationToken::new();
    let tls = fleet.tls(Role::Router, "router");
    let config = ServerConfig { tls, state_dir: None, placement: PlacementConfig::default() };
    let serving = serve(listener, config, shutdown.clone()).await.unwrap();
    let second = Running { serving, shutdown };
    state.wait_for(|state| matches!(state, RegistrationState::Registered { .. })).await.unwrap();

    let edge = fleet.client(Role::Edge, "phone", &[&second]);
    let status = edge.status().await.unwrap();
    assert_eq!((status.nodes.len(), status.nodes[0].alive), (1, true));
    end.cancel();
    task.await.unwrap().unwrap();
    assert!(edge.status().await.unwrap().nodes[0].draining, "a node that leaves says so");
    second.stop().await;
}

#[tokio::test]
async fn a_registration_that_cannot_succeed_ends_with_the_reason() {
    let fleet = Fleet::new();
    let router = fleet.plain_router().await;
    let client = fleet.client(Role::Edge, "cloud-a", &[&router]);
    let ended = Registration::new(client, card("cloud-a", 1)).run(idle, CancellationToken::new()).await;
    assert!(matches!(ended, Err(ClientError::Denied(_))), "{ended:?}");
    router.stop().await;
}

#[tokio::test]
async fn one_of_several_routers_is_enough_and_the_last_ticket_outlives_all() {
    let fleet = Fleet::new();
    let gone = fleet.plain_router().await;
    let gone_endpoint = gone.endpoint();
    gone.stop().await;
    let router = fleet.plain_router().await;
    let cloud = fleet.client(Role::Cloud, "cloud-a", &[&router]);
    cloud.register(&card("cloud-a", 1), &idle()).await.unwrap();

    let endpoints = [gone_endpoint, router.endpoint()];
    let edge = RouterClient::connect(&endpoints, &fleet.tls(Role::Edge, "phone")).unwrap();
    let tickets = TicketSource::new(edge, TicketCache::default());
    let place = place_for("tandem-cloud");
    let first = tickets.ticket(&place, 1_000).await.unwrap();
    assert!(!first.stale);
    router.stop().await;

    let fresh = tickets.ticket(&place, 2_000).await.unwrap();
    assert_eq!((fresh.ticket.clone(), fresh.stale), (first.ticket.clone(), false), "no router was asked");
    let late = 1_000 + first.ticket.expires_in_ms;
    let stale = tickets.ticket(&place, late).await.unwrap();
    assert_eq!((stale.ticket, stale.stale), (first.ticket.clone(), true));
    let elsewhere = PlaceCommand { avoid: vec!["cloud-a".into()], ..place };
    let last = tickets.ticket(&elsewhere, late).await.unwrap();
    assert_eq!(last.ticket, first.ticket, "the node may be back, and no router can name another");
    let unknown = PlaceCommand { model: "another".into(), ..elsewhere };
    let error = tickets.ticket(&unknown, late).await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }) && error.is_temporary(), "{error:?}");
}

/// As after a month: the certificates that router and client started with have ended.
#[tokio::test]
async fn certificates_are_replaced_while_router_and_clients_run() {
    let fleet = Fleet::new();
    let brief = |role, name| {
        let id = PeerIdentity::new("default", role, name).unwrap();
        let identity = fleet.ca.issue_for(&id, Duration::from_secs(2)).unwrap();
        TlsPem { certificate: identity.cert_pem().into(), key: identity.key_pem().into(), ca: fleet.ca.ca_pem().into() }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let shutdown = CancellationToken::new();
    let tls = brief(Role::Router, "router");
    let config = ServerConfig { tls, state_dir: None, placement: PlacementConfig::default() };
    let router = Running { serving: serve(listener, config, shutdown.clone()).await.unwrap(), shutdown };
    let cloud = RouterClient::connect(&[router.endpoint()], &brief(Role::Cloud, "cloud-a")).unwrap();
    cloud.register(&card("cloud-a", 1), &idle()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let edge = fleet.client(Role::Edge, "phone", &[&router]);
    let error = edge.status().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "an expired router was trusted: {error:?}");

    let renewal = router.serving.renewal();
    let broken = TlsPem { key: "no key".into(), ..fleet.tls(Role::Router, "router") };
    assert!(renewal.set_tls(broken).is_err());
    renewal.set_tls(fleet.tls(Role::Router, "router")).unwrap();
    assert_eq!(edge.status().await.unwrap().nodes.len(), 1, "its state is the same");
    assert!(cloud.set_tls(&TlsPem { certificate: "none".into(), ..fleet.tls(Role::Cloud, "cloud-a") }).is_err());
    cloud.set_tls(&fleet.tls(Role::Cloud, "cloud-a")).unwrap();
    assert!(cloud.heartbeat("cloud-a", 1, &idle()).await.unwrap().known);
    router.stop().await;
}

/// Two processes under one name: the one that started earlier waits, and says why.
#[tokio::test]
async fn a_node_whose_name_is_taken_waits_for_it() {
    let fleet = Fleet::new();
    let router = fleet.router(None, PlacementConfig { stale_ms: 300, ..PlacementConfig::default() }).await.unwrap();
    let client = fleet.client(Role::Cloud, "cloud-a", &[&router]);
    client.register(&card("cloud-a", 7), &idle()).await.unwrap();
    // Its clock was set back before it started again.
    let registration = Registration::new(client, card("cloud-a", 6)).every(Duration::from_millis(20));
    let mut state = registration.state();
    let end = CancellationToken::new();
    let task = tokio::spawn(registration.run(idle, end.clone()));
    let away = state.wait_for(|state| matches!(state, RegistrationState::Away { .. })).await.unwrap().clone();
    let RegistrationState::Away { why } = away else { unreachable!() };
    assert!(why.contains("cloud-a") && why.contains("--name"), "{why}");
    state.wait_for(|state| matches!(state, RegistrationState::Registered { .. })).await.unwrap();
    end.cancel();
    task.await.unwrap().unwrap();
    router.stop().await;
}

#[tokio::test]
async fn oversize_messages_and_lists_of_routers_are_refused() {
    let fleet = Fleet::new();
    let router = fleet.plain_router().await;
    let edge = fleet.client(Role::Edge, "phone", &[&router]);
    let huge = PlaceCommand { region: "x".repeat(2 * 1024 * 1024), ..place_for("tandem-cloud") };
    let error = edge.place(&huge).await.unwrap_err();
    assert!(matches!(&error, ClientError::Malformed(why) if why.contains("too large")), "{error:?}");
    assert!(edge.status().await.is_ok(), "the connection goes on");

    let tls = fleet.tls(Role::Edge, "phone");
    for (endpoints, words) in [
        (vec![], "list of 0"),
        (vec!["127.0.0.1:1".to_owned(); 17], "list of 17"),
        (vec!["nowhere".to_owned()], "lacks a host or a port"),
    ] {
        let error = RouterClient::connect(&endpoints, &tls).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} lacks {words:?}");
    }
    let broken = TlsPem { key: "no key".into(), ..tls };
    assert!(matches!(RouterClient::connect(&[router.endpoint()], &broken), Err(ClientError::Tls(_))));
    router.stop().await;
}

#[tokio::test]
async fn a_server_name_other_than_the_host_is_checked() {
    let fleet = Fleet::new();
    let router = fleet.plain_router().await;
    let tls = fleet.tls(Role::Edge, "phone");
    let by_name = |name: &str| RouterClient::connect(&[format!("{name}@{}", router.endpoint())], &tls).unwrap();
    assert!(by_name("router.tandem").status().await.is_ok());
    let error = by_name("impostor.tandem").status().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    router.stop().await;
}

#[tokio::test]
async fn a_router_that_cannot_start_says_why() {
    let fleet = Fleet::new();
    std::fs::create_dir_all(fleet.state()).unwrap();
    std::fs::write(fleet.state().join("control.snapshot"), "rubbish\n").unwrap();
    let error = fleet.router(Some(&fleet.state()), PlacementConfig::default()).await.err().unwrap().to_string();
    assert!(error.contains("damaged") && error.contains("control.snapshot"), "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tls = TlsPem { key: "no key".into(), ..fleet.tls(Role::Router, "router") };
    let config = ServerConfig { tls, state_dir: None, placement: PlacementConfig::default() };
    let error = serve(listener, config, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(error.contains("check the certificate"), "{error}");
}
