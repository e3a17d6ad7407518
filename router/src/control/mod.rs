//! The control plane's state: a deterministic state machine fed by commands.
//!
//! Call order: build a [`Request`] (its time and id are inputs, never read here), hand it to
//! [`ControlState::apply`] with its index in the log, act on the [`Outcome`]. The same commands
//! give the same state and outcomes on every replica. Callers never touch the state: they propose
//! through [`log::CommandLog`], so that raft can replace the single node under it.
//!
//! Epochs come from one counter for all devices: every new one is above all before it, so a device
//! whose entry was dropped can still not see an old one again.

mod command;
#[cfg(feature = "server")]
pub mod log;
mod state;
#[cfg(feature = "server")]
mod store;

pub use command::{Alternative, Command, Outcome, PlaceCommand, Refusal, Request, RequestId, Ticket};
pub use state::{ControlState, Node, NodeView, RestoreError, StatusView};

/// Most registered nodes.
pub const NODES_MAX: usize = 1024;
/// Most (device, model) pairs with a ticket.
pub const DEVICES_MAX: usize = 65_536;
/// Outcomes remembered, so that a repeated request gets the same answer.
pub const DEDUP_MAX: usize = 4096;
/// Most prefix blocks of one place request; longer chains are judged by their front.
pub const PREFIX_BLOCKS_MAX: usize = 256;
/// Most measured latencies of one place request.
pub const LATENCIES_MAX: usize = 64;
/// Most nodes that a device may ask to avoid.
pub const AVOID_MAX: usize = 16;
/// Most alternatives and exclusions reported.
pub const ALTERNATIVES_MAX: usize = 16;
/// Most model names listed in a refusal.
pub const LISTED_MODELS_MAX: usize = 64;
/// How long a ticket is valid, ms.
pub const TICKET_MS: u64 = 60_000;
/// A node without a heartbeat for so long is forgotten, ms.
pub const NODE_FORGET_MS: u64 = 60_000;

/// Epochs in JSON.
pub(crate) mod epoch_as_number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use tandem_proto::ids::Epoch;

    pub(crate) fn serialize<S: Serializer>(epoch: &Epoch, to: S) -> Result<S::Ok, S::Error> {
        epoch.0.serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Epoch, D::Error> {
        u64::deserialize(from).map(Epoch)
    }
}

#[cfg(test)]
mod tests;
