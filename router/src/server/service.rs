//! The gRPC methods: who asks, what is proposed, how the outcome is said.

use std::{sync::Arc, time::Instant};

use tandem_proto::rpc::{self, control_server::Control};
use tandem_transport::identity::{PeerIdentity, Role};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Request, Response, Status};

use super::Clock;
use crate::{
    control::{self, Command, Outcome, Refusal, RequestId, TICKET_MS, log::CommandLog},
    convert, metric_definitions as names,
    node::{InvalidField, check_name},
};

/// How often nodes are asked to report, ms. Well under the age at which they count as stale.
const HEARTBEAT_MS: u32 = 1_000;

type Reply<T> = Result<Response<T>, Status>;

pub(super) struct Service<L> {
    log: Arc<L>,
    clock: Clock,
    places: Semaphore,
}

fn invalid(error: &InvalidField) -> Status {
    Status::invalid_argument(format!("request field {error}"))
}

/// A reply of the log that its command cannot have; a bug, not the caller's fault.
fn unexpected(outcome: &Outcome) -> Status {
    tracing::error!(?outcome, "outcome does not fit its command");
    Status::internal("the router's state machine answered another question")
}

/// The identity in the peer's certificate, if its role is one of `roles`.
fn peer<T>(request: &Request<T>, roles: &[Role]) -> Result<PeerIdentity, Status> {
    let certificates = request.extensions().get::<Certificates>().and_then(|info| info.peer_certs());
    let certificate = certificates.as_ref().and_then(|chain| chain.first());
    let certificate = certificate.ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
    let peer = PeerIdentity::of(certificate).map_err(|error| Status::unauthenticated(error.to_string()))?;
    if roles.contains(&peer.role) {
        return Ok(peer);
    }
    let allowed = roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ");
    Err(Status::permission_denied(format!("{peer} has the role {}, this call needs {allowed}", peer.role)))
}

type Certificates = tonic::transport::server::TlsConnectInfo<tonic::transport::server::TcpConnectInfo>;

/// A node may register, report and drain itself only.
fn own_name(peer: &PeerIdentity, name: &str) -> Result<(), Status> {
    if peer.name == name {
        return Ok(());
    }
    Err(Status::permission_denied(format!("{peer} cannot speak for `{name}`; use the name in the certificate")))
}

/// The device's name in the state: tenants do not share names.
fn device_name(peer: &PeerIdentity, asked: &str) -> Result<String, Status> {
    if !asked.is_empty() {
        own_name(peer, asked)?;
    }
    Ok(format!("{}/{}/{}", peer.tenant, peer.role, peer.name))
}

impl<L: CommandLog> Service<L> {
    pub(super) fn new(log: Arc<L>, clock: Clock, requests_max: usize) -> Self {
        Self { log, clock, places: Semaphore::new(requests_max) }
    }

    fn enter(&self) -> Result<SemaphorePermit<'_>, Status> {
        self.places.try_acquire().map_err(|_| Status::resource_exhausted("the router is busy; retry in a second"))
    }

    async fn propose(&self, id: RequestId, command: Command) -> Result<(Outcome, u64), Status> {
        let now_ms = self.clock.now_ms();
        let outcome = self.log.propose(control::Request { id, now_ms, command }).await;
        let outcome = outcome.map_err(|error| {
            tracing::error!(%error, "command refused by the log");
            Status::unavailable(error.to_string())
        })?;
        Ok((outcome, now_ms))
    }

    async fn register_inner(&self, request: Request<rpc::RegisterRequest>) -> Reply<rpc::RegisterReply> {
        use rpc::register_reply::Result as Said;
        let peer = peer(&request, &[Role::Cloud])?;
        let request = request.into_inner();
        let id = convert::request_id(&request.request_id).map_err(|error| invalid(&error))?;
        let card = convert::card(request.card).map_err(|error| invalid(&error))?;
        let load = convert::load(request.load).map_err(|error| invalid(&error))?;
        own_name(&peer, &card.name)?;
        let name = card.name.clone();
        let result = match self.propose(id, Command::RegisterNode { card, load }).await?.0 {
            Outcome::Registered => {
                tracing::info!(node = name, "node registered");
                Said::Registered(rpc::Registered { heartbeat_ms: HEARTBEAT_MS })
            }
            Outcome::Refused(refusal) => Said::Refusal(convert::refusal_to_wire(&refusal)),
            other => return Err(unexpected(&other)),
        };
        Ok(Response::new(rpc::RegisterReply { result: Some(result) }))
    }

    async fn heartbeat_inner(&self, request: Request<rpc::HeartbeatRequest>) -> Reply<rpc::HeartbeatReply> {
        let peer = peer(&request, &[Role::Cloud])?;
        let request = request.into_inner();
        own_name(&peer, &request.node)?;
        let load = convert::load(request.load).map_err(|error| invalid(&error))?;
        let command = Command::Heartbeat { node: request.node, boot_epoch: request.boot_epoch, load };
        match self.propose(RequestId::default(), command).await?.0 {
            Outcome::Heartbeat { known, draining } => Ok(Response::new(rpc::HeartbeatReply { known, draining })),
            Outcome::Refused(refusal) => Err(Status::invalid_argument(refusal.to_string())),
            other => Err(unexpected(&other)),
        }
    }

    async fn drain_inner(&self, request: Request<rpc::DrainRequest>) -> Reply<rpc::DrainReply> {
        let peer = peer(&request, &[Role::Cloud, Role::Operator, Role::Router])?;
        let request = request.into_inner();
        if peer.role == Role::Cloud {
            own_name(&peer, &request.node)?;
        }
        check_name("node", &request.node, false).map_err(|error| invalid(&error))?;
        let id = convert::request_id(&request.request_id).map_err(|error| invalid(&error))?;
        tracing::info!(node = request.node, draining = request.draining, by = %peer, "drain");
        match self.propose(id, Command::Drain { node: request.node, draining: request.draining }).await?.0 {
            Outcome::Drained { known } => Ok(Response::new(rpc::DrainReply { known })),
            other => Err(unexpected(&other)),
        }
    }

    async fn place_inner(&self, request: Request<rpc::PlaceRequest>) -> Reply<rpc::PlaceReply> {
        use rpc::place_reply::Result as Said;
        let peer = peer(&request, &[Role::Edge, Role::Operator])?;
        let request = request.into_inner();
        let id = convert::request_id(&request.request_id).map_err(|error| invalid(&error))?;
        let mut place = convert::place(request).map_err(|error| invalid(&error))?;
        place.device = device_name(&peer, &place.device)?;
        let result = match self.propose(id, Command::Place(place)).await? {
            (Outcome::Placed(ticket), now_ms) => Said::Ticket(ticket_to_wire(ticket, now_ms)),
            (Outcome::Refused(refusal), _) => Said::Refusal(refused(&peer, &refusal)),
            (other, _) => return Err(unexpected(&other)),
        };
        Ok(Response::new(rpc::PlaceReply { result: Some(result) }))
    }

    async fn status_inner(&self, request: Request<rpc::StatusRequest>) -> Reply<rpc::StatusReply> {
        peer(&request, Role::ALL)?;
        let now_ms = self.clock.now_ms();
        let read = self.log.read(|state| state.status(now_ms)).await;
        let status = read.map_err(|error| Status::unavailable(error.to_string()))?;
        let nodes = status.nodes.into_iter().map(|view| rpc::NodeStatus {
            card: Some(convert::card_to_wire(&view.node.card)),
            // Who holds which prompt's blocks is between the router and its nodes.
            load: Some(rpc::LoadReport { prefixes: Vec::new(), ..convert::load_to_wire(&view.node.load) }),
            draining: view.node.draining,
            heartbeat_age_ms: view.heartbeat_age_ms,
            alive: view.alive,
            devices: view.devices,
        });
        Ok(Response::new(rpc::StatusReply {
            nodes: nodes.collect(),
            devices: status.devices,
            epoch: status.epoch.0,
            applied: status.applied,
        }))
    }
}

fn refused(peer: &PeerIdentity, refusal: &Refusal) -> rpc::Refusal {
    tracing::debug!(device = %peer, %refusal, "no placement");
    convert::refusal_to_wire(refusal)
}

fn ticket_to_wire(ticket: control::Ticket, now_ms: u64) -> rpc::Ticket {
    let alternatives = ticket.alternatives.into_iter().map(|other| rpc::Alternative {
        node: other.node,
        address: other.address,
        reasons: other.reasons,
    });
    rpc::Ticket {
        node: ticket.node,
        address: ticket.address,
        server_name: ticket.server_name,
        epoch: ticket.epoch.0,
        // The state's clock never steps back, the wall clock may.
        expires_in_ms: ticket.expires_at_ms.saturating_sub(now_ms).min(TICKET_MS),
        reasons: ticket.reasons,
        alternatives: alternatives.collect(),
    }
}

fn outcome<T>(reply: &Reply<T>, refused: impl FnOnce(&T) -> bool) -> &'static str {
    match reply {
        Ok(reply) if refused(reply.get_ref()) => "refused",
        Ok(_) => "ok",
        Err(status) => match status.code() {
            tonic::Code::PermissionDenied | tonic::Code::Unauthenticated => "denied",
            tonic::Code::InvalidArgument => "invalid",
            tonic::Code::ResourceExhausted => "busy",
            _ => "failed",
        },
    }
}

/// Counts and times one method around its body.
macro_rules! measured {
    ($self:ident, $method:literal, $body:expr, $refused:expr) => {{
        let started = Instant::now();
        let reply = match $self.enter() {
            Ok(_place) => $body.await,
            Err(busy) => Err(busy),
        };
        let outcome = outcome(&reply, $refused);
        metrics::counter!(names::REQUESTS, names::LABEL_METHOD => $method, names::LABEL_OUTCOME => outcome).increment(1);
        metrics::histogram!(names::REQUEST_SECONDS, names::LABEL_METHOD => $method)
            .record(started.elapsed().as_secs_f64());
        reply
    }};
}

#[tonic::async_trait]
impl<L: CommandLog> Control for Service<L> {
    async fn register(&self, request: Request<rpc::RegisterRequest>) -> Reply<rpc::RegisterReply> {
        measured!(self, "register", self.register_inner(request), |reply| matches!(
            reply.result,
            Some(rpc::register_reply::Result::Refusal(_))
        ))
    }

    async fn heartbeat(&self, request: Request<rpc::HeartbeatRequest>) -> Reply<rpc::HeartbeatReply> {
        measured!(self, "heartbeat", self.heartbeat_inner(request), |reply| !reply.known)
    }

    async fn drain(&self, request: Request<rpc::DrainRequest>) -> Reply<rpc::DrainReply> {
        measured!(self, "drain", self.drain_inner(request), |reply| !reply.known)
    }

    async fn place(&self, request: Request<rpc::PlaceRequest>) -> Reply<rpc::PlaceReply> {
        measured!(self, "place", self.place_inner(request), |reply| matches!(
            reply.result,
            Some(rpc::place_reply::Result::Refusal(_))
        ))
    }

    async fn status(&self, request: Request<rpc::StatusRequest>) -> Reply<rpc::StatusReply> {
        measured!(self, "status", self.status_inner(request), |_| false)
    }
}

#[cfg(test)]
mod tests;
