//! Commands into the state machine and outcomes out of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tandem_proto::ids::{Digest, Epoch};

use crate::node::{InvalidField, LoadReport, NodeCard};

/// Chosen by the caller, the same for every retry of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct RequestId(pub [u8; 16]);

/// A command with what makes it deterministic.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Id of the call. Together with the caller's name it is the key of the dedup table.
    pub id: RequestId,
    /// The proposer's wall clock, ms since the Unix epoch.
    pub now_ms: u64,
    /// What to do.
    pub command: Command,
}

/// What can be done to the state.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Adds a node or replaces the one of that name.
    RegisterNode {
        /// What it is.
        card: NodeCard,
        /// How busy it is.
        load: LoadReport,
    },
    /// Refreshes a node's load.
    Heartbeat {
        /// Name of the node.
        node: String,
        /// Its start; must be that of the registration.
        boot_epoch: u64,
        /// How busy it is.
        load: LoadReport,
    },
    /// Stops or resumes placement on a node. A restart of the node ends the drain too.
    Drain {
        /// Name of the node.
        node: String,
        /// False ends the drain.
        draining: bool,
    },
    /// Asks for a ticket.
    Place(PlaceCommand),
    /// Forgets nodes and tickets whose time has passed.
    Expire,
    /// The state was read from a snapshot. Every later epoch is larger than `floor`. The request's time is the
    /// state's from here on, even if it lies before the snapshot's: what is stored keeps its age. A stored
    /// registration leaves its name free until its node reports.
    Restart {
        /// Largest epoch that may have been issued already.
        floor: Epoch,
    },
}

/// What a device asks for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PlaceCommand {
    /// Name of the device.
    pub device: String,
    /// Model name or digest in hex.
    pub model: String,
    /// Chained block hashes of the prompt, first to last; may be empty.
    pub prefix: Vec<Digest>,
    /// Region, empty if unknown.
    pub region: String,
    /// Measured round trips, µs by node.
    pub latencies_us: BTreeMap<String, u32>,
    /// Nodes that the device has just failed to reach, the latest first.
    pub avoid: Vec<String>,
}

/// Permission to use a node under an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The node.
    pub node: String,
    /// `host:port`.
    pub address: String,
    /// Name to check in the node's certificate.
    pub server_name: String,
    /// Fencing counter.
    #[serde(with = "super::epoch_as_number")]
    pub epoch: Epoch,
    /// End of validity on the state's clock, ms.
    pub expires_at_ms: u64,
    /// Why this node, for people.
    pub reasons: Vec<String>,
    /// Other nodes, best first. They need a ticket of their own.
    pub alternatives: Vec<Alternative>,
}

/// A node that would have done as well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// The node.
    pub node: String,
    /// `host:port`.
    pub address: String,
    /// What its cost is made of.
    pub reasons: Vec<String>,
}

/// Why the answer is no.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// No node serves the model.
    #[error("no node serves model `{model}`; known models: {}", listed(known))]
    UnknownModel {
        /// What was asked for.
        model: String,
        /// Models that some node serves.
        known: Vec<String>,
    },
    /// Nodes serve the model, but none can take the device.
    #[error("no node can take a session of model `{model}` now: {}", excluded_text(excluded))]
    NoNode {
        /// What was asked for.
        model: String,
        /// Each node with the reason.
        excluded: Vec<(String, String)>,
    },
    /// A table is full.
    #[error("{message}")]
    Full {
        /// Which one, and its bound.
        message: String,
    },
    /// A newer start of the node is registered and reports.
    #[error("{message}")]
    Taken {
        /// Which node, and what to do.
        message: String,
    },
    /// A field is wrong.
    #[error("{message}")]
    Invalid {
        /// Which one, and what is wrong with it.
        message: String,
    },
}

impl Refusal {
    pub(super) fn taken(node: &str) -> Self {
        Self::Taken {
            message: format!(
                "a newer start of node `{node}` is registered and reports; stop one of the two, or give it another --name"
            ),
        }
    }

    pub(super) fn full(what: &str, max: usize) -> Self {
        Self::Full { message: format!("the router's table of {what} is full ({max}); retry later or add a router") }
    }
}

impl From<InvalidField> for Refusal {
    fn from(invalid: InvalidField) -> Self {
        Self::Invalid { message: format!("request field {invalid}") }
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none (is a cloud node running?)".into() } else { names.join(", ") }
}

fn excluded_text(excluded: &[(String, String)]) -> String {
    excluded.iter().map(|(node, why)| format!("{node} ({why})")).collect::<Vec<_>>().join(", ")
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The node is registered.
    Registered,
    /// The heartbeat was taken, or the node must register again.
    Heartbeat {
        /// False: unknown node or another start of it.
        known: bool,
        /// True: the node is being drained.
        draining: bool,
    },
    /// The drain was set.
    Drained {
        /// False: no such node.
        known: bool,
    },
    /// A ticket.
    Placed(Ticket),
    /// No.
    Refused(Refusal),
    /// What was forgotten.
    Expired {
        /// Nodes.
        nodes: usize,
        /// Tickets.
        devices: usize,
    },
    /// The counter stands at least here now.
    Restarted {
        /// Last epoch issued or skipped.
        #[serde(with = "super::epoch_as_number")]
        epoch: Epoch,
    },
}
