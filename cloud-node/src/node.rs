//! The handle to a cloud node: accepts links and starts a task per session.

use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge};
use tandem_engine::Model;
use tandem_engine::tokenizer::Tokenizer;
use tandem_transport::close::CloseCode;
use tandem_transport::link::Link;
use tandem_transport::server::Server;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;
use tracing::field::Empty;

use crate::context::NodeContext;
pub use crate::context::NodeLoad;
use crate::metric_definitions as m;
use crate::session;
use crate::settings::CloudSettings;
use crate::target::Target;
use crate::target::own::{CloudError, OwnEngine};

/// Handle to a cloud node; cheap to clone.
#[derive(Clone)]
pub struct CloudNode(Arc<NodeContext>);

impl CloudNode {
    /// A node with a model in this process.
    ///
    /// # Errors
    /// The settings do not fit the model, or the KV pool does not fit in memory.
    pub fn start(model: Arc<Model>, tokenizer: Tokenizer, settings: CloudSettings) -> Result<Self, CloudError> {
        let engine = OwnEngine::start(model, &settings)?;
        Ok(Self::with_target(Arc::new(engine), tokenizer, settings))
    }

    /// A node whose sessions are decided by `target`, a model with this tokenizer.
    #[must_use]
    pub fn with_target(target: Arc<dyn Target>, tokenizer: Tokenizer, settings: CloudSettings) -> Self {
        Self(Arc::new(NodeContext::new(target, tokenizer, settings)))
    }

    /// What the node reports.
    #[must_use]
    pub fn load(&self) -> NodeLoad {
        self.0.load()
    }

    /// Sets the gauges that show what the node reports; called before they are read.
    pub fn publish_gauges(&self) {
        self.0.target.publish();
        let load = self.0.target.load();
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

    /// Serves links until `shutdown`, then lets the sessions' tasks end.
    pub async fn serve(self, server: Server, shutdown: CancellationToken) {
        let Self(context) = self;
        let tasks = TaskTracker::new();
        let mut sweep = tokio::time::interval(Duration::from_secs(5));
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = sweep.tick() => context.registry.expire(),
                link = server.accept() => match link {
                    Some(link) => { tasks.spawn(serve_link(context.clone(), Arc::new(link), shutdown.clone(), tasks.clone())); }
                    None => break,
                },
            }
        }
        context.drain();
        server.close(CloseCode::ShuttingDown, "the node is shutting down").await;
        tasks.close();
        // Sessions end when their links do; one that does not is not worth waiting for.
        let _ = tokio::time::timeout(Duration::from_secs(2), tasks.wait()).await;
    }
}

async fn serve_link(context: Arc<NodeContext>, link: Arc<Link>, shutdown: CancellationToken, tasks: TaskTracker) {
    let peer = link.peer_identity().clone();
    tracing::info!(%peer, address = %link.remote_address(), "link opened");
    let bulk = {
        let (inbox, link) = (context.bulk.clone(), link.clone());
        tasks.spawn(async move { inbox.serve(&link).await })
    };
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            channel = link.accept_session() => match channel {
                Some(channel) => {
                    // The opening frame says which session it is, and whose request.
                    let span = tracing::info_span!("session", device = %peer, id = Empty, request = Empty);
                    tasks.spawn(session::run(context.clone(), link.clone(), channel).instrument(span));
                }
                None => break,
            },
        }
    }
    bulk.abort();
    tracing::info!(%peer, "link closed");
}
