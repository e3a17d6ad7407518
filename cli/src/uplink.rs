//! How an edge finds its cloud node: at a fixed address, or where a router's ticket points.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tandem_edge_node::uplinks::{TicketEpoch, Uplinks};
use tandem_proto::ids::Epoch;
use tandem_proto::message::Hello;
use tandem_router::client::{ClientError, RouterClient, TicketCache, TicketSource, place_for};
use tandem_router::control::Refusal;
use tandem_router::tls::TlsPem;
use tandem_transport::bulk::BulkInbox;
use tandem_transport::{
    Backoff, Connector, Identity, NoTarget, Redial, Role, Settings as QuicSettings, Target, TransportError,
};

use crate::config::PeerSettings;
use crate::failure::{Code, Failure, OrFail as _};
use crate::pair::now_ms;

/// Attempts on one node before a router is asked for another.
const ATTEMPTS_PER_NODE: u32 = 2;

/// The key material in the form the control plane takes.
pub(crate) fn tls_pem(identity: &Identity) -> TlsPem {
    TlsPem {
        certificate: identity.cert_pem().to_owned(),
        key: identity.key_pem().to_owned(),
        ca: identity.ca_pem().to_owned(),
    }
}

/// Starts keeping up the link that `peers` asks for; none without a cloud or a router.
pub(crate) fn start(
    peers: &PeerSettings,
    cloud_model: &str,
    identity: &Identity,
    quic: &QuicSettings,
    hello: &Hello,
    bulk: &BulkInbox,
) -> Result<Uplinks, Failure> {
    let connector =
        || Connector::new_for(identity, quic.clone(), hello.clone(), &[Role::Cloud]).map(Arc::new).or_fail(Code::State);
    let epoch = TicketEpoch::default();
    if let Some(cloud) = &peers.cloud {
        let (server_name, address) = named_address(cloud)?;
        // Without tickets there is one owner of every session, so one epoch.
        epoch.saw(Epoch(1));
        let redial = Redial::start(connector()?, Backoff::default(), move || {
            let (server_name, address) = (server_name.clone(), address.clone());
            async move { target(&address, server_name).await }
        });
        return Ok(Uplinks::new(redial, epoch, bulk.clone()));
    }
    if peers.routers.is_empty() {
        return Ok(Uplinks::none());
    }
    let client = RouterClient::connect(&peers.routers, &tls_pem(identity)).or_fail(Code::Config)?;
    let places = Arc::new(Places {
        source: TicketSource::new(client, TicketCache::default()),
        model: cloud_model.to_owned(),
        epoch: epoch.clone(),
        attempts: AtomicU32::new(0),
        last_node: Mutex::default(),
    });
    let resolving = Arc::clone(&places);
    let redial = Redial::start(connector()?, Backoff::default(), move || {
        let places = Arc::clone(&resolving);
        async move { places.next().await }
    });
    let mut links = redial.link();
    tokio::spawn(async move {
        while links.changed().await.is_ok() {
            if links.borrow_and_update().is_some() {
                places.attempts.store(0, Ordering::Relaxed);
            }
        }
    });
    Ok(Uplinks::new(redial, epoch, bulk.clone()))
}

/// Where the router places this edge.
struct Places {
    source: TicketSource,
    model: String,
    epoch: TicketEpoch,
    /// Attempts since a link was up.
    attempts: AtomicU32,
    last_node: Mutex<Option<String>>,
}

impl Places {
    /// Where to dial next. The same node again at first, for its sessions can be resumed there; if
    /// it does not come back, another one, if there is one.
    async fn next(&self) -> Result<Target, TransportError> {
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let last = self.last_node.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut place = place_for(&self.model);
        if attempt >= ATTEMPTS_PER_NODE && attempt.is_multiple_of(ATTEMPTS_PER_NODE) {
            // The node may run at another address by now: what is cached is not to be trusted.
            self.source.forget(&self.model);
            place.avoid.extend(last);
        }
        let mut placed = self.source.ticket(&place, now_ms()).await;
        if matches!(placed, Err(ClientError::Refused(_))) && !place.avoid.is_empty() {
            place.avoid.clear();
            placed = self.source.ticket(&place, now_ms()).await;
        }
        let ticket = placed.map_err(|e| no_ticket(&e))?.ticket;
        self.epoch.saw(ticket.epoch);
        *self.last_node.lock().unwrap_or_else(PoisonError::into_inner) = Some(ticket.node);
        target(&ticket.address, ticket.server_name).await
    }
}

/// Why there is no ticket, as the link's own error.
fn no_ticket(error: &ClientError) -> TransportError {
    let cause = match error {
        ClientError::Unreachable { tls: Some(fault), .. } => NoTarget::RouterCertificate(*fault),
        ClientError::Unreachable { tls: None, .. } => NoTarget::RouterUnreachable,
        ClientError::Refused(Refusal::UnknownModel { model, known }) => {
            NoTarget::UnknownModel { model: model.clone(), known: known.clone() }
        }
        ClientError::Refused(Refusal::NoNode { .. } | Refusal::Full { .. }) => NoTarget::NoNode,
        ClientError::Denied(_) => NoTarget::RouterDenied,
        _ => NoTarget::Other,
    };
    TransportError::NoTarget { cause, reason: error.to_string() }
}

/// Looks an address up.
async fn target(address: &str, server_name: String) -> Result<Target, TransportError> {
    let unknown = |reason: String| TransportError::NoTarget {
        cause: NoTarget::UnknownHost { address: address.to_owned() },
        reason: format!("{address} cannot be found: {reason}"),
    };
    let mut found = tokio::net::lookup_host(address).await.map_err(|e| unknown(e.to_string()))?;
    let addr = found.next().ok_or_else(|| unknown("it has no address".into()))?;
    Ok(Target { addr, server_name })
}

/// `host:port` or `server-name@host:port` as the name to check and the address to dial.
fn named_address(text: &str) -> Result<(String, String), Failure> {
    let (name, address) = match text.split_once('@') {
        Some((name, address)) => (Some(name), address),
        None => (None, text),
    };
    let bad = || {
        let message = format!("`{text}` is no address of a cloud node; write host:port, or server-name@host:port");
        Failure::new(Code::Config, message)
    };
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    if host.is_empty() || port.parse::<u16>().map_or(true, |port| port == 0) || name == Some("") {
        return Err(bad());
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    // Certificates carry names: every node's has `localhost`, which stands for any address here.
    let name = name.unwrap_or_else(|| if host.parse::<std::net::IpAddr>().is_ok() { "localhost" } else { host });
    Ok((name.to_owned(), address.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::named_address;

    #[test]
    fn addresses_of_cloud_nodes() {
        let table = [
            ("127.0.0.1:4433", Some(("localhost", "127.0.0.1:4433"))),
            ("[::1]:4433", Some(("localhost", "[::1]:4433"))),
            ("cloud.example:4433", Some(("cloud.example", "cloud.example:4433"))),
            ("cloud-1.tandem@10.0.0.7:4433", Some(("cloud-1.tandem", "10.0.0.7:4433"))),
            ("cloud.example", None),
            ("cloud.example:0", None),
            ("@a:1", None),
            (":1", None),
        ];
        for (text, expected) in table {
            let got = named_address(text).ok();
            assert_eq!(got.as_ref().map(|(n, a)| (n.as_str(), a.as_str())), expected, "{text}");
        }
    }
}
