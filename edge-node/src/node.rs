//! An edge node: the model, the policy, the link to the cloud, and the answers under way.

mod exchange;
mod parts;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tandem_engine::chat::ChatTemplate;
use tandem_engine::constraint::Constraints;
use tandem_engine::runner::{Job, JobDone, Runner, RunnerError, RunnerOptions, prefix_key};
use tandem_engine::tokenizer::{Difference, Tokenizer};
use tandem_engine::trunk::Trunk;
use tandem_engine::{BlockStore, Model, memory};
use tandem_proto::block::BlockChain;
use tandem_proto::ids::Digest;
use tandem_proto::ids::SessionId;
use tandem_proto::message::{ModelCard, SamplingParams};
use tandem_router::policy::{Aim, Goal, Paired, Steering};
use tandem_transport::bulk::BulkInbox;
use tandem_transport::link::Link;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

pub use self::parts::{EdgeError, EdgeParts};
use crate::account::{Account, Totals};
use crate::admission::{Admission, Slot, Slots};
use crate::api::short_json;
use crate::cloud_watch::{self, PATIENCE};
use crate::diagnosis::{self, CloudState, Diagnosis, LinkState};
use crate::embed;
use crate::explained::Explained;
use crate::generate;
use crate::generate::draft::{EdgeChoice, choose};
use crate::pacing::Estimates;
use crate::request::{Controls, Events, GenerateError, GenerateRequest, Generation, Mode, NodeStatus, Scored};
use crate::settings::EdgeSettings;
use crate::uplinks::Uplinks;

/// Events of an answer that may wait for a slow client.
const EVENTS_MAX: usize = 256;

/// Longest wait for state to be written at the end; its last part is a flush of what the disk was given.
const SAVE_MAX: Duration = Duration::from_secs(5);

/// Things that the page's controls change.
#[derive(Clone, Copy, Debug)]
struct Dials {
    threshold: Option<f32>,
    /// The same for the stand-in of a rule that does not fit the cloud's model; it scores in a unit of its
    /// own.
    stand_in: Option<f32>,
    default_mode: Mode,
}

pub(crate) struct Inner {
    pub(crate) settings: EdgeSettings,
    pub(crate) model: Arc<Model>,
    pub(crate) runner: Runner<EdgeChoice>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) uplinks: Uplinks,
    pub(crate) bulk: BulkInbox,
    tokenizer: Arc<Tokenizer>,
    constraints: Constraints,
    chat: ChatTemplate,
    policy: Paired,
    aim: Aim,
    /// Cloud model for which the fitted rule was last found wanting, so that it is logged once.
    unfit_for: Mutex<Option<Digest>>,
    tenant_key: [u8; 32],
    /// Under which sequences share rows.
    pub(crate) prefix_key: BlockChain,
    pub(crate) trunk: Option<Trunk>,
    sampling: SamplingParams,
    short_json: bool,
    context_tokens: usize,
    dials: Mutex<Dials>,
    estimates: Mutex<Estimates>,
    pub(crate) totals: Mutex<Totals>,
    pub(crate) answered: Mutex<Explained>,
    admission: Admission,
    /// Where the clock of the sessions begins.
    begun: Instant,
    /// Cancelled when answers under way are to end.
    pub(crate) closing: CancellationToken,
}

/// Handle to an edge node; cheap to clone.
#[derive(Clone)]
pub struct EdgeNode(Arc<Inner>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EdgeNode {
    /// Starts the engine thread of a node.
    ///
    /// # Errors
    /// The settings or the policy's parameters do not fit the model, or the KV pool does not fit in
    /// memory.
    pub fn start(settings: EdgeSettings, parts: EdgeParts) -> Result<Self, EdgeError> {
        let trunk = Trunk::of_setting(&parts.model, settings.trunk_layers)?;
        let policy = Paired::new(parts.policy, &parts.model.digest(), parts.model.spec().hidden_size)?;
        let goal = Goal {
            threshold: settings.threshold,
            quality: settings.quality,
            cloud_share: settings.cloud_share,
            cloud_tokens_max: settings.answer_cloud_tokens_max,
        };
        let aim = Aim::new(goal, &policy)?;
        let spec = parts.model.spec();
        let kv_blocks = match settings.kv_blocks {
            0 => memory::kv_blocks(spec, settings.requests_max, memory::available_bytes()),
            blocks => blocks,
        };
        let context_tokens = memory::context_tokens(spec, kv_blocks);
        let options = RunnerOptions {
            split: settings.trunk_layers,
            kv_blocks,
            prefix_blocks_max: memory::blocks_of_mib(spec, settings.prefix_cache_mib_max),
            queue_max: settings.requests_max.max(1) * 4,
            batch: settings.batch(),
        };
        let prefix_key = prefix_key(&parts.model, parts.tenant_key);
        let store = parts.kv_folder.and_then(|dir| block_store(&settings, &dir, &prefix_key, &parts.model));
        let runner = Runner::start_with(parts.model.clone(), options, store, Box::new(choose))?;
        let tokenizer = Arc::new(parts.tokenizer);
        let admission = Admission::new(settings.requests_max, settings.queue_ms_max);
        let answers_kept = settings.answers_kept;
        let inner = Arc::new(Inner {
            dials: Mutex::new(Dials {
                threshold: aim.threshold(),
                stand_in: None,
                default_mode: settings.default_mode,
            }),
            stop_tokens: parts.stop_tokens,
            settings,
            model: parts.model,
            runner,
            uplinks: parts.uplinks,
            bulk: parts.bulk,
            constraints: Constraints::new(tokenizer.clone()),
            tokenizer,
            chat: parts.chat,
            policy,
            aim,
            unfit_for: Mutex::default(),
            tenant_key: parts.tenant_key,
            prefix_key,
            trunk,
            sampling: parts.sampling,
            short_json: parts.short_json.unwrap_or_else(|| short_json::by_default(context_tokens)),
            context_tokens,
            estimates: Mutex::default(),
            totals: Mutex::default(),
            answered: Mutex::new(Explained::new(answers_kept)),
            admission,
            begun: Instant::now(),
            closing: CancellationToken::new(),
        });
        cloud_watch::start(&inner);
        Ok(Self(inner))
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
        let inner = &self.0;
        let link = inner.uplinks.current();
        let context = inner.context_for(request.mode, link.as_deref());
        if request.prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if request.prompt.len() >= context {
            return Err(GenerateError::TooLong { prompt: request.prompt.len(), context });
        }
        let vocabulary = inner.model.spec().vocab_size;
        if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= vocabulary) {
            let text = inner.tokenizer.token(token).unwrap_or_default().to_owned();
            return Err(GenerateError::UnknownToken { token, text, vocabulary });
        }
        if matches!(request.mode, Mode::Exact | Mode::Cloud) && !inner.uplinks.configured() {
            return Err(GenerateError::NoCloud(request.mode.name()));
        }
        if request.mode != Mode::Local
            && let Some(problem) = link.and_then(|link| inner.mismatch(&link))
        {
            return Err(GenerateError::ForeignCloud { mode: request.mode.name(), problem: problem.line() });
        }
        request.tokens_max = request.tokens_max.min(context - request.prompt.len());
        let id = session_id()?;
        let (tx, events) = mpsc::channel(EVENTS_MAX);
        let (account, route) = Account::open(inner.clone());
        let span = tracing::info_span!(
            "answer",
            request = ?request.request_id,
            session = %id,
            device = inner.settings.name,
            mode = request.mode.name()
        );
        tokio::spawn(generate::run(inner.clone(), slot, request, id, tx, account.clone()).instrument(span));
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
        let inner = &self.0;
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if prompt.len() > inner.context_tokens {
            return Err(GenerateError::TooLong { prompt: prompt.len(), context: inner.context_tokens });
        }
        let key = session_id()?;
        let (tokens, runner) = (prompt.len(), inner.runner.clone());
        let job = Job {
            key,
            prompt_len: tokens,
            sequence: prompt,
            feed_from: 0,
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
        inner.runner.submit(job, Box::new(on_done)).map_err(|e| GenerateError::Engine(e.to_string()))?;
        Ok(scores)
    }

    /// The embedding of a text's tokens, see [`Backend::embed`](crate::api::Backend::embed).
    ///
    /// # Errors
    /// The node is busy, the text does not fit, or the model failed.
    pub async fn embed(&self, tokens: Vec<u32>) -> Result<Vec<f32>, GenerateError> {
        let inner = &self.0;
        if tokens.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if tokens.len() > inner.context_tokens {
            return Err(GenerateError::TooLong { prompt: tokens.len(), context: inner.context_tokens });
        }
        let _slot = inner.admission.enter(1).await?;
        embed::embed(&inner.runner, &inner.model, tokens).await
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
        self.0.short_json
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
        let inner = &self.0;
        let link = inner.uplinks.current();
        let stats = link.as_ref().map(|l| l.stats());
        let dials = *lock(&inner.dials);
        let totals = lock(&inner.totals);
        let (policy, unfit) = inner.policy.towards(link.as_deref().and_then(|l| inner.cloud_digest(l)));
        let dialled = if unfit.is_some() { dials.stand_in } else { dials.threshold };
        let cloud = inner.cloud_state();
        NodeStatus {
            node: inner.settings.name.clone(),
            edge_model: inner.settings.model.clone(),
            cloud_model: link.as_ref().map(|_| inner.settings.cloud_model.clone()),
            cloud_connected: link.is_some(),
            cloud_problem: cloud.failure(),
            cloud,
            cut: inner.uplinks.is_cut(),
            rtt_ms: stats.as_ref().map(|s| s.rtt_us as f64 / 1000.0),
            goodput_bytes_per_s: stats.as_ref().and_then(|s| s.goodput_bytes_per_s()).map(|g| g as f64),
            threshold: dialled.unwrap_or_else(|| policy.threshold()),
            threshold_unit: policy.unit().name().to_owned(),
            threshold_max: policy.unit().max(),
            default_mode: dials.default_mode,
            policy: policy.name().to_owned(),
            policy_note: unfit.map(|why| why.to_string()),
            trunk_layers: link
                .as_ref()
                .map_or(0, |l| if inner.shares_trunk(l) { inner.settings.trunk_layers } else { 0 }),
            active_requests: inner.admission.taken(),
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
        let inner = &self.0;
        let link = inner.uplinks.current();
        let (_, unfit) = inner.policy.towards(link.as_deref().and_then(|l| inner.cloud_digest(l)));
        let mut dials = lock(&inner.dials);
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

/// The KV blocks on disk, if some are to be kept there. A node starts without them as well.
fn block_store(settings: &EdgeSettings, dir: &Path, key: &BlockChain, model: &Model) -> Option<BlockStore> {
    let bytes_max = settings.prefix_disk_mib_max.saturating_mul(1 << 20);
    let opened = if bytes_max == 0 || settings.prefix_cache_mib_max == 0 {
        BlockStore::clear(dir).map(|()| None)
    } else {
        BlockStore::open(dir, key.clone(), model.kv_layout(), bytes_max).map(Some)
    };
    opened.unwrap_or_else(|why| {
        tracing::warn!(%why, "this node's conversations do not outlive it (edge.prefix_disk_mib_max)");
        None
    })
}

fn session_id() -> Result<SessionId, GenerateError> {
    let mut id = [0; 16];
    match getrandom::fill(&mut id) {
        Ok(()) => Ok(SessionId(id)),
        Err(e) => Err(GenerateError::Engine(format!("the system gives no random numbers: {e}"))),
    }
}

impl Inner {
    /// The model that the peer serves under the name we ask for.
    fn cloud_card<'l>(&self, link: &'l Link) -> Option<&'l ModelCard> {
        link.peer_hello().models.iter().find(|card| card.name == self.settings.cloud_model)
    }

    /// Its digest.
    fn cloud_digest<'l>(&self, link: &'l Link) -> Option<&'l Digest> {
        self.cloud_card(link).map(|card| &card.digest)
    }

    /// Longest prompt plus answer: where the cloud decides every token, its model's context counts too.
    fn context_for(&self, mode: Mode, link: Option<&Link>) -> usize {
        let decides = matches!(mode, Mode::Exact | Mode::Cloud);
        let card = link.filter(|_| decides).and_then(|link| self.cloud_card(link));
        card.map_or(self.context_tokens, |card| self.context_tokens.min(card.context_tokens as usize))
    }

    /// Steering of an answer that may ask the cloud over `link`. Where the fitted rule does not hold
    /// for the cloud's model, the stand-in decides, at its own threshold.
    pub(crate) fn steering(&self, threshold: Option<f32>, link: Option<&Link>) -> Steering {
        let cloud = link.and_then(|l| self.cloud_digest(l));
        let (policy, unfit) = self.policy.towards(cloud);
        let stands_in = unfit.is_some();
        let threshold = match unfit {
            None => threshold.or(lock(&self.dials).threshold),
            Some(why) => {
                let mut known = lock(&self.unfit_for);
                if known.as_ref() != cloud {
                    tracing::warn!("{} decides on this link: {why}", policy.name());
                    *known = cloud.copied();
                }
                // A request's own is on the fitted risk.
                lock(&self.dials).stand_in
            }
        };
        self.aim.steering(policy, stands_in, threshold)
    }

    /// A time on the clock of the sessions, microseconds.
    pub(crate) fn clock_us(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.begun).as_micros()).unwrap_or(u64::MAX)
    }

    /// When that clock says `us`; none for a time that never comes.
    pub(crate) fn instant_of(&self, us: u64) -> Option<Instant> {
        self.begun.checked_add(Duration::from_micros(us))
    }

    pub(crate) fn estimates(&self) -> Estimates {
        *lock(&self.estimates)
    }

    pub(crate) fn learn(&self, f: impl FnOnce(&mut Estimates)) {
        f(&mut lock(&self.estimates));
    }

    /// Why the cloud's model cannot write with this one token by token, if it cannot: ids that mean
    /// other text must never be exchanged. A model that the peer does not announce is refused by it.
    pub(crate) fn mismatch(&self, link: &Link) -> Option<Diagnosis> {
        let card = self.cloud_card(link)?;
        if card.tokenizer == self.tokenizer.digest() {
            return None;
        }
        let name = |id: u32| match self.tokenizer.token(id) {
            Some(text) => format!("token {id} (here `{text}`)"),
            None => format!("token {id} (which is none here)"),
        };
        let first = match self.tokenizer.first_difference(&card.tokenizer_marks) {
            Difference::Token(id) => format!(" first in {}", name(id)),
            Difference::Within(from, to) => format!(" first between {} and {}", name(from), name(to)),
            Difference::Unknown => String::new(),
        };
        Some(diagnosis::tokenizers_differ(&self.settings.model, &self.settings.cloud_model, &first))
    }

    /// How the cloud stands.
    pub(crate) fn cloud_state(&self) -> CloudState {
        let Some(dialing) = self.uplinks.dialing() else { return CloudState::of(LinkState::None) };
        let patient = self.uplinks.patience_left(PATIENCE).is_some();
        let state = CloudState::of_dialing(&dialing.borrow(), patient);
        if state.state != LinkState::Connected {
            return state;
        }
        let Some(link) = self.uplinks.current() else {
            let why = self.uplinks.left_alone();
            return why.map_or(CloudState::of(LinkState::Connecting), |why| {
                CloudState::with(LinkState::Failed, diagnosis::node_fails(&why))
            });
        };
        let served = || link.peer_hello().models.iter().map(|card| card.name.clone()).collect::<Vec<_>>();
        let misfit = match self.cloud_card(&link) {
            None => Some(diagnosis::unknown_model(&self.settings.cloud_model, &served())),
            Some(_) => self.mismatch(&link),
        };
        misfit.map_or(state, |why| CloudState::with(LinkState::Failed, why))
    }
}
