//! Engines behind URLs as a target: their distributions, our choices. Sampling, penalties, grammars and the
//! judging of drafts happen here, so `exact` means what it means with the engine of this workspace: the tokens
//! that `cloud` would write through the same engine.

mod breaker;
mod choice;
mod lanes;
mod members;
mod path;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::counter;
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::ids::{Digest, SessionId};
use tandem_proto::session::Decided;
use tandem_proto::session::cloud::JobTimes;
use tandem_upstream::{Counters, Fault, Key};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use self::choice::{Asked, Choice, choose};
use self::members::{Member, Members};
use self::path::Path;
use super::{
    Capabilities, Job, JobDone, JobProgress, Pending, Submitted, Target, TargetError, TargetLoad, TrunkDone,
    TrunkState, Verify, millis,
};
use crate::metric_definitions as m;

pub use self::members::ConnectError;

/// When to come again where an upstream does not say.
const RETRY_MS: u32 = 1000;

/// Positions that an engine writes ahead of a greedy answer, and of one that is drawn: that one leaves the greedy
/// path every few tokens.
const GREEDY_AHEAD_MAX: usize = 64;
const DRAWN_AHEAD_MAX: usize = 4;

/// Where engines are, and what is known of their model.
#[derive(Clone, Debug, Default)]
pub struct UpstreamOptions {
    /// URLs; of several, all serve the same model.
    pub urls: Vec<String>,
    /// The key that they want, if any.
    pub key: Option<Key>,
}

/// Engines behind URLs that serve one model.
pub struct Upstream {
    shared: Arc<Shared>,
}

struct Shared {
    members: Members,
    capabilities: Capabilities,
    /// Calls at once: as many as the engines have lanes.
    places: Semaphore,
    sessions: Mutex<HashMap<SessionId, Arc<tokio::sync::Mutex<Session>>>>,
    jobs: AtomicUsize,
    rows: AtomicU64,
    faults: AtomicU64,
    busy_us: AtomicU64,
}

/// What is kept of a session between its jobs.
#[derive(Default)]
struct Session {
    /// The engine that has its tokens in the cache, and where there.
    seat: Option<lanes::Seat>,
    /// An answer of that engine that is still coming.
    path: Option<Path>,
}

impl Upstream {
    /// Finds out what the engines can do, and whether they agree with each other and with `tokenizer`.
    ///
    /// # Errors
    /// [`ConnectError`]; one that [`ConnectError::passes`] may be gone on the next try.
    pub async fn connect(options: &UpstreamOptions, tokenizer: &Tokenizer) -> Result<Self, ConnectError> {
        let members = Members::connect(options, tokenizer).await?;
        let lanes = members.all().iter().map(|m| m.engine().abilities().lanes).sum::<usize>().max(1);
        let context = members.all().iter().map(|m| m.engine().abilities().context_tokens).min().unwrap_or(0);
        let capabilities = Capabilities {
            // The last position of a full context cannot be asked for: an engine wants room for a token of its own.
            context_tokens: context.saturating_sub(1),
            vocabulary: tokenizer.vocab_size(),
            verify: Verify::Exact,
            grammar: true,
        };
        let shared = Shared {
            members,
            capabilities,
            places: Semaphore::new(lanes),
            sessions: Mutex::default(),
            jobs: AtomicUsize::new(0),
            rows: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            busy_us: AtomicU64::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The model's name, as the engines have it.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.first().abilities().model
    }

    /// Context of a session, tokens.
    #[must_use]
    pub fn context_tokens(&self) -> usize {
        self.shared.capabilities.context_tokens
    }

    /// Names the arithmetic: equal for equal kinds and versions of engines. Their bits are not pinned by it.
    #[must_use]
    pub fn numerics(&self) -> String {
        let abilities = self.first().abilities();
        format!("{}-{}", abilities.kind.name(), abilities.version)
    }

    /// Stands for the model where rules that were fitted to a pair ask which one it is: weights cannot be hashed
    /// from outside, so it is what the engine calls it.
    #[must_use]
    pub fn digest(&self, tokenizer: Digest) -> Digest {
        let abilities = self.first().abilities();
        let mut hash = blake3::Hasher::new();
        hash.update(b"tandem-upstream-1");
        hash.update(&(abilities.model.len() as u64).to_le_bytes());
        hash.update(abilities.model.as_bytes());
        hash.update(&(abilities.vocabulary as u64).to_le_bytes());
        hash.update(&tokenizer.0);
        Digest(*hash.finalize().as_bytes())
    }

    /// One line for people: what was found.
    #[must_use]
    pub fn summary(&self) -> String {
        let abilities = self.first().abilities();
        let at: Vec<String> = self.shared.members.all().iter().map(|m| m.engine().address().shown()).collect();
        format!(
            "upstream {} {} at {}: model {}, context {}, {} lanes; drafts are judged by continuation (a decode per \
             token), exact up to ties",
            abilities.kind.name(),
            abilities.version,
            at.join(", "),
            abilities.model,
            abilities.context_tokens,
            self.shared.places.available_permits(),
        )
    }

    fn first(&self) -> &tandem_upstream::Engine {
        self.shared.members.all()[0].engine()
    }
}

impl Target for Upstream {
    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities
    }

    fn load(&self) -> TargetLoad {
        let shared = &self.shared;
        TargetLoad {
            jobs: shared.jobs.load(Ordering::Relaxed),
            rows: shared.rows.load(Ordering::Relaxed),
            passes: shared.sum(|c| &c.calls),
            busy_us: shared.busy_us.load(Ordering::Relaxed),
            // While one answers, sessions move to it.
            stalled_ms: shared.members.all().iter().map(|m| millis(m.engine().stalled())).min().unwrap_or(0),
            ..TargetLoad::default()
        }
    }

    fn publish(&self) {
        let shared = &self.shared;
        counter!(m::UPSTREAM_CALLS).absolute(shared.sum(|c| &c.calls));
        counter!(m::UPSTREAM_ROWS).absolute(shared.sum(|c| &c.rows));
        counter!(m::UPSTREAM_FAULTS).absolute(shared.faults.load(Ordering::Relaxed));
        let prompt = |source: &'static str| counter!(m::UPSTREAM_PROMPT_TOKENS, m::LABEL_SOURCE => source);
        prompt("computed").absolute(shared.sum(|c| &c.prompt_computed));
        prompt("cache").absolute(shared.sum(|c| &c.prompt_cached));
    }

    fn held(&self, _tenant_key: [u8; 32], _tokens: Vec<u32>) -> Pending<usize> {
        // Engines say what they had in their cache afterwards only.
        Box::pin(std::future::ready(Ok(0)))
    }

    fn submit(&self, job: Job) -> Submitted {
        let left = Arc::new(AtomicUsize::new(job.tokens.len() + 1 - job.picks_from));
        let progress = left.clone();
        let shared = self.shared.clone();
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            let _counted = Counted::new(&shared.jobs);
            shared.run(&job, &left).await
        }));
        let done = Box::pin(async move {
            task.await.unwrap_or_else(|e| Err(TargetError::Failed(format!("the job's task failed: {e}"))))
        });
        let progress = move || JobProgress { rows_left: progress.load(Ordering::Relaxed), working: true };
        Submitted { done, progress: Box::new(progress) }
    }

    fn forget(&self, session: SessionId) {
        self.shared.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(&session);
    }

    fn trunk(&self) -> Option<&dyn TrunkState> {
        None
    }
}

/// Counts something as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// A count of all engines together.
    fn sum(&self, count: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        self.members.all().iter().map(|m| count(m.engine().counters()).load(Ordering::Relaxed)).sum()
    }

    async fn run(&self, job: &Job, left: &AtomicUsize) -> Result<JobDone, TargetError> {
        let session = {
            let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            sessions.entry(job.session).or_default().clone()
        };
        // A job that was given up may still be ending.
        let mut session = session.lock().await;
        let begun = Instant::now();
        let place = self.places.acquire().await.map_err(|e| TargetError::Failed(e.to_string()))?;
        let working = Instant::now();
        let mut picks = Vec::new();
        for position in job.picks_from..=job.tokens.len() {
            let pick = self.decide(&mut session, job, position).await?;
            let id = pick.id;
            picks.push(pick);
            left.fetch_sub(1, Ordering::Relaxed);
            self.rows.fetch_add(1, Ordering::Relaxed);
            if job.tokens.get(position).is_some_and(|&next| next != id)
                && job.judged.iter().any(|judged| judged.contains(&position))
            {
                break;
            }
        }
        drop(place);
        let us = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let times = JobTimes { compute_us: us(working.elapsed()), queue_us: us(working - begun) };
        self.busy_us.fetch_add(u64::from(times.compute_us), Ordering::Relaxed);
        Ok(JobDone { picks, times, trunk: TrunkDone::default() })
    }

    /// The choice at one position, from whichever engine is there.
    async fn decide(&self, session: &mut Session, job: &Job, position: usize) -> Result<Decided, TargetError> {
        let mut failed = None;
        // Each engine that fails is left out of the next round.
        for _ in 0..self.members.all().len() + 1 {
            let at = session.seat.as_ref().map(|seat| seat.member);
            let Some(member) = self.members.choose(at, &job.tokens) else { break };
            let seated = session.seat.as_ref().is_some_and(|seat| seat.member == member.index());
            if !seated {
                session.path = None;
                session.seat = Some(member.seat(job.tenant_key, &job.tokens));
            }
            match self.decide_at(session, member, job, position).await {
                Ok(pick) => {
                    member.succeeded();
                    return Ok(pick);
                }
                Err(Failed::Fault(fault)) => {
                    session.path = None;
                    let url = member.engine().address().shown();
                    tracing::warn!(upstream = url, tokens = position, "{fault}");
                    self.faults.fetch_add(1, Ordering::Relaxed);
                    if !fault.passes() {
                        return Err(of_fault(&fault));
                    }
                    member.failed(&fault);
                    session.seat = None;
                    failed = Some(of_fault(&fault));
                }
                Err(Failed::OtherModel(fault)) => {
                    let url = member.engine().address().shown();
                    tracing::error!(upstream = url, "{fault}");
                    member.failed(&fault);
                    session.seat = None;
                    failed = Some(TargetError::Gone(fault.to_string()));
                }
                Err(Failed::Choice(e)) => return Err(e),
            }
        }
        Err(failed.unwrap_or_else(none_left))
    }

    async fn decide_at(
        &self,
        session: &mut Session,
        member: &Member,
        job: &Job,
        position: usize,
    ) -> Result<Decided, Failed> {
        if let Err(fault) = member.make_sure().await {
            return Err(if fault.passes() { Failed::Fault(fault) } else { Failed::OtherModel(fault) });
        }
        let seat = session.seat.as_ref().map_or(0, |seat| seat.lane);
        let mut asked = Asked::first(job, member.engine().abilities());
        loop {
            let leads = session.path.as_ref().is_some_and(|path| path.leads_to(&job.tokens[..position]));
            if !leads {
                let alone = asked.is_alone();
                let ahead = if alone { 0 } else { asked.ahead(job, member.engine().abilities()) };
                let end = if alone { position } else { job.tokens.len() };
                session.path = Some(Path::begin(member.engine(), job, position..=end, ahead, &asked, seat).await?);
            }
            let row = match session.path.as_mut() {
                Some(path) => path.next().await?,
                None => None,
            };
            let Some(row) = row else {
                session.path = None;
                asked = asked.alone().ok_or_else(|| Fault::Unexpected(format!("no distribution at {position}")))?;
                continue;
            };
            let (vocabulary, head_rows) = (self.capabilities.vocabulary, member.engine().abilities().vocabulary);
            match choose(job, position, &row, vocabulary, head_rows).map_err(Failed::Choice)? {
                Choice::Made(pick) => return Ok(pick),
                Choice::NeedsMore => {
                    // What was asked for with less goes on along the engine's own path, which may be ours too; but
                    // the answers that are wanted now are in another call.
                    session.path = None;
                    asked = asked.more(member.engine().abilities()).ok_or_else(undecided)?;
                }
            }
        }
    }
}

/// Why there is no choice from an engine.
enum Failed {
    /// The engine's.
    Fault(Fault),
    /// It came back with another model.
    OtherModel(Fault),
    /// Not the engine's: no other would do.
    Choice(TargetError),
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

fn undecided() -> Failed {
    let text =
        "the upstream returns too few probabilities to decide this position; raise its limit (vLLM: --max-logprobs)";
    Failed::Choice(TargetError::Failed(text.into()))
}

fn none_left() -> TargetError {
    TargetError::Gone("no upstream answers at the moment".into())
}

fn of_fault(fault: &Fault) -> TargetError {
    let reason = fault.to_string();
    match fault {
        Fault::Busy { retry_after } => {
            let ms = retry_after.map_or(RETRY_MS, |wait| millis(Some(wait)));
            TargetError::Busy { reason, retry_after_ms: ms }
        }
        Fault::Gone(_) | Fault::Silent(_) => TargetError::Gone(reason),
        _ => TargetError::Failed(reason),
    }
}
