//! The engine thread: owns every sequence's KV state and runs one ragged batch after the other
//! (continuous batching). Callers hand it jobs and get, per position, what a function of theirs
//! made of the logits. Both ends use it: the edge for drafts, the cloud for verification.
//!
//! Some leading layers of the model, the trunk, may be equal in an edge and a cloud model; how many depends on
//! the peer, so each job names them. Rows that arrive with hidden states above the trunk skip the trunk; when a
//! later row needs the trunk itself, the runner first catches up on what it skipped.

pub mod batch;
pub mod fairness;
mod layer_runs;
pub mod pass_times;
mod prefix;
mod saved;
mod state;
mod streams;
mod worker;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tandem_proto::block::BlockChain;
use tandem_proto::ids::SessionId;
use tandem_proto::message::SamplingParams;

use crate::constraint::{Followed, TokenMask};
use crate::error::EngineError;
use crate::kv::KvPool;
use crate::kv::block_store::BlockStore;
use crate::model::{Model, ROWS_MAX};
use crate::sampling::Before;
use batch::BatchBounds;
pub use prefix::prefix_key;

/// Why a job failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RunnerError {
    /// No KV block is free for the sequence; it keeps the state it has.
    #[error("no KV memory for the sequence: {0}")]
    Memory(String),
    /// The model refused or failed; the sequence's state is dropped.
    #[error("the model failed: {0}")]
    Engine(String),
    /// State that the job builds on is not there (any more).
    #[error("the sequence's state covers {have} tokens, the job needs {wanted}")]
    Gap {
        /// Tokens covered.
        have: usize,
        /// Tokens needed.
        wanted: usize,
    },
    /// The runner was asked to work with bounds that it cannot keep.
    #[error("runner option `{field}` is {value}; {min} to {max} are taken")]
    Options {
        /// The option.
        field: &'static str,
        /// What it is.
        value: usize,
        /// Least.
        min: usize,
        /// Most.
        max: usize,
    },
    /// The job contradicts itself.
    #[error("bad job: {0}")]
    BadJob(&'static str),
    /// More jobs than the runner's bound are waiting.
    #[error("{0} jobs are waiting, which is the runner's bound")]
    Full(usize),
    /// The engine thread could not start or is gone.
    #[error("the engine thread is not running: {0}")]
    Stopped(String),
}

impl From<EngineError> for RunnerError {
    fn from(e: EngineError) -> Self {
        match e {
            EngineError::PoolExhausted { .. } => Self::Memory(e.to_string()),
            other => Self::Engine(other.to_string()),
        }
    }
}

/// Work on one sequence. A sequence has one job at a time.
#[derive(Debug, Clone)]
pub struct Job {
    /// The sequence.
    pub key: SessionId,
    /// All its tokens up to the end of the job.
    pub sequence: Vec<u32>,
    /// KV state is cut to this many tokens, then `sequence[feed_from..]` is fed.
    pub feed_from: usize,
    /// Layers of the trunk: those that a peer shares; 0 for none.
    pub trunk_layers: usize,
    /// Hidden states above the trunk for the tokens fed, `[tokens, hidden_size]`; the trunk is not
    /// run for them.
    pub hidden: Option<Vec<f32>>,
    /// Outputs are wanted for the positions `outputs_from ..= sequence.len()`.
    pub outputs_from: usize,
    /// Tokens of the prompt: penalties and grammars tell them from the answer's.
    pub prompt_len: usize,
    /// Sampling parameters of the sequence.
    pub sampling: Arc<SamplingParams>,
    /// Alternatives per output.
    pub top_logprobs: usize,
    /// All rows count as a prompt's, those with outputs too: no answer is written here (a text is scored).
    pub is_prefill: bool,
    /// Return the hidden states above the trunk of the tokens fed, from this one on.
    pub keep_hidden_from: Option<usize>,
    /// The grammar that the answer follows, if any.
    pub constraint: Option<Followed>,
    /// Sequences with an equal key share rows ([`prefix_key`]): of a new sequence, those that are held for
    /// its first tokens are not computed again, and what is computed is kept for others. None to share none.
    pub prefix: Option<BlockChain>,
}

impl Job {
    /// Tokens of the prompt.
    fn prompt(&self) -> &[u32] {
        &self.sequence[..self.prompt_len.min(self.sequence.len())]
    }

    /// Tokens of the answer before `position`.
    fn answer_before(&self, position: usize) -> &[u32] {
        self.sequence.get(self.prompt_len..position).unwrap_or(&[])
    }

    /// The tokens before `position`, as penalties tell them apart.
    #[must_use]
    pub fn before(&self, position: usize) -> Before<'_> {
        let prompt = self.sequence.get(..self.prompt_len.min(position)).unwrap_or(&self.sequence);
        Before { prompt, answer: self.answer_before(position) }
    }

    /// The tokens that the grammar leaves at `position`; none without a grammar.
    ///
    /// # Errors
    /// [`EngineError::Constraint`] if the answer can no longer be followed.
    pub fn allowed(&self, position: usize) -> Result<Option<TokenMask>, EngineError> {
        let followed = self.constraint.as_ref();
        Ok(followed.map(|f| f.allowed(self.answer_before(position))).transpose()?)
    }
}

/// What the model says at one position.
#[derive(Debug, Clone, Copy)]
pub struct RowOutput<'a> {
    /// The position the logits predict.
    pub position: usize,
    /// Logits over the vocabulary.
    pub logits: &'a [f32],
    /// Hidden state above the last layer, before the final norm.
    pub hidden: &'a [f32],
}

/// Turns a row into what the caller wants of it. Runs on the engine thread.
pub type Choose<T> = Box<dyn Fn(&Job, RowOutput<'_>) -> Result<T, EngineError> + Send>;

/// Result of a job.
#[derive(Debug, Clone)]
pub struct JobDone<T> {
    /// One output per wanted position, in order.
    pub outputs: Vec<T>,
    /// Time from the first pass of the job to its end, microseconds.
    pub compute_us: u32,
    /// Time before that, microseconds.
    pub queue_us: u32,
    /// Tokens of whose state no layer is missing.
    pub trunk_tokens: usize,
    /// Rows computed here from the first layer on, and rows whose hidden states were given.
    pub trunk_rows: (usize, usize),
    /// Hidden states above the trunk of the tokens fed, as asked for.
    pub trunk_hidden: Vec<f32>,
    /// Leading tokens that were not fed, as their state was held.
    pub reused: usize,
}

/// Gets the result of a job, on the engine thread: hand it on, do not work there.
pub type OnDone<T> = Box<dyn FnOnce(Result<T, RunnerError>) + Send>;

enum Command<T> {
    Run(Box<Job>, Arc<JobProgress>, OnDone<JobDone<T>>, Instant),
    Forget(SessionId),
    /// Look at what is to be forgotten although the queue was full.
    Wake,
    ExportTrunk {
        key: SessionId,
        layers: usize,
        tokens: usize,
        done: OnDone<Vec<Vec<f32>>>,
    },
    ImportTrunk {
        key: SessionId,
        layers: usize,
        blocks: Vec<Vec<f32>>,
        tokens: usize,
        done: OnDone<usize>,
    },
    Held {
        prefix: BlockChain,
        tokens: Vec<u32>,
        done: OnDone<usize>,
    },
    Save(OnDone<()>),
}

/// How far a job is; other threads read it.
#[derive(Debug, Default)]
pub struct JobProgress {
    /// Tokens that are still to be fed.
    pub rows_left: AtomicUsize,
    /// True while a pass feeds some of them.
    pub in_pass: AtomicBool,
}

/// What has been asked of the thread and not answered, whether or not the thread has seen it.
#[derive(Debug)]
struct Outstanding {
    since: Instant,
    jobs: AtomicUsize,
    /// When the first of it was asked, microseconds after `since`.
    first_us: AtomicU64,
}

impl Outstanding {
    fn now_us(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn add(&self) {
        if self.jobs.load(Ordering::Relaxed) == 0 {
            self.first_us.store(self.now_us(), Ordering::Relaxed);
        }
        self.jobs.fetch_add(1, Ordering::Relaxed);
    }

    fn remove(&self) {
        self.jobs.fetch_sub(1, Ordering::Relaxed);
    }

    /// How long there has been work; none if there is none.
    fn age(&self) -> Option<Duration> {
        let age = || Duration::from_micros(self.now_us().saturating_sub(self.first_us.load(Ordering::Relaxed)));
        (self.jobs.load(Ordering::Relaxed) > 0).then(age)
    }
}

/// Gauges that other threads read.
#[derive(Debug, Default)]
pub struct RunnerLoad {
    /// Jobs waiting or running.
    pub jobs: AtomicUsize,
    /// Rows that these jobs have still to feed.
    pub rows_waiting: AtomicUsize,
    /// KV blocks that can be had: those held for reuse only are given up when needed.
    pub kv_blocks_free: AtomicUsize,
    /// KV blocks held for reuse.
    pub prefix_blocks: AtomicUsize,
    /// KV blocks held for reuse that have been given up since the start.
    pub prefix_evicted: AtomicU64,
    /// Sequences since the start that found rows to reuse.
    pub prefix_hits: AtomicU64,
    /// Rows reused since the start.
    pub prefix_rows: AtomicU64,
    /// KV blocks on disk, for the next start.
    pub saved_blocks: AtomicUsize,
    /// Bytes of their files.
    pub saved_bytes: AtomicU64,
    /// KV blocks that were read back from disk since the start.
    pub restored_blocks: AtomicU64,
    /// KV blocks on disk that were damaged or gone when they were wanted.
    pub refused_blocks: AtomicU64,
    /// Rows fed since the start.
    pub rows: AtomicU64,
    /// Forward passes since the start.
    pub passes: AtomicU64,
    /// Time in the model since the start, microseconds.
    pub busy_us: AtomicU64,
}

/// How a runner is set up.
#[derive(Debug, Clone, Copy)]
pub struct RunnerOptions {
    /// KV blocks.
    pub kv_blocks: usize,
    /// Most KV blocks held for reuse; 0 to reuse none.
    pub prefix_blocks_max: usize,
    /// Most commands waiting.
    pub queue_max: usize,
    /// Bounds of a pass.
    pub batch: BatchBounds,
}

impl RunnerOptions {
    fn check(&self) -> Result<(), RunnerError> {
        let BatchBounds { rows_max, sequences_max, prefill_chunk, prefill_reserve } = self.batch;
        let table = [
            ("queue_max", self.queue_max, 1, usize::MAX),
            // A pass without room for a row would be composed again and again.
            ("rows_max", rows_max, 1, ROWS_MAX),
            ("sequences_max", sequences_max, 1, usize::MAX),
            ("prefill_chunk", prefill_chunk, 1, usize::MAX),
            ("prefill_reserve", prefill_reserve, 0, usize::MAX),
        ];
        match table.into_iter().find(|(_, value, min, max)| !(*min..=*max).contains(value)) {
            Some((field, value, min, max)) => Err(RunnerError::Options { field, value, min, max }),
            None => Ok(()),
        }
    }
}

/// Sequences to forget that found the queue full. Bounded by the sequences there are.
#[derive(Debug, Default)]
struct Unwanted(Mutex<HashSet<SessionId>>);

impl Unwanted {
    fn keys(&self) -> MutexGuard<'_, HashSet<SessionId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Handle to the engine thread. The thread ends when the last handle is gone.
#[derive(Debug)]
pub struct Runner<T> {
    commands: SyncSender<Command<T>>,
    unwanted: Arc<Unwanted>,
    queue_max: usize,
    load: Arc<RunnerLoad>,
    model: Arc<Model>,
    outstanding: Arc<Outstanding>,
}

impl<T> Clone for Runner<T> {
    fn clone(&self) -> Self {
        Self {
            commands: self.commands.clone(),
            unwanted: self.unwanted.clone(),
            queue_max: self.queue_max,
            load: self.load.clone(),
            model: self.model.clone(),
            outstanding: self.outstanding.clone(),
        }
    }
}

impl<T: Send + 'static> Runner<T> {
    /// Starts the thread.
    ///
    /// # Errors
    /// An option is out of range, the pool does not fit in memory, or no thread can be started.
    pub fn start(model: Arc<Model>, options: RunnerOptions, choose: Choose<T>) -> Result<Self, RunnerError> {
        Self::start_with(model, options, None, choose)
    }

    /// As [`Self::start`]; KV blocks held for reuse under the store's key are kept there as well, and found again by
    /// the next runner with it.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        model: Arc<Model>,
        options: RunnerOptions,
        store: Option<BlockStore>,
        choose: Choose<T>,
    ) -> Result<Self, RunnerError> {
        options.check()?;
        let pool = KvPool::new(model.kv_layout(), 0..model.spec().layers, options.kv_blocks)?;
        let (commands, inbox) = sync_channel(options.queue_max);
        let unwanted = Arc::new(Unwanted::default());
        let load = Arc::new(RunnerLoad::default());
        load.kv_blocks_free.store(options.kv_blocks, Ordering::Relaxed);
        let saved = store.map(saved::Saved::new);
        let worker = worker::Worker::new(model.clone(), options, pool, saved, choose, unwanted.clone(), load.clone());
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || worker.run(&inbox))
            .map_err(|e| RunnerError::Stopped(e.to_string()))?;
        let outstanding = Outstanding { since: Instant::now(), jobs: AtomicUsize::new(0), first_us: AtomicU64::new(0) };
        Ok(Self { commands, unwanted, queue_max: options.queue_max, load, model, outstanding: Arc::new(outstanding) })
    }

    /// Gauges.
    #[must_use]
    pub fn load(&self) -> &RunnerLoad {
        &self.load
    }

    /// How long the thread has made no progress although there is work, if that is longer than the model's steps
    /// usually take: it hangs.
    #[must_use]
    pub fn stalled(&self) -> Option<Duration> {
        let pulse = self.model.pulse();
        self.outstanding.age().map(|work| work.min(pulse.age())).filter(|age| *age >= pulse.patience())
    }

    /// Queues a job and says how far it is from then on. `done` is called exactly once unless the thread
    /// dies.
    ///
    /// # Errors
    /// The queue is full or the thread is gone.
    pub fn submit(&self, job: Job, done: OnDone<JobDone<T>>) -> Result<Arc<JobProgress>, RunnerError> {
        let rows_left = job.sequence.len().saturating_sub(job.feed_from);
        let progress = Arc::new(JobProgress { rows_left: AtomicUsize::new(rows_left), ..JobProgress::default() });
        self.ask(done, |done| Command::Run(Box::new(job), progress.clone(), done, Instant::now()))?;
        Ok(progress)
    }

    /// Drops a sequence's state (after its running job, if any), also when the queue is full: state that
    /// no job asks for again would stay for ever.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn forget(&self, key: SessionId) -> Result<(), RunnerError> {
        match self.send(Command::Forget(key)) {
            Err(RunnerError::Full(_)) => {}
            sent => return sent,
        }
        self.unwanted.keys().insert(key);
        // If the queue is full still, the thread has a command to come back for; else this wakes it.
        match self.send(Command::Wake) {
            Err(RunnerError::Full(_)) => Ok(()),
            sent => sent,
        }
    }

    /// Copies out the state of the first `layers` layers of the sequence's first `tokens` tokens, one
    /// `[layer][token][width]` payload per block.
    ///
    /// # Errors
    /// The queue is full or the thread is gone.
    pub fn export_trunk(
        &self,
        key: SessionId,
        layers: usize,
        tokens: usize,
        done: OnDone<Vec<Vec<f32>>>,
    ) -> Result<(), RunnerError> {
        self.ask(done, |done| Command::ExportTrunk { key, layers, tokens, done })
    }

    /// Puts state of the first `layers` layers in place for those of the sequence's first `tokens` tokens that
    /// skipped them, or some of them, as their hidden states were given; `done` gets the number of tokens of whose
    /// state no layer is missing then, which is unchanged if more layers were skipped.
    ///
    /// # Errors
    /// The queue is full or the thread is gone.
    pub fn import_trunk(
        &self,
        key: SessionId,
        layers: usize,
        blocks: Vec<Vec<f32>>,
        tokens: usize,
        done: OnDone<usize>,
    ) -> Result<(), RunnerError> {
        self.ask(done, |done| Command::ImportTrunk { key, layers, blocks, tokens, done })
    }

    /// Tells `done` how many of the first `tokens` a sequence under this key would find computed.
    ///
    /// # Errors
    /// The queue is full or the thread is gone.
    pub fn held(&self, prefix: BlockChain, tokens: Vec<u32>, done: OnDone<usize>) -> Result<(), RunnerError> {
        self.ask(done, |done| Command::Held { prefix, tokens, done })
    }

    /// Writes what is to be kept on disk, and calls `done` when that is done or has taken too long. Otherwise it is
    /// written when the thread has had nothing to do for a moment. For the end: sequences wait meanwhile.
    ///
    /// # Errors
    /// The queue is full or the thread is gone.
    pub fn save(&self, done: OnDone<()>) -> Result<(), RunnerError> {
        self.ask(done, Command::Save)
    }

    /// Sends a command that `done` ends; until then it is outstanding work, so that [`Self::stalled`] sees it.
    fn ask<R: 'static>(
        &self,
        done: OnDone<R>,
        command: impl FnOnce(OnDone<R>) -> Command<T>,
    ) -> Result<(), RunnerError> {
        self.outstanding.add();
        let outstanding = self.outstanding.clone();
        let counted = Box::new(move |result| {
            outstanding.remove();
            done(result);
        });
        self.send(command(counted)).inspect_err(|_| self.outstanding.remove())
    }

    fn send(&self, command: Command<T>) -> Result<(), RunnerError> {
        self.commands.try_send(command).map_err(|e| match e {
            TrySendError::Full(_) => RunnerError::Full(self.queue_max),
            TrySendError::Disconnected(_) => RunnerError::Stopped("it has ended".into()),
        })
    }
}
