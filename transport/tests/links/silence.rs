//! Peers that die, fall silent or restart without a close frame, while a request waits for them.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tandem_transport::{
    Backoff, CloseCode, Connector, Faults, Link, Redial, Server, Settings, Target, TransportError, UdpProxy,
};

use crate::setup::{Bed, dial, hello, loopback, token, within};

/// The idle timeout and the keep-alive find nothing within a test.
fn sleepy() -> Settings {
    let idle = Duration::from_secs(120);
    Settings { idle, keep_alive: Duration::from_secs(60), ..Settings::edge() }
}

struct Through {
    edge: Link,
    cloud: Link,
    proxy: UdpProxy,
    _parts: (Connector, Server),
}

async fn through(faults: Faults) -> Through {
    let bed = Bed::new();
    let server = bed.server(sleepy());
    let connector = bed.connector(sleepy());
    let proxy = UdpProxy::start(loopback(), server.local_addr().unwrap(), faults, 7).unwrap();
    let edge = within(connector.connect(proxy.local_addr(), "big.tandem")).await.unwrap();
    let cloud = within(server.accept()).await.unwrap();
    Through { edge, cloud, proxy, _parts: (connector, server) }
}

fn is_silent(end: &TransportError) -> bool {
    matches!(end, TransportError::Closed { code: CloseCode::Silent, .. })
}

#[tokio::test]
async fn a_silent_peer_is_found_while_somebody_waits() {
    for rtt in [Duration::ZERO, Duration::from_millis(80)] {
        let bed = through(Faults::rtt(rtt)).await;
        // Three callers wait, and one of them gives up.
        let (_first, second, _third) = (bed.edge.probe(), bed.edge.probe(), bed.edge.probe());
        bed.proxy.handle().update(|faults| faults.on = false);
        drop(second);
        let end = within(bed.edge.closed()).await;
        assert!(is_silent(&end), "{end}");
    }
}

#[tokio::test]
async fn nothing_is_sent_while_nobody_waits_and_a_live_peer_is_kept() {
    let bed = through(Faults::default()).await;
    // What the handshake has left over goes first.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = bed.edge.stats().sent_packets;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let quiet = bed.edge.stats().sent_packets - before;
    assert!(quiet <= 1, "{quiet} packets with nobody waiting");
    {
        let _waiting = bed.edge.probe();
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert!(!bed.edge.is_closed(), "a live peer was given up");
        assert!(bed.edge.stats().sent_packets > before + quiet + 2, "a silent peer was not probed");
    }
    // The guard is gone: silence is not watched any more.
    bed.proxy.handle().update(|faults| faults.on = false);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(!bed.edge.is_closed());
}

#[tokio::test]
async fn a_lossy_link_is_no_dead_one() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let bed = through(Faults::rtt(Duration::from_millis(40))).await;
    let _waiting = bed.edge.probe();
    bed.proxy.handle().update(|faults| faults.loss = 0.2);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(!bed.edge.is_closed(), "{:?}", within(bed.edge.closed()).await);
}

/// Only the peer has something to say, and it says it to the old port: without a probe it stays unheard.
#[tokio::test]
async fn a_nat_that_forgets_its_port_loses_nothing_while_somebody_waits() {
    let bed = through(Faults::rtt(Duration::from_millis(10))).await;
    let mut here = bed.edge.open_session().await.unwrap();
    here.tx.send(&token(0), Bytes::new()).await.unwrap();
    let mut there = within(bed.cloud.accept_session()).await.unwrap();
    within(there.rx.next()).await.unwrap().unwrap();
    for i in 1..4 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        bed.proxy.handle().rebind();
        let _waiting = bed.edge.probe();
        there.tx.send(&token(i), Bytes::new()).await.unwrap();
        let frame = within(here.rx.next()).await.expect("the link was lost");
        assert_eq!(frame.unwrap().message, token(i));
    }
}

/// A process that dies leaves a closed port, which its system reports at once.
#[tokio::test]
async fn a_closed_port_ends_a_dial_and_a_link() {
    let bed = Bed::new();
    let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = within(bed.connector(sleepy()).connect(gone, "big.tandem")).await.unwrap_err();
    assert!(matches!(error, TransportError::NobodyListens { addr } if addr == gone), "{error}");

    // A link through a proxy that is no more.
    let Through { edge, proxy, cloud: _cloud, _parts } = through(Faults::default()).await;
    let _waiting = edge.probe();
    drop(proxy);
    let end = within(edge.closed()).await;
    assert!(is_silent(&end) && end.to_string().contains("nobody listens"), "{end}");
}

/// The process is killed and starts again: its socket is closed without a word, the next one knows nothing of
/// the link.
#[tokio::test]
async fn a_restarted_node_ends_the_links_of_its_last_life() {
    let bed = Bed::new();
    let first = bed.server(sleepy());
    let mut connector = bed.connector(sleepy());
    // The clients' port stays, the packets go elsewhere: to a node that has the same CA and name.
    let proxy = UdpProxy::start(loopback(), first.local_addr().unwrap(), Faults::default(), 9).unwrap();
    for restart in 0..2 {
        let edge = within(connector.connect(proxy.local_addr(), "big.tandem")).await.unwrap();
        // As a new process: a new certificate, a new key.
        let identity = bed.ca.issue(bed.cloud.id().role, &bed.cloud.id().name).unwrap();
        let again = Server::bind(loopback(), &identity, sleepy(), hello("big")).unwrap();
        proxy.handle().set_target(again.local_addr().unwrap());
        let mut session = edge.open_session().await.unwrap();
        session.tx.send(&token(0), Bytes::new()).await.unwrap();
        let end = within(edge.closed()).await;
        assert!(matches!(&end, TransportError::Lost { reason } if reason.contains("reset")), "{restart}: {end}");
        proxy.handle().set_target(first.local_addr().unwrap());
        connector = bed.connector(sleepy());
    }
}

/// Names and addresses of the nodes that a resolver may give.
type Nodes = Arc<Mutex<Vec<(String, Vec<SocketAddr>)>>>;

/// A resolver over a list of nodes that does as it is told: the first that is not to be avoided, else the one
/// that failed longest ago.
fn redial(bed: &Bed, nodes: &Nodes) -> Redial {
    let nodes = Arc::clone(nodes);
    Redial::start(Arc::new(bed.connector(sleepy())), Backoff::default(), move |avoid| {
        let nodes = nodes.lock().unwrap();
        let best = nodes.iter().find(|(name, _)| !avoid.contains(name));
        let best = best.or_else(|| avoid.iter().rev().find_map(|old| nodes.iter().find(|(name, _)| name == old)));
        let (node, addrs) = best.unwrap_or(&nodes[0]).clone();
        async move { Ok(Target { node, addrs, server_name: "big.tandem".into() }) }
    })
}

fn two(first: &Server, second: &Server) -> Nodes {
    let node = |name: &str, server: &Server| (name.to_owned(), vec![server.local_addr().unwrap()]);
    Arc::new(Mutex::new(vec![node("a", first), node("b", second)]))
}

/// Whatever ends the link to the first node, the second one has the next link.
#[tokio::test]
async fn a_node_that_leaves_or_is_suspected_is_left_for_another_at_once() {
    for how in ["drained", "suspected", "dead"] {
        let bed = Bed::new();
        let (first, second) = (bed.server(sleepy()), bed.server(sleepy()));
        let redial = redial(&bed, &two(&first, &second));
        let link = within(redial.demand(Duration::from_secs(60))).await.expect("a link");
        let _cloud = within(first.accept()).await.unwrap();
        assert!(!redial.is_suspect());
        let mut links = redial.link();
        match how {
            "drained" => first.close(CloseCode::ShuttingDown, "drained").await,
            "suspected" => redial.suspect(&link, "its engine hangs"),
            _ => {
                // Its port is taken away: no process answers there any more.
                drop(_cloud);
                drop(first);
            }
        }
        within(second.accept()).await.expect(how);
        within(links.wait_for(|next| next.as_ref().is_some_and(|next| !Arc::ptr_eq(next, &link)))).await.unwrap();
        assert!(!redial.is_suspect(), "{how}: the second node has done nothing");
        // What is said about a link that is no more says nothing about the next one.
        redial.suspect(&link, "late");
        assert!(redial.current().is_some() && !redial.is_suspect(), "{how}");
    }
}

/// A node that is the only one is dialed again, and known as one that did not work.
#[tokio::test]
async fn the_only_node_is_tried_again() {
    let bed = Bed::new();
    let server = bed.server(sleepy());
    let nodes = Arc::new(Mutex::new(vec![("a".to_owned(), vec![server.local_addr().unwrap()])]));
    let redial = redial(&bed, &nodes);
    let link = within(redial.demand(Duration::from_secs(60))).await.expect("a link");
    redial.suspect(&link, "its engine hangs");
    let mut links = redial.link();
    within(links.wait_for(|next| next.as_ref().is_some_and(|next| !next.is_closed()))).await.unwrap();
    assert!(redial.is_suspect());
}

/// Of several addresses of a name any will do, and one at which a link has died is tried last.
#[tokio::test]
async fn every_address_of_a_name_is_dialed() {
    let bed = Bed::new();
    let server = bed.server(sleepy());
    let live = server.local_addr().unwrap();
    let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // It takes packets and says nothing.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let nowhere = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], closed.port()));
    for addrs in [vec![closed, live], vec![nowhere, live], vec![silent.local_addr().unwrap(), nowhere, live]] {
        let connector = Arc::new(bed.connector(sleepy()));
        let link = within(connector.connect_any(&addrs, "big.tandem")).await.expect("a link");
        assert_eq!(link.remote_address(), live, "{addrs:?}");
        within(server.accept()).await.unwrap();
    }
    let connector = Arc::new(bed.connector(sleepy()));
    let error = within(connector.connect_any(&[live, closed], "small.tandem")).await.unwrap_err();
    assert!(matches!(error, TransportError::Unauthorised { .. }), "the node that was reached knows best: {error}");
    let error = within(connector.connect_any(&[], "big.tandem")).await.unwrap_err();
    assert!(error.to_string().contains("no address"), "{error}");

    // A link through an address that dies; the name has two.
    let proxy = UdpProxy::start(loopback(), live, Faults::default(), 3).unwrap();
    let nodes = Arc::new(Mutex::new(vec![("a".to_owned(), vec![proxy.local_addr()])]));
    let redial = redial(&bed, &nodes);
    let link = within(redial.demand(Duration::from_secs(60))).await.expect("a link");
    nodes.lock().unwrap()[0].1.push(live);
    let _waiting = link.probe();
    proxy.handle().update(|faults| faults.on = false);
    let mut links = redial.link();
    let began = Instant::now();
    let next = within(links.wait_for(|next| next.as_ref().is_some_and(|next| !Arc::ptr_eq(next, &link)))).await;
    assert_eq!(next.unwrap().as_ref().unwrap().remote_address(), live, "after {:?}", began.elapsed());
}

#[tokio::test]
async fn a_guard_outlives_its_link() {
    let bed = Bed::new();
    let (server, connector) = (bed.server(sleepy()), bed.connector(sleepy()));
    let (edge, cloud) = dial(&server, &connector).await.unwrap();
    let waiting = edge.probe();
    cloud.close(CloseCode::Done, "enough");
    within(edge.closed()).await;
    drop(edge);
    drop(waiting);
}
