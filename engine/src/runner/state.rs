//! KV state of the sequences, and what a job has done so far.

use std::sync::Arc;
use std::time::Instant;

use tandem_proto::ids::SessionId;

use crate::kv::{KvPool, Sequence};

use super::batch::Take;
use super::layer_runs::Way;
use super::prefix::Path;
use super::{Job, JobDone, JobProgress, OnDone, RunnerError};

/// Rows without an output that a decision may bring along, such as those of tokens that the cloud corrected.
const DECISION_ROWS_MAX: usize = 8;

pub(super) struct KvState {
    pub(super) seq: Sequence,
    /// Leading rows of which no layer is missing. Those after them have state from layer `skipped` on.
    pub(super) whole: usize,
    /// Leading layers that rows skipped whose hidden states were given.
    pub(super) skipped: usize,
    /// The tokens whose state this is, as far as a finished job has told.
    pub(super) tokens: Vec<u32>,
    /// From this row on the state rests on numbers of a peer.
    pub(super) given_from: Option<usize>,
    /// Where the sequence stands among those it shares rows with, if it does.
    pub(super) path: Option<Path>,
}

impl KvState {
    pub(super) fn new(pool: &KvPool) -> Self {
        Self { seq: pool.sequence(), whole: 0, skipped: 0, tokens: Vec::new(), given_from: None, path: None }
    }

    /// Rows that lack the layers they skipped.
    pub(super) fn lag(&self) -> usize {
        self.seq.len() - self.whole
    }

    /// Leading rows whose state is whole and was computed here.
    pub(super) fn computed_rows(&self) -> usize {
        self.whole.min(self.given_from.unwrap_or(usize::MAX))
    }

    /// A peer's numbers stand in from row `from` on.
    pub(super) fn given(&mut self, from: usize) {
        self.given_from = Some(self.given_from.map_or(from, |given| given.min(from)));
    }

    /// Cuts the state to `len` tokens.
    pub(super) fn truncate(&mut self, len: usize) {
        self.seq.truncate(len);
        self.whole = self.whole.min(len);
        self.given_from = self.given_from.filter(|given| *given < len);
        if let Some(path) = &mut self.path {
            path.cut(len);
        }
    }
}

pub(super) struct Pending<T> {
    pub(super) job: Box<Job>,
    pub(super) progress: Arc<JobProgress>,
    pub(super) done: OnDone<JobDone<T>>,
    pub(super) kv: KvState,
    /// Next token to feed.
    pub(super) cursor: usize,
    pub(super) outputs: Vec<T>,
    /// Why no output can be had of a row.
    pub(super) failed: Option<RunnerError>,
    pub(super) trunk_hidden: Vec<f32>,
    pub(super) trunk_rows: (usize, usize),
    pub(super) arrival: u64,
    pub(super) queued_at: Instant,
    pub(super) started_at: Option<Instant>,
    /// The sequence is to be dropped after this job.
    pub(super) forget: bool,
    /// Nothing of the sequence has been computed: rows of others may stand in for its first ones.
    pub(super) fresh: bool,
    /// Blocks of its first tokens that were looked for on disk.
    pub(super) asked: usize,
    /// Rows that did.
    pub(super) reused: usize,
}

impl<T> Pending<T> {
    pub(super) fn new(
        job: Box<Job>,
        progress: Arc<JobProgress>,
        done: OnDone<JobDone<T>>,
        kv: KvState,
        (arrival, queued_at): (u64, Instant),
    ) -> Self {
        Self {
            cursor: job.feed_from,
            job,
            progress,
            done,
            kv,
            outputs: Vec::new(),
            failed: None,
            trunk_hidden: Vec::new(),
            trunk_rows: (0, 0),
            arrival,
            queued_at,
            started_at: None,
            forget: false,
            fresh: false,
            asked: 0,
            reused: 0,
        }
    }

    /// Leading tokens that need not be fed if their state is there.
    pub(super) fn reusable(&self) -> usize {
        let outputs = self.job.outputs_from - 1;
        outputs.min(self.job.keep_hidden_from.unwrap_or(usize::MAX)).min(self.job.sequence.len() - 1)
    }

    /// The tokens whose state this job is going to publish.
    pub(super) fn promised(&self) -> Option<&[u32]> {
        let publishes = self.job.hidden.is_none() && self.kv.given_from.is_none() && self.failed.is_none();
        publishes.then(|| self.job.prompt())
    }

    /// Tokens to catch up on before the next row: it needs layers that they skipped.
    fn trunk_lag(&self) -> usize {
        let skips_them_too = self.job.hidden.is_some() && self.job.trunk_layers == self.kv.skipped;
        if skips_them_too { 0 } else { self.kv.lag() }
    }

    /// Which layers the rows of a plan run through, of `layers`.
    pub(super) fn way(&self, plan: &Plan, layers: usize) -> Way {
        let trunk = self.job.trunk_layers;
        if plan.catching_up {
            Way { from: 0, to: self.kv.skipped, keep: None }
        } else if self.job.hidden.is_some() {
            Way { from: trunk, to: layers, keep: None }
        } else {
            Way { from: 0, to: layers, keep: self.job.keep_hidden_from.map(|_| trunk) }
        }
    }

    /// The rows of a plan have run.
    pub(super) fn ran(&mut self, plan: &Plan) {
        if plan.catching_up {
            self.kv.whole += plan.rows;
            self.trunk_rows.0 += plan.rows;
            return;
        }
        self.kv.seq.grow(plan.rows);
        self.cursor += plan.rows;
        if self.job.hidden.is_some() {
            self.kv.skipped = self.job.trunk_layers;
            self.trunk_rows.1 += plan.rows;
        } else {
            self.kv.whole += plan.rows;
            self.trunk_rows.0 += plan.rows;
        }
    }

    pub(super) fn rows_left(&self) -> usize {
        self.trunk_lag() + self.job.sequence.len() - self.cursor
    }

    /// True while the rows to be fed are a prompt's: many stand before the first one with an output.
    pub(super) fn is_prefill(&self) -> bool {
        let before_outputs = (self.job.outputs_from - 1).saturating_sub(self.cursor);
        self.job.is_prefill || self.trunk_lag() + before_outputs > DECISION_ROWS_MAX
    }

    pub(super) fn plan(&self, take: Take) -> Plan {
        let lag = self.trunk_lag();
        if lag > 0 {
            Plan { index: take.index, from: self.cursor - lag, rows: take.rows.min(lag), catching_up: true }
        } else {
            Plan { index: take.index, from: self.cursor, rows: take.rows, catching_up: false }
        }
    }

    /// Answers the job; returns its sequence, its state, and whether that is to be dropped.
    pub(super) fn finish(self) -> (SessionId, KvState, bool) {
        let started = self.started_at.unwrap_or(self.queued_at);
        let result = JobDone {
            outputs: self.outputs,
            compute_us: micros(started, Instant::now()),
            queue_us: micros(self.queued_at, started),
            trunk_tokens: self.kv.whole,
            trunk_rows: self.trunk_rows,
            trunk_hidden: self.trunk_hidden,
            reused: self.reused,
        };
        (self.done)(Ok(result));
        let mut kv = self.kv;
        kv.tokens = self.job.sequence;
        (self.job.key, kv, self.forget)
    }
}

fn micros(from: Instant, to: Instant) -> u32 {
    u32::try_from(to.duration_since(from).as_micros()).unwrap_or(u32::MAX)
}

/// What one pass feeds of one job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Index of the job.
    pub(super) index: usize,
    /// First token.
    pub(super) from: usize,
    /// Tokens.
    pub(super) rows: usize,
    /// Only the layers run that these rows skipped before.
    pub(super) catching_up: bool,
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::kv::KvLayout;

    /// However late the thread takes a job out of the queue.
    #[test]
    fn a_job_has_queued_since_it_was_submitted() {
        let job = Job {
            key: SessionId([1; 16]),
            sequence: vec![1],
            feed_from: 0,
            trunk_layers: 0,
            hidden: None,
            outputs_from: 1,
            prompt_len: 0,
            sampling: Arc::default(),
            top_logprobs: 0,
            is_prefill: false,
            keep_hidden_from: None,
            constraint: None,
            prefix: None,
        };
        let pool = KvPool::new(KvLayout { layers: 1, width: 1 }, 0..1, 1).expect("pool");
        let (send, result) = channel();
        let done: OnDone<JobDone<()>> = Box::new(move |result| drop(send.send(result)));
        let submitted = Instant::now();
        let mut pending = Pending::new(Box::new(job), Arc::default(), done, KvState::new(&pool), (0, submitted));
        pending.started_at = Some(submitted + Duration::from_micros(5000));
        pending.finish();
        assert_eq!(result.recv().expect("told").expect("done").queue_us, 5000);
    }
}
