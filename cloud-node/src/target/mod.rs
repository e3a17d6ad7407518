//! What decides below the sessions: the target model behind whatever engine runs it. A session turns
//! frames into [`Job`]s and asks a [`Target`] for the choices at their positions; it knows no engine.

pub mod own;
pub mod upstream;

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tandem_engine::constraint::Followed;
use tandem_engine::trunk::SharedLayers;
use tandem_proto::ids::SessionId;
use tandem_proto::message::{Open, RefuseCode, SamplingParams};
use tandem_proto::session::Decided;
use tandem_proto::session::cloud::JobTimes;

/// What a target answers later. The work is asked for when the function is called, not when this is first
/// polled; dropping it says that nobody waits for the result any more, so a target that can stop the work does.
pub type Pending<T> = Pin<Box<dyn Future<Output = Result<T, TargetError>> + Send>>;

/// An engine that runs the target model.
///
/// A trait object: a virtual call per job is nothing beside a forward pass or a request over the network, and
/// the session's code is compiled once, whatever engines there are.
pub trait Target: Send + Sync + 'static {
    /// What it can do; the same as long as it lives.
    fn capabilities(&self) -> Capabilities;

    /// How busy it is now. Must not wait: it is asked for with every report to an edge.
    fn load(&self) -> TargetLoad;

    /// Publishes the metrics that only this kind of target has; called before they are read.
    fn publish(&self) {}

    /// How many of a new sequence's first `tokens` it holds already, so that they cost nothing. Only what
    /// sessions of the same tenant computed counts.
    fn held(&self, tenant_key: [u8; 32], tokens: Vec<u32>) -> Pending<usize>;

    /// Chooses the tokens that `job` asks for. A session has one job at a time.
    fn submit(&self, job: Job) -> Submitted;

    /// Drops what it holds for a session. Must not wait: it is called under the registry's lock.
    fn forget(&self, session: SessionId);

    /// The layers it may share with an edge, and their state; none if it hands out no state.
    fn trunk(&self) -> Option<&dyn TrunkState>;
}

/// The state of a target's first layers, which edges with the same layers lend and borrow.
pub trait TrunkState: Send + Sync {
    /// The layers, of which an edge may have some.
    fn layers(&self) -> &SharedLayers;

    /// Copies out the state of the first `layers` layers of a session's first `tokens` tokens, one
    /// `[layer][token][width]` payload per block.
    fn export(&self, session: SessionId, layers: usize, tokens: usize) -> Pending<Vec<Vec<f32>>>;

    /// Puts an edge's state of the first `layers` layers in place for those of a session's first `tokens` tokens that
    /// lack it; yields the tokens that lack no layer then.
    fn import(&self, session: SessionId, layers: usize, blocks: Vec<Vec<f32>>, tokens: usize) -> Pending<usize>;
}

/// What a target's choices are worth for an edge's drafts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// It chooses for each position of a sequence, greedy and sampled, as it would when writing by itself.
    Exact,
    /// So it does where the temperature is 0; it draws no noise that an edge could repeat.
    Greedy,
    /// It only continues a sequence.
    Unable,
}

/// What a target can do. What it lacks is refused by name before it is asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Context length, tokens.
    pub context_tokens: usize,
    /// Tokens of the vocabulary: ids are below it.
    pub vocabulary: usize,
    /// How it judges drafts.
    pub verify: Verify,
    /// Whether it chooses among the tokens that a grammar leaves.
    pub grammar: bool,
}

/// What an edge asked for that the target cannot do. A trunk is not among it: the cloud declines one in its
/// `Opened` and computes the layers itself, which costs the session nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lacking {
    /// A grammar.
    #[error("this node's target cannot follow a grammar; ask without one, or ask another node")]
    Grammar,
    /// Choices with a temperature above 0.
    #[error("this node's target decides greedy answers only; ask with temperature 0, or ask another node")]
    Sampling,
    /// Judging drafts.
    #[error("this node's target cannot judge drafts, it only writes by itself; use mode `cloud`, or ask another node")]
    Verification,
}

impl Lacking {
    /// Code to refuse with.
    #[must_use]
    pub fn code(self) -> RefuseCode {
        RefuseCode::Incompatible
    }
}

impl Capabilities {
    /// Whether the target can do what a session is opened for.
    ///
    /// # Errors
    /// What it lacks.
    pub fn allow(&self, open: &Open) -> Result<(), Lacking> {
        if open.grammar.is_some() && !self.grammar {
            Err(Lacking::Grammar)
        } else if open.sampling.temperature > 0.0 && self.verify == Verify::Greedy {
            Err(Lacking::Sampling)
        } else {
            Ok(())
        }
    }

    /// Whether the target can judge drafts. `Open` does not say if any will come.
    ///
    /// # Errors
    /// It cannot.
    pub fn allow_drafts(&self) -> Result<(), Lacking> {
        if self.verify == Verify::Unable { Err(Lacking::Verification) } else { Ok(()) }
    }
}

/// Why a target did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// It has no room now.
    #[error("{reason}")]
    Busy {
        /// What there is no room for.
        reason: String,
        /// When to ask again, milliseconds.
        retry_after_ms: u32,
    },
    /// What runs the model is gone or hangs: another node may have what this one lacks.
    #[error("{0}")]
    Gone(String),
    /// It failed.
    #[error("{0}")]
    Failed(String),
}

/// Work on a session's sequence.
#[derive(Clone, Debug)]
pub struct Job {
    /// The session.
    pub session: SessionId,
    /// Names the tenant: what is held of a sequence serves this tenant's sessions only.
    pub tenant_key: [u8; 32],
    /// All tokens of the sequence up to the end of the job.
    pub tokens: Vec<u32>,
    /// Earlier jobs of the session cover the tokens before this one; from here on the sequence may be another.
    pub feed_from: usize,
    /// Choices are wanted for the positions `picks_from ..= tokens.len()`.
    pub picks_from: usize,
    /// Positions of drafts that are judged: where the choice differs from `tokens` at one of them, those after it
    /// may be left out of [`JobDone::picks`].
    pub judged: Vec<Range<usize>>,
    /// Choices that will be wanted next if the edge does not intervene; a target may run ahead.
    pub ahead: usize,
    /// Tokens of the prompt: penalties and grammars tell them from the answer's.
    pub prompt_len: usize,
    /// Sampling parameters of the session.
    pub sampling: Arc<SamplingParams>,
    /// Alternatives per choice.
    pub top_logprobs: usize,
    /// The grammar that the answer follows, if any.
    pub constraint: Option<Followed>,
    /// Layers that the edge shares; 0 for none, and where the target has no trunk.
    pub trunk_layers: usize,
    /// The edge's hidden states above the trunk for the tokens fed, f32 little-endian. Only where the target
    /// has a trunk.
    pub hidden: Option<Bytes>,
    /// Return the hidden states above the trunk of the tokens fed. Only where the target has a trunk.
    pub keep_hidden: bool,
}

/// A job that was handed to the target.
pub struct Submitted {
    /// Its result.
    pub done: Pending<JobDone>,
    /// How far it is. Must not wait.
    pub progress: Box<dyn Fn() -> JobProgress + Send + Sync>,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobProgress {
    /// Tokens that are still to be fed.
    pub rows_left: usize,
    /// True while some of them are being fed.
    pub working: bool,
}

/// Result of a job.
#[derive(Clone, Debug)]
pub struct JobDone {
    /// One choice per wanted position, in order; see [`Job::judged`].
    pub picks: Vec<Decided>,
    /// Time it took.
    pub times: JobTimes,
    /// What came of the trunk; nothing where there is none.
    pub trunk: TrunkDone,
}

/// What a job did with the trunk.
#[derive(Clone, Debug, Default)]
pub struct TrunkDone {
    /// Tokens whose trunk state the target holds.
    pub tokens: usize,
    /// Rows computed from the first layer on.
    pub rows_computed: usize,
    /// Rows whose hidden states the edge gave.
    pub rows_given: usize,
    /// Hidden states above the trunk, as asked for.
    pub hidden: Vec<f32>,
}

/// How busy a target is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetLoad {
    /// Jobs waiting or running.
    pub jobs: usize,
    /// Rows that these jobs have still to feed.
    pub rows_waiting: usize,
    /// Rows fed since the start.
    pub rows: u64,
    /// Forward passes since the start.
    pub passes: u64,
    /// Time in the model since the start, microseconds.
    pub busy_us: u64,
    /// How long it has made no progress, if it hangs, milliseconds; else 0.
    pub stalled_ms: u32,
    /// Memory for KV state; none if that is not the node's to give out, and no session is refused for it.
    pub kv: Option<KvLoad>,
}

/// KV memory of a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvLoad {
    /// Blocks.
    pub blocks: usize,
    /// Free ones.
    pub blocks_free: usize,
    /// Blocks held for reuse.
    pub prefix_blocks: usize,
    /// Blocks held for reuse that have been given up since the start.
    pub prefix_evicted: u64,
    /// Sequences since the start that found rows to reuse.
    pub prefix_hits: u64,
    /// Rows reused since the start.
    pub prefix_rows: u64,
}

/// Whole milliseconds, as reports and frames carry them; 0 for none.
fn millis(time: Option<Duration>) -> u32 {
    time.map_or(0, |time| u32::try_from(time.as_millis()).unwrap_or(u32::MAX))
}
