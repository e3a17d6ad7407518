//! The edge model's side of one answer: feeds tokens to the engine thread, yields the next draft
//! with its uncertainty, and keeps the trunk's hidden states that the cloud may want.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tandem_engine::constraint::Followed;
use tandem_engine::runner::{Job, JobDone, Runner, RunnerError};
use tandem_engine::trunk;
use tandem_proto::block::BlockChain;
use tandem_proto::ids::SessionId;
use tandem_proto::limits::PAYLOAD_BYTES_MAX;
use tandem_proto::message::SamplingParams;
use tokio::sync::oneshot;

use crate::choice::EdgeChoice;
use crate::request::GenerateRequest;

struct Running {
    result: oneshot::Receiver<Result<JobDone<EdgeChoice>, RunnerError>>,
    from: usize,
    end: usize,
    /// State stays valid up to here if the path was cut meanwhile.
    valid_to: usize,
    trunk_layers: usize,
    begun: Instant,
}

/// What a finished step yields.
pub(crate) struct Step {
    /// Position the choice is for.
    pub(crate) position: usize,
    /// The choice; none if the path was cut under the step.
    pub(crate) choice: Option<EdgeChoice>,
    /// Tokens fed.
    pub(crate) rows: usize,
    /// Leading tokens whose state was there before the answer.
    pub(crate) reused: usize,
    /// Wall time, seconds.
    pub(crate) seconds: f64,
}

/// Drafts one answer.
pub(crate) struct Drafter {
    runner: Runner<EdgeChoice>,
    key: SessionId,
    sampling: Arc<SamplingParams>,
    prompt_len: usize,
    top_logprobs: usize,
    constraint: Option<Followed>,
    prefix: BlockChain,
    fed: usize,
    running: Option<Running>,
    width: usize,
    /// Leading layers that the cloud shares; 0 for none.
    trunk_layers: usize,
    keep_hidden: bool,
    hidden_from: usize,
    hidden: Vec<f32>,
}

impl Drafter {
    pub(crate) fn new(
        runner: Runner<EdgeChoice>,
        key: SessionId,
        sampling: Arc<SamplingParams>,
        request: &GenerateRequest,
        constraint: Option<Followed>,
        prefix: BlockChain,
        width: usize,
    ) -> Self {
        Self {
            runner,
            key,
            sampling,
            prompt_len: request.prompt.len(),
            top_logprobs: request.top_logprobs as usize,
            constraint,
            prefix,
            fed: 0,
            running: None,
            width,
            trunk_layers: 0,
            keep_hidden: false,
            hidden_from: 0,
            hidden: Vec::new(),
        }
    }

    /// From now on `trunk_layers` leading layers are shared with the cloud; whether the hidden states above them are
    /// kept of the answer's tokens.
    pub(crate) fn share(&mut self, trunk_layers: usize, keep_hidden: bool) {
        // Above a trunk of another depth the numbers are others.
        if trunk_layers != self.trunk_layers {
            self.hidden.clear();
        }
        self.trunk_layers = trunk_layers;
        self.keep_hidden = keep_hidden && trunk_layers > 0;
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Tokens whose state the engine holds.
    pub(crate) fn fed(&self) -> usize {
        self.fed
    }

    /// Begins the step that chooses the token after `tokens`. `hidden` stands in for the trunk over
    /// all tokens not yet fed.
    pub(crate) fn start(&mut self, tokens: &[u32], hidden: Option<Vec<f32>>) -> Result<(), RunnerError> {
        let end = tokens.len();
        let from = self.fed.min(end - 1);
        let job = Job {
            key: self.key,
            sequence: tokens.to_vec(),
            feed_from: from,
            trunk_layers: self.trunk_layers,
            hidden,
            outputs_from: end,
            prompt_len: self.prompt_len,
            sampling: self.sampling.clone(),
            top_logprobs: self.top_logprobs,
            is_prefill: false,
            keep_hidden_from: self.keep_hidden.then_some(self.prompt_len),
            constraint: self.constraint.clone(),
            prefix: Some(self.prefix.clone()),
        };
        let (done, result) = oneshot::channel();
        self.runner.submit(job, Box::new(move |r| drop(done.send(r))))?;
        let trunk_layers = self.trunk_layers;
        self.running = Some(Running { result, from, end, valid_to: end, trunk_layers, begun: Instant::now() });
        Ok(())
    }

    /// Waits for the running step; pends if there is none. Cancel-safe.
    pub(crate) async fn wait(&mut self) -> Result<Step, RunnerError> {
        let Some(running) = &mut self.running else { return std::future::pending().await };
        let result = (&mut running.result).await.unwrap_or_else(|_| Err(RunnerError::Stopped("it has ended".into())));
        let Some(Running { from, end, valid_to, trunk_layers, begun, .. }) = self.running.take() else {
            return Err(RunnerError::BadJob("no step is running"));
        };
        let mut done = result?;
        self.fed = valid_to;
        let from = from.max(done.reused);
        if !done.trunk_hidden.is_empty() && trunk_layers == self.trunk_layers {
            let kept_from = from.max(self.prompt_len);
            let keep = valid_to.saturating_sub(kept_from) * self.width;
            done.trunk_hidden.truncate(keep);
            self.store_hidden(kept_from, &done.trunk_hidden);
        }
        let choice = if valid_to == end { done.outputs.pop() } else { None };
        Ok(Step {
            position: end,
            choice,
            rows: end - from,
            reused: done.reused,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    fn store_hidden(&mut self, from: usize, rows: &[f32]) {
        let have_to = self.hidden_from + self.hidden.len() / self.width;
        if from < self.hidden_from || from > have_to {
            self.hidden.clear();
            self.hidden_from = from;
        }
        self.hidden.truncate((from - self.hidden_from) * self.width);
        self.hidden.extend_from_slice(rows);
    }

    /// The path was cut to `len` tokens.
    pub(crate) fn cut(&mut self, len: usize) {
        self.fed = self.fed.min(len);
        if let Some(running) = &mut self.running {
            running.valid_to = running.valid_to.min(len);
        }
        self.hidden.truncate(len.saturating_sub(self.hidden_from) * self.width);
    }

    /// Whether a frame carries the hidden states of `rows` positions.
    pub(crate) fn fits_frame(&self, rows: usize) -> bool {
        rows * self.width * size_of::<f32>() <= PAYLOAD_BYTES_MAX
    }

    /// Hidden states of the positions `from..to` for the wire, if all are at hand. Older ones are
    /// dropped.
    pub(crate) fn take_hidden(&mut self, from: usize, to: usize) -> Option<Bytes> {
        let have_to = self.hidden_from + self.hidden.len() / self.width;
        if from < self.hidden_from || to > have_to || from >= to || !self.fits_frame(to - from) {
            return None;
        }
        self.hidden.drain(..(from - self.hidden_from) * self.width);
        self.hidden_from = from;
        Some(trunk::payload(&self.hidden[..(to - from) * self.width]).into())
    }

    /// How many of the prompt's tokens have their state held from earlier answers.
    pub(crate) async fn held(&self, prompt: &[u32]) -> Result<usize, RunnerError> {
        let (done, result) = oneshot::channel();
        self.runner.held(self.prefix.clone(), prompt.to_vec(), Box::new(move |r| drop(done.send(r))))?;
        result.await.unwrap_or_else(|_| Err(RunnerError::Stopped("it has ended".into())))
    }

    /// Copies out the trunk's state of the first `tokens` tokens. No step may be running.
    pub(crate) async fn export_trunk(&self, layers: usize, tokens: usize) -> Result<Vec<Vec<f32>>, RunnerError> {
        let (done, result) = oneshot::channel();
        self.runner.export_trunk(self.key, layers, tokens, Box::new(move |r| drop(done.send(r))))?;
        result.await.unwrap_or_else(|_| Err(RunnerError::Stopped("it has ended".into())))
    }

    /// Puts the trunk's state of the first `tokens` tokens in place. No step may be running.
    pub(crate) async fn import_trunk(&mut self, blocks: Vec<Vec<f32>>, tokens: usize) -> Result<usize, RunnerError> {
        let (done, result) = oneshot::channel();
        self.runner.import_trunk(self.key, self.trunk_layers, blocks, tokens, Box::new(move |r| drop(done.send(r))))?;
        result.await.unwrap_or_else(|_| Err(RunnerError::Stopped("it has ended".into())))
    }
}

impl Drop for Drafter {
    fn drop(&mut self) {
        if let Err(e) = self.runner.forget(self.key) {
            tracing::warn!("the state of answer {} could not be dropped: {e}", self.key);
        }
    }
}
