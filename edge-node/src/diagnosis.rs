//! What keeps the cloud from taking part, in words for people: what is wrong, and what to do about it.
//! The log, `/ready`, `/tandem/status`, `tandem doctor` and the page all say it from here.

use serde::{Deserialize, Serialize};
use tandem_transport::{DialState, NoTarget, TlsFault, TransportError};

/// Why the cloud does not take part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// Stable word for programs.
    pub code: &'static str,
    /// What is wrong.
    pub problem: String,
    /// What a person can do about it.
    pub what_to_do: String,
    /// True if waiting does not mend it.
    pub lasting: bool,
}

impl Diagnosis {
    fn lasting(code: &'static str, problem: impl Into<String>, what_to_do: impl Into<String>) -> Self {
        Self { code, problem: problem.into(), what_to_do: what_to_do.into(), lasting: true }
    }

    fn passing(code: &'static str, problem: impl Into<String>, what_to_do: impl Into<String>) -> Self {
        Self { code, problem: problem.into(), what_to_do: what_to_do.into(), lasting: false }
    }

    /// Both on one line.
    #[must_use]
    pub fn line(&self) -> String {
        format!("{}; {}", self.problem, self.what_to_do)
    }
}

/// How the cloud stands, as `/tandem/status` and `/ready` say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// This node was started without a cloud.
    #[default]
    None,
    /// A link is up, and the cloud's model can take part.
    Connected,
    /// No link yet, or not again yet.
    Connecting,
    /// The cloud cannot take part; `problem` says why.
    Failed,
    /// The operator has cut the cloud off.
    Cut,
}

/// How the cloud stands, and what to do about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudState {
    /// The state.
    pub state: LinkState,
    /// Stable word for the problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What is wrong; also given while `connecting`, if an attempt has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// What a person can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub what_to_do: Option<String>,
}

impl CloudState {
    /// A state without a problem.
    #[must_use]
    pub fn of(state: LinkState) -> Self {
        Self { state, ..Self::default() }
    }

    /// A state with its reason.
    #[must_use]
    pub fn with(state: LinkState, why: Diagnosis) -> Self {
        Self { state, code: Some(why.code.to_owned()), problem: Some(why.problem), what_to_do: Some(why.what_to_do) }
    }

    /// Problem and advice on one line, once the cloud counts as failed.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let problem = self.problem.as_ref().filter(|_| self.state == LinkState::Failed)?;
        Some(format!("{problem}; {}", self.what_to_do.as_deref().unwrap_or("see the log of this node")))
    }

    /// What dialing says; `patient` while a cloud that is merely not there yet is no failure.
    #[must_use]
    pub fn of_dialing(dial: &DialState, patient: bool) -> Self {
        let error = match dial {
            DialState::Up => return Self::of(LinkState::Connected),
            DialState::Cut => return Self::of(LinkState::Cut),
            DialState::Dialing { error, .. } => error.as_ref(),
            DialState::Waiting { error, .. } => Some(error),
        };
        match error.map(diagnose) {
            None => Self::of(LinkState::Connecting),
            Some(why) if patient && !why.lasting => Self::with(LinkState::Connecting, why),
            Some(why) => Self::with(LinkState::Failed, why),
        }
    }
}

const COPY_CA: &str = "stop this node, copy the `ca` folder of the fleet's state folder over the one in its own (or give it \
    --identity), and start it again";
const CLOCKS: &str = "check the clocks of both machines, and start the node again whose certificate has expired";

/// What a failed attempt to reach the cloud means.
#[must_use]
pub fn diagnose(error: &TransportError) -> Diagnosis {
    match error {
        TransportError::Unauthorised { fault, reason } => certificate("the cloud node", *fault, reason),
        TransportError::NoTarget { cause, reason } => no_target(cause, reason),
        TransportError::Identity(identity) => Diagnosis::lasting(
            "bad_identity",
            format!("this node's certificate cannot be used: {identity}"),
            "start this node again, or give it another --identity",
        ),
        TransportError::Connect { server_name, reason, .. } => Diagnosis::lasting(
            "wrong_server_name",
            format!("{server_name:?} cannot be dialed: {reason}"),
            "write the cloud's address as host:port, or server-name@host:port",
        ),
        TransportError::WrongPeer { found, expected } => Diagnosis::lasting(
            "wrong_peer",
            format!("what answers at the cloud's address is {found}, expected {expected}"),
            "check the address after --cloud (a router's goes after --router)",
        ),
        TransportError::Incompatible { what, here, there } => Diagnosis::lasting(
            "incompatible",
            format!("the cloud node is another version: {what} here {here}, there {there}"),
            "run the same version on both machines",
        ),
        TransportError::NameInUse { reason } => Diagnosis::lasting(
            "name_in_use",
            format!("other edges use the name of this one: {reason}"),
            "give each edge a name of its own with --name",
        ),
        TransportError::Refused { reason, .. } => Diagnosis::passing(
            "cloud_busy",
            format!("the cloud node takes no more links now: {reason}"),
            "wait, or add a cloud node",
        ),
        TransportError::Timeout { .. } | TransportError::NobodyListens { .. } => Diagnosis::passing(
            "cloud_unreachable",
            "the cloud node does not answer",
            "check that it runs, that the address is right, and that UDP passes the firewalls on the way",
        ),
        TransportError::Bind { .. } => Diagnosis::passing(
            "no_socket",
            error.to_string(),
            "raise the limit of open files, or stop what holds the sockets",
        ),
        TransportError::Closed { .. }
        | TransportError::Lost { .. }
        | TransportError::Frame(_)
        | TransportError::Truncated
        | TransportError::Reset(_)
        | TransportError::Broken
        | TransportError::Cut => Diagnosis::passing(
            "link_lost",
            format!("the link to the cloud node ended: {error}"),
            "check that the cloud node runs; the link comes back by itself",
        ),
    }
}

/// A certificate that one of the two sides refuses.
fn certificate(peer: &str, fault: TlsFault, reason: &str) -> Diagnosis {
    match fault {
        TlsFault::WrongName => Diagnosis::lasting(
            "wrong_server_name",
            format!("{peer} has another name than the one it was dialed by: {reason}"),
            "write its name before the address, NAME.tandem@host:port, where NAME is what it was started with (--name)",
        ),
        TlsFault::PeerUntrusted => {
            let problem = format!("the certificate of {peer} is of another CA than this node's: {reason}");
            Diagnosis::lasting("untrusted_ca", problem, COPY_CA)
        }
        TlsFault::OwnUntrusted => {
            let problem = format!("{peer} does not accept this node's certificate: {reason}");
            Diagnosis::lasting("untrusted_ca", problem, COPY_CA)
        }
        TlsFault::PeerOutOfDate => {
            let problem = format!("the certificate of {peer} is not valid now: {reason}");
            Diagnosis::lasting("certificate_expired", problem, CLOCKS)
        }
        TlsFault::OwnOutOfDate => {
            let problem = format!("{peer} finds this node's certificate not valid now: {reason}");
            Diagnosis::lasting("certificate_expired", problem, CLOCKS)
        }
        TlsFault::Other => Diagnosis::lasting(
            "tls_failed",
            format!("no TLS connection with {peer}: {reason}"),
            "check that the address is that of a Tandem node, and that both machines have the same CA",
        ),
    }
}

/// An attempt that found no address to dial.
fn no_target(cause: &NoTarget, reason: &str) -> Diagnosis {
    match cause {
        NoTarget::UnknownHost { address } => Diagnosis::passing(
            "unknown_host",
            format!("the cloud's address {address} is unknown: {reason}"),
            "check its spelling and this machine's name server",
        ),
        NoTarget::RouterUnreachable => Diagnosis::passing(
            "router_unreachable",
            format!("no router answers: {reason}"),
            "check that `tandem router` runs, that the address after --router is right, and that TCP passes the firewalls",
        ),
        NoTarget::RouterCertificate(fault) => certificate("the router", *fault, reason),
        NoTarget::RouterDenied => Diagnosis::lasting(
            "router_denied",
            format!("the router refuses this node: {reason}"),
            "start it with the certificate of an edge (--identity)",
        ),
        NoTarget::UnknownModel { model, known } if known.is_empty() => Diagnosis::passing(
            "no_cloud_node",
            format!("the router knows no cloud node yet that could serve {model:?}"),
            "start one with `tandem cloud --router …`, or wait until it has loaded its model",
        ),
        NoTarget::UnknownModel { model, known } => unknown_model(model, known),
        NoTarget::NoNode => Diagnosis::passing(
            "no_cloud_node",
            format!("no cloud node can take this edge now: {reason}"),
            "wait, or add a cloud node",
        ),
        NoTarget::Other => {
            let what_to_do = "check the address after --router, and that both are of one version";
            Diagnosis::lasting("router_failed", format!("the router gives no cloud node: {reason}"), what_to_do)
        }
    }
}

/// The cloud serves other models than the one this edge asks for.
#[must_use]
pub fn unknown_model(model: &str, served: &[String]) -> Diagnosis {
    let names = served.join(", ");
    let first = served.first().map_or("NAME", String::as_str);
    Diagnosis::lasting(
        "unknown_model",
        format!("no cloud node serves the model {model:?}; served: {names}"),
        format!("start this edge with --cloud-model {first}, or a cloud node with that model"),
    )
}

/// Code of [`tokenizers_differ`].
pub const TOKENIZERS_DIFFER: &str = "tokenizers_differ";

/// The cloud's model has another tokenizer; `first` says from which token on, as far as that is known.
#[must_use]
pub fn tokenizers_differ(edge: &str, cloud: &str, first: &str) -> Diagnosis {
    Diagnosis::lasting(
        TOKENIZERS_DIFFER,
        format!("the tokenizers of {edge} and {cloud} differ{first}, so they cannot answer as one"),
        "pair models of one family, or use mode `local`",
    )
}

/// The connected node has failed an answer and is left alone for a while.
#[must_use]
pub fn node_fails(why: &str) -> Diagnosis {
    Diagnosis::passing(
        "cloud_node_fails",
        format!("the cloud node is connected and does not do its work: {why}"),
        "this edge tries it again by itself; look at that node's log and accelerator, or start it again",
    )
}

#[cfg(test)]
mod tests;
