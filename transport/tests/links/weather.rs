//! Links through the fault proxy: bad paths, changes of address, restarts, the switch.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tandem_transport::{
    Backoff, CloseCode, DialState, Faults, Link, Redial, Server, Settings, Target, TransportError, UdpProxy,
};

use crate::setup::{Bed, block, hello, loopback, pattern, token, within};

struct Through {
    edge: Arc<Link>,
    cloud: Arc<Link>,
    proxy: UdpProxy,
    connector: tandem_transport::Connector,
    _server: Server,
}

async fn through(faults: Faults, seed: u64) -> Through {
    println!("seed {seed}");
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let connector = bed.connector(Settings::dev());
    let proxy = UdpProxy::start(loopback(), server.local_addr().unwrap(), faults, seed).unwrap();
    let edge = within(connector.connect(proxy.local_addr(), "big.tandem")).await.unwrap();
    let cloud = within(server.accept()).await.unwrap();
    Through { edge: edge.into(), cloud: cloud.into(), proxy, connector, _server: server }
}

/// `frames` frames there and back, in order, with a payload now and then.
async fn echo(edge: &Link, cloud: &Link, frames: u32) {
    let mut here = within(edge.open_session()).await.unwrap();
    here.tx.send(&token(0), Bytes::new()).await.unwrap();
    let mut there = within(cloud.accept_session()).await.unwrap();
    within(there.rx.next()).await.unwrap().unwrap();
    for i in 1..=frames {
        let payload = if i % 5 == 0 { pattern(4_000, i.into()) } else { Bytes::new() };
        here.tx.send(&block(i, &payload), payload.clone()).await.unwrap();
        let frame = within(there.rx.next()).await.unwrap().unwrap();
        assert_eq!(frame.message, block(i, &payload));
        assert!(frame.payload == payload);
        there.tx.send(&frame.message, frame.payload).await.unwrap();
        assert!(within(here.rx.next()).await.unwrap().unwrap().payload == payload);
    }
}

#[tokio::test]
async fn the_round_trip_time_is_the_proxys() {
    let bed = through(Faults::rtt(Duration::from_millis(50)), 1).await;
    let start = Instant::now();
    echo(&bed.edge, &bed.cloud, 4).await;
    // Nothing can be faster than the path; how much slower is the machine's business.
    assert!(start.elapsed() >= Duration::from_millis(4 * 50));
    let stats = bed.edge.stats();
    assert!(stats.min_rtt_us >= 50_000, "{stats:?}");
}

fn storm() -> Faults {
    Faults {
        delay: Duration::from_millis(2),
        jitter: Duration::from_millis(2),
        loss: 0.1,
        reorder: 0.1,
        duplicate: 0.1,
        ..Faults::default()
    }
}

#[tokio::test]
async fn frames_survive_loss_reordering_and_duplication() {
    // The link is made in fair weather: one dial in forty does not survive this storm.
    let bed = through(Faults::default(), fastrand::u64(..)).await;
    bed.proxy.handle().set(storm());
    echo(&bed.edge, &bed.cloud, 40).await;
    let stats = bed.proxy.handle().stats();
    assert!(stats.lost > 0 && stats.reordered > 0 && stats.duplicated > 0, "{stats:?}");
}

/// QUIC waits a second before it repeats a lost first packet (RFC 9002 section 6.2.2), so a dial may
/// well fail; the next one is made without a call.
#[tokio::test]
async fn a_link_is_made_through_loss_reordering_and_duplication() {
    let (bed, seed) = (Bed::new(), fastrand::u64(..));
    println!("seed {seed}");
    let server = bed.server(Settings::dev());
    let proxy = UdpProxy::start(loopback(), server.local_addr().unwrap(), storm(), seed).unwrap();
    let redial = redial(&bed, &Arc::new(Mutex::new(proxy.local_addr())));
    redial.demand(Duration::from_secs(120)).await.expect("a link");
}

/// Blocks go one after the other, and a token overtakes a block that has been started.
#[tokio::test]
async fn a_token_overtakes_blocks_under_way() {
    let faults = Faults { bytes_per_s: Some(1_000_000), ..Faults::rtt(Duration::from_millis(10)) };
    let bed = through(faults, 6).await;
    let mut here = bed.edge.open_session().await.unwrap();
    here.tx.send(&token(0), Bytes::new()).await.unwrap();
    let mut there = within(bed.cloud.accept_session()).await.unwrap();
    within(there.rx.next()).await.unwrap().unwrap();
    for i in 0..2 {
        let payload = pattern(1 << 20, i.into());
        within(bed.edge.send_bulk(&block(i, &payload), payload)).await.unwrap();
    }
    // The first block is on its way: some of it has arrived.
    let before = bed.cloud.stats().bytes_received;
    while bed.cloud.stats().bytes_received < before + 50_000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    here.tx.send(&token(1), Bytes::new()).await.unwrap();
    let mut arrived = vec![];
    while arrived.len() < 3 {
        tokio::select! {
            frame = there.rx.next() => {
                assert_eq!(frame.unwrap().unwrap().message, token(1));
                arrived.push("token");
            }
            frame = bed.cloud.accept_bulk() => {
                let payload = frame.unwrap().payload;
                arrived.push(if payload == pattern(1 << 20, 0) { "first" } else { "second" });
            }
        }
    }
    assert_eq!(arrived, ["token", "first", "second"]);
}

#[tokio::test]
async fn a_blackout_shorter_than_the_idle_timeout_is_survived() {
    let bed = through(Faults::rtt(Duration::from_millis(10)), 2).await;
    let handle = bed.proxy.handle();
    handle.update(|faults| faults.on = false);
    let mut session = bed.edge.open_session().await.unwrap();
    session.tx.send(&token(1), Bytes::new()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(handle.stats().lost > 0);
    handle.update(|faults| faults.on = true);
    let mut there = within(bed.cloud.accept_session()).await.unwrap();
    assert_eq!(within(there.rx.next()).await.unwrap().unwrap().message, token(1));
}

#[tokio::test]
async fn a_dead_peer_is_noticed_by_both_sides() {
    let bed = through(Faults::default(), 3).await;
    bed.proxy.handle().update(|faults| faults.on = false);
    let (edge, cloud) = tokio::join!(within(bed.edge.closed()), within(bed.cloud.closed()));
    assert!(matches!(edge, TransportError::Lost { .. }), "{edge}");
    assert!(matches!(cloud, TransportError::Lost { .. }), "{cloud}");
}

#[tokio::test]
async fn a_change_of_address_keeps_the_session() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let connector = bed.connector(Settings::dev());
    let addr = server.local_addr().unwrap();
    let edge = within(connector.connect(addr, "big.tandem")).await.unwrap();
    let cloud = within(server.accept()).await.unwrap();
    let mut here = edge.open_session().await.unwrap();
    here.tx.send(&token(0), Bytes::new()).await.unwrap();
    let mut there = within(cloud.accept_session()).await.unwrap();
    within(there.rx.next()).await.unwrap().unwrap();
    let before = cloud.remote_address();
    for i in 1..10 {
        connector.rebind().unwrap();
        here.tx.send(&token(i), Bytes::new()).await.unwrap();
        assert_eq!(within(there.rx.next()).await.unwrap().unwrap().message, token(i));
        there.tx.send(&token(i), Bytes::new()).await.unwrap();
        assert_eq!(within(here.rx.next()).await.unwrap().unwrap().message, token(i));
    }
    assert_ne!(before.port(), cloud.remote_address().port(), "the path never changed");
}

#[tokio::test]
async fn the_path_may_change_behind_a_nat() {
    let bed = through(Faults::default(), 4).await;
    bed.connector.rebind().unwrap();
    echo(&bed.edge, &bed.cloud, 3).await;
}

#[tokio::test]
async fn the_proxy_can_be_pointed_at_another_node() {
    let bed = Bed::new();
    let (first, second) = (bed.server(Settings::dev()), bed.server(Settings::dev()));
    let target = first.local_addr().unwrap();
    let proxy = UdpProxy::start(loopback(), target, Faults::default(), 5).unwrap();
    let connector = bed.connector(Settings::dev());
    let _one = within(connector.connect(proxy.local_addr(), "big.tandem")).await.unwrap();
    within(first.accept()).await.unwrap();
    proxy.handle().set_target(second.local_addr().unwrap());
    let _two = within(connector.connect(proxy.local_addr(), "big.tandem")).await.unwrap();
    within(second.accept()).await.unwrap();
}

fn redial(bed: &Bed, target: &Arc<Mutex<SocketAddr>>) -> Redial {
    let (connector, target) = (Arc::new(bed.connector(Settings::dev())), Arc::clone(target));
    Redial::start(connector, Backoff::default(), move |_| {
        let addr = *target.lock().unwrap();
        async move { Ok(Target::at(addr, "big.tandem")) }
    })
}

async fn up(redial: &Redial) -> Arc<Link> {
    within(redial.demand(Duration::from_secs(15))).await.expect("a link")
}

#[tokio::test]
async fn a_link_comes_back_after_the_server_restarts() {
    let bed = Bed::new();
    let first = bed.server(Settings::dev());
    let addr = first.local_addr().unwrap();
    let redial = redial(&bed, &Arc::new(Mutex::new(addr)));
    let link = up(&redial).await;
    let cloud = within(first.accept()).await.unwrap();
    echo(&link, &cloud, 2).await;

    first.close(CloseCode::ShuttingDown, "restart").await;
    let end = within(link.closed()).await;
    assert!(matches!(end, TransportError::Closed { code: CloseCode::ShuttingDown, .. }), "{end}");
    drop((link, cloud, first));
    let mut watch = redial.link();
    within(watch.wait_for(Option::is_none)).await.unwrap();
    let waiting = |state: &DialState| matches!(state, DialState::Waiting { failures: 2.., .. });
    within(redial.state().wait_for(waiting)).await.unwrap();

    // On the same port, as a restarted process.
    let again = within(async {
        loop {
            match Server::bind(addr, &bed.cloud, Settings::dev(), hello("big")) {
                Ok(server) => return server,
                // Dropping the old socket is the runtime's business.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await;
    let link = up(&redial).await;
    let cloud = within(again.accept()).await.unwrap();
    echo(&link, &cloud, 2).await;
}

#[tokio::test]
async fn the_resolver_is_asked_again_so_a_node_may_move() {
    let bed = Bed::new();
    let first = bed.server(Settings::dev());
    let target = Arc::new(Mutex::new(first.local_addr().unwrap()));
    let redial = redial(&bed, &target);
    up(&redial).await;
    let second = bed.server(Settings::dev());
    *target.lock().unwrap() = second.local_addr().unwrap();
    drop(first);
    within(second.accept()).await.unwrap();
}

#[tokio::test]
async fn the_switch_severs_and_refuses_until_it_is_closed_again() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let redial = redial(&bed, &Arc::new(Mutex::new(server.local_addr().unwrap())));
    let link = up(&redial).await;
    let cloud = within(server.accept()).await.unwrap();

    redial.cut(true);
    within(link.closed()).await;
    let end = within(cloud.closed()).await;
    assert!(matches!(end, TransportError::Closed { code: CloseCode::Cut, .. }), "{end}");
    within(redial.state().wait_for(|state| matches!(state, DialState::Cut))).await.unwrap();
    assert!(redial.is_cut() && redial.current().is_none());
    assert!(redial.demand(Duration::from_secs(60)).await.is_none(), "must refuse at once");
    redial.wake();
    let dialed = tokio::time::timeout(Duration::from_millis(300), server.accept()).await;
    assert!(dialed.is_err(), "dialed although cut");

    redial.cut(false);
    up(&redial).await;
    within(server.accept()).await.unwrap();
}

/// The supervisor may see the last of two turns only.
#[tokio::test]
async fn the_switch_severs_even_if_it_is_closed_again_at_once() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let redial = redial(&bed, &Arc::new(Mutex::new(server.local_addr().unwrap())));
    let mut link = up(&redial).await;
    for _ in 0..3 {
        let cloud = within(server.accept()).await.unwrap();
        redial.cut(true);
        assert!(link.is_closed(), "a request could still go out");
        redial.cut(false);
        let end = within(cloud.closed()).await;
        assert!(matches!(end, TransportError::Closed { code: CloseCode::Cut, .. }), "{end}");
        let next = up(&redial).await;
        assert!(!Arc::ptr_eq(&link, &next) && !redial.is_cut());
        link = next;
    }
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_dialed_with_growing_waits() {
    let bed = Bed::new();
    // A port that no process listens on.
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let target = Arc::new(Mutex::new(nobody.local_addr().unwrap()));
    let (connector, addr) = (Arc::new(bed.connector(Settings::dev())), Arc::clone(&target));
    let backoff = Backoff { first_attempt: Duration::from_millis(100), ..Backoff::default() };
    let redial = Redial::start(connector, backoff, move |_| {
        let addr = *addr.lock().unwrap();
        async move { Ok(Target::at(addr, "big.tandem")) }
    });
    let mut state = redial.state();
    let third = |state: &DialState| matches!(state, DialState::Waiting { failures: 3, .. });
    let state = within(state.wait_for(third)).await.unwrap().clone();
    assert!(matches!(state, DialState::Waiting { error: TransportError::Timeout { .. }, .. }));
    assert!(redial.current().is_none());
    // It comes up elsewhere; a demand does not wait for the timer.
    let server = bed.server(Settings::dev());
    *target.lock().unwrap() = server.local_addr().unwrap();
    up(&redial).await;
}
