//! Whether the peer of a link still answers while a task waits for it.
//!
//! QUIC finds a dead peer by its idle timeout, which is long so that radios may sleep. A task that waits for an
//! answer holds a [`ProbeGuard`]; while any is held the link sends small datagrams whenever the peer has
//! acknowledged nothing for a moment, and is closed with [`CloseCode::Silent`] when that goes on for three
//! round trips and [`PATIENCE`]. A port that the peer's system reports as closed ends it sooner. Without
//! waiting callers nothing is sent. A datagram also shows the peer a new address of ours (NAT rebinding), so
//! that QUIC migrates the path instead of losing it.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use quinn::Connection;
use tokio::{
    net::UdpSocket,
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::{close::CloseCode, link::Ended};

/// How often a link is checked while a task waits on it.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// Silence beyond three round trips after which the peer counts as dead. With a tick before the silence
/// shows and one after, a dead peer is found within three round trips and a second.
pub const PATIENCE: Duration = Duration::from_millis(800);
/// Silence beyond two round trips after which the peer's system is probed for a listener.
const DOUBT: Duration = Duration::from_millis(100);
/// What a probe carries: enough that a restarted peer may answer it with a stateless reset (RFC 9000,
/// section 10.3: a reset is smaller than what it answers).
const PROBE: [u8; 16] = *b"is anybody there";
/// Pause between two packets to a port that may be closed.
const PORT_CHECK_EVERY: Duration = Duration::from_millis(200);

/// What to do about a peer at one look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It acknowledged something lately.
    Answers,
    /// Silent, and a probe is on its way.
    Wait,
    /// Silent: send a probe.
    Probe,
    /// Silent for too long.
    Dead,
}

/// Counts the silence of a peer. Pure: the time is passed in.
#[derive(Debug)]
pub(crate) struct Silence {
    seen_at: Instant,
    acks: u64,
    silent: Duration,
    probed: Option<Instant>,
}

impl Silence {
    /// Starts at `now` with `acks` acknowledgements received so far.
    pub(crate) fn new(now: Instant, acks: u64) -> Self {
        Self { seen_at: now, acks, silent: Duration::ZERO, probed: None }
    }

    /// Looks at the link: `acks` acknowledgements received so far, round-trip time `rtt`.
    pub(crate) fn look(&mut self, now: Instant, acks: u64, rtt: Duration) -> Verdict {
        // A late look (this process was stopped, the machine slept) says nothing about the peer.
        let since = now.duration_since(self.seen_at).min(2 * TICK);
        self.seen_at = now;
        if acks != self.acks {
            (self.acks, self.silent, self.probed) = (acks, Duration::ZERO, None);
            return Verdict::Answers;
        }
        self.silent += since;
        if self.silent >= 3 * rtt + PATIENCE {
            return Verdict::Dead;
        }
        // Not more often than answers can come: a slow link has no room for more.
        if self.probed.is_some_and(|at| now.duration_since(at) < TICK.max(rtt / 2)) {
            return Verdict::Wait;
        }
        self.probed = Some(now);
        Verdict::Probe
    }

    /// Whether an answer is overdue.
    pub(crate) fn is_overdue(&self, rtt: Duration) -> bool {
        self.silent >= 2 * rtt + DOUBT
    }
}

/// Held by a caller that waits for the peer: meanwhile the link is probed. All guards of a link share the
/// probes. Drop it when the answer has come.
#[derive(Debug)]
#[must_use = "the link is probed while the guard lives"]
pub struct ProbeGuard(Arc<watch::Sender<usize>>);

impl ProbeGuard {
    pub(crate) fn new(waiting: &Arc<watch::Sender<usize>>) -> Self {
        waiting.send_modify(|waiting| *waiting += 1);
        Self(Arc::clone(waiting))
    }
}

impl Drop for ProbeGuard {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

/// Probes `conn` while `waiting` is above zero, and closes it when the peer is dead. Ends only with that.
pub(crate) async fn watch_over(conn: &Connection, mut waiting: watch::Receiver<usize>, ended: &Ended) {
    let acks = || conn.stats().frame_rx.acks;
    loop {
        if waiting.wait_for(|waiting| *waiting > 0).await.is_err() {
            return std::future::pending().await;
        }
        let mut silence = Silence::new(Instant::now(), acks());
        let mut port = None;
        sleep(TICK).await;
        while *waiting.borrow() > 0 {
            let rtt = conn.rtt();
            match silence.look(Instant::now(), acks(), rtt) {
                Verdict::Answers => port = None,
                Verdict::Wait => {}
                // A full queue holds other packets that the peer acknowledges as well.
                Verdict::Probe => drop(conn.send_datagram(Bytes::from_static(&PROBE))),
                Verdict::Dead => {
                    return ended.close(conn, CloseCode::Silent, "the peer does not answer while it is waited for");
                }
            }
            if !silence.is_overdue(rtt) {
                sleep(TICK).await;
                continue;
            }
            if port.is_none() {
                port = PortCheck::new(conn.remote_address()).await;
            }
            let Some(port) = &port else {
                sleep(TICK).await;
                continue;
            };
            if timeout(TICK, port.refused()).await.is_ok() {
                return ended.close(conn, CloseCode::Silent, "nobody listens at the peer's address any more");
            }
        }
    }
}

/// Probes whether a process listens at an address: a closed UDP port is reported (ICMP port
/// unreachable) to a connected socket only, which QUIC's is not. Where the report does not come, nothing is
/// known.
#[derive(Debug)]
pub(crate) struct PortCheck(UdpSocket);

impl PortCheck {
    pub(crate) async fn new(addr: SocketAddr) -> Option<Self> {
        let any: SocketAddr =
            if addr.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
        let socket = UdpSocket::bind(any).await.ok()?;
        socket.connect(addr).await.ok()?;
        Some(Self(socket))
    }

    /// Returns once the port is known to be closed. Cancel-safe.
    pub(crate) async fn refused(&self) {
        let is_refusal = |e: std::io::Error| e.kind() == std::io::ErrorKind::ConnectionRefused;
        let mut answer = [0; 64];
        loop {
            // A byte that is no QUIC packet: a QUIC endpoint drops it.
            if self.0.send(&[0]).await.is_err_and(is_refusal) {
                return;
            }
            let heard = timeout(PORT_CHECK_EVERY, self.0.recv(&mut answer)).await;
            if heard.is_ok_and(|heard| heard.is_err_and(is_refusal)) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every [`TICK`] at a peer that acknowledges as `acks` says (by look); when it was found dead, and
    /// how many probes were sent.
    fn run(rtt: Duration, looks: u32, acks: impl Fn(u32) -> u64) -> (Option<Duration>, usize) {
        let start = Instant::now();
        let mut silence = Silence::new(start, 0);
        let mut probes = 0;
        for look in 1..=looks {
            let now = start + TICK * look;
            match silence.look(now, acks(look), rtt) {
                Verdict::Dead => return (Some(now - start), probes),
                Verdict::Probe => probes += 1,
                Verdict::Answers | Verdict::Wait => {}
            }
        }
        (None, probes)
    }

    #[test]
    fn a_silent_peer_is_dead_after_three_round_trips_and_a_second() {
        for rtt_ms in [0, 1, 50, 200, 600] {
            let rtt = Duration::from_millis(rtt_ms);
            let (dead, probes) = run(rtt, 1_000, |_| 0);
            let dead = dead.expect("dead");
            assert!(dead >= 3 * rtt + PATIENCE, "{rtt_ms} ms: {dead:?}");
            assert!(dead <= 3 * rtt + Duration::from_secs(1), "{rtt_ms} ms: {dead:?}");
            assert!(probes >= 3, "{rtt_ms} ms: one lost probe would be enough: {probes}");
        }
    }

    #[test]
    fn a_peer_that_acknowledges_lives_and_a_busy_one_is_not_probed() {
        let rtt = Duration::from_millis(50);
        assert_eq!(run(rtt, 1_000, u64::from), (None, 0), "something is acknowledged at every look");
        // Every probe is acknowledged before the next look: every second look sends one.
        let (dead, probes) = run(rtt, 1_000, |look| u64::from(look / 2));
        assert_eq!((dead, probes), (None, 500));
        // Nine packets of ten are lost.
        assert_eq!(run(rtt, 1_000, |look| u64::from(look / 9)).0, None);
    }

    #[test]
    fn a_stopped_process_blames_nobody() {
        let start = Instant::now();
        let mut silence = Silence::new(start, 0);
        for hour in 1..4 {
            let verdict = silence.look(start + Duration::from_secs(3_600 * hour), 0, Duration::ZERO);
            assert_eq!(verdict, Verdict::Probe);
        }
        assert!(silence.is_overdue(Duration::ZERO));
    }

    #[tokio::test]
    async fn a_closed_port_is_known_and_an_open_one_is_not_blamed() {
        let open = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let addr = open.local_addr().unwrap();
        let check = PortCheck::new(addr).await.unwrap();
        assert!(timeout(Duration::from_millis(300), check.refused()).await.is_err());
        drop(open);
        timeout(Duration::from_secs(10), check.refused()).await.expect("the port is closed");
    }
}
