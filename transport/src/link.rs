//! One QUIC connection whose two ends know each other: certificates checked, HELLOs exchanged.

mod hello;

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tandem_proto::{
    block::tenant_key,
    frame::{Frame, Message},
    limits::PAYLOAD_BYTES_MAX,
    message::Hello,
};
use tokio::{
    sync::{Mutex, Semaphore, mpsc, watch},
    task::{JoinHandle, JoinSet},
};

use self::hello::{check, exchange};
use crate::{
    channel::{Bounds, Channel, FrameReceiver, FrameSender, handshake_bounds},
    close::CloseCode,
    error::TransportError,
    estimator::expected_bytes_per_s,
    identity::{self, Identity, IdentityError, PeerIdentity, Role},
    meter::{Direction, Meter},
    probe::{self, ProbeGuard},
    settings::{CONTROL_PRIORITY, SESSION_PRIORITY, Settings, bulk_priority},
};

/// Bulk frames that may wait for [`Link::accept_bulk`]; more wait in the sender.
pub const BULK_QUEUE_MAX: usize = 8;
/// How often the round-trip time is sampled.
const RTT_SAMPLE_INTERVAL: Duration = Duration::from_millis(250);

/// Which end of a link this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// What is known about a link's path and load.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u64,
    /// Smallest round-trip time of the last 10 to 20 seconds, microseconds.
    pub min_rtt_us: u64,
    /// Mean deviation of the round-trip time, microseconds.
    pub rtt_deviation_us: u64,
    /// Rate at which large payloads arrived here, bytes per second; `None` before the first.
    pub receive_bytes_per_s: Option<u64>,
    /// Rate at which large payloads left here and were acknowledged; `None` before the first.
    pub send_bytes_per_s: Option<u64>,
    /// Packets sent here that were declared lost.
    pub lost_packets: u64,
    /// Packets sent here.
    pub sent_packets: u64,
    /// UDP payload bytes sent here, everything included.
    pub bytes_sent: u64,
    /// UDP payload bytes received here, everything included.
    pub bytes_received: u64,
    /// Congestion window, bytes.
    pub cwnd: u64,
}

impl LinkStats {
    /// The measured rate of large payloads, receiving first; `None` before the first.
    #[must_use]
    pub fn goodput_bytes_per_s(&self) -> Option<u64> {
        self.receive_bytes_per_s.or(self.send_bytes_per_s)
    }

    /// Bytes per second to expect of state that is sent; never 0.
    #[must_use]
    pub fn expected_send_bytes_per_s(&self) -> f64 {
        expected_bytes_per_s(self.send_bytes_per_s, self.receive_bytes_per_s, self.cwnd, self.rtt_us)
    }

    /// Bytes per second to expect of state that is received; never 0.
    #[must_use]
    pub fn expected_receive_bytes_per_s(&self) -> f64 {
        expected_bytes_per_s(self.receive_bytes_per_s, self.send_bytes_per_s, self.cwnd, self.rtt_us)
    }
}

/// Why this side closed a link: QUIC itself only remembers that it did.
#[derive(Debug, Default)]
pub(crate) struct Ended(OnceLock<(CloseCode, String)>);

impl Ended {
    /// Closes the connection; of several reasons the first counts.
    pub(crate) fn close(&self, conn: &Connection, code: CloseCode, reason: &str) {
        let _ = self.0.set((code, reason.to_owned()));
        conn.close(code.to_wire(), clip(reason));
    }
}

/// Whom an end takes for a peer.
#[derive(Debug)]
pub(crate) struct Peers {
    pub(crate) roles: Vec<Role>,
    /// Public key of the authority that vouches for them.
    pub(crate) authority: Arc<[u8]>,
}

impl Peers {
    pub(crate) fn new(identity: &Identity, roles: &[Role]) -> Self {
        Self { roles: roles.to_vec(), authority: identity.authority() }
    }
}

/// A link to an authenticated peer. Dropping it closes the connection and every channel on it, so
/// share it as `Arc<Link>` among the tasks that use a channel.
pub struct Link {
    conn: Connection,
    peer: PeerIdentity,
    authority: Arc<[u8]>,
    hello: Hello,
    minor: u16,
    bounds: Bounds,
    open_timeout: Duration,
    bulk_slots: Arc<Semaphore>,
    bulk_sent: AtomicU32,
    bulk: Mutex<mpsc::Receiver<Frame>>,
    waiting: Arc<watch::Sender<usize>>,
    ended: Arc<Ended>,
    // Open as long as the link: its end would be the peer's sign that the link is done.
    _control: Channel,
    tender: JoinHandle<()>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Link");
        out.field("peer", &self.peer).field("remote", &self.conn.remote_address());
        out.field("end", &self.conn.close_reason()).finish_non_exhaustive()
    }
}

/// The identity in the peer's certificate, which TLS has verified.
pub(crate) fn peer_identity(conn: &Connection) -> Result<(PeerIdentity, SystemTime), TransportError> {
    let chain = conn.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let Some(leaf) = chain.as_deref().and_then(|chain| chain.first()) else {
        return Err(IdentityError::NoSpiffeId { found: "no certificate".into() }.into());
    };
    Ok((PeerIdentity::of(leaf)?, identity::not_after(leaf)?))
}

impl Link {
    /// Exchanges HELLOs on a fresh connection. `keep` lives as long as the connection.
    pub(crate) async fn establish(
        conn: Connection,
        side: Side,
        ours: &Hello,
        settings: &Settings,
        peers: &Peers,
        keep: impl Send + 'static,
    ) -> Result<Self, TransportError> {
        let result = tokio::time::timeout(
            settings.handshake,
            Self::try_establish(conn.clone(), side, ours, settings, peers, keep),
        );
        let result = result.await.unwrap_or_else(|_| {
            let ms = settings.handshake.as_millis() as u64;
            Err(TransportError::Timeout { what: "the exchange of HELLOs", ms })
        });
        if let Err(error) = &result {
            let code = match error {
                TransportError::Timeout { .. } => CloseCode::TooSlow,
                TransportError::Incompatible { .. } => CloseCode::Incompatible,
                TransportError::Identity(_) | TransportError::WrongPeer { .. } => CloseCode::Unauthorised,
                _ => CloseCode::Malformed,
            };
            conn.close(code.to_wire(), clip(&error.to_string()));
        }
        result
    }

    async fn try_establish(
        conn: Connection,
        side: Side,
        ours: &Hello,
        settings: &Settings,
        peers: &Peers,
        keep: impl Send + 'static,
    ) -> Result<Self, TransportError> {
        let (peer, not_after) = peer_identity(&conn)?;
        if !peers.roles.contains(&peer.role) {
            let expected = peers.roles.iter().map(|r| r.as_str()).collect::<Vec<_>>().join(" or ");
            return Err(TransportError::WrongPeer { found: peer.to_string(), expected });
        }
        let meter = Meter::new();
        let mut bounds = handshake_bounds(settings.frame_progress, &meter);
        let streams = match side {
            Side::Client => conn.open_bi().await?,
            Side::Server => conn.accept_bi().await?,
        };
        let mut control = Channel::new(streams, &bounds);
        control.tx.set_priority(CONTROL_PRIORITY);
        let hello = exchange(&mut control, side, ours).await?;
        let minor = match check(ours, &hello) {
            Ok(minor) => minor,
            Err(error) => {
                hello::let_peer_see(&conn, side).await;
                return Err(error);
            }
        };
        let cap = |bytes: u32| (bytes as usize).min(PAYLOAD_BYTES_MAX);
        bounds.send_payload_max = cap(hello.payload_bytes_max);
        bounds.receive_payload_max = cap(ours.payload_bytes_max);
        let (bulk_tx, bulk_rx) = mpsc::channel(BULK_QUEUE_MAX);
        let (waiting, ended) = (Arc::new(watch::Sender::new(0)), Arc::new(Ended::default()));
        let watched = (waiting.subscribe(), Arc::clone(&ended));
        let tender = tokio::spawn(tend(conn.clone(), bounds.clone(), bulk_tx, not_after, watched, keep));
        Ok(Self {
            conn,
            peer,
            authority: Arc::clone(&peers.authority),
            hello,
            minor,
            bounds,
            open_timeout: settings.handshake,
            bulk_slots: Arc::new(Semaphore::new(settings.bulk_streams as usize)),
            bulk_sent: AtomicU32::new(0),
            bulk: Mutex::new(bulk_rx),
            waiting,
            ended,
            _control: control,
            tender,
        })
    }

    /// The peer's HELLO.
    #[must_use]
    pub fn peer_hello(&self) -> &Hello {
        &self.hello
    }

    /// Who the peer's certificate says it is.
    #[must_use]
    pub fn peer_identity(&self) -> &PeerIdentity {
        &self.peer
    }

    /// Key of the block ids of the peer's tenant ([`tandem_proto::block::tenant_key`]).
    #[must_use]
    pub fn peer_tenant_key(&self) -> [u8; 32] {
        tenant_key(&self.authority, &self.peer.tenant)
    }

    /// The minor protocol version both speak.
    #[must_use]
    pub fn minor(&self) -> u16 {
        self.minor
    }

    /// Where the peer's packets come from now; may change (migration).
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.conn.remote_address()
    }

    /// Opens a stream for one request. The peer sees it with the first frame.
    ///
    /// # Errors
    /// [`TransportError::Timeout`] if the peer allows no more sessions, or the link's end.
    pub async fn open_session(&self) -> Result<Channel, TransportError> {
        let open = tokio::time::timeout(self.open_timeout, self.conn.open_bi());
        let streams = open.await.map_err(|_| TransportError::Timeout {
            what: "a free session on the link",
            ms: self.open_timeout.as_millis() as u64,
        })??;
        Ok(self.session(streams))
    }

    /// The next stream that the peer opened; `None` once the link is over. Cancel-safe.
    pub async fn accept_session(&self) -> Option<Channel> {
        self.conn.accept_bi().await.ok().map(|streams| self.session(streams))
    }

    fn session(&self, streams: (SendStream, RecvStream)) -> Channel {
        let channel = Channel::new(streams, &self.bounds);
        channel.tx.set_priority(SESSION_PRIORITY);
        channel
    }

    /// Sends one frame on a stream of its own, below all sessions in priority and in order of
    /// the calls. At most
    /// [`Settings::bulk_streams`] may be unacknowledged; more wait. Returns when QUIC has taken the
    /// bytes; the protocol's own acknowledgement says that they were used. Not cancel-safe: if
    /// dropped, the peer drops the part that arrived.
    ///
    /// # Errors
    /// As [`FrameSender::send`].
    pub async fn send_bulk(&self, message: &Message, payload: Bytes) -> Result<(), TransportError> {
        let slot = Arc::clone(&self.bulk_slots).acquire_owned().await;
        let slot = slot.map_err(|_| TransportError::Broken)?;
        let stream = self.conn.open_uni().await?;
        let mut sender = FrameSender::new(stream, &self.bounds, Arc::default());
        sender.set_priority(bulk_priority(self.bulk_sent.fetch_add(1, Ordering::Relaxed)));
        let transfer = self.bounds.meter.transfer(Direction::Sent);
        sender.send(message, payload).await?;
        sender.finish()?;
        let conn = self.conn.clone();
        // Ends with the acknowledgement or with the connection; as many as there are slots.
        tokio::spawn(async move {
            let bytes = sender.bytes_sent() as usize;
            if sender.delivered().await.is_ok() {
                transfer.acknowledged(bytes, conn.rtt());
            }
            drop(slot);
        });
        Ok(())
    }

    /// The next frame the peer sent with [`Link::send_bulk`], in order of completion; `None` once
    /// the link is over. Cancel-safe.
    pub async fn accept_bulk(&self) -> Option<Frame> {
        self.bulk.lock().await.recv().await
    }

    /// Says that the caller waits for the peer until the guard is dropped. Meanwhile a peer that has died or
    /// fallen silent is found within about three round trips and a second; the link is then closed with
    /// [`CloseCode::Silent`]. Costs nothing while the peer answers anyway, and two small packets a round trip
    /// at most while it does not.
    pub fn probe(&self) -> ProbeGuard {
        ProbeGuard::new(&self.waiting)
    }

    /// Path and load of the link now.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        let stats = self.conn.stats();
        self.bounds.meter.observe_rtt(stats.path.rtt);
        let rtt = self.bounds.meter.rtt();
        let (receive_bytes_per_s, send_bytes_per_s) = self.bounds.meter.goodput();
        LinkStats {
            rtt_us: rtt.smoothed_us(),
            min_rtt_us: rtt.min_us().unwrap_or_default(),
            rtt_deviation_us: rtt.deviation_us(),
            receive_bytes_per_s,
            send_bytes_per_s,
            lost_packets: stats.path.lost_packets,
            sent_packets: stats.path.sent_packets,
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            cwnd: stats.path.cwnd,
        }
    }

    /// Closes the link at once; what is not yet acknowledged is lost.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.ended.close(&self.conn, code, reason);
    }

    /// True once the link is over.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.conn.close_reason().is_some()
    }

    /// Waits for the end of the link and says why it ended. Cancel-safe.
    pub async fn closed(&self) -> TransportError {
        match (self.conn.closed().await, self.ended.0.get()) {
            (quinn::ConnectionError::LocallyClosed, Some((code, reason))) => {
                TransportError::Closed { code: *code, reason: reason.clone() }
            }
            (error, _) => error.into(),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.conn.close(CloseCode::Done.to_wire(), b"done");
        self.tender.abort();
    }
}

/// A close reason is one packet at most.
fn clip(reason: &str) -> &[u8] {
    &reason.as_bytes()[..reason.len().min(512)]
}

/// Looks after a link until it ends: reads bulk streams, samples the round-trip time, probes a peer that is
/// waited for, closes the link when the peer's certificate ends.
async fn tend(
    conn: Connection,
    bounds: Bounds,
    bulk: mpsc::Sender<Frame>,
    not_after: SystemTime,
    (waiting, ended): (watch::Receiver<usize>, Arc<Ended>),
    keep: impl Send + 'static,
) {
    let mut probing = std::pin::pin!(probe::watch_over(&conn, waiting, &ended));
    let mut readers = JoinSet::new();
    let mut sample = tokio::time::interval(RTT_SAMPLE_INTERVAL);
    sample.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = conn.closed() => break,
            // Bounded by the number of unidirectional streams the transport settings allow.
            stream = conn.accept_uni() => match stream {
                Ok(stream) => {
                    let receiver = FrameReceiver::new(stream, &bounds, Arc::default());
                    readers.spawn(read_bulk(conn.clone(), receiver, bulk.clone()));
                }
                Err(_) => break,
            },
            Some(_) = readers.join_next() => {}
            () = &mut probing => break,
            // Probes have done their work when they are acknowledged.
            probe = conn.read_datagram() => if probe.is_err() { break },
            _ = sample.tick() => {
                bounds.meter.observe_rtt(conn.rtt());
                // TLS counts the last second as valid; so does this.
                if SystemTime::now() >= not_after + Duration::from_secs(1) {
                    conn.close(CloseCode::Unauthorised.to_wire(), b"the certificate has expired");
                }
            }
        }
    }
    drop(keep);
}

/// Reads one stream: a frame, or a batch of them. The peer may open another when this one is used up.
async fn read_bulk(conn: Connection, mut receiver: FrameReceiver, bulk: mpsc::Sender<Frame>) {
    let error = loop {
        match receiver.next().await {
            Ok(Some(frame)) => {
                if bulk.send(frame).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => break error,
        }
    };
    match error {
        TransportError::Frame(_) | TransportError::Timeout { .. } => {
            tracing::warn!(%error, "bulk stream");
            conn.close(CloseCode::Malformed.to_wire(), clip(&error.to_string()));
        }
        // The sender gave up: as if it had never begun. The exchange above recomputes.
        _ => tracing::debug!(%error, "a bulk transfer was given up"),
    }
}
