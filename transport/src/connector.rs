//! The connecting end.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quinn::{ClientConfig, Endpoint, crypto::rustls::QuicClientConfig};
use tandem_proto::message::Hello;
use tokio::task::JoinSet;

use crate::{
    close::CloseCode,
    error::TransportError,
    identity::{Identity, IdentityError, Role},
    link::{Link, Peers, Side},
    probe::PortCheck,
    settings::Settings,
    socket,
};

/// A dialed address gets this long before the next one is dialed beside it (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// A peer that has not answered for so long is probed for a listener.
const PORT_CHECK_AFTER: Duration = Duration::from_millis(30);

/// Dials links; all of them share one UDP socket per address family.
#[derive(Debug)]
pub struct Connector {
    settings: Settings,
    peers: Peers,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    config: ClientConfig,
    hello: Hello,
    v4: Option<Endpoint>,
    v6: Option<Endpoint>,
}

fn client_config(identity: &Identity, settings: &Settings) -> Result<ClientConfig, TransportError> {
    let tls =
        QuicClientConfig::try_from(identity.client_tls()?).map_err(|e| IdentityError::Tls { reason: e.to_string() })?;
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(settings.transport_config());
    Ok(config)
}

impl Connector {
    /// Dials peers of every role whose certificate the identity's CA signed.
    ///
    /// # Errors
    /// [`TransportError::Identity`].
    pub fn new(identity: &Identity, settings: Settings, hello: Hello) -> Result<Self, TransportError> {
        Self::new_for(identity, settings, hello, Role::ALL)
    }

    /// As [`Connector::new`], but a peer of another role than `roles` is refused: any node of the
    /// CA could otherwise stand in for a cloud node.
    ///
    /// # Errors
    /// [`TransportError::Identity`].
    pub fn new_for(
        identity: &Identity,
        settings: Settings,
        hello: Hello,
        roles: &[Role],
    ) -> Result<Self, TransportError> {
        let config = client_config(identity, &settings)?;
        let state = Mutex::new(State { config, hello, v4: None, v6: None });
        Ok(Self { settings, peers: Peers::new(identity, roles), state })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dials `addr`; the peer's certificate must be for `server_name`
    /// ([`crate::identity::PeerIdentity::dns_name`], or `localhost`). Needs a tokio runtime.
    ///
    /// # Errors
    /// A [`TransportError`] that says who refused whom and why.
    pub async fn connect(&self, addr: SocketAddr, server_name: &str) -> Result<Link, TransportError> {
        let (endpoint, config, hello) = self.prepare(addr)?;
        let connecting = endpoint.connect_with(config, addr, server_name).map_err(|e| {
            let (server_name, reason) = (server_name.to_owned(), e.to_string());
            TransportError::Connect { addr, server_name, reason }
        })?;
        let limit = self.settings.handshake;
        let closed = async {
            tokio::time::sleep(PORT_CHECK_AFTER).await;
            match PortCheck::new(addr).await {
                Some(port) => port.refused().await,
                None => std::future::pending().await,
            }
        };
        let conn = tokio::select! {
            conn = tokio::time::timeout(limit, connecting) => conn
                .map_err(|_| TransportError::Timeout { what: "the connection", ms: limit.as_millis() as u64 })??,
            () = closed => return Err(TransportError::NobodyListens { addr }),
        };
        Link::establish(conn, Side::Client, &hello, &self.settings, &self.peers, ()).await
    }

    /// As [`Connector::connect`], for a peer with several addresses: each gets a short start before the next
    /// one is dialed beside it, and the first link wins.
    ///
    /// # Errors
    /// Of several failures the one that says most: a peer that was reached and refused comes before one that
    /// was not.
    pub async fn connect_any(
        self: &Arc<Self>,
        addrs: &[SocketAddr],
        server_name: &str,
    ) -> Result<Link, TransportError> {
        let mut attempts = JoinSet::new();
        let mut waiting = addrs.iter().copied();
        let mut failed = None;
        loop {
            if let Some(addr) = waiting.next() {
                let (this, server_name) = (Arc::clone(self), server_name.to_owned());
                attempts.spawn(async move { this.connect(addr, &server_name).await });
            }
            let more = waiting.len() > 0;
            tokio::select! {
                ended = attempts.join_next() => match ended {
                    Some(Ok(Ok(link))) => return Ok(link),
                    Some(Ok(Err(error))) => failed = Some(telling(failed, error)),
                    // An attempt that panicked has said so.
                    Some(Err(_)) => {}
                    None => {
                        let reason = || TransportError::Lost { reason: format!("{server_name} has no address") };
                        return Err(failed.unwrap_or_else(reason));
                    }
                },
                () = tokio::time::sleep(STAGGER), if more => {}
            }
        }
    }

    fn prepare(&self, addr: SocketAddr) -> Result<(Endpoint, ClientConfig, Hello), TransportError> {
        let mut state = self.lock();
        let (slot, any): (_, SocketAddr) = if addr.is_ipv4() {
            (&mut state.v4, (Ipv4Addr::UNSPECIFIED, 0).into())
        } else {
            (&mut state.v6, (Ipv6Addr::UNSPECIFIED, 0).into())
        };
        let endpoint = match slot {
            Some(endpoint) => endpoint.clone(),
            None => slot.insert(socket::client(any)?).clone(),
        };
        Ok((endpoint, state.config.clone(), state.hello.clone()))
    }

    /// What later peers are told.
    pub fn set_hello(&self, hello: Hello) {
        self.lock().hello = hello;
    }

    /// Uses another certificate (renewal) for later links.
    ///
    /// # Errors
    /// [`TransportError::Identity`].
    pub fn set_identity(&self, identity: &Identity) -> Result<(), TransportError> {
        let config = client_config(identity, &self.settings)?;
        self.lock().config = config;
        Ok(())
    }

    /// Moves every link to a new UDP socket, as a change of network does; the links live on.
    ///
    /// # Errors
    /// [`TransportError::Bind`].
    pub fn rebind(&self) -> Result<(), TransportError> {
        let state = self.lock();
        let any: [(&Option<Endpoint>, SocketAddr); 2] =
            [(&state.v4, (Ipv4Addr::UNSPECIFIED, 0).into()), (&state.v6, (Ipv6Addr::UNSPECIFIED, 0).into())];
        for (endpoint, addr) in any {
            let Some(endpoint) = endpoint else { continue };
            endpoint.rebind(socket::udp(addr)?).map_err(|e| TransportError::Bind { addr, reason: e.to_string() })?;
        }
        Ok(())
    }
}

/// Of two failures the one that says more: a reply from a peer before a timeout.
fn telling(before: Option<TransportError>, error: TransportError) -> TransportError {
    let reached = |error: &TransportError| {
        !matches!(
            error,
            TransportError::Timeout { .. }
                | TransportError::Connect { .. }
                | TransportError::NobodyListens { .. }
                | TransportError::Bind { .. }
                | TransportError::Lost { .. }
        )
    };
    before.filter(|before| reached(before) || !reached(&error)).unwrap_or(error)
}

impl Drop for Connector {
    fn drop(&mut self) {
        let state = self.lock();
        for endpoint in state.v4.iter().chain(&state.v6) {
            endpoint.close(CloseCode::Done.to_wire(), b"done");
        }
    }
}
