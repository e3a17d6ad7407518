//! What the sessions of a node share: its settings, the target, the grammars, who is here, and how much of it
//! there may be. Below the sessions and the handle that starts them, neither of which is named here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::limits::KV_BLOCK_TOKENS;
use tandem_transport::bulk::BulkInbox;

use crate::admission::{Load, Refusal, admit};
use crate::grammars::Grammars;
use crate::registry::{Live, Registry};
use crate::settings::CloudSettings;
use crate::target::Target;

/// What a node reports to the router and on its status page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct NodeLoad {
    /// Open sessions.
    pub sessions: usize,
    /// Sessions the node takes at most.
    pub sessions_max: usize,
    /// Jobs waiting or running.
    pub jobs: usize,
    /// Rows that these jobs have still to feed.
    pub rows_waiting: usize,
    /// Free KV blocks.
    pub kv_blocks_free: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Rows fed since the start.
    pub rows: u64,
    /// Forward passes since the start.
    pub passes: u64,
    /// Time in the model since the start, microseconds.
    pub busy_us: u64,
    /// How long the engine has made no progress, if it hangs, milliseconds; else 0.
    pub stalled_ms: u32,
    /// True once the node is shutting down.
    pub draining: bool,
}

/// See the module's text.
pub(crate) struct NodeContext {
    pub(crate) settings: CloudSettings,
    pub(crate) target: Arc<dyn Target>,
    pub(crate) grammars: Arc<Grammars>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) bulk: BulkInbox,
    draining: AtomicBool,
}

impl NodeContext {
    pub(crate) fn new(target: Arc<dyn Target>, tokenizer: Tokenizer, settings: CloudSettings) -> Self {
        let forgetful = target.clone();
        Self {
            grammars: Arc::new(Grammars::new(tokenizer, settings.bounds.grammar_bytes_max)),
            registry: Registry::new(settings.bounds, Box::new(move |id| forgetful.forget(id))),
            settings,
            target,
            bulk: BulkInbox::default(),
            draining: AtomicBool::new(false),
        }
    }

    /// What the node reports.
    pub(crate) fn load(&self) -> NodeLoad {
        let load = self.target.load();
        let kv = load.kv.unwrap_or_default();
        NodeLoad {
            sessions: self.registry.live(),
            sessions_max: self.settings.bounds.sessions_max,
            jobs: load.jobs,
            rows_waiting: load.rows_waiting,
            kv_blocks_free: kv.blocks_free,
            kv_blocks: kv.blocks,
            rows: load.rows,
            passes: load.passes,
            busy_us: load.busy_us,
            stalled_ms: load.stalled_ms,
            draining: self.draining.load(Ordering::Relaxed),
        }
    }

    /// Lets no further session in.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Lets a session of up to `tokens` tokens in beside the live ones, or not.
    pub(crate) fn admit(&self, live: Live, tokens: usize) -> Result<(), Refusal> {
        let target = self.target.load();
        let load = Load {
            sessions: live.all,
            sessions_of_device: live.of_device,
            jobs: target.jobs,
            kv_blocks_free: target.kv.map_or(usize::MAX, |kv| kv.blocks_free),
            kv_blocks_wanted: tokens.div_ceil(KV_BLOCK_TOKENS),
            stalled_ms: target.stalled_ms,
            draining: self.draining.load(Ordering::Relaxed),
        };
        admit(&load, &self.settings.bounds)
    }
}
