//! Who may open a session. A pure function over counters; every bound of the node is named here.

use serde::{Deserialize, Serialize};
use tandem_proto::limits::GRAMMAR_BYTES_MAX;
use tandem_proto::message::RefuseCode;

/// Bounds of a cloud node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Bounds {
    /// Most open sessions.
    pub sessions_max: usize,
    /// Most open sessions of one device.
    pub sessions_per_device_max: usize,
    /// Most sessions kept for resumption after their link broke.
    pub parked_max: usize,
    /// How long such a session is kept, milliseconds.
    pub parked_ms_max: u64,
    /// A session without a frame for this long is closed, milliseconds.
    pub idle_ms_max: u64,
    /// Most jobs waiting for the model.
    pub jobs_max: usize,
    /// Longest grammar of a session, bytes; those past the wire's own bound do not arrive.
    pub grammar_bytes_max: usize,
    /// KV blocks of the node; 0 for what the sessions can fill and the memory allows.
    pub kv_blocks: usize,
    /// Most memory for the KV state of sessions that is kept for later ones of their tenant which begin
    /// alike, MiB of the node's KV blocks; open sessions come first. 0 keeps none.
    pub prefix_cache_mib_max: u64,
    /// Free KV blocks below which no new session is admitted.
    pub kv_blocks_reserve: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            sessions_max: 256,
            sessions_per_device_max: 64,
            parked_max: 256,
            parked_ms_max: 30_000,
            idle_ms_max: 300_000,
            jobs_max: 512,
            grammar_bytes_max: GRAMMAR_BYTES_MAX,
            kv_blocks: 0,
            prefix_cache_mib_max: 4096,
            kv_blocks_reserve: 32,
        }
    }
}

/// The node's load when a session asks for admission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Open sessions.
    pub sessions: usize,
    /// Open sessions of the device that knocks.
    pub sessions_of_device: usize,
    /// Jobs waiting for the model.
    pub jobs: usize,
    /// Free KV blocks.
    pub kv_blocks_free: usize,
    /// Free KV blocks the new sequence needs.
    pub kv_blocks_wanted: usize,
    /// How long the engine has made no progress, if it hangs, milliseconds; else 0.
    pub stalled_ms: u32,
    /// True once the node is shutting down.
    pub draining: bool,
}

/// Why no session is admitted now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The engine hangs.
    #[error("the node's engine has got nowhere for {0} ms; go to another node")]
    Stalled(u32),
    /// The node shuts down.
    #[error("the node is shutting down; ask the router for another one")]
    Draining,
    /// All sessions are taken.
    #[error("all {0} sessions of the node are taken")]
    Sessions(usize),
    /// The device has its share.
    #[error("the device already has {0} sessions here, which is its limit")]
    DeviceSessions(usize),
    /// The queue for the model is full.
    #[error("{0} jobs wait for the model")]
    Queue(usize),
    /// No memory for its KV state.
    #[error("{free} KV blocks are free, the sequence needs {wanted}")]
    Memory {
        /// Free blocks, the reserve taken off.
        free: usize,
        /// Blocks wanted.
        wanted: usize,
    },
}

impl Refusal {
    /// Code to refuse with.
    #[must_use]
    pub fn code(self) -> RefuseCode {
        match self {
            Self::Stalled(_) => RefuseCode::Stalled,
            Self::Draining => RefuseCode::ShuttingDown,
            Self::Sessions(_) | Self::DeviceSessions(_) | Self::Queue(_) | Self::Memory { .. } => RefuseCode::Busy,
        }
    }

    /// When to try again, milliseconds; 0 for never at this node.
    #[must_use]
    pub fn retry_after_ms(self) -> u32 {
        match self {
            Self::Draining | Self::Stalled(_) => 0,
            Self::Queue(_) => 200,
            Self::Sessions(_) | Self::DeviceSessions(_) | Self::Memory { .. } => 1000,
        }
    }
}

/// Decides on a new session.
pub fn admit(load: &Load, bounds: &Bounds) -> Result<(), Refusal> {
    let free = load.kv_blocks_free.saturating_sub(bounds.kv_blocks_reserve);
    if load.draining {
        Err(Refusal::Draining)
    } else if load.stalled_ms > 0 {
        Err(Refusal::Stalled(load.stalled_ms))
    } else if load.sessions >= bounds.sessions_max {
        Err(Refusal::Sessions(bounds.sessions_max))
    } else if load.sessions_of_device >= bounds.sessions_per_device_max {
        Err(Refusal::DeviceSessions(bounds.sessions_per_device_max))
    } else if load.jobs >= bounds.jobs_max {
        Err(Refusal::Queue(load.jobs))
    } else if load.kv_blocks_wanted > free {
        Err(Refusal::Memory { free, wanted: load.kv_blocks_wanted })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_refuses_by_its_own_name() {
        let bounds = Bounds {
            sessions_max: 10,
            sessions_per_device_max: 2,
            jobs_max: 5,
            kv_blocks_reserve: 4,
            ..Bounds::default()
        };
        let quiet = Load { kv_blocks_free: 100, kv_blocks_wanted: 3, ..Load::default() };
        let table = [
            (quiet, Ok(())),
            (Load { draining: true, ..quiet }, Err(Refusal::Draining)),
            (Load { stalled_ms: 1200, ..quiet }, Err(Refusal::Stalled(1200))),
            (Load { sessions: 9, ..quiet }, Ok(())),
            (Load { sessions: 10, ..quiet }, Err(Refusal::Sessions(10))),
            (Load { sessions_of_device: 2, ..quiet }, Err(Refusal::DeviceSessions(2))),
            (Load { jobs: 5, ..quiet }, Err(Refusal::Queue(5))),
            (Load { kv_blocks_free: 7, ..quiet }, Ok(())),
            (Load { kv_blocks_free: 6, ..quiet }, Err(Refusal::Memory { free: 2, wanted: 3 })),
        ];
        for (load, expected) in table {
            assert_eq!(admit(&load, &bounds), expected, "{load:?}");
        }
    }

    /// An edge gives up on a node that is `Busy` and says no time.
    #[test]
    fn who_is_refused_for_now_is_told_when_to_come_again() {
        assert_eq!(Refusal::Draining.code(), RefuseCode::ShuttingDown);
        assert_eq!(Refusal::Stalled(1).code(), RefuseCode::Stalled);
        let for_now = [
            Refusal::Sessions(1),
            Refusal::DeviceSessions(1),
            Refusal::Queue(1),
            Refusal::Memory { free: 0, wanted: 1 },
        ];
        for refusal in for_now {
            assert!(refusal.code() == RefuseCode::Busy && refusal.retry_after_ms() > 0, "{refusal}");
        }
    }
}
