//! The engine of this workspace as a target: one thread in this process (`tandem_engine::runner`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tandem_engine::runner::batch::BatchBounds;
use tandem_engine::runner::{self, OnDone, RowOutput, Runner, RunnerError, RunnerOptions, prefix_key};
use tandem_engine::trunk::{self, SharedLayers};
use tandem_engine::{EngineError, Model, memory, sampling};
use tandem_proto::ids::SessionId;
use tandem_proto::session::Decided;
use tandem_proto::session::cloud::JobTimes;
use tokio::sync::oneshot;

use super::{
    Capabilities, Job, JobDone, JobProgress, KvLoad, Pending, Submitted, Target, TargetError, TargetLoad, TrunkDone,
    TrunkState, Verify, millis,
};
use crate::settings::CloudSettings;

/// When to come again to an engine without room, milliseconds.
const BUSY_RETRY_MS: u32 = 1000;

/// Why a node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    /// The engine thread cannot start.
    #[error("the engine cannot start: {0}")]
    Runner(#[from] RunnerError),
}

impl From<RunnerError> for TargetError {
    fn from(e: RunnerError) -> Self {
        match e {
            RunnerError::Memory(_) | RunnerError::Full(_) => {
                Self::Busy { reason: e.to_string(), retry_after_ms: BUSY_RETRY_MS }
            }
            other => Self::Failed(other.to_string()),
        }
    }
}

/// A model in this process and its engine thread.
#[derive(Debug)]
pub struct OwnEngine {
    model: Arc<Model>,
    runner: Runner<Decided>,
    trunk: Option<OwnTrunk>,
    kv_blocks: usize,
    context_tokens: usize,
}

#[derive(Debug)]
struct OwnTrunk {
    layers: SharedLayers,
    runner: Runner<Decided>,
}

fn decide(job: &runner::Job, row: RowOutput<'_>) -> Result<Decided, EngineError> {
    let (allowed, before) = (job.allowed(row.position)?, job.before(row.position));
    let pick = sampling::pick(row.logits, allowed.as_ref(), &job.sampling, before, row.position as u32)?;
    let alternatives =
        if job.top_logprobs == 0 { Vec::new() } else { sampling::top_alternatives(row.logits, job.top_logprobs)? };
    Ok(Decided { id: pick.token, logprob: pick.logprob, alternatives })
}

fn batch_bounds(settings: &CloudSettings) -> BatchBounds {
    BatchBounds {
        rows_max: settings.batch_rows_max.max(1),
        sequences_max: settings.batch_sequences_max.max(1),
        prefill_chunk: settings.prefill_chunk.max(1),
        prefill_reserve: settings.prefill_chunk.clamp(1, 32),
    }
}

impl OwnEngine {
    /// Starts the engine thread.
    ///
    /// # Errors
    /// The settings do not fit the model, or the KV pool does not fit in memory.
    pub fn start(model: Arc<Model>, settings: &CloudSettings) -> Result<Self, CloudError> {
        let (spec, bounds) = (model.spec(), &settings.bounds);
        let layers = SharedLayers::of(&model, settings.trunk_layers);
        let kv_blocks = match bounds.kv_blocks {
            0 => memory::kv_blocks(spec, bounds.sessions_max, memory::available_bytes()),
            blocks => blocks,
        };
        let options = RunnerOptions {
            kv_blocks,
            prefix_blocks_max: memory::blocks_of_mib(spec, bounds.prefix_cache_mib_max),
            queue_max: bounds.jobs_max.max(bounds.sessions_max) * 2,
            batch: batch_bounds(settings),
        };
        let runner = Runner::start(model.clone(), options, Box::new(decide))?;
        Ok(Self {
            trunk: (!layers.is_empty()).then(|| OwnTrunk { layers, runner: runner.clone() }),
            runner,
            kv_blocks,
            context_tokens: memory::context_tokens(spec, kv_blocks),
            model,
        })
    }
}

/// Asks the engine thread for something, which it answers through the function it gets.
fn ask<T: Send + 'static>(send: impl FnOnce(OnDone<T>) -> Result<(), RunnerError>) -> Pending<T> {
    let (done, result) = oneshot::channel();
    let sent = send(Box::new(move |r| drop(done.send(r))));
    Box::pin(async move {
        sent?;
        Ok(result.await.unwrap_or_else(|_| Err(RunnerError::Stopped("it has ended".into())))?)
    })
}

impl Target for OwnEngine {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            context_tokens: self.context_tokens,
            vocabulary: self.model.spec().vocab_size,
            verify: Verify::Exact,
            grammar: true,
        }
    }

    fn load(&self) -> TargetLoad {
        let load = self.runner.load();
        TargetLoad {
            jobs: load.jobs.load(Ordering::Relaxed),
            rows_waiting: load.rows_waiting.load(Ordering::Relaxed),
            rows: load.rows.load(Ordering::Relaxed),
            passes: load.passes.load(Ordering::Relaxed),
            busy_us: load.busy_us.load(Ordering::Relaxed),
            stalled_ms: millis(self.runner.stalled()),
            kv: Some(KvLoad {
                blocks: self.kv_blocks,
                blocks_free: load.kv_blocks_free.load(Ordering::Relaxed),
                prefix_blocks: load.prefix_blocks.load(Ordering::Relaxed),
                prefix_evicted: load.prefix_evicted.load(Ordering::Relaxed),
                prefix_hits: load.prefix_hits.load(Ordering::Relaxed),
                prefix_rows: load.prefix_rows.load(Ordering::Relaxed),
            }),
        }
    }

    fn held(&self, tenant_key: [u8; 32], tokens: Vec<u32>) -> Pending<usize> {
        ask(|done| self.runner.held(prefix_key(&self.model, tenant_key), tokens, done))
    }

    fn submit(&self, job: Job) -> Submitted {
        let request = runner::Job {
            key: job.session,
            sequence: job.tokens,
            feed_from: job.feed_from,
            trunk_layers: job.trunk_layers,
            hidden: job.hidden.as_deref().map(trunk::numbers),
            outputs_from: job.picks_from,
            prompt_len: job.prompt_len,
            sampling: job.sampling,
            top_logprobs: job.top_logprobs,
            is_prefill: false,
            keep_hidden_from: job.keep_hidden.then_some(job.feed_from),
            constraint: job.constraint,
            prefix: Some(prefix_key(&self.model, job.tenant_key)),
        };
        let mut progress = None;
        let done = ask(|done| self.runner.submit(request, done).map(|p| progress = Some(p)));
        let progress = move || {
            progress.as_ref().map_or_else(JobProgress::default, |p| JobProgress {
                rows_left: p.rows_left.load(Ordering::Relaxed),
                working: p.in_pass.load(Ordering::Relaxed),
            })
        };
        let done = Box::pin(async move {
            let done = done.await?;
            Ok(JobDone {
                picks: done.outputs,
                times: JobTimes { compute_us: done.compute_us, queue_us: done.queue_us },
                trunk: TrunkDone {
                    tokens: done.trunk_tokens,
                    rows_computed: done.trunk_rows.0,
                    rows_given: done.trunk_rows.1,
                    hidden: done.trunk_hidden,
                },
            })
        });
        Submitted { done, progress: Box::new(progress) }
    }

    fn forget(&self, session: SessionId) {
        if let Err(e) = self.runner.forget(session) {
            tracing::warn!("the state of session {session} could not be dropped: {e}");
        }
    }

    fn trunk(&self) -> Option<&dyn TrunkState> {
        self.trunk.as_ref().map(|trunk| trunk as &dyn TrunkState)
    }
}

impl TrunkState for OwnTrunk {
    fn layers(&self) -> &SharedLayers {
        &self.layers
    }

    fn export(&self, session: SessionId, layers: usize, tokens: usize) -> Pending<Vec<Vec<f32>>> {
        ask(|done| self.runner.export_trunk(session, layers, tokens, done))
    }

    fn import(&self, session: SessionId, layers: usize, blocks: Vec<Vec<f32>>, tokens: usize) -> Pending<usize> {
        ask(|done| self.runner.import_trunk(session, layers, blocks, tokens, done))
    }
}
