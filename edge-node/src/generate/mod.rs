//! The life of one answer.
//!
//! One task per answer waits for whichever comes first: a draft of the edge model, a frame of the
//! cloud, a change of the link, a deadline, the client going away. What these mean for the tokens is
//! decided by `tandem_proto::session::edge`; when to ask, by the policy; how far to draft ahead, by
//! [`crate::pacing`]; what happens while the cloud is away, in [`away`].

mod away;
mod draft;
mod exchange;
mod frames;
mod uplink;

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tandem_engine::runner::RunnerError;
use tandem_engine::trunk::Trunk;
use tandem_proto::frame::Message;
use tandem_proto::ids::SessionId;
use tandem_proto::limits::UNVERIFIED_TOKENS_MAX;
use tandem_proto::message::{Alternative, KvPull, SamplingParams};
use tandem_proto::session::edge::clock::{Need, Patience, RETRY_US};
use tandem_proto::session::edge::{Committed, Decider, EdgeSession, FrameRule};
use tandem_router::policy::{Features, Steering};
use tandem_transport::exchange::Lender;
use tandem_transport::link::Link;
use tokio::sync::{mpsc, watch};

use self::draft::{Drafter, Step};
use self::exchange::PromptFetch;
use self::frames::next_frame;
use self::uplink::Uplink;
use crate::account::{Account, Written};
use crate::admission::Slot;
use crate::choice::EdgeChoice;
use crate::context::NodeContext;
use crate::pacing::{self, CHUNK_MAX, Plan};
use crate::request::{
    Done, Event, FinishReason, GenerateError, GenerateRequest, Mode, Origin, RouteSummary, TokenEvent,
};

/// Steps of at least this many rows tell how fast the edge prefills.
const PREFILL_ROWS_MIN: usize = 8;

/// What the edge noted when it drafted a token.
#[derive(Clone, Debug)]
struct DraftNote {
    logprob: f32,
    top1: f32,
    entropy: f32,
    risk: Option<f32>,
    reason: &'static str,
    alternatives: Vec<Alternative>,
}

/// Why the loop leaves an iteration for good.
enum Halt {
    /// The client went away.
    Cancelled,
    /// The node ends.
    Closing,
    /// The edge's own model failed.
    Engine(RunnerError),
    /// The cloud cannot use the request's grammar.
    Grammar(String),
}

impl From<RunnerError> for Halt {
    fn from(e: RunnerError) -> Self {
        Self::Engine(e)
    }
}

pub(crate) struct Answer {
    node: Arc<NodeContext>,
    request: GenerateRequest,
    session: EdgeSession<DraftNote>,
    drafter: Drafter,
    sampling: Arc<SamplingParams>,
    steering: Steering,
    links: watch::Receiver<Option<Arc<Link>>>,
    uplink: Option<Uplink>,
    /// The layers that the uplink's cloud shares.
    trunk: Option<Trunk>,
    send_hidden: bool,
    fetch: Option<PromptFetch>,
    fetched: bool,
    /// Tokens of the prompt whose state is held from earlier answers.
    held: usize,
    pull: Option<KvPull>,
    lender: Lender,
    /// The edge's model cannot go on with this answer: only the cloud can.
    draft_error: Option<RunnerError>,
    links_open: bool,
    last_token_at: Option<Instant>,
    events: mpsc::Sender<Event>,
    summary: RouteSummary,
    sent: u32,
    trace: Vec<TokenEvent>,
}

/// Runs an answer to its end and tells the node what it took.
pub(crate) async fn run(
    node: Arc<NodeContext>,
    slot: Slot,
    request: GenerateRequest,
    session: SessionId,
    events: mpsc::Sender<Event>,
    account: Arc<Account>,
) {
    let begun = Instant::now();
    let mut answer = Answer::new(node, request, session, events);
    let result = answer.run().await;
    let cancelled = matches!(result, Err(Halt::Cancelled | Halt::Closing));
    if answer.request.mode == Mode::Auto {
        answer.node.learn(|e| e.saw_auto(answer.summary.round_trips > 0 || answer.summary.degraded));
    }
    answer.close_uplink(cancelled).await;
    let Answer { drafter, request, summary, trace, events, .. } = answer;
    let last = match result {
        Ok(finish) => Some(Event::Done(Done { finish, route: summary.clone() })),
        Err(Halt::Engine(e)) => Some(Event::Failed(GenerateError::Engine(e.to_string()))),
        Err(Halt::Grammar(problem)) => Some(Event::Failed(GenerateError::Grammar(problem))),
        Err(Halt::Closing) => Some(Event::Failed(GenerateError::Closing)),
        Err(Halt::Cancelled) => None,
    };
    tracing::debug!(tokens = trace.len(), degraded = summary.degraded, cancelled, "ended");
    // The KV state goes before the next request takes the slot.
    drop(drafter);
    account.written(Written { request, route: summary, trace, took: begun.elapsed() });
    drop(slot);
    if let Some(event) = last {
        // A client that has gone needs no end.
        let _ = events.send(event).await;
    }
}

impl Answer {
    fn new(node: Arc<NodeContext>, request: GenerateRequest, id: SessionId, events: mpsc::Sender<Event>) -> Self {
        let sampling = Arc::new(request.sampling.clone());
        let drafter = Drafter::new(
            node.runner.clone(),
            id,
            sampling.clone(),
            &request,
            request.grammar.as_ref().map(|grammar| grammar.follow(&node.stop_tokens)),
            node.prefix_key.clone(),
            node.model.spec().hidden_size,
        );
        let patience = Patience {
            need: match request.mode {
                Mode::Local => Need::Nothing,
                Mode::Auto => Need::Advice,
                Mode::Exact | Mode::Cloud => Need::Decisions,
            },
            question_us: node.settings.escalation_ms_max.saturating_mul(1000),
            grace_us: node.settings.reconnect_ms_max.saturating_mul(1000),
        };
        let mut session = EdgeSession::new(id, &request.prompt, request.tokens_max, &node.stop_tokens, patience);
        let links = node.uplinks.links();
        let link = links.borrow().clone();
        if node.uplinks.configured() && link.as_ref().is_none_or(|l| l.is_closed()) {
            session.away_since(node.clock_us(node.uplinks.down_since().unwrap_or_else(Instant::now)));
        }
        Self {
            session,
            steering: node.steering(request.threshold, link.as_deref()),
            node,
            request,
            drafter,
            sampling,
            links,
            uplink: None,
            trunk: None,
            send_hidden: false,
            fetch: None,
            fetched: false,
            held: 0,
            pull: None,
            lender: Lender::new(id),
            draft_error: None,
            links_open: true,
            last_token_at: None,
            events,
            summary: RouteSummary::default(),
            sent: 0,
            trace: Vec::new(),
        }
    }

    async fn run(&mut self) -> Result<FinishReason, Halt> {
        let closing = self.node.closing.clone();
        if self.node.may_share_layers() && matches!(self.request.mode, Mode::Auto | Mode::Exact) {
            // What is here need not be fetched.
            self.held = self.drafter.held(&self.request.prompt).await?;
        }
        loop {
            self.emit().await?;
            if self.session.is_finished() {
                let last = self.session.tokens()[self.session.committed() - 1];
                let stopped = self.sent > 0 && self.node.stop_tokens.contains(&last);
                return Ok(if stopped { FinishReason::Stop } else { FinishReason::Length });
            }
            self.connect().await;
            // One for the whole turn: if what is too little to ask were enough to wait for a verdict,
            // both would wait for ever.
            let plan = self.plan();
            self.ask(plan).await;
            self.serve_pull().await;
            // Before `draft` looks at the clock: what is not over here, it or the deadline will notice.
            let deadline = self.deadline();
            self.draft(plan)?;
            // What the edge has just settled by itself sends no wake-up.
            if self.session.can_commit() {
                continue;
            }
            // A link that has died is found while the answer waits on it; otherwise nothing is sent to find out.
            let _probe = self.awaited_link().map(Link::probe);
            tokio::select! {
                () = self.events.closed() => return Err(Halt::Cancelled),
                () = closing.cancelled() => return Err(Halt::Closing),
                step = self.drafter.wait() => self.on_draft(step).await?,
                frame = next_frame(&mut self.uplink) => self.on_frame(frame).await?,
                block = exchange::next_block(&mut self.fetch) => self.on_block(block).await?,
                changed = self.links.changed(), if self.links_open => {
                    self.links_open = changed.is_ok();
                    self.on_link_change();
                }
                () = sleep_until(deadline) => self.on_deadline(),
            }
        }
    }

    /// The link, while the cloud owes this answer something.
    fn awaited_link(&self) -> Option<&Link> {
        let owes = self.session.in_flight() > 0
            || self.session.is_waiting()
            || self.session.is_streaming()
            || self.fetch.is_some();
        self.uplink.as_ref().filter(|_| owes).map(|uplink| &*uplink.link)
    }

    /// Sends every token that has become final.
    async fn emit(&mut self) -> Result<(), Halt> {
        while let Some(token) = self.session.commit() {
            // A gap that a slow client makes says nothing of the cloud.
            if self.events.capacity() == 0 {
                self.last_token_at = None;
            }
            let event = self.event(token);
            self.trace.push(event.clone());
            if self.events.send(Event::Token(event)).await.is_err() {
                return Err(Halt::Cancelled);
            }
        }
        Ok(())
    }

    fn event(&mut self, c: Committed<DraftNote>) -> TokenEvent {
        let origin = match c.decider {
            Decider::Edge => Origin::Edge,
            Decider::Agreed => Origin::Verified,
            Decider::Cloud => Origin::Cloud,
        };
        match origin {
            Origin::Edge => self.summary.edge_tokens += 1,
            Origin::Verified => self.summary.accepted += 1,
            Origin::Cloud => self.summary.cloud_tokens += 1,
        }
        let note = c.info.as_ref();
        let reason = match (origin, note) {
            (_, None) => self.request.mode.name(),
            (Origin::Edge, Some(n)) if self.summary.degraded && n.reason == self.request.mode.name() => "cloud-away",
            (_, Some(n)) => n.reason,
        };
        let alternatives = if origin == Origin::Edge {
            c.info.as_ref().map(|n| n.alternatives.clone()).unwrap_or_default()
        } else {
            c.alternatives
        };
        let event = TokenEvent {
            index: self.sent,
            id: c.token,
            origin,
            logprob: c.logprob.or(note.map(|n| n.logprob)).unwrap_or(0.0),
            edge_top1: note.map(|n| n.top1),
            edge_entropy: note.map(|n| n.entropy),
            risk: note.and_then(|n| n.risk),
            reason,
            alternatives,
        };
        self.sent += 1;
        event
    }

    /// Whether the cloud is to be opened before anything is asked of it: `auto` waits for the first
    /// question, so that an easy answer leaves nothing on the wire.
    fn opens_early(&self) -> bool {
        matches!(self.request.mode, Mode::Exact | Mode::Cloud)
    }

    async fn connect(&mut self) {
        if self.uplink.is_some() {
            return;
        }
        let now = self.now();
        let Some(link) = self.usable_link().filter(|_| self.session.may_open(now)) else {
            self.note_absence();
            return;
        };
        if let Some(problem) = self.node.mismatch(&link) {
            // The cloud came, or changed its model, after the answer had begun.
            self.refused(&problem.line());
            return;
        }
        let trunk = self.node.trunk(&link).ok();
        let fetch = trunk.as_ref().is_some_and(|trunk| self.fetch_is_due(&link, trunk));
        let wanted = self.opens_early() || self.session.is_waiting() || fetch || self.draft_error.is_some();
        if !wanted && !self.opens_ahead() {
            return;
        }
        let trunk_layers = trunk.as_ref().map_or(0, |trunk| trunk.layers);
        self.send_hidden = trunk.as_ref().is_some_and(|trunk| self.node.hidden_pays(&link, trunk));
        self.drafter.share(trunk_layers, self.send_hidden);
        self.trunk = trunk;
        let (mut open, tokens) = self.session.open(
            now,
            self.node.uplinks.epoch(),
            self.node.settings.cloud_model.clone(),
            self.request.request_id.clone(),
            (*self.sampling).clone(),
            trunk_layers as u32,
            fetch,
            self.request.top_logprobs,
        );
        open.grammar = self.request.grammar.as_ref().map(|grammar| grammar.grammar().clone());
        self.fetched |= fetch;
        if fetch {
            self.fetch = Some(PromptFetch::new(&self.node, open.session));
        }
        match Uplink::open(link, open, &tokens).await {
            Ok(uplink) => self.uplink = Some(uplink),
            Err(e) => {
                tracing::debug!("the cloud session did not open: {e}");
                self.lose_session("the link to the cloud broke", Some(RETRY_US));
            }
        }
    }

    /// Whether the cloud is to prefill beside the edge although nothing has been asked yet.
    fn opens_ahead(&self) -> bool {
        let fresh = self.sent == 0 && self.session.pending() == 0 && self.drafter.fed() == 0;
        self.request.mode == Mode::Auto
            && fresh
            && pacing::opens_ahead(&self.node.estimates(), self.request.prompt.len())
    }

    /// Whether the prompt's state is to come from the cloud: only for an edge that is going to draft.
    fn fetch_is_due(&self, link: &Link, trunk: &Trunk) -> bool {
        let drafts = match self.request.mode {
            Mode::Auto => true,
            Mode::Exact => self.plan() != Plan::Stream,
            Mode::Local | Mode::Cloud => false,
        };
        drafts
            && self.draft_error.is_none()
            && !self.fetched
            && self.drafter.fed() == 0
            && !self.drafter.is_running()
            && self.node.prompt_fetch_pays(link, trunk, self.request.prompt.len(), self.held)
    }

    /// Sends what is due to be asked.
    async fn ask(&mut self, plan: Plan) {
        if self.uplink.is_none() || self.fetch.is_some() {
            return;
        }
        let streams = self.request.mode == Mode::Cloud
            || self.draft_error.is_some()
            || (self.request.mode == Mode::Exact && plan == Plan::Stream);
        if streams {
            // Drafts under way are let go: the cloud decodes from the last final token.
            if let Some(g) = self.session.next_span(usize::MAX) {
                self.drafter.cut(self.session.committed());
                self.last_token_at = None;
                self.send(Message::Generate(g), Bytes::new()).await;
            }
            return;
        }
        let rule = self.frame_rule(plan);
        while let Some(mut draft) = self.session.next_frame(rule) {
            let (from, to) = (draft.hidden_from as usize, draft.start as usize + draft.tokens.len());
            let hidden = if self.send_hidden { self.drafter.take_hidden(from, to) } else { None };
            if hidden.is_some() {
                draft.hidden_rows = (to - from) as u32;
                self.session.hidden_sent(to);
            } else if self.send_hidden && !self.drafter.fits_frame(to.saturating_sub(from)) {
                // The cloud computes these rows; the next frame begins after them.
                self.session.hidden_sent(to);
            }
            if !self.send(Message::Draft(draft), hidden.unwrap_or_default()).await {
                return;
            }
        }
    }

    fn plan(&self) -> Plan {
        let rtt_s = self.uplink.as_ref().map_or(0.0, |u| u.link.stats().rtt_us as f64 / 1e6);
        pacing::plan(&self.node.estimates().at(rtt_s), self.node.settings.exact, self.sent as usize)
    }

    fn frame_rule(&self, plan: Plan) -> FrameRule {
        match (self.request.mode, plan) {
            // The bonus row's hidden state does not exist yet when the frame goes out.
            (Mode::Exact, Plan::Draft { chunk, .. }) => {
                FrameRule { chunk_min: chunk, chunk_max: CHUNK_MAX, bonus: !self.send_hidden }
            }
            _ => FrameRule { chunk_min: 1, chunk_max: CHUNK_MAX, bonus: false },
        }
    }

    /// Tokens the path may run ahead of the final ones.
    fn window(&self, plan: Plan) -> usize {
        match (self.request.mode, plan) {
            (Mode::Exact, Plan::Draft { window, .. }) => window,
            _ => self.node.settings.speculate_tokens_max.clamp(1, UNVERIFIED_TOKENS_MAX),
        }
    }

    /// Starts the next draft, if one is due.
    fn draft(&mut self, plan: Plan) -> Result<(), Halt> {
        if let Some(e) = &self.draft_error {
            return if self.cloud_decides() { Ok(()) } else { Err(Halt::Engine(e.clone())) };
        }
        if self.drafter.is_running()
            || self.holds_back()
            || !self.session.can_draft()
            || self.session.pending() >= self.window(plan)
        {
            return Ok(());
        }
        Ok(self.drafter.start(self.session.tokens(), None)?)
    }

    /// A step has ended. Where it failed, a cloud that is there writes the rest.
    async fn on_draft(&mut self, step: Result<Step, RunnerError>) -> Result<(), Halt> {
        match step {
            Ok(step) => self.on_step(step).await,
            Err(e) if self.cloud_decides() => {
                tracing::warn!("the edge's model cannot go on with an answer, the cloud writes it: {e}");
                self.drop_fetch();
                self.draft_error = Some(e);
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    async fn on_step(&mut self, step: Step) -> Result<(), Halt> {
        self.node.learn(|e| {
            if step.rows == 1 {
                e.saw_draft(step.seconds);
            } else if step.rows >= PREFILL_ROWS_MIN {
                e.saw_prefill(step.seconds, step.rows);
            }
        });
        // Only the first step finds rows.
        self.summary.cached_tokens += step.reused as u32;
        self.finish_fetch().await;
        let Some(choice) = step.choice else { return Ok(()) };
        // The cloud may have put a token of its own where this one was to go.
        if step.position != self.session.tokens().len() || !self.session.can_draft() || self.session.is_streaming() {
            return Ok(());
        }
        let (ask, risk, reason) = self.judge(&choice);
        let note = DraftNote {
            logprob: choice.logprob,
            top1: choice.uncertainty.top1_probability,
            entropy: choice.uncertainty.entropy,
            risk,
            reason,
            alternatives: choice.alternatives,
        };
        self.session.draft(choice.token, ask, note);
        Ok(())
    }

    /// Whether the cloud must decide this token, and why.
    fn judge(&mut self, choice: &EdgeChoice) -> (bool, Option<f32>, &'static str) {
        let reachable = self.cloud_decides();
        match self.request.mode {
            Mode::Local => (false, None, "local"),
            Mode::Exact | Mode::Cloud => {
                if !reachable {
                    self.degrade("the cloud is not reachable");
                }
                (reachable, None, self.request.mode.name())
            }
            Mode::Auto if choice.forced => (false, Some(0.0), "grammar"),
            Mode::Auto => {
                let u = &choice.uncertainty;
                let features = Features {
                    entropy: u.entropy,
                    top1: u.top1_probability,
                    margin: u.margin_probability,
                    logit_margin: u.margin_logit,
                    running_acceptance: self.node.estimates().acceptance() as f32,
                    position_in_answer: (self.session.tokens().len() - self.request.prompt.len()) as u32,
                    hidden: Some(&choice.hidden),
                };
                let decision = self.steering.decide(&features);
                if decision.escalates() && !reachable {
                    self.degrade("the cloud is not reachable");
                    return (false, Some(decision.risk()), "cloud-away");
                }
                (decision.escalates(), Some(decision.risk()), decision.reason().as_str())
            }
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(t) => tokio::time::sleep_until(t.into()).await,
        None => std::future::pending().await,
    }
}
