//! A cloud node: accepts links, opens sessions, runs the model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics::{counter, gauge};
use serde::Serialize;
use tandem_engine::runner::{Job, RowOutput, Runner, RunnerError, RunnerOptions, prefix_key};
use tandem_engine::tokenizer::Tokenizer;
use tandem_engine::trunk::Trunk;
use tandem_engine::{EngineError, Model, memory, sampling};
use tandem_proto::block::BlockChain;
use tandem_proto::limits::KV_BLOCK_TOKENS;
use tandem_proto::message::ModelCard;
use tandem_proto::session::Decided;
use tandem_transport::bulk::BulkInbox;
use tandem_transport::close::CloseCode;
use tandem_transport::link::Link;
use tandem_transport::server::Server;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;
use tracing::field::Empty;

use crate::admission::{Load, Refusal, admit};
use crate::grammars::Grammars;
use crate::metric_definitions as m;
use crate::registry::{Live, Registry};
use crate::session;
use crate::settings::CloudSettings;

/// Why a node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    /// The engine thread cannot start.
    #[error("the engine cannot start: {0}")]
    Runner(#[from] RunnerError),
    /// The settings contradict the model.
    #[error("trunk_layers is {asked}, the model has {layers} layers; use 0 or the number the pair shares")]
    Trunk {
        /// Setting.
        asked: usize,
        /// Layers of the model.
        layers: usize,
    },
}

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
    /// How long the engine has got nowhere, if it hangs, milliseconds; else 0.
    pub stalled_ms: u32,
    /// True once the node is shutting down.
    pub draining: bool,
}

/// A cloud node. Cheap to share as `Arc`.
pub struct CloudNode {
    pub(crate) settings: CloudSettings,
    pub(crate) card: ModelCard,
    model: Arc<Model>,
    pub(crate) runner: Runner<Decided>,
    pub(crate) grammars: Arc<Grammars>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) bulk: BulkInbox,
    pub(crate) trunk: Option<Trunk>,
    pub(crate) context_tokens: usize,
    /// Tokens of the model's vocabulary.
    pub(crate) vocabulary: usize,
    draining: AtomicBool,
}

fn decide(job: &Job, row: RowOutput<'_>) -> Result<Decided, EngineError> {
    let (allowed, before) = (job.allowed(row.position)?, job.before(row.position));
    let pick = sampling::pick(row.logits, allowed.as_ref(), &job.sampling, before, row.position as u32)?;
    let alternatives =
        if job.top_logprobs == 0 { Vec::new() } else { sampling::top_alternatives(row.logits, job.top_logprobs)? };
    Ok(Decided { id: pick.token, logprob: pick.logprob, alternatives })
}

impl CloudNode {
    /// Starts the engine thread of a node.
    ///
    /// # Errors
    /// The settings do not fit the model, or the KV pool does not fit in memory.
    pub fn start(
        model: Arc<Model>,
        tokenizer: Tokenizer,
        card: ModelCard,
        mut settings: CloudSettings,
    ) -> Result<Arc<Self>, CloudError> {
        let layers = model.spec().layers;
        if settings.trunk_layers >= layers {
            return Err(CloudError::Trunk { asked: settings.trunk_layers, layers });
        }
        let trunk = Trunk::of(&model, settings.trunk_layers);
        if settings.bounds.kv_blocks == 0 {
            let available = memory::available_bytes();
            settings.bounds.kv_blocks = memory::kv_blocks(model.spec(), settings.bounds.sessions_max, available);
        }
        let context = memory::context_tokens(model.spec(), settings.bounds.kv_blocks);
        let vocabulary = model.spec().vocab_size;
        let options = RunnerOptions {
            split: settings.trunk_layers,
            kv_blocks: settings.bounds.kv_blocks,
            prefix_blocks_max: memory::blocks_of_mib(model.spec(), settings.bounds.prefix_cache_mib_max),
            queue_max: settings.bounds.jobs_max.max(settings.bounds.sessions_max) * 2,
            batch: settings.batch(),
        };
        let runner = Runner::start(model.clone(), options, Box::new(decide))?;
        let forgetful = runner.clone();
        let forget = move |id| {
            if let Err(e) = forgetful.forget(id) {
                tracing::warn!("the state of session {id} could not be dropped: {e}");
            }
        };
        Ok(Arc::new(Self {
            grammars: Arc::new(Grammars::new(tokenizer, settings.bounds.grammar_bytes_max)),
            registry: Registry::new(settings.bounds, Box::new(forget)),
            settings,
            card,
            model,
            runner,
            bulk: BulkInbox::default(),
            trunk,
            context_tokens: context,
            vocabulary,
            draining: AtomicBool::new(false),
        }))
    }

    /// What the node reports.
    #[must_use]
    pub fn load(&self) -> NodeLoad {
        let load = self.runner.load();
        NodeLoad {
            sessions: self.registry.live(),
            sessions_max: self.settings.bounds.sessions_max,
            jobs: load.jobs.load(Ordering::Relaxed),
            rows_waiting: load.rows_waiting.load(Ordering::Relaxed),
            kv_blocks_free: load.kv_blocks_free.load(Ordering::Relaxed),
            kv_blocks: self.settings.bounds.kv_blocks,
            rows: load.rows.load(Ordering::Relaxed),
            passes: load.passes.load(Ordering::Relaxed),
            busy_us: load.busy_us.load(Ordering::Relaxed),
            stalled_ms: self.stalled_ms(),
            draining: self.draining.load(Ordering::Relaxed),
        }
    }

    /// Sets the gauges that show what the node reports. For whoever is about to read them.
    pub fn publish_gauges(&self) {
        let load = self.load();
        gauge!(m::QUEUE_JOBS).set(load.jobs as f64);
        gauge!(m::QUEUE_ROWS).set(load.rows_waiting as f64);
        gauge!(m::KV_POOL_BLOCKS).set(load.kv_blocks as f64);
        gauge!(m::KV_POOL_FREE_BLOCKS).set(load.kv_blocks_free as f64);
        let engine = self.runner.load();
        gauge!(m::PREFIX_BLOCKS).set(engine.prefix_blocks.load(Ordering::Relaxed) as f64);
        counter!(m::PREFIX_HITS).absolute(engine.prefix_hits.load(Ordering::Relaxed));
        counter!(m::PREFIX_ROWS).absolute(engine.prefix_rows.load(Ordering::Relaxed));
        counter!(m::PREFIX_EVICTED).absolute(engine.prefix_evicted.load(Ordering::Relaxed));
    }

    /// The key under which the sessions of the tenant at the other end of `link` share rows.
    pub(crate) fn prefix_key(&self, link: &Link) -> BlockChain {
        prefix_key(&self.model, link.peer_tenant_key())
    }

    /// How long the engine has got nowhere, if it hangs, milliseconds; else 0.
    pub(crate) fn stalled_ms(&self) -> u32 {
        self.runner.stalled().map_or(0, |age| u32::try_from(age.as_millis()).unwrap_or(u32::MAX))
    }

    /// Lets a session of up to `tokens` tokens in beside the live ones, or not.
    pub(crate) fn admit(&self, live: Live, tokens: usize) -> Result<(), Refusal> {
        let runner = self.runner.load();
        let load = Load {
            sessions: live.all,
            sessions_of_device: live.of_device,
            jobs: runner.jobs.load(Ordering::Relaxed),
            kv_blocks_free: runner.kv_blocks_free.load(Ordering::Relaxed),
            kv_blocks_wanted: tokens.div_ceil(KV_BLOCK_TOKENS),
            stalled_ms: self.stalled_ms(),
            draining: self.draining.load(Ordering::Relaxed),
        };
        admit(&load, &self.settings.bounds)
    }

    /// Serves links until `shutdown`, then lets the sessions' tasks end.
    pub async fn serve(self: Arc<Self>, server: Server, shutdown: CancellationToken) {
        let tasks = TaskTracker::new();
        let mut sweep = tokio::time::interval(Duration::from_secs(5));
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = sweep.tick() => self.registry.expire(),
                link = server.accept() => match link {
                    Some(link) => { tasks.spawn(self.clone().serve_link(Arc::new(link), shutdown.clone(), tasks.clone())); }
                    None => break,
                },
            }
        }
        self.draining.store(true, Ordering::Relaxed);
        server.close(CloseCode::ShuttingDown, "the node is shutting down").await;
        tasks.close();
        // Sessions end when their links do; one that does not is not worth waiting for.
        let _ = tokio::time::timeout(Duration::from_secs(2), tasks.wait()).await;
    }

    async fn serve_link(self: Arc<Self>, link: Arc<Link>, shutdown: CancellationToken, tasks: TaskTracker) {
        let peer = link.peer_identity().clone();
        tracing::info!(%peer, address = %link.remote_address(), "link opened");
        let bulk = {
            let (inbox, link) = (self.bulk.clone(), link.clone());
            tasks.spawn(async move { inbox.serve(&link).await })
        };
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                channel = link.accept_session() => match channel {
                    Some(channel) => {
                        // The opening frame says which session it is, and whose request.
                        let span = tracing::info_span!("session", device = %peer, id = Empty, request = Empty);
                        tasks.spawn(session::run(self.clone(), link.clone(), channel).instrument(span));
                    }
                    None => break,
                },
            }
        }
        bulk.abort();
        tracing::info!(%peer, "link closed");
    }
}
