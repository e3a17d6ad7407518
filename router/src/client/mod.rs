//! Talks to routers: any of several that answers.
//!
//! Connections are made at the first call and again after a loss. A call goes to the router that
//! answered last; if that one is away, each other one is tried once, with the same request id.

mod endpoint;
mod registration;
mod tickets;

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tandem_proto::{
    ids::Epoch,
    rpc::{self, control_client::ControlClient},
};
use tandem_transport::TlsFault;
use tonic::{Code, Request, Response, Status, transport::Channel};

pub use self::{
    endpoint::Endpoint,
    registration::{Registration, RegistrationState},
    tickets::{CACHED_TICKETS_MAX, CachedTicket, TicketCache, TicketSource},
};
use crate::{
    control::{Alternative, PlaceCommand, Refusal, RequestId},
    convert,
    node::{InvalidField, LoadReport, NodeCard},
    tls::TlsPem,
};

/// Most routers of one client.
pub const ENDPOINTS_MAX: usize = 16;
/// Largest message in either direction, bytes.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Longest time to connect to one router.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest time for one call to one router, connecting included.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a call came to nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The list of routers cannot be used.
    #[error("router endpoint `{endpoint}` {problem}; write host:port, or server-name@host:port")]
    BadEndpoint {
        /// As given.
        endpoint: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The key material cannot be used.
    #[error("key material for the router connection: {0}")]
    Tls(String),
    /// No router answered.
    #[error("no router answers ({tried}); check that `tandem router` or `tandem up` runs and is reachable")]
    Unreachable {
        /// Each router with what happened.
        tried: String,
        /// What TLS refused, if that is why.
        tls: Option<TlsFault>,
    },
    /// The router said no, with a typed reason.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The certificate does not allow the call.
    #[error("the router denies this: {0}")]
    Denied(String),
    /// The router found the request malformed, or the reply was.
    #[error("router call failed: {0}")]
    Malformed(String),
}

impl ClientError {
    /// True if another try later may work without any change here.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Refused(Refusal::NoNode { .. } | Refusal::Full { .. }))
    }
}

impl From<InvalidField> for ClientError {
    fn from(invalid: InvalidField) -> Self {
        Self::Malformed(format!("reply field {invalid}"))
    }
}

/// Permission to use a node, as an edge sees it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Ticket {
    /// The node.
    pub node: String,
    /// `host:port` of its QUIC endpoint.
    pub address: String,
    /// Name to check in its certificate.
    pub server_name: String,
    /// Fencing counter for frames to the node.
    #[serde(with = "crate::control::epoch_as_number")]
    pub epoch: Epoch,
    /// Validity from the moment of the reply, ms.
    pub expires_in_ms: u64,
    /// Why this node, for people.
    pub reasons: Vec<String>,
    /// Other nodes in order of preference; they need a ticket of their own.
    pub alternatives: Vec<Alternative>,
}

/// A node as `status` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeStatus {
    /// What it is.
    pub card: NodeCard,
    /// How busy it is; without prefixes.
    pub load: LoadReport,
    /// True if it takes no new sessions.
    pub draining: bool,
    /// Age of its last heartbeat, ms.
    pub heartbeat_age_ms: u64,
    /// False: too old to be placed on.
    pub alive: bool,
    /// Devices whose ticket names it.
    pub devices: u32,
}

/// What a router knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterStatus {
    /// Nodes by name.
    pub nodes: Vec<NodeStatus>,
    /// Devices with an unexpired ticket.
    pub devices: u32,
    /// Last epoch issued.
    pub epoch: Epoch,
    /// Index of the last applied command.
    pub applied: u64,
}

/// The router's answer to a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// False: register again.
    pub known: bool,
    /// True: the node is being drained.
    pub draining: bool,
}

#[derive(Debug)]
struct Router {
    endpoint: Endpoint,
    /// Replaced when the certificate is.
    channel: RwLock<Channel>,
}

/// A client of one or several routers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RouterClient {
    routers: Arc<[Router]>,
    // Which router answered last.
    current: Arc<AtomicUsize>,
}

/// A fresh request id.
fn new_id() -> RequestId {
    let mut id = RequestId::default();
    fastrand::fill(&mut id.0);
    id
}

fn wire_id(id: RequestId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
}

/// True if another router may answer where this one did not.
fn try_next(status: &Status) -> bool {
    use Code::{Aborted, Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable, Unknown};
    matches!(status.code(), Aborted | Cancelled | DeadlineExceeded | ResourceExhausted | Unavailable | Unknown)
}

/// The innermost cause says what happened ("connection refused"), the outer ones only where.
fn cause(status: &Status) -> String {
    let mut innermost: Option<&dyn std::error::Error> = std::error::Error::source(status);
    while let Some(deeper) = innermost.and_then(std::error::Error::source) {
        innermost = Some(deeper);
    }
    innermost.map_or_else(|| status.message().to_owned(), ToString::to_string)
}

impl RouterClient {
    /// A client of the routers at `endpoints` (`host:port` or `server-name@host:port`). Connects
    /// at the first call. Must be called inside a tokio runtime.
    pub fn connect(endpoints: &[String], tls: &TlsPem) -> Result<Self, ClientError> {
        let bad = |endpoint: &str, problem: String| ClientError::BadEndpoint { endpoint: endpoint.into(), problem };
        if endpoints.is_empty() || endpoints.len() > ENDPOINTS_MAX {
            return Err(bad(
                &endpoints.join(","),
                format!("is a list of {}, 1..={ENDPOINTS_MAX} are allowed", endpoints.len()),
            ));
        }
        let routers = endpoints.iter().map(|text| {
            let endpoint = text.parse::<Endpoint>().map_err(|problem| bad(text, problem))?;
            Ok(Router { channel: RwLock::new(endpoint.channel(tls)?), endpoint })
        });
        Ok(Self { routers: routers.collect::<Result<_, ClientError>>()?, current: Arc::default() })
    }

    /// Uses another certificate (renewal) for later calls. Calls under way end on the connections they have.
    ///
    /// # Errors
    /// [`ClientError::Tls`]; the earlier certificate stays in use.
    pub fn set_tls(&self, tls: &TlsPem) -> Result<(), ClientError> {
        let channels = self.routers.iter().map(|router| router.endpoint.channel(tls));
        for (router, channel) in self.routers.iter().zip(channels.collect::<Result<Vec<_>, _>>()?) {
            *router.channel.write().unwrap_or_else(PoisonError::into_inner) = channel;
        }
        Ok(())
    }

    /// Runs `call` against the current router, then against each other one once.
    async fn call<T, F>(&self, call: impl Fn(ControlClient<Channel>) -> F + Send + Sync) -> Result<T, ClientError>
    where
        F: Future<Output = Result<Response<T>, Status>> + Send,
    {
        let first = self.current.load(Ordering::Relaxed);
        let (mut tried, mut tls) = (Vec::new(), None);
        for at in (0..self.routers.len()).map(|step| (first + step) % self.routers.len()) {
            let router = &self.routers[at];
            let channel = router.channel.read().unwrap_or_else(PoisonError::into_inner).clone();
            let client = ControlClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            let status = match tokio::time::timeout(CALL_TIMEOUT, call(client)).await {
                Ok(Ok(reply)) => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(reply.into_inner());
                }
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {CALL_TIMEOUT:?}")),
            };
            match status.code() {
                Code::PermissionDenied | Code::Unauthenticated => {
                    return Err(ClientError::Denied(status.message().to_owned()));
                }
                _ if try_next(&status) => {
                    tls = tls.or_else(|| TlsFault::of(&status));
                    tried.push(format!("{}: {}", router.endpoint, cause(&status)));
                }
                _ => return Err(ClientError::Malformed(status.message().to_owned())),
            }
        }
        Err(ClientError::Unreachable { tried: tried.join("; "), tls })
    }

    /// Announces a cloud node. Returns how often the router wants heartbeats.
    pub async fn register(&self, card: &NodeCard, load: &LoadReport) -> Result<Duration, ClientError> {
        use rpc::register_reply::Result as Said;
        let request = rpc::RegisterRequest {
            request_id: wire_id(new_id()),
            card: Some(convert::card_to_wire(card)),
            load: Some(convert::load_to_wire(load)),
        };
        let call = |mut client: ControlClient<Channel>| {
            let request = request.clone();
            async move { client.register(Request::new(request)).await }
        };
        match self.call(call).await?.result {
            Some(Said::Registered(registered)) => Ok(Duration::from_millis(u64::from(registered.heartbeat_ms))),
            Some(Said::Refusal(refusal)) => Err(convert::refusal(refusal, "").into()),
            None => Err(ClientError::Malformed("the reply to Register is empty".into())),
        }
    }

    /// Reports a registered node's load.
    pub async fn heartbeat(&self, node: &str, boot_epoch: u64, load: &LoadReport) -> Result<Heartbeat, ClientError> {
        let load = Some(convert::load_to_wire(load));
        let request = rpc::HeartbeatRequest { node: node.into(), boot_epoch, load };
        let call = |mut client: ControlClient<Channel>| {
            let request = request.clone();
            async move { client.heartbeat(Request::new(request)).await }
        };
        let reply = self.call(call).await?;
        Ok(Heartbeat { known: reply.known, draining: reply.draining })
    }

    /// Stops (or resumes) placement on a node. False: the router does not know it.
    pub async fn drain(&self, node: &str, draining: bool) -> Result<bool, ClientError> {
        let request = rpc::DrainRequest { request_id: wire_id(new_id()), node: node.into(), draining };
        let call = |mut client: ControlClient<Channel>| {
            let request = request.clone();
            async move { client.drain(Request::new(request)).await }
        };
        Ok(self.call(call).await?.known)
    }

    /// Asks for a ticket. An empty `device` stands for the name in the certificate.
    pub async fn place(&self, place: &PlaceCommand) -> Result<Ticket, ClientError> {
        use rpc::place_reply::Result as Said;
        let request = convert::place_to_wire(new_id(), place);
        let call = |mut client: ControlClient<Channel>| {
            let request = request.clone();
            async move { client.place(Request::new(request)).await }
        };
        match self.call(call).await?.result {
            Some(Said::Ticket(ticket)) => Ok(ticket_from_wire(ticket)),
            Some(Said::Refusal(refusal)) => Err(convert::refusal(refusal, &place.model).into()),
            None => Err(ClientError::Malformed("the reply to Place is empty".into())),
        }
    }

    /// What the router knows.
    pub async fn status(&self) -> Result<RouterStatus, ClientError> {
        let call = |mut client: ControlClient<Channel>| async move { client.status(rpc::StatusRequest {}).await };
        let status = self.call(call).await?;
        let nodes = status.nodes.into_iter().map(|node| {
            Ok(NodeStatus {
                card: convert::card(node.card)?,
                load: convert::load(node.load)?,
                draining: node.draining,
                heartbeat_age_ms: node.heartbeat_age_ms,
                alive: node.alive,
                devices: node.devices,
            })
        });
        Ok(RouterStatus {
            nodes: nodes.collect::<Result<_, InvalidField>>()?,
            devices: status.devices,
            epoch: Epoch(status.epoch),
            applied: status.applied,
        })
    }
}

fn ticket_from_wire(ticket: rpc::Ticket) -> Ticket {
    let alternatives = ticket.alternatives.into_iter().map(|other| Alternative {
        node: other.node,
        address: other.address,
        reasons: other.reasons,
    });
    Ticket {
        node: ticket.node,
        address: ticket.address,
        server_name: ticket.server_name,
        epoch: Epoch(ticket.epoch),
        expires_in_ms: ticket.expires_in_ms,
        reasons: ticket.reasons,
        alternatives: alternatives.collect(),
    }
}

/// What a device asks for when it knows nothing but the model.
#[must_use]
pub fn place_for(model: &str) -> PlaceCommand {
    PlaceCommand { model: model.into(), latencies_us: BTreeMap::new(), ..PlaceCommand::default() }
}
