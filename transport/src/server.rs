//! The accepting end: bounded in connections altogether and per identity.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use quinn::{Connection, Endpoint, Incoming, crypto::rustls::QuicServerConfig};
use tandem_proto::message::Hello;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
};

use crate::{
    close::CloseCode,
    error::TransportError,
    identity::{Identity, IdentityError, PeerIdentity, Role},
    link::{Link, Peers, Side, peer_identity},
    settings::Settings,
    socket,
};

/// Links that may wait for [`Server::accept`].
pub const ACCEPT_QUEUE_MAX: usize = 64;
/// Connection attempts that may wait for the accepting task.
const INCOMING_MAX: usize = 1024;
/// Bytes of early packets kept for all waiting attempts.
const INCOMING_BYTES_MAX: u64 = 8 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    peers: Peers,
    hello: Mutex<Hello>,
    live: Mutex<HashMap<PeerIdentity, Vec<Connection>>>,
    refused: AtomicU64,
}

/// Accepts links on one UDP address.
#[derive(Debug)]
pub struct Server {
    endpoint: Endpoint,
    shared: Arc<Shared>,
    links: tokio::sync::Mutex<mpsc::Receiver<Link>>,
    accepting: JoinHandle<()>,
}

fn quic_config(identity: &Identity, settings: &Settings) -> Result<quinn::ServerConfig, TransportError> {
    let tls =
        QuicServerConfig::try_from(identity.server_tls()?).map_err(|e| IdentityError::Tls { reason: e.to_string() })?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    config
        .transport_config(settings.transport_config())
        .migration(true)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size_total(INCOMING_BYTES_MAX);
    Ok(config)
}

impl Server {
    /// Binds `addr` (port 0 for any) and accepts peers of every role whose certificate the
    /// identity's CA signed. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`TransportError::Bind`] or [`TransportError::Identity`].
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        settings: Settings,
        hello: Hello,
    ) -> Result<Self, TransportError> {
        Self::bind_for(addr, identity, settings, hello, Role::ALL)
    }

    /// As [`Server::bind`], for peers of `roles` only.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_for(
        addr: SocketAddr,
        identity: &Identity,
        settings: Settings,
        hello: Hello,
        roles: &[Role],
    ) -> Result<Self, TransportError> {
        let endpoint = socket::server(addr, quic_config(identity, &settings)?, identity.reset_key())?;
        let shared = Arc::new(Shared {
            settings,
            peers: Peers::new(identity, roles),
            hello: Mutex::new(hello),
            live: Mutex::default(),
            refused: AtomicU64::new(0),
        });
        let (tx, rx) = mpsc::channel(ACCEPT_QUEUE_MAX);
        let accepting = tokio::spawn(accept_all(endpoint.clone(), Arc::clone(&shared), tx));
        Ok(Self { endpoint, shared, links: tokio::sync::Mutex::new(rx), accepting })
    }

    /// The bound address.
    ///
    /// # Errors
    /// [`TransportError::Lost`] if the socket is gone.
    pub fn local_addr(&self) -> Result<SocketAddr, TransportError> {
        self.endpoint.local_addr().map_err(|e| TransportError::Lost { reason: e.to_string() })
    }

    /// The next link whose handshake and HELLO are done; `None` once the server is closed. Slow
    /// peers hold up no other peer. Cancel-safe.
    pub async fn accept(&self) -> Option<Link> {
        self.links.lock().await.recv().await
    }

    /// Connections that are up, or in their handshake after TLS.
    #[must_use]
    pub fn connections(&self) -> usize {
        lock(&self.shared.live).values().map(Vec::len).sum()
    }

    /// Connections refused by a cap since the start.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// What later peers are told.
    pub fn set_hello(&self, hello: Hello) {
        *lock(&self.shared.hello) = hello;
    }

    /// Changes the certificate of the running server.
    #[must_use]
    pub fn renewal(&self) -> ServerRenewal {
        ServerRenewal { endpoint: self.endpoint.clone(), shared: Arc::clone(&self.shared) }
    }

    /// Closes the live links of every peer that `which` selects (revocation); returns how many.
    pub fn close_where(&self, which: impl Fn(&PeerIdentity) -> bool, code: CloseCode, reason: &str) -> usize {
        let live = lock(&self.shared.live);
        let selected = live.iter().filter(|(peer, _)| which(peer)).flat_map(|(_, conns)| conns);
        selected.map(|conn| conn.close(code.to_wire(), reason.as_bytes())).count()
    }

    /// Closes every link and the socket, and waits until the peers were told (at most a few round
    /// trips).
    pub async fn close(&self, code: CloseCode, reason: &str) {
        self.accepting.abort();
        self.endpoint.close(code.to_wire(), reason.as_bytes());
        self.endpoint.wait_idle().await;
    }
}

/// Changes the certificate of a [`Server`]; goes on working, to no effect, when that is gone.
#[derive(Debug, Clone)]
pub struct ServerRenewal {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

impl ServerRenewal {
    /// Uses another certificate (renewal, rotation) for later handshakes.
    ///
    /// # Errors
    /// [`TransportError::Identity`].
    pub fn set_identity(&self, identity: &Identity) -> Result<(), TransportError> {
        let config = quic_config(identity, &self.shared.settings)?;
        self.endpoint.set_server_config(Some(config));
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        self.endpoint.close(CloseCode::ShuttingDown.to_wire(), b"the node shuts down");
    }
}

async fn accept_all(endpoint: Endpoint, shared: Arc<Shared>, links: mpsc::Sender<Link>) {
    let slots = Arc::new(Semaphore::new(shared.settings.connections_max));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            shared.refused.fetch_add(1, Ordering::Relaxed);
            incoming.refuse();
            continue;
        };
        let loaded = endpoint.open_connections() > shared.settings.retry_above;
        if loaded && incoming.may_retry() && !incoming.remote_address_validated() {
            // `may_retry` was asked, so this cannot fail.
            let _ = incoming.retry();
            continue;
        }
        let (shared, links) = (Arc::clone(&shared), links.clone());
        // Bounded by the slots.
        tokio::spawn(async move {
            let remote = incoming.remote_address();
            match handshake(incoming, &shared, slot).await {
                // An error means that the server is being closed.
                Ok(link) => drop(links.send(link).await),
                Err(error) => tracing::warn!(%remote, %error, "a peer was not accepted"),
            }
        });
    }
}

async fn handshake(
    incoming: Incoming,
    shared: &Arc<Shared>,
    slot: OwnedSemaphorePermit,
) -> Result<Link, TransportError> {
    let limit = shared.settings.handshake;
    let conn = tokio::time::timeout(limit, incoming)
        .await
        .map_err(|_| TransportError::Timeout { what: "the TLS handshake", ms: limit.as_millis() as u64 })??;
    let (peer, _) = peer_identity(&conn).inspect_err(|e| {
        conn.close(CloseCode::Unauthorised.to_wire(), e.to_string().as_bytes());
    })?;
    let entry = Entry::insert(shared, peer, &conn).inspect_err(|e| {
        shared.refused.fetch_add(1, Ordering::Relaxed);
        conn.close(CloseCode::NameInUse.to_wire(), e.to_string().as_bytes());
    })?;
    let hello = lock(&shared.hello).clone();
    Link::establish(conn, Side::Server, &hello, &shared.settings, &shared.peers, (entry, slot)).await
}

/// A connection's place in the list of live ones; leaves it when dropped.
struct Entry {
    shared: Arc<Shared>,
    peer: PeerIdentity,
    id: usize,
}

impl Entry {
    fn insert(shared: &Arc<Shared>, peer: PeerIdentity, conn: &Connection) -> Result<Self, TransportError> {
        let mut live = lock(&shared.live);
        let of_peer = live.entry(peer.clone()).or_default();
        let alive = of_peer.iter().filter(|conn| conn.close_reason().is_none()).count();
        let max = shared.settings.connections_per_device_max;
        if alive >= max {
            let reason = format!("{peer} has {alive} connections, at most {max} are allowed");
            return Err(TransportError::NameInUse { reason });
        }
        of_peer.push(conn.clone());
        let entry = Self { shared: Arc::clone(shared), peer, id: conn.stable_id() };
        drop(live);
        Ok(entry)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut live = lock(&self.shared.live);
        if let Some(of_peer) = live.get_mut(&self.peer) {
            of_peer.retain(|conn| conn.stable_id() != self.id);
            if of_peer.is_empty() {
                live.remove(&self.peer);
            }
        }
    }
}
