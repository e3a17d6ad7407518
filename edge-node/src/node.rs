//! The handle to an edge node: starts what runs over the node's context, and asks it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tandem_engine::chat::ChatTemplate;
use tandem_engine::constraint::Constraints;
use tandem_engine::runner::{Job, JobDone, RunnerError};
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::ids::SessionId;
use tandem_proto::message::SamplingParams;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument as _;

use crate::account::Account;
use crate::admission::{Slot, Slots};
use crate::api::short_json;
use crate::choice::EdgeChoice;
use crate::cloud_watch;
pub use crate::context::{EdgeError, EdgeParts};
use crate::context::{NodeContext, lock};
use crate::embed;
use crate::generate;
use crate::request::{Controls, Events, GenerateError, GenerateRequest, Generation, Mode, NodeStatus, Scored};
use crate::settings::EdgeSettings;

/// Events of an answer that may wait for a slow client.
const EVENTS_MAX: usize = 256;

/// Longest wait for state to be written at the end; its last part is a flush of what the disk was given.
const SAVE_MAX: Duration = Duration::from_secs(5);

/// Handle to an edge node; cheap to clone.
#[derive(Clone)]
pub struct EdgeNode(Arc<NodeContext>);

impl EdgeNode {
    /// Starts the engine thread of a node.
    ///
    /// # Errors
    /// The settings or the policy's parameters do not fit the model, or the KV pool does not fit in
    /// memory.
    pub fn start(settings: EdgeSettings, parts: EdgeParts) -> Result<Self, EdgeError> {
        let context = Arc::new(NodeContext::start(settings, parts)?);
        cloud_watch::start(&context);
        Ok(Self(context))
    }

    /// Slots for `answers` answers, when it is this request's turn.
    ///
    /// # Errors
    /// The node is busy.
    pub async fn admit(&self, answers: usize) -> Result<Slots, GenerateError> {
        self.0.admission.enter(answers).await
    }

    /// Begins an answer, if the node has a slot free.
    ///
    /// # Errors
    /// The node is busy, or as [`EdgeNode::begin`].
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, GenerateError> {
        self.begin(request, self.0.admission.try_enter()?)
    }

    /// Begins an answer that was admitted.
    ///
    /// # Errors
    /// The prompt does not fit, or the mode needs a cloud that is not configured.
    pub fn begin(&self, mut request: GenerateRequest, slot: Slot) -> Result<Generation, GenerateError> {
        let context = &self.0;
        let link = context.uplinks.current();
        let longest = context.context_for(request.mode, link.as_deref());
        if request.prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if request.prompt.len() >= longest {
            return Err(GenerateError::TooLong { prompt: request.prompt.len(), context: longest });
        }
        let vocabulary = context.model.spec().vocab_size;
        if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= vocabulary) {
            let text = context.tokenizer.token(token).unwrap_or_default().to_owned();
            return Err(GenerateError::UnknownToken { token, text, vocabulary });
        }
        if matches!(request.mode, Mode::Exact | Mode::Cloud) && !context.uplinks.configured() {
            return Err(GenerateError::NoCloud(request.mode.name()));
        }
        if request.mode != Mode::Local
            && let Some(problem) = link.and_then(|link| context.mismatch(&link))
        {
            return Err(GenerateError::ForeignCloud { mode: request.mode.name(), problem: problem.line() });
        }
        request.tokens_max = request.tokens_max.min(longest - request.prompt.len());
        let id = session_id()?;
        let (tx, events) = mpsc::channel(EVENTS_MAX);
        let (account, route) = Account::open(context.clone());
        let span = tracing::info_span!(
            "answer",
            request = ?request.request_id,
            session = %id,
            device = context.settings.name,
            mode = request.mode.name()
        );
        tokio::spawn(generate::run(context.clone(), slot, request, id, tx, account.clone()).instrument(span));
        Ok(Generation { events: Events::new(events, move |tokens| account.taken(tokens)), route })
    }

    /// Scores the tokens of a prompt but the first, each with so many alternatives. For a request that was
    /// admitted.
    ///
    /// # Errors
    /// The prompt is empty or does not fit, or the engine takes nothing.
    pub fn score(
        &self,
        prompt: Vec<u32>,
        alternatives: u32,
    ) -> Result<oneshot::Receiver<Result<Vec<Scored>, GenerateError>>, GenerateError> {
        let context = &self.0;
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if prompt.len() > context.context_tokens {
            return Err(GenerateError::TooLong { prompt: prompt.len(), context: context.context_tokens });
        }
        let key = session_id()?;
        let (tokens, runner) = (prompt.len(), context.runner.clone());
        let job = Job {
            key,
            prompt_len: tokens,
            sequence: prompt,
            feed_from: 0,
            trunk_layers: 0,
            hidden: None,
            outputs_from: 1,
            sampling: Arc::new(SamplingParams::default()),
            top_logprobs: alternatives as usize,
            is_prefill: true,
            keep_hidden_from: None,
            constraint: None,
            prefix: None,
        };
        let (done, scores) = oneshot::channel();
        let on_done = move |result: Result<JobDone<EdgeChoice>, RunnerError>| {
            // On the engine's thread, which takes what is forgotten when it comes round again.
            let _ = runner.forget(key);
            let score = |choice: EdgeChoice| Scored { logprob: choice.logprob, alternatives: choice.alternatives };
            // The last row says what would come after the prompt.
            let scored = |job: JobDone<EdgeChoice>| job.outputs.into_iter().take(tokens - 1).map(score).collect();
            let _ = done.send(result.map(scored).map_err(|e| GenerateError::Engine(e.to_string())));
        };
        context.runner.submit(job, Box::new(on_done)).map_err(|e| GenerateError::Engine(e.to_string()))?;
        Ok(scores)
    }

    /// The embedding of a text's tokens, see [`Backend::embed`](crate::api::Backend::embed).
    ///
    /// # Errors
    /// The node is busy, the text does not fit, or the model failed.
    pub async fn embed(&self, tokens: Vec<u32>) -> Result<Vec<f32>, GenerateError> {
        let context = &self.0;
        if tokens.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if tokens.len() > context.context_tokens {
            return Err(GenerateError::TooLong { prompt: tokens.len(), context: context.context_tokens });
        }
        let _slot = context.admission.enter(1).await?;
        embed::embed(&context.runner, &context.model, tokens).await
    }

    /// Ends the answers under way: their clients are told why.
    pub fn close(&self) {
        self.0.closing.cancel();
    }

    /// Writes the state that the next start is to find. For the end: nothing else is computed meanwhile.
    pub async fn save(&self) {
        let saved = async {
            // An answer's state is published when it has given its slot back.
            while self.0.admission.taken() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let (done, saved) = oneshot::channel();
            if self.0.runner.save(Box::new(move |result| drop(done.send(result)))).is_ok() {
                let _ = saved.await;
            }
        };
        if tokio::time::timeout(SAVE_MAX, saved).await.is_err() {
            tracing::warn!("the state of conversations could not be written in time; a part is on disk");
        }
    }

    /// Tokenizer of the pair.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.0.tokenizer
    }

    /// Tokens that end an answer.
    #[must_use]
    pub fn stop_tokens(&self) -> &[u32] {
        &self.0.stop_tokens
    }

    /// Grammars over the tokenizer's tokens.
    #[must_use]
    pub fn constraints(&self) -> &Constraints {
        &self.0.constraints
    }

    /// Chat template of the pair.
    #[must_use]
    pub fn chat_template(&self) -> &ChatTemplate {
        &self.0.chat
    }

    /// True if answers of a given form are kept short.
    pub fn short_json(&self) -> bool {
        self.0.short_json.unwrap_or_else(|| short_json::by_default(self.0.context_tokens))
    }

    /// Sampling where a request says nothing.
    #[must_use]
    pub fn sampling(&self) -> &SamplingParams {
        &self.0.sampling
    }

    /// True if a cloud is configured, connected or not.
    #[must_use]
    pub fn has_cloud(&self) -> bool {
        self.0.uplinks.configured()
    }

    /// Settings the node was started with.
    #[must_use]
    pub fn settings(&self) -> &EdgeSettings {
        &self.0.settings
    }

    /// Longest prompt plus answer, tokens.
    #[must_use]
    pub fn context_tokens(&self) -> usize {
        self.0.context_tokens
    }

    /// What the node is doing.
    #[must_use]
    pub fn status(&self) -> NodeStatus {
        let context = &self.0;
        let link = context.uplinks.current();
        let stats = link.as_ref().map(|l| l.stats());
        let dials = *lock(&context.dials);
        let totals = lock(&context.totals);
        let (policy, unfit) = context.policy.towards(link.as_deref().and_then(|l| context.cloud_digest(l)));
        let dialled = if unfit.is_some() { dials.stand_in } else { dials.threshold };
        let cloud = context.cloud_state();
        let trunk = link.as_deref().map(|link| context.trunk(link));
        NodeStatus {
            node: context.settings.name.clone(),
            edge_model: context.settings.model.clone(),
            cloud_model: link.as_ref().map(|_| context.settings.cloud_model.clone()),
            cloud_connected: link.is_some(),
            cloud_problem: cloud.failure(),
            cloud,
            cut: context.uplinks.is_cut(),
            rtt_ms: stats.as_ref().map(|s| s.rtt_us as f64 / 1000.0),
            goodput_bytes_per_s: stats.as_ref().and_then(|s| s.goodput_bytes_per_s()).map(|g| g as f64),
            threshold: dialled.unwrap_or_else(|| policy.threshold()),
            threshold_unit: policy.unit().name().to_owned(),
            threshold_max: policy.unit().max(),
            default_mode: dials.default_mode,
            policy: policy.name().to_owned(),
            policy_note: unfit.map(|why| why.to_string()),
            trunk_layers: trunk.as_ref().and_then(|trunk| trunk.as_ref().ok()).map_or(0, |trunk| trunk.layers),
            trunk_note: trunk.and_then(Result::err).map(|why| why.to_string()),
            active_requests: context.admission.taken(),
            totals: totals.route.clone(),
            answers: totals.answers,
            tokens_per_s: totals.tokens_per_s,
        }
    }

    /// Records what the engine has counted.
    pub fn record_engine(&self) {
        self.0.record_engine();
    }

    /// Changes the controls; values are checked by the caller.
    pub fn set_controls(&self, controls: &Controls) {
        let context = &self.0;
        let link = context.uplinks.current();
        let (_, unfit) = context.policy.towards(link.as_deref().and_then(|l| context.cloud_digest(l)));
        let mut dials = lock(&context.dials);
        if let Some(threshold) = controls.threshold {
            // It is in the unit of the policy in use, as the status is.
            *(if unfit.is_some() { &mut dials.stand_in } else { &mut dials.threshold }) = Some(threshold);
        }
        if let Some(mode) = controls.default_mode {
            dials.default_mode = mode;
        }
        if let Some(cut) = controls.cut {
            self.0.uplinks.cut(cut);
        }
    }

    /// Why each token of an answer stayed or went; of the last answer without an id.
    #[must_use]
    pub fn explain(&self, id: Option<&str>) -> Option<Value> {
        let answered = lock(&self.0.answered).find(id)?;
        Some(answered.json(&self.0.tokenizer))
    }
}

fn session_id() -> Result<SessionId, GenerateError> {
    let mut id = [0; 16];
    match getrandom::fill(&mut id) {
        Ok(()) => Ok(SessionId(id)),
        Err(e) => Err(GenerateError::Engine(format!("the system gives no random numbers: {e}"))),
    }
}
