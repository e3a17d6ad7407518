//! A cloud node: accepts links, opens sessions, runs the model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics::{counter, gauge};
use serde::Serialize;
use tandem_engine::Model;
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::limits::KV_BLOCK_TOKENS;
use tandem_proto::message::ModelCard;
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
use crate::target::Target;
use crate::target::own::{CloudError, OwnEngine};

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
    pub(crate) target: Arc<dyn Target>,
    pub(crate) grammars: Arc<Grammars>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) bulk: BulkInbox,
    draining: AtomicBool,
}

impl CloudNode {
    /// A node with a model in this process.
    ///
    /// # Errors
    /// The settings do not fit the model, or the KV pool does not fit in memory.
    pub fn start(
        model: Arc<Model>,
        tokenizer: Tokenizer,
        card: ModelCard,
        settings: CloudSettings,
    ) -> Result<Arc<Self>, CloudError> {
        let engine = OwnEngine::start(model, &settings)?;
        Ok(Self::with_target(Arc::new(engine), tokenizer, card, settings))
    }

    /// A node whose sessions are decided by `target`, a model with this tokenizer and card.
    #[must_use]
    pub fn with_target(
        target: Arc<dyn Target>,
        tokenizer: Tokenizer,
        card: ModelCard,
        settings: CloudSettings,
    ) -> Arc<Self> {
        let forgetful = target.clone();
        Arc::new(Self {
            grammars: Arc::new(Grammars::new(tokenizer, settings.bounds.grammar_bytes_max)),
            registry: Registry::new(settings.bounds, Box::new(move |id| forgetful.forget(id))),
            settings,
            card,
            target,
            bulk: BulkInbox::default(),
            draining: AtomicBool::new(false),
        })
    }

    /// What the node reports.
    #[must_use]
    pub fn load(&self) -> NodeLoad {
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

    /// Sets the gauges that show what the node reports; called before they are read.
    pub fn publish_gauges(&self) {
        let load = self.target.load();
        gauge!(m::QUEUE_JOBS).set(load.jobs as f64);
        gauge!(m::QUEUE_ROWS).set(load.rows_waiting as f64);
        let Some(kv) = load.kv else { return };
        gauge!(m::KV_POOL_BLOCKS).set(kv.blocks as f64);
        gauge!(m::KV_POOL_FREE_BLOCKS).set(kv.blocks_free as f64);
        gauge!(m::PREFIX_BLOCKS).set(kv.prefix_blocks as f64);
        counter!(m::PREFIX_HITS).absolute(kv.prefix_hits);
        counter!(m::PREFIX_ROWS).absolute(kv.prefix_rows);
        counter!(m::PREFIX_EVICTED).absolute(kv.prefix_evicted);
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
