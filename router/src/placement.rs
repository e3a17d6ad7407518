//! Which cloud node takes a device: a pure function of membership, load, prefixes, latencies and
//! the device's previous node, to a ranking with reasons.
//!
//! Every node gets a cost: the microseconds that the device would wait there for a first verdict,
//! round trip + queue + crowding + prefill of what the node does not hold. The cheapest wins, but
//! a device leaves its node only for a clear gain. Integers only, so that every replica ranks alike.

use std::{collections::BTreeMap, fmt};

use tandem_proto::{ids::Digest, limits::KV_BLOCK_TOKENS};

use crate::node::{LoadReport, ModelCard};

/// The numbers behind the costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementConfig {
    /// A node whose last heartbeat is older gets no sessions, milliseconds.
    pub stale_ms: u64,
    /// Round trip assumed inside a region, µs.
    pub rtt_same_region_us: u64,
    /// Round trip assumed between regions, µs.
    pub rtt_other_region_us: u64,
    /// Round trip assumed where a region is unknown, µs.
    pub rtt_unknown_us: u64,
    /// Prefill of one token that a node does not hold, µs.
    pub prefill_us_per_token: u64,
    /// Extra wait on a node whose sessions are all taken, µs; grows with the square of its load.
    pub crowding_us: u64,
    /// Tokens a second assumed for a node that has not worked lately.
    pub tokens_per_second_idle: u64,
    /// A move must gain at least this, µs ...
    pub hysteresis_us: u64,
    /// ... and at least this share of the present cost, in thousandths.
    pub hysteresis_permille: u64,
}

impl Default for PlacementConfig {
    fn default() -> Self {
        Self {
            stale_ms: 5_000,
            rtt_same_region_us: 5_000,
            rtt_other_region_us: 60_000,
            rtt_unknown_us: 30_000,
            prefill_us_per_token: 500,
            crowding_us: 200_000,
            tokens_per_second_idle: 2_000,
            hysteresis_us: 10_000,
            hysteresis_permille: 200,
        }
    }
}

/// A node as placement sees it.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Name.
    pub name: &'a str,
    /// Region, empty if unknown.
    pub region: &'a str,
    /// Models it serves.
    pub models: &'a [ModelCard],
    /// True if it takes no new sessions.
    pub draining: bool,
    /// Time of its last heartbeat, ms.
    pub heartbeat_at_ms: u64,
    /// Its last report; `prefixes` are sorted.
    pub load: &'a LoadReport,
}

/// What a device asks for.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// Model name or digest in hex.
    pub model: &'a str,
    /// Chained hashes of the prompt's blocks, first to last: holding one implies the ones before.
    pub prefix: &'a [Digest],
    /// The device's region, empty if unknown.
    pub region: &'a str,
    /// Round trips that the device has measured, µs by node.
    pub latencies_us: &'a BTreeMap<String, u32>,
    /// Nodes that the device has just failed to reach, the latest first: they come last, and the latest at the
    /// very end, so that a device whose nodes have all failed tries them in turn.
    pub avoid: &'a [String],
    /// The node that holds the device's unexpired ticket.
    pub previous: Option<&'a str>,
    /// Now, ms, on the clock of the heartbeats.
    pub now_ms: u64,
}

/// A node that can take the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranked {
    /// Name.
    pub node: String,
    /// Expected wait, µs, before hysteresis.
    pub cost_us: u64,
    /// What the cost is made of, for people.
    pub reasons: Vec<String>,
}

/// Why a node cannot take the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exclusion {
    /// It does not serve the model.
    OtherModel,
    /// Its last heartbeat is too old.
    Stale {
        /// Age, ms.
        age_ms: u64,
    },
    /// Its engine hangs.
    Stalled {
        /// For how long, ms.
        ms: u32,
    },
    /// It is being drained.
    Draining,
    /// All its sessions are taken.
    Full {
        /// Sessions under way.
        sessions: u32,
    },
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherModel => f.write_str("serves other models"),
            Self::Stale { age_ms } => write!(f, "no heartbeat for {age_ms} ms"),
            Self::Stalled { ms } => write!(f, "its engine has got nowhere for {ms} ms"),
            Self::Draining => f.write_str("draining"),
            Self::Full { sessions } => write!(f, "full with {sessions} sessions"),
        }
    }
}

/// The outcome of placement.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ranking {
    /// Nodes that can take the device, best first.
    pub ranked: Vec<Ranked>,
    /// Nodes that cannot, by name.
    pub excluded: Vec<(String, Exclusion)>,
}

/// Ranks `candidates` for `query`. Ties go to the lower name.
pub fn rank<'a>(
    config: &PlacementConfig,
    candidates: impl IntoIterator<Item = Candidate<'a>>,
    query: &Query<'_>,
) -> Ranking {
    let mut ranking = Ranking::default();
    let mut keyed = Vec::new();
    for node in candidates {
        if let Some(why) = exclusion(config, &node, query) {
            ranking.excluded.push((node.name.to_owned(), why));
        } else {
            let ranked = cost(config, &node, query);
            // 0 for a node that is not to be avoided; the earlier in the list, the larger.
            let avoided = query.avoid.iter().position(|name| name == node.name).map_or(0, |at| query.avoid.len() - at);
            let weight = match (avoided > 0, query.previous == Some(node.name)) {
                (false, true) => stay_weight(config, ranked.cost_us),
                _ => ranked.cost_us,
            };
            keyed.push(((avoided, weight, ranked.node.clone()), ranked));
        }
    }
    keyed.sort_by(|(a, _), (b, _)| a.cmp(b));
    for ((avoided, weight, _), mut ranked) in keyed {
        if avoided > 0 {
            ranked.reasons.push("the device has just failed to reach it".into());
        } else if weight < ranked.cost_us {
            ranked.reasons.push("holds the device's ticket".into());
        }
        ranking.ranked.push(ranked);
    }
    ranking.excluded.sort_by(|(a, _), (b, _)| a.cmp(b));
    ranking
}

fn exclusion(config: &PlacementConfig, node: &Candidate<'_>, query: &Query<'_>) -> Option<Exclusion> {
    let age_ms = query.now_ms.saturating_sub(node.heartbeat_at_ms);
    if !node.models.iter().any(|model| model.answers_to(query.model)) {
        Some(Exclusion::OtherModel)
    } else if age_ms > config.stale_ms {
        Some(Exclusion::Stale { age_ms })
    } else if node.load.stalled_ms > 0 {
        Some(Exclusion::Stalled { ms: node.load.stalled_ms })
    } else if node.draining {
        Some(Exclusion::Draining)
    } else if node.load.full() && query.previous != Some(node.name) {
        // A device that is there already occupies one of the sessions.
        Some(Exclusion::Full { sessions: node.load.sessions })
    } else {
        None
    }
}

/// What the present node counts for: another one must beat even this.
fn stay_weight(config: &PlacementConfig, cost_us: u64) -> u64 {
    let share = cost_us.saturating_mul(config.hysteresis_permille) / 1000;
    cost_us.saturating_sub(config.hysteresis_us.max(share))
}

fn cost(config: &PlacementConfig, node: &Candidate<'_>, query: &Query<'_>) -> Ranked {
    let mut reasons = Vec::new();
    let ms = |us: u64| us.div_ceil(1000);

    let rtt_us = if let Some(measured) = query.latencies_us.get(node.name) {
        reasons.push(format!("round trip {} ms measured", ms(u64::from(*measured))));
        u64::from(*measured)
    } else if query.region.is_empty() || node.region.is_empty() {
        config.rtt_unknown_us
    } else if query.region == node.region {
        reasons.push(format!("in region {}", node.region));
        config.rtt_same_region_us
    } else {
        reasons.push(format!("in region {}, the device in {}", node.region, query.region));
        config.rtt_other_region_us
    };

    let rate = match node.load.tokens_per_second {
        0 => config.tokens_per_second_idle,
        measured => u64::from(measured),
    };
    let queue_us = node.load.queued_tokens.saturating_mul(1_000_000) / rate.max(1);
    if queue_us > 0 {
        reasons.push(format!("queue {} ms", ms(queue_us)));
    }

    let taken_permille = occupancy_permille(node.load);
    let crowding_us = config.crowding_us.saturating_mul(taken_permille * taken_permille) / 1_000_000;
    reasons.push(format!("{} sessions", node.load.sessions));

    let held = query.prefix.iter().rposition(|hash| node.load.prefixes.binary_search(hash).is_ok());
    let held_blocks = held.map_or(0, |last| last + 1);
    if held_blocks > 0 {
        reasons.push(format!("holds {held_blocks} of {} prefix blocks", query.prefix.len()));
    }
    let missing_tokens = ((query.prefix.len() - held_blocks) * KV_BLOCK_TOKENS) as u64;
    let prefill_us = missing_tokens.saturating_mul(config.prefill_us_per_token);

    let cost_us = rtt_us.saturating_add(queue_us).saturating_add(crowding_us).saturating_add(prefill_us);
    reasons.insert(0, format!("expected wait {} ms", ms(cost_us)));
    Ranked { node: node.name.to_owned(), cost_us, reasons }
}

/// Sessions or KV blocks taken, whichever is tighter, in thousandths, at most 1000.
fn occupancy_permille(load: &LoadReport) -> u64 {
    let share = |used: u32, max: u32| match max {
        0 => 0,
        _ => (u64::from(used) * 1000 / u64::from(max)).min(1000),
    };
    share(load.sessions, load.sessions_max).max(share(load.kv_blocks_used, load.kv_blocks_max))
}

#[cfg(test)]
mod tests;
