//! What the tasks of a node share: its settings, the model and the engine's thread, the link, the estimates
//! and the totals. Below everything that runs: no task and no handle is named here.

mod exchange;
mod parts;
mod totals;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tandem_engine::chat::ChatTemplate;
use tandem_engine::constraint::Constraints;
use tandem_engine::runner::{Runner, RunnerOptions, prefix_key};
use tandem_engine::tokenizer::{Difference, Tokenizer};
use tandem_engine::trunk::SharedLayers;
use tandem_engine::{BlockStore, Model, memory};
use tandem_proto::block::BlockChain;
use tandem_proto::ids::Digest;
use tandem_proto::message::{ModelCard, SamplingParams};
use tandem_router::policy::{Aim, Goal, Paired, Steering};
use tandem_transport::bulk::BulkInbox;
use tandem_transport::link::Link;
use tokio_util::sync::CancellationToken;

pub use self::parts::{EdgeError, EdgeParts};
pub(crate) use self::totals::Totals;
use crate::admission::Admission;
use crate::choice::{EdgeChoice, choose};
use crate::diagnosis::{self, CloudState, Diagnosis, LinkState};
use crate::explained::Explained;
use crate::pacing::Estimates;
use crate::request::Mode;
use crate::settings::EdgeSettings;
use crate::uplinks::Uplinks;

/// How long a cloud that is merely not there counts as being connected to. A node that restarts, or loads
/// its model beside this one, is back by then.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// Things that the page's controls change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dials {
    pub(crate) threshold: Option<f32>,
    /// The same for the stand-in of a rule that does not fit the cloud's model; it scores in a unit of its
    /// own.
    pub(crate) stand_in: Option<f32>,
    pub(crate) default_mode: Mode,
}

/// What the tasks of a node share. It knows none of them, nor the handle that starts them.
pub(crate) struct NodeContext {
    pub(crate) settings: EdgeSettings,
    pub(crate) model: Arc<Model>,
    pub(crate) runner: Runner<EdgeChoice>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) uplinks: Uplinks,
    pub(crate) bulk: BulkInbox,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) constraints: Constraints,
    pub(crate) chat: ChatTemplate,
    pub(crate) policy: Paired,
    aim: Aim,
    /// Cloud model for which the fitted rule was last found wanting, so that it is logged once.
    unfit_for: Mutex<Option<Digest>>,
    tenant_key: [u8; 32],
    /// Under which sequences share rows.
    pub(crate) prefix_key: BlockChain,
    /// What of the model may be a trunk with a cloud's.
    shared_layers: SharedLayers,
    pub(crate) sampling: SamplingParams,
    pub(crate) short_json: Option<bool>,
    pub(crate) context_tokens: usize,
    pub(crate) dials: Mutex<Dials>,
    estimates: Mutex<Estimates>,
    pub(crate) totals: Mutex<Totals>,
    pub(crate) answered: Mutex<Explained>,
    pub(crate) admission: Admission,
    /// Where the clock of the sessions begins.
    begun: Instant,
    /// Cancelled when answers under way are to end.
    pub(crate) closing: CancellationToken,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NodeContext {
    /// Checks the parts against each other and starts the engine's thread.
    pub(crate) fn start(settings: EdgeSettings, parts: EdgeParts) -> Result<Self, EdgeError> {
        let shared_layers = SharedLayers::of(&parts.model, settings.trunk_layers);
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
        Ok(Self {
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
            shared_layers,
            sampling: parts.sampling,
            short_json: parts.short_json,
            context_tokens,
            estimates: Mutex::default(),
            totals: Mutex::default(),
            answered: Mutex::new(Explained::new(answers_kept)),
            admission,
            begun: Instant::now(),
            closing: CancellationToken::new(),
        })
    }

    /// The model that the peer serves under the name we ask for.
    pub(crate) fn cloud_card<'l>(&self, link: &'l Link) -> Option<&'l ModelCard> {
        link.peer_hello().models.iter().find(|card| card.name == self.settings.cloud_model)
    }

    /// Its digest.
    pub(crate) fn cloud_digest<'l>(&self, link: &'l Link) -> Option<&'l Digest> {
        self.cloud_card(link).map(|card| &card.digest)
    }

    /// Longest prompt plus answer: where the cloud decides every token, its model's context counts too.
    pub(crate) fn context_for(&self, mode: Mode, link: Option<&Link>) -> usize {
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
