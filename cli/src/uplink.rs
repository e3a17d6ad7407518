//! How an edge finds its cloud node: at a fixed address, or where a router's ticket points.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tandem_edge_node::uplinks::{TicketEpoch, Uplinks};
use tandem_proto::ids::Epoch;
use tandem_proto::message::Hello;
use tandem_router::client::{ClientError, RouterClient, TicketCache, TicketSource, place_for};
use tandem_router::control::{LATENCIES_MAX, Refusal};
use tandem_router::tls::TlsPem;
use tandem_transport::bulk::BulkInbox;
use tandem_transport::{
    Backoff, Connector, Identity, Link, NoTarget, Redial, Role, Settings as QuicSettings, Target, TransportError,
};
use tokio::sync::watch;

use crate::config::PeerSettings;
use crate::failure::{Code, Failure, OrFail as _};
use crate::pair::now_ms;
use crate::renewal::{Issuer, keep_fresh};

/// A router that takes longer is passed over where an earlier ticket is at hand: an answer may be waiting.
const ROUTER_PATIENCE: Duration = Duration::from_millis(700);
/// Between two measurements of a link's round trip.
const ROUND_TRIP_EVERY: Duration = Duration::from_secs(10);

/// The key material in the form the control plane takes.
pub(crate) fn tls_pem(identity: &Identity) -> TlsPem {
    TlsPem {
        certificate: identity.cert_pem().to_owned(),
        key: identity.key_pem().to_owned(),
        ca: identity.ca_pem().to_owned(),
    }
}

/// Starts keeping up the link that `peers` asks for, under an `identity` that is renewed by its issuer; none
/// without a cloud or a router.
pub(crate) fn start(
    peers: &PeerSettings,
    cloud_model: &str,
    (identity, issuer): (&Identity, Issuer),
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
        let connector = connector()?;
        let dials = Arc::clone(&connector);
        keep_fresh(issuer, identity.clone(), move |next| dials.set_identity(next));
        let redial = Redial::start(connector, Backoff::default(), move |_| {
            let (server_name, address) = (server_name.clone(), address.clone());
            async move { target(server_name.clone(), &address, server_name).await }
        });
        return Ok(Uplinks::new(redial, epoch, bulk.clone()));
    }
    if peers.routers.is_empty() {
        return Ok(Uplinks::none());
    }
    let client = RouterClient::connect(&peers.routers, &tls_pem(identity)).or_fail(Code::Config)?;
    let connector = connector()?;
    let (dials, calls) = (Arc::clone(&connector), client.clone());
    keep_fresh(issuer, identity.clone(), move |next| {
        dials.set_identity(next).or_fail(Code::State)?;
        calls.set_tls(&tls_pem(next)).or_fail(Code::State)
    });
    let round_trips = RoundTrips::default();
    let places = Arc::new(Places {
        source: TicketSource::new(client, TicketCache::default()),
        model: cloud_model.to_owned(),
        region: peers.region.clone(),
        round_trips: round_trips.clone(),
        epoch: epoch.clone(),
    });
    let redial = Redial::start(connector, Backoff::default(), move |avoid| {
        let places = Arc::clone(&places);
        async move { places.next(avoid).await }
    });
    tokio::spawn(round_trips.watch(redial.link()));
    Ok(Uplinks::new(redial, epoch, bulk.clone()))
}

/// Round trips to the nodes that this edge has had links to, as the links' estimators measured them last,
/// microseconds. Bounded by what a router takes.
#[derive(Clone, Debug, Default)]
struct RoundTrips(Arc<Mutex<BTreeMap<String, u32>>>);

impl RoundTrips {
    fn known(&self) -> BTreeMap<String, u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, node: &str, us: u64) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= LATENCIES_MAX && !known.contains_key(node) {
            known.pop_first();
        }
        known.insert(node.to_owned(), u32::try_from(us).unwrap_or(u32::MAX));
    }

    /// Measures now and then, until there are no more links to come. Holds no link: one that is done must
    /// be let go of.
    async fn watch(self, mut links: watch::Receiver<Option<Arc<Link>>>) {
        loop {
            let link = links.borrow_and_update().as_ref().map(Arc::downgrade);
            if let Some(link) = link.as_ref().and_then(Weak::upgrade) {
                self.note(&link.peer_hello().node, link.stats().rtt_us);
            }
            let changed = match link {
                Some(_) => tokio::time::timeout(ROUND_TRIP_EVERY, links.changed()).await,
                None => Ok(links.changed().await),
            };
            if matches!(changed, Ok(Err(_))) {
                return;
            }
        }
    }
}

/// Where the router places this edge.
struct Places {
    source: TicketSource,
    model: String,
    region: String,
    round_trips: RoundTrips,
    epoch: TicketEpoch,
}

impl Places {
    /// Where to dial next: the node of the ticket at hand while it is good, for its sessions can be resumed
    /// there; another one, if the router knows one, in place of the nodes in `avoid`.
    async fn next(&self, avoid: Vec<String>) -> Result<Target, TransportError> {
        let mut place = place_for(&self.model);
        place.avoid = avoid;
        place.region.clone_from(&self.region);
        place.latencies_us = self.round_trips.known();
        let placed = tokio::time::timeout(ROUTER_PATIENCE, self.source.ticket(&place, now_ms())).await;
        let ticket = match placed {
            Ok(placed) => placed.map_err(|e| no_ticket(&e))?.ticket,
            Err(_) => self.source.last(&self.model).ok_or_else(|| TransportError::Timeout {
                what: "the router's answer",
                ms: ROUTER_PATIENCE.as_millis() as u64,
            })?,
        };
        self.epoch.saw(ticket.epoch);
        target(ticket.node, &ticket.address, ticket.server_name).await
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

/// Looks the addresses of a node up.
async fn target(node: String, address: &str, server_name: String) -> Result<Target, TransportError> {
    let unknown = |reason: String| TransportError::NoTarget {
        cause: NoTarget::UnknownHost { address: address.to_owned() },
        reason: format!("{address} cannot be found: {reason}"),
    };
    let addrs: Vec<_> = tokio::net::lookup_host(address).await.map_err(|e| unknown(e.to_string()))?.collect();
    if addrs.is_empty() {
        return Err(unknown("it has no address".into()));
    }
    Ok(Target { node, addrs, server_name })
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
    use super::*;

    #[test]
    fn as_many_round_trips_are_kept_as_a_router_takes() {
        let known = RoundTrips::default();
        (0..LATENCIES_MAX + 5).for_each(|n| known.note(&format!("cloud-{n:03}"), 1000));
        known.note("cloud-050", u64::MAX);
        assert_eq!((known.known().len(), known.known()["cloud-050"]), (LATENCIES_MAX, u32::MAX));
    }

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
