//! The loop of the engine thread.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tandem_proto::ids::SessionId;

use crate::kv::KvPool;
use crate::model::{Batch, HEAD_ROWS_MAX, Hidden, Model};

use super::batch::{Take, Waiting, decisions, prefills};
use super::fairness::{Allowance, allowance};
use super::layer_runs::{Way, layer_runs};
use super::pass_times::PassTimes;
use super::prefix::{Path, Prefixes, Save};
use super::saved::Saved;
use super::state::{KvState, Pending, Plan};
use super::streams::Streams;
use super::{
    Choose, Command, Job, JobDone, JobProgress, OnDone, RowOutput, RunnerError, RunnerLoad, RunnerOptions, Unwanted,
};

/// Nothing is written to disk before the thread has had nothing to do for this long: between two tokens of an answer
/// it has not.
const QUIET: Duration = Duration::from_millis(50);
/// Time between two blocks that are written then, and between two looks for one that is being read.
const DISK_EVERY: Duration = Duration::from_millis(1);
/// Longest time that writing what is left takes at the end.
const SAVE_MAX: Duration = Duration::from_secs(3);

pub(super) struct Worker<T> {
    model: Arc<Model>,
    options: RunnerOptions,
    pool: KvPool,
    /// States of sequences without a job.
    idle: HashMap<SessionId, KvState>,
    pending: Vec<Pending<T>>,
    streams: Streams,
    times: PassTimes,
    prefixes: Prefixes,
    arrivals: u64,
    choose: Choose<T>,
    unwanted: Arc<Unwanted>,
    load: Arc<RunnerLoad>,
}

impl<T> Worker<T> {
    pub(super) fn new(
        model: Arc<Model>,
        options: RunnerOptions,
        pool: KvPool,
        saved: Option<Saved>,
        choose: Choose<T>,
        unwanted: Arc<Unwanted>,
        load: Arc<RunnerLoad>,
    ) -> Self {
        Self {
            model,
            options,
            pool,
            idle: HashMap::new(),
            pending: Vec::new(),
            streams: Streams::default(),
            times: PassTimes::default(),
            prefixes: Prefixes::new(options.prefix_blocks_max.min(options.kv_blocks), saved),
            arrivals: 0,
            choose,
            unwanted,
            load,
        }
    }

    pub(super) fn run(mut self, inbox: &Receiver<Command<T>>) {
        loop {
            if self.pending.is_empty() {
                match self.next_command(inbox) {
                    Some(command) => self.take(command),
                    None => return,
                }
            }
            // Taken before the commands, so that a job sent before its sequence was forgotten comes first.
            let unwanted = std::mem::take(&mut *self.unwanted.keys());
            while let Ok(command) = inbox.try_recv() {
                self.take(command);
            }
            unwanted.into_iter().for_each(|key| self.forget(key));
            if self.pending.is_empty() {
                continue;
            }
            match self.compose() {
                Ok(takes) => self.step(&takes),
                // The next command; or the time is over, or the last handle is gone.
                Err(wait) => inbox.recv_timeout(wait).into_iter().for_each(|command| self.take(command)),
            }
            self.publish_load();
        }
    }

    /// The next command; blocks go to the disk until it comes. None once the last handle is gone.
    fn next_command(&mut self, inbox: &Receiver<Command<T>>) -> Option<Command<T>> {
        let mut pause = QUIET;
        while self.prefixes.has_to_save() {
            self.publish_load();
            match inbox.recv_timeout(pause) {
                Ok(command) => return Some(command),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => self.save_next(),
            };
            pause = DISK_EVERY;
        }
        self.publish_load();
        inbox.recv().ok()
    }

    fn save_next(&mut self) -> Save {
        self.prefixes.save_next(&self.pool)
    }

    fn save(&mut self, done: OnDone<()>) {
        let begun = Instant::now();
        while begun.elapsed() < SAVE_MAX {
            match self.save_next() {
                Save::Went => {}
                Save::Waits => std::thread::sleep(DISK_EVERY),
                Save::Nothing => break,
            }
        }
        match &self.prefixes.saved {
            Some(saved) => saved.store.flush(move || done(Ok(()))),
            None => done(Ok(())),
        }
    }

    fn publish_load(&self) {
        self.load.kv_blocks_free.store(self.pool.available_blocks(), Ordering::Relaxed);
        self.load.prefix_blocks.store(self.prefixes.blocks(), Ordering::Relaxed);
        self.load.prefix_evicted.store(self.prefixes.evicted(), Ordering::Relaxed);
        self.load.prefix_hits.store(self.prefixes.hits, Ordering::Relaxed);
        self.load.prefix_rows.store(self.prefixes.rows, Ordering::Relaxed);
        if let Some(saved) = &self.prefixes.saved {
            self.load.saved_blocks.store(saved.index.len(), Ordering::Relaxed);
            self.load.saved_bytes.store(saved.store.bytes(), Ordering::Relaxed);
            self.load.restored_blocks.store(saved.restored, Ordering::Relaxed);
            self.load.refused_blocks.store(saved.refused, Ordering::Relaxed);
        }
        self.load.jobs.store(self.pending.len(), Ordering::Relaxed);
        self.load.rows_waiting.store(self.pending.iter().map(Pending::rows_left).sum(), Ordering::Relaxed);
    }

    fn take(&mut self, command: Command<T>) {
        match command {
            Command::Run(job, progress, done, queued_at) => self.admit(job, progress, done, queued_at),
            Command::Forget(key) => self.forget(key),
            Command::Wake => {}
            Command::ExportTrunk { key, layers, tokens, done } => done(self.export(key, layers, tokens)),
            Command::ImportTrunk { key, layers, blocks, tokens, done } => {
                done(self.import(key, layers, &blocks, tokens));
            }
            Command::Held { prefix, tokens, done } => done(Ok(self.prefixes.held(prefix, &tokens))),
            Command::Save(done) => self.save(done),
        }
    }

    fn forget(&mut self, key: SessionId) {
        self.streams.forget(key);
        if let Some(kv) = self.idle.remove(&key) {
            self.leave(kv);
        }
        for p in self.pending.iter_mut().filter(|p| p.job.key == key) {
            p.forget = true;
        }
    }

    /// Drops a sequence's state; what others may use of it stays.
    fn leave(&mut self, mut kv: KvState) {
        let tokens = std::mem::take(&mut kv.tokens);
        self.prefixes.publish(&mut kv, &tokens, true);
        self.prefixes.note_to_save(&kv, &tokens);
    }

    fn admit(&mut self, job: Box<Job>, progress: Arc<JobProgress>, done: OnDone<JobDone<T>>, queued_at: Instant) {
        let rows = job.sequence.len().saturating_sub(job.feed_from);
        let spec = self.model.spec();
        let width = spec.hidden_size;
        // What the model would refuse fails here, alone: in a pass it would take the others with it.
        let bad = if rows == 0 {
            Some("nothing to feed")
        } else if job.sequence.len() > spec.context_tokens {
            Some("the sequence passes the model's context")
        } else if job.sequence.iter().any(|&token| token as usize >= spec.vocab_size) {
            Some("a token is outside the vocabulary")
        } else if job.outputs_from <= job.feed_from {
            Some("an output is wanted for a token that is not fed")
        } else if job.trunk_layers > spec.layers {
            Some("the trunk has more layers than the model")
        } else if job.trunk_layers == 0 && (job.hidden.is_some() || job.keep_hidden_from.is_some()) {
            Some("hidden states are given or wanted without a trunk")
        } else if job.hidden.as_ref().is_some_and(|h| h.len() != rows * width) {
            Some("hidden states do not match the tokens fed")
        } else if self.pending.iter().any(|p| p.job.key == job.key) {
            Some("the sequence already has a job")
        } else {
            None
        };
        if let Some(what) = bad {
            done(Err(RunnerError::BadJob(what)));
            return;
        }
        let mut kv = self.idle.remove(&job.key).unwrap_or_else(|| KvState::new(&self.pool));
        let have = kv.seq.len();
        if job.feed_from > have {
            let wanted = job.feed_from;
            self.idle.insert(job.key, kv);
            done(Err(RunnerError::Gap { have, wanted }));
            return;
        }
        // What is kept for others is found by its tokens: they must be those of the state.
        if job.prefix.is_some() && kv.tokens.get(..job.feed_from) != job.sequence.get(..job.feed_from) {
            self.idle.insert(job.key, kv);
            done(Err(RunnerError::BadJob("the tokens before those fed are not the ones whose state is held")));
            return;
        }
        kv.truncate(job.feed_from);
        if job.hidden.is_some() {
            kv.given(job.feed_from);
        }
        if kv.path.is_none() && self.prefixes.is_on() {
            kv.path = job.prefix.clone().map(Path::new);
        }
        self.arrivals += 1;
        let mut pending = Pending::new(job, progress, done, kv, (self.arrivals, queued_at));
        pending.fresh = pending.kv.path.is_some() && pending.kv.seq.is_empty() && pending.job.hidden.is_none();
        if pending.is_prefill() {
            self.streams.forget(pending.job.key);
        } else {
            self.streams.came(pending.job.key, queued_at);
        }
        self.pending.push(pending);
    }

    /// Gives new sequences what is held of their first rows. One that an earlier job is about to compute
    /// rows for waits, and so does one whose rows are being read from disk.
    fn attach(&mut self) {
        self.prefixes.restore(&mut self.pool);
        for index in 0..self.pending.len() {
            if !self.pending[index].fresh || self.prefixes.waits(&self.pending, index) {
                continue;
            }
            let p = &mut self.pending[index];
            if self.prefixes.reads(p) {
                continue;
            }
            p.fresh = false;
            p.reused = self.prefixes.attach(p, &self.pool);
            p.job.feed_from = p.reused;
            p.cursor = p.reused;
        }
    }

    /// Rows of the next pass, in order of the jobs; how long to wait for a better one instead.
    fn compose(&mut self) -> Result<Vec<Take>, Duration> {
        self.attach();
        let bounds = &self.options.batch;
        let waiting = |p: &Pending<T>| Waiting {
            rows: if p.fresh { 0 } else { p.rows_left() },
            is_prefill: p.is_prefill() || p.rows_left() > bounds.prefill_chunk,
            arrival: p.arrival,
        };
        let waiting: Vec<Waiting> = self.pending.iter().map(waiting).collect();
        let mut takes = decisions(&waiting, bounds);
        let prompts = waiting.iter().filter(|w| w.is_prefill).map(|w| w.rows.min(bounds.prefill_chunk));
        let rows_left = prompts.sum::<usize>().min(bounds.rows_max);
        if rows_left > 0 {
            let decisions = takes.iter().map(|t| t.rows).sum();
            let pending = &self.pending;
            let streams = self.streams.beside(Instant::now(), |key| pending.iter().any(|p| p.job.key == key));
            match allowance(&self.times, &streams, decisions, rows_left) {
                Allowance::Rows(rows) => takes.extend(prefills(&waiting, bounds, &takes, rows)),
                Allowance::Wait(us) => return Err(Duration::from_micros(us)),
            }
        }
        if takes.is_empty() && self.prefixes.saved.as_ref().is_some_and(Saved::is_reading) {
            return Err(DISK_EVERY);
        }
        takes.sort_by_key(|t| t.index);
        Ok(takes)
    }

    /// Runs one batch and answers the jobs it ends.
    fn step(&mut self, takes: &[Take]) {
        let begun = Instant::now();
        self.model.pulse().begin();
        let plans = self.reserve(takes);
        for plan in &plans {
            self.pending[plan.index].progress.in_pass.store(true, Ordering::Relaxed);
        }
        if let Err(e) = self.forward(&plans) {
            // The pass failed as a whole: the state of its sequences is unknown and goes.
            for plan in plans.iter().rev() {
                (self.pending.remove(plan.index).done)(Err(e.clone()));
            }
            return;
        }
        self.load.passes.fetch_add(1, Ordering::Relaxed);
        let rows = plans.iter().map(|p| p.rows).sum();
        let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.times.note(rows, took_us);
        self.load.rows.fetch_add(rows as u64, Ordering::Relaxed);
        self.load.busy_us.fetch_add(took_us, Ordering::Relaxed);
        for p in &self.pending {
            p.progress.rows_left.store(p.rows_left(), Ordering::Relaxed);
            p.progress.in_pass.store(false, Ordering::Relaxed);
        }
        for plan in &plans {
            let Pending { job, kv, .. } = &mut self.pending[plan.index];
            // Of an answer more than once: what is thrown away again is nothing to keep.
            if plan.from < job.prompt_len {
                let last = kv.seq.len() >= job.prompt_len;
                self.prefixes.publish(kv, job.prompt(), last);
            }
        }
        for index in (0..self.pending.len()).rev() {
            if let Some(e) = self.pending[index].failed.take() {
                (self.pending.remove(index).done)(Err(e));
            } else if self.pending[index].rows_left() == 0 {
                let is_prefill = self.pending[index].job.is_prefill;
                let (key, kv, forget) = self.pending.remove(index).finish();
                if forget {
                    self.leave(kv);
                    continue;
                }
                if !is_prefill {
                    self.streams.went(key, Instant::now());
                }
                self.idle.insert(key, kv);
            }
        }
    }

    /// Reserves memory for each take; a sequence that gets none fails alone.
    fn reserve(&mut self, takes: &[Take]) -> Vec<Plan> {
        let mut plans = Vec::with_capacity(takes.len());
        let mut removed = 0;
        for take in takes {
            let take = Take { index: take.index - removed, ..*take };
            let p = &mut self.pending[take.index];
            p.started_at.get_or_insert_with(Instant::now);
            let plan = p.plan(take);
            match self.prefixes.reserve(&mut self.pool, &mut p.kv.seq, plan.from, plan.rows) {
                Ok(()) => plans.push(plan),
                Err(e) => {
                    removed += 1;
                    let mut p = self.pending.remove(take.index);
                    if !p.forget {
                        p.kv.tokens = p.job.sequence;
                        self.idle.insert(p.job.key, p.kv);
                    }
                    (p.done)(Err(e.into()));
                }
            }
        }
        plans
    }

    fn forward(&mut self, plans: &[Plan]) -> Result<(), RunnerError> {
        let model = self.model.clone();
        let (layers, width) = (model.spec().layers, model.spec().hidden_size);
        let ways: Vec<Way> = plans.iter().map(|plan| self.pending[plan.index].way(plan, layers)).collect();
        let mut rows = self.entering(&model, plans, &ways)?;
        for run in layer_runs(&ways) {
            let active: Vec<usize> = (0..plans.len()).filter(|&i| ways[i].runs(&run)).collect();
            let (mut batch, mut data) = (Batch::default(), Vec::new());
            for &i in &active {
                batch.push(&self.pending[plans[i].index].kv.seq, plans[i].from, plans[i].rows);
                data.append(&mut rows[i]);
            }
            let above = run.end;
            let hidden = Hidden { rows: data.len() / width, width, data };
            let hidden = model.run(run, &mut self.pool, &batch, hidden)?;
            let mut left = hidden.data.as_slice();
            for &i in &active {
                let own;
                (own, left) = left.split_at(plans[i].rows * width);
                if ways[i].keep == Some(above) {
                    let p = &mut self.pending[plans[i].index];
                    let skipped = p.job.keep_hidden_from.unwrap_or(0).saturating_sub(plans[i].from);
                    p.trunk_hidden.extend_from_slice(&own[skipped.min(plans[i].rows) * width..]);
                }
                rows[i].extend_from_slice(own);
            }
        }
        let mut data = Vec::new();
        for (plan, mut rows) in plans.iter().zip(rows) {
            if !plan.catching_up {
                data.append(&mut rows);
            }
        }
        self.outputs(&model, plans, &Hidden { rows: data.len() / width, width, data })?;
        plans.iter().for_each(|plan| self.pending[plan.index].ran(plan));
        Ok(())
    }

    /// Per plan, the hidden states with which its rows begin: the embeddings of their tokens, or what a peer gave.
    fn entering(&self, model: &Model, plans: &[Plan], ways: &[Way]) -> Result<Vec<Vec<f32>>, RunnerError> {
        let width = model.spec().hidden_size;
        let given = |plan: &Plan, way: &Way| {
            let job = &self.pending[plan.index].job;
            let hidden = job.hidden.as_ref().filter(|_| way.from > 0)?;
            let at = (plan.from - job.feed_from) * width;
            Some(hidden[at..at + plan.rows * width].to_vec())
        };
        let mut rows: Vec<Option<Vec<f32>>> = plans.iter().zip(ways).map(|(plan, way)| given(plan, way)).collect();
        let tokens = |plan: &Plan| &self.pending[plan.index].job.sequence[plan.from..plan.from + plan.rows];
        let embedded = plans.iter().zip(&rows).filter(|(_, rows)| rows.is_none());
        let embedded: Vec<u32> = embedded.flat_map(|(plan, _)| tokens(plan)).copied().collect();
        if !embedded.is_empty() {
            let hidden = model.embed(&embedded)?;
            let mut left = hidden.data.as_slice();
            for (plan, rows) in plans.iter().zip(&mut rows).filter(|(_, rows)| rows.is_none()) {
                let own;
                (own, left) = left.split_at(plan.rows * width);
                *rows = Some(own.to_vec());
            }
        }
        Ok(rows.into_iter().map(Option::unwrap_or_default).collect())
    }

    fn outputs(&mut self, model: &Model, plans: &[Plan], hidden: &Hidden) -> Result<(), RunnerError> {
        let mut rows = Vec::new();
        let mut wanted = Vec::new();
        let mut at = 0;
        for plan in plans.iter().filter(|p| !p.catching_up) {
            let p = &self.pending[plan.index];
            for i in 0..plan.rows {
                let position = plan.from + i + 1;
                if position >= p.job.outputs_from {
                    rows.push(at + i);
                    wanted.push((plan.index, position));
                }
            }
            at += plan.rows;
        }
        for (rows, wanted) in rows.chunks(HEAD_ROWS_MAX).zip(wanted.chunks(HEAD_ROWS_MAX)) {
            let logits = model.head(hidden, rows)?;
            let logits = logits.data.chunks_exact(logits.vocab);
            for ((&row, &(index, position)), logits) in rows.iter().zip(wanted).zip(logits) {
                let p = &mut self.pending[index];
                let hidden = &hidden.data[row * hidden.width..(row + 1) * hidden.width];
                // What one answer cannot have is no reason to drop the others.
                match (self.choose)(&p.job, RowOutput { position, logits, hidden }) {
                    Ok(chosen) => p.outputs.push(chosen),
                    Err(e) => p.failed = Some(e.into()),
                }
            }
        }
        Ok(())
    }

    fn export(&self, key: SessionId, layers: usize, tokens: usize) -> Result<Vec<Vec<f32>>, RunnerError> {
        let have = self.idle.get(&key).map_or(0, |kv| kv.whole);
        match self.idle.get(&key) {
            Some(kv) if tokens <= have => Ok(self.pool.export_layers(&kv.seq, layers, tokens)?),
            _ => Err(RunnerError::Gap { have, wanted: tokens }),
        }
    }

    fn import(
        &mut self,
        key: SessionId,
        layers: usize,
        blocks: &[Vec<f32>],
        tokens: usize,
    ) -> Result<usize, RunnerError> {
        if self.pending.iter().any(|p| p.job.key == key) {
            return Err(RunnerError::BadJob("the sequence has a job"));
        }
        let have = self.idle.get(&key).map_or(0, |kv| kv.seq.len());
        let Some(kv) = self.idle.get_mut(&key).filter(|_| tokens <= have) else {
            return Err(RunnerError::Gap { have, wanted: tokens });
        };
        // What was computed here stays.
        let from = kv.whole;
        if tokens <= from {
            return Ok(from);
        }
        if layers < kv.skipped {
            // It was shared with another peer: the rest would have to be computed from the first layer on anyway.
            return Ok(from);
        }
        self.prefixes.reserve(&mut self.pool, &mut kv.seq, from, tokens - from)?;
        self.pool.import_layers(&kv.seq, (kv.skipped, layers), from..tokens, blocks)?;
        kv.given(from);
        kv.whole = tokens;
        Ok(tokens)
    }
}
