//! The state and how commands change it.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use tandem_proto::ids::Epoch;

use super::{
    ALTERNATIVES_MAX, AVOID_MAX, Alternative, Command, DEDUP_MAX, DEVICES_MAX, LATENCIES_MAX, LISTED_MODELS_MAX,
    NODE_FORGET_MS, NODES_MAX, Outcome, PREFIX_BLOCKS_MAX, PlaceCommand, Refusal, Request, RequestId, TICKET_MS,
    Ticket,
};
use crate::{
    node::{InvalidField, LoadReport, NodeCard, check_name},
    placement::{self, Candidate, PlacementConfig, Query, Ranked, Ranking},
};

/// A registered node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// What it is.
    pub card: NodeCard,
    /// Its last report.
    pub load: LoadReport,
    /// True if it takes no new sessions.
    pub draining: bool,
    /// Time of its last heartbeat, ms on the state's clock.
    pub heartbeat_at_ms: u64,
    /// True if it has registered or reported since the state was last read from a snapshot.
    #[serde(default)]
    pub heard: bool,
}

/// Who owns a device's sessions of one model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ownership {
    node: String,
    boot_epoch: u64,
    epoch: u64,
    expires_at_ms: u64,
}

/// (device, model) of a ticket, or (caller, request id) of a remembered outcome.
type DeviceKey = (String, String);
type DedupKey = (String, RequestId);

/// The control plane's whole state.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ControlState {
    config: PlacementConfig,
    clock_ms: u64,
    applied: u64,
    epoch: u64,
    nodes: BTreeMap<String, Node>,
    devices: BTreeMap<DeviceKey, Ownership>,
    outcomes: BTreeMap<DedupKey, Outcome>,
    outcome_order: VecDeque<DedupKey>,
}

/// The state as stored: maps as sorted lists, so that equal states have equal bytes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    clock_ms: u64,
    applied: u64,
    epoch: u64,
    nodes: Vec<Node>,
    devices: Vec<(DeviceKey, Ownership)>,
    outcomes: Vec<(DedupKey, Outcome)>,
}

/// A snapshot that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Not of the expected form.
    #[error("not of the expected form: {0}")]
    Form(#[from] serde_json::Error),
    /// A table is larger than its bound.
    #[error("{what} has {len} entries, at most {max} are allowed")]
    TooLarge {
        /// Which table.
        what: &'static str,
        /// Entries found.
        len: usize,
        /// Its bound.
        max: usize,
    },
    /// A node's card breaks a limit.
    #[error("node `{node}`: {source}")]
    Node {
        /// Name of the node.
        node: String,
        /// What is wrong.
        source: InvalidField,
    },
    /// A ticket carries an epoch that the counter has not reached.
    #[error("a ticket has epoch {ticket}, the counter stands at {counter}")]
    EpochAhead {
        /// Epoch of the ticket.
        ticket: u64,
        /// The counter.
        counter: u64,
    },
}

/// A node for `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    /// The node.
    pub node: Node,
    /// Age of its last heartbeat, ms.
    pub heartbeat_age_ms: u64,
    /// False: too old to be placed on.
    pub alive: bool,
    /// Unexpired tickets that name it.
    pub devices: u32,
}

/// What `status` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusView {
    /// Nodes by name.
    pub nodes: Vec<NodeView>,
    /// Unexpired tickets.
    pub devices: u32,
    /// Last epoch issued.
    pub epoch: Epoch,
    /// Index of the last applied command.
    pub applied: u64,
}

impl ControlState {
    /// An empty state that places by `config`. The configuration is no part of a snapshot: all
    /// replicas must be given the same.
    #[must_use]
    pub fn new(config: PlacementConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// Last epoch issued.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }

    /// Index of the last applied command.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// The state's clock, ms: the latest time that any command has carried.
    #[must_use]
    pub fn clock_ms(&self) -> u64 {
        self.clock_ms
    }

    /// Applies the command at `index` of the log; indices rise, and the log hands each over once. A
    /// proposer's clock that steps back is ignored, except in [`Command::Restart`].
    pub fn apply(&mut self, index: u64, request: Request) -> Outcome {
        self.applied = self.applied.max(index);
        if matches!(request.command, Command::Restart { .. }) {
            self.restart_clock(request.now_ms);
        }
        self.clock_ms = self.clock_ms.max(request.now_ms);
        let key = caller(&request.command).map(|name| (name.to_owned(), request.id));
        if let Some(known) = key.as_ref().and_then(|key| self.outcomes.get(key)) {
            return known.clone();
        }
        let outcome = match request.command {
            Command::RegisterNode { card, load } => self.register(card, load),
            Command::Heartbeat { node, boot_epoch, load } => self.heartbeat(&node, boot_epoch, load),
            Command::Drain { node, draining } => self.drain(&node, draining),
            Command::Place(place) => self.place(&place),
            Command::Expire => self.expire(),
            Command::Restart { floor } => {
                self.epoch = self.epoch.max(floor.0);
                for node in self.nodes.values_mut() {
                    node.heard = false;
                }
                Outcome::Restarted { epoch: Epoch(self.epoch) }
            }
        };
        // What was refused may be possible on the next try.
        if let (Some(key), false) = (key, matches!(outcome, Outcome::Refused(_))) {
            self.remember(key, outcome.clone());
        }
        outcome
    }

    /// Goes on from `now_ms`. Where that lies before what is stored, the clock was ahead then or is behind now:
    /// which of both is unknown, so everything stored keeps its age.
    fn restart_clock(&mut self, now_ms: u64) {
        let back_ms = self.clock_ms.saturating_sub(now_ms);
        if back_ms == 0 {
            return;
        }
        self.clock_ms = now_ms;
        for node in self.nodes.values_mut() {
            node.heartbeat_at_ms = node.heartbeat_at_ms.saturating_sub(back_ms);
        }
        for owner in self.devices.values_mut() {
            owner.expires_at_ms = owner.expires_at_ms.saturating_sub(back_ms).min(now_ms.saturating_add(TICKET_MS));
        }
    }

    fn remember(&mut self, key: DedupKey, outcome: Outcome) {
        if self.outcome_order.len() >= DEDUP_MAX
            && let Some(oldest) = self.outcome_order.pop_front()
        {
            self.outcomes.remove(&oldest);
        }
        self.outcome_order.push_back(key.clone());
        self.outcomes.insert(key, outcome);
    }

    fn register(&mut self, card: NodeCard, load: LoadReport) -> Outcome {
        let load = match card.check().and_then(|()| load.checked()) {
            Ok(load) => load,
            Err(invalid) => return Outcome::Refused(invalid.into()),
        };
        let mut draining = false;
        if let Some(present) = self.nodes.get(&card.name) {
            let alive = self.clock_ms.saturating_sub(present.heartbeat_at_ms) <= self.config.stale_ms;
            if present.heard && alive && card.boot_epoch < present.card.boot_epoch {
                // Two processes under one name: the older one must not take the newer one's place. Or the clock
                // was set back between two starts; then this one is let in once the other is silent.
                return Outcome::Refused(Refusal::taken(&card.name));
            }
            draining = present.draining && card.boot_epoch == present.card.boot_epoch;
        } else if self.nodes.len() >= NODES_MAX {
            return Outcome::Refused(Refusal::full("nodes", NODES_MAX));
        }
        let node = Node { load, draining, heartbeat_at_ms: self.clock_ms, heard: true, card };
        self.nodes.insert(node.card.name.clone(), node);
        Outcome::Registered
    }

    fn heartbeat(&mut self, name: &str, boot_epoch: u64, load: LoadReport) -> Outcome {
        let Some(node) = self.nodes.get_mut(name).filter(|node| node.card.boot_epoch == boot_epoch) else {
            return Outcome::Heartbeat { known: false, draining: false };
        };
        match load.checked() {
            Ok(load) => {
                node.load = load;
                node.heartbeat_at_ms = self.clock_ms;
                node.heard = true;
                Outcome::Heartbeat { known: true, draining: node.draining }
            }
            Err(invalid) => Outcome::Refused(invalid.into()),
        }
    }

    fn drain(&mut self, name: &str, draining: bool) -> Outcome {
        let node = self.nodes.get_mut(name);
        let known = node.is_some();
        if let Some(node) = node {
            node.draining = draining;
        }
        Outcome::Drained { known }
    }

    fn place(&mut self, place: &PlaceCommand) -> Outcome {
        if let Err(invalid) = check_place(place) {
            return Outcome::Refused(invalid.into());
        }
        let key = (place.device.clone(), place.model.clone());
        let now_ms = self.clock_ms;
        let previous = self.devices.get(&key).filter(|owner| owner.expires_at_ms > now_ms).cloned();
        let ranking = self.rank(place, previous.as_ref().map(|owner| owner.node.as_str()));
        let mut ranked = ranking.ranked.iter();
        let Some((best, node)) = ranked.next().and_then(|best| Some((best, self.nodes.get(&best.node)?))) else {
            return Outcome::Refused(self.refusal(place, ranking));
        };
        // A restarted node has lost its sessions: it is a new owner.
        let epoch = match previous {
            Some(owner) if owner.node == best.node && owner.boot_epoch == node.card.boot_epoch => owner.epoch,
            _ => self.epoch.saturating_add(1),
        };
        let owner = Ownership {
            node: best.node.clone(),
            boot_epoch: node.card.boot_epoch,
            epoch,
            expires_at_ms: now_ms.saturating_add(TICKET_MS),
        };
        let ticket = Ticket {
            node: node.card.name.clone(),
            address: node.card.address.clone(),
            server_name: node.card.server_name.clone(),
            epoch: Epoch(epoch),
            expires_at_ms: owner.expires_at_ms,
            reasons: best.reasons.clone(),
            alternatives: ranked.take(ALTERNATIVES_MAX).filter_map(|other| self.alternative(other)).collect(),
        };
        if !self.devices.contains_key(&key) && self.devices.len() >= DEVICES_MAX {
            self.forget_tickets();
            if self.devices.len() >= DEVICES_MAX {
                return Outcome::Refused(Refusal::full("devices", DEVICES_MAX));
            }
        }
        self.devices.insert(key, owner);
        self.epoch = self.epoch.max(epoch);
        Outcome::Placed(ticket)
    }

    fn rank(&self, place: &PlaceCommand, previous: Option<&str>) -> Ranking {
        let candidates = self.nodes.values().map(|node| Candidate {
            name: &node.card.name,
            region: &node.card.region,
            models: &node.card.models,
            draining: node.draining,
            heartbeat_at_ms: node.heartbeat_at_ms,
            load: &node.load,
        });
        let query = Query {
            model: &place.model,
            prefix: &place.prefix[..place.prefix.len().min(PREFIX_BLOCKS_MAX)],
            region: &place.region,
            latencies_us: &place.latencies_us,
            avoid: &place.avoid,
            previous,
            now_ms: self.clock_ms,
        };
        placement::rank(&self.config, candidates, &query)
    }

    fn alternative(&self, ranked: &Ranked) -> Option<Alternative> {
        let node = self.nodes.get(&ranked.node)?;
        let address = node.card.address.clone();
        Some(Alternative { node: ranked.node.clone(), address, reasons: ranked.reasons.clone() })
    }

    fn refusal(&self, place: &PlaceCommand, ranking: Ranking) -> Refusal {
        let model = place.model.clone();
        let others = |(_, why): &(String, placement::Exclusion)| *why == placement::Exclusion::OtherModel;
        if ranking.excluded.iter().all(others) {
            let mut known: Vec<_> =
                self.nodes.values().flat_map(|node| &node.card.models).map(|model| model.name.clone()).collect();
            known.sort_unstable();
            known.dedup();
            known.truncate(LISTED_MODELS_MAX);
            return Refusal::UnknownModel { model, known };
        }
        let serving = ranking.excluded.into_iter().filter(|entry| !others(entry));
        let excluded = serving.take(ALTERNATIVES_MAX).map(|(node, why)| (node, why.to_string())).collect();
        Refusal::NoNode { model, excluded }
    }

    fn forget_tickets(&mut self) -> usize {
        let before = self.devices.len();
        self.devices.retain(|_, owner| owner.expires_at_ms > self.clock_ms);
        before - self.devices.len()
    }

    fn expire(&mut self) -> Outcome {
        let before = self.nodes.len();
        self.nodes.retain(|_, node| self.clock_ms.saturating_sub(node.heartbeat_at_ms) <= NODE_FORGET_MS);
        Outcome::Expired { nodes: before - self.nodes.len(), devices: self.forget_tickets() }
    }

    /// What the router knows at `now_ms`.
    #[must_use]
    pub fn status(&self, now_ms: u64) -> StatusView {
        let now_ms = now_ms.max(self.clock_ms);
        let mut by_node = BTreeMap::<&str, u32>::new();
        let mut devices = 0;
        for owner in self.devices.values().filter(|owner| owner.expires_at_ms > now_ms) {
            *by_node.entry(&owner.node).or_default() += 1;
            devices += 1;
        }
        let nodes = self.nodes.values().map(|node| {
            let heartbeat_age_ms = now_ms.saturating_sub(node.heartbeat_at_ms);
            NodeView {
                node: node.clone(),
                heartbeat_age_ms,
                alive: heartbeat_age_ms <= self.config.stale_ms,
                devices: by_node.get(node.card.name.as_str()).copied().unwrap_or(0),
            }
        });
        StatusView { nodes: nodes.collect(), devices, epoch: Epoch(self.epoch), applied: self.applied }
    }

    /// The state as bytes. Equal states give equal bytes.
    pub fn snapshot(&self) -> Result<Vec<u8>, serde_json::Error> {
        let remembered =
            self.outcome_order.iter().filter_map(|key| Some((key.clone(), self.outcomes.get(key)?.clone())));
        serde_json::to_vec(&Snapshot {
            clock_ms: self.clock_ms,
            applied: self.applied,
            epoch: self.epoch,
            nodes: self.nodes.values().cloned().collect(),
            devices: self.devices.iter().map(|(key, owner)| (key.clone(), owner.clone())).collect(),
            outcomes: remembered.collect(),
        })
    }

    /// The state from the bytes of [`ControlState::snapshot`].
    pub fn restore(config: PlacementConfig, bytes: &[u8]) -> Result<Self, RestoreError> {
        let stored: Snapshot = serde_json::from_slice(bytes)?;
        let tables = [
            ("nodes", stored.nodes.len(), NODES_MAX),
            ("devices", stored.devices.len(), DEVICES_MAX),
            ("outcomes", stored.outcomes.len(), DEDUP_MAX),
        ];
        if let Some(&(what, len, max)) = tables.iter().find(|(_, len, max)| len > max) {
            return Err(RestoreError::TooLarge { what, len, max });
        }
        for node in &stored.nodes {
            node.card.check().map_err(|source| RestoreError::Node { node: node.card.name.clone(), source })?;
        }
        if let Some(ticket) = stored.devices.iter().map(|(_, owner)| owner.epoch).find(|epoch| *epoch > stored.epoch) {
            return Err(RestoreError::EpochAhead { ticket, counter: stored.epoch });
        }
        Ok(Self {
            config,
            clock_ms: stored.clock_ms,
            applied: stored.applied,
            epoch: stored.epoch,
            nodes: stored.nodes.into_iter().map(|node| (node.card.name.clone(), node)).collect(),
            devices: stored.devices.into_iter().collect(),
            outcome_order: stored.outcomes.iter().map(|(key, _)| key.clone()).collect(),
            outcomes: stored.outcomes.into_iter().collect(),
        })
    }
}

/// Whose request ids these are; `None` where repeating does no harm.
fn caller(command: &Command) -> Option<&str> {
    match command {
        Command::Place(place) => Some(&place.device),
        Command::RegisterNode { .. }
        | Command::Heartbeat { .. }
        | Command::Drain { .. }
        | Command::Expire
        | Command::Restart { .. } => None,
    }
}

fn check_place(place: &PlaceCommand) -> Result<(), InvalidField> {
    check_name("device", &place.device, false)?;
    check_name("model", &place.model, false)?;
    check_name("region", &place.region, true)?;
    let lists = [("latencies", place.latencies_us.len(), LATENCIES_MAX), ("avoid", place.avoid.len(), AVOID_MAX)];
    for (field, len, max) in lists {
        if len > max {
            return Err(InvalidField { field, problem: format!("has {len} entries, at most {max} are allowed") });
        }
    }
    Ok(())
}
