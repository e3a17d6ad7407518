//! The task of one session: frames in, jobs to the engine thread, frames out. What a frame means is
//! decided by [`CloudSession`]; what happens to KV state by `tandem_proto::exchange`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use metrics::{counter, gauge, histogram};
use tandem_engine::constraint::Followed;
use tandem_engine::runner::{Job as EngineJob, JobDone, RunnerError};
use tandem_engine::trunk;
use tandem_proto::block::development_tenant_key;
use tandem_proto::exchange::{CostInputs, ExchangeError, Incoming, Outgoing, StateRun, bytes_per_token};
use tandem_proto::frame::{Frame, Message};
use tandem_proto::ids::{Epoch, SessionId};
use tandem_proto::limits::HANDSHAKE_MS_MAX;
use tandem_proto::message::{KvBlock, KvPull, Open, Opened, Refuse, RefuseCode, SamplingParams};
use tandem_proto::session::cloud::{CloudSession, Job, JobTimes};
use tandem_proto::session::{Decided, SessionError};
use tandem_transport::bulk::BulkReceiver;
use tandem_transport::channel::{Channel, FrameReceiver, FrameSender};
use tandem_transport::error::TransportError;
use tandem_transport::link::Link;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::metric_definitions as m;
use crate::node::CloudNode;
use crate::registry::Claim;

/// How long the cloud waits for trunk state of the edge before it computes it itself.
const PULL_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a session's task ends.
#[derive(Debug)]
enum Ending {
    /// The edge is done.
    Closed,
    /// The link is gone or a newer stream took over; the session may be resumed.
    Parked,
    /// The edge is told why and the session is dropped.
    Refused(RefuseCode, String, u32),
}

impl From<SessionError> for Ending {
    fn from(e: SessionError) -> Self {
        Self::Refused(e.code(), e.to_string(), 0)
    }
}

impl From<ExchangeError> for Ending {
    fn from(e: ExchangeError) -> Self {
        Self::Refused(RefuseCode::BadState, e.to_string(), 0)
    }
}

impl From<RunnerError> for Ending {
    fn from(e: RunnerError) -> Self {
        match e {
            RunnerError::Memory(_) | RunnerError::Full(_) => Self::Refused(RefuseCode::Busy, e.to_string(), 1000),
            other => Self::Refused(RefuseCode::Internal, other.to_string(), 0),
        }
    }
}

impl From<TransportError> for Ending {
    fn from(e: TransportError) -> Self {
        match e {
            TransportError::Frame(e) => Self::Refused(RefuseCode::Malformed, e.to_string(), 0),
            _ => Self::Parked,
        }
    }
}

/// Serves one stream from its first frame to its end.
pub(crate) async fn run(node: Arc<CloudNode>, link: Arc<Link>, channel: Channel) {
    let (mut tx, mut rx) = channel.split();
    let ending = match tokio::time::timeout(Duration::from_millis(HANDSHAKE_MS_MAX), rx.next()).await {
        Ok(Ok(Some(frame))) => serve(&node, &link, frame, &mut tx, &mut rx).await,
        Ok(Ok(None)) => Ending::Closed,
        Ok(Err(e)) => Ending::from(e),
        Err(_) => Ending::Refused(RefuseCode::Malformed, format!("no frame within {HANDSHAKE_MS_MAX} ms"), 0),
    };
    if let Ending::Refused(code, message, retry_after_ms) = ending {
        tracing::debug!(?code, message, "session refused");
        counter!(m::SESSIONS_REFUSED, "code" => format!("{code:?}")).increment(1);
        let message: String = message.chars().take(250).collect();
        // The peer may be gone already; then it needs no reason.
        let _ = tx.send(&Message::Refuse(Refuse { code, message, retry_after_ms }), Bytes::new()).await;
    }
    let _ = tx.finish();
}

async fn serve(
    node: &Arc<CloudNode>,
    link: &Arc<Link>,
    first: Frame,
    tx: &mut FrameSender,
    rx: &mut FrameReceiver,
) -> Ending {
    let Message::Open(open) = first.message else {
        return Ending::Refused(RefuseCode::OutOfOrder, "a session begins with Open".into(), 0);
    };
    let device = link.peer_identity().to_string();
    let (id, epoch) = (open.session, open.epoch);
    let constraint = match node.grammars.follow(&open, &first.payload).await {
        Ok(constraint) => constraint,
        Err(e) => return Ending::Refused(RefuseCode::BadGrammar, e.to_string(), 0),
    };
    let (session, resumed) = match claim(node, &device, &open, &first.payload).await {
        Ok(s) => s,
        Err(e) => return e,
    };
    let stop = CancellationToken::new();
    node.registry.enter(id, &device, epoch, stop.clone());
    gauge!(m::SESSIONS).increment(1.0);
    counter!(m::SESSIONS_OPENED, "resumed" => if resumed { "true" } else { "false" }).increment(1);
    let mut task = SessionTask::new(node.clone(), link.clone(), id, &open, session, constraint);
    let ending = match task.run(&open, tx, rx, stop).await {
        Ok(()) => Ending::Closed,
        Err(e) => e,
    };
    task.settle().await;
    let keep = matches!(ending, Ending::Parked).then(|| Box::new(task.session));
    node.forget(node.registry.leave(id, keep, &node.settings.bounds));
    gauge!(m::SESSIONS).decrement(1.0);
    ending
}

/// The token ids of an opening frame's payload.
pub(crate) fn token_ids(payload: &Bytes) -> Vec<u32> {
    payload.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Finds the session's earlier state, if any, and lets it in.
async fn claim(node: &CloudNode, device: &str, open: &Open, payload: &Bytes) -> Result<(CloudSession, bool), Ending> {
    let refuse = |code, text: String| Ending::Refused(code, text, 0);
    if open.model != node.settings.model {
        return Err(refuse(
            RefuseCode::UnknownModel,
            format!("no model `{}` here, there is `{}`", open.model, node.settings.model),
        ));
    }
    if !payload.len().is_multiple_of(4) {
        return Err(refuse(RefuseCode::Malformed, format!("{} bytes of token ids", payload.len())));
    }
    let tokens = token_ids(payload);
    let context = node.context_tokens;
    if tokens.len() >= context {
        return Err(refuse(RefuseCode::TooLong, format!("{} tokens, the model's context is {context}", tokens.len())));
    }
    let hidden_row_bytes = node.trunk.as_ref().map_or(0, |t| t.hidden_size * 4);
    let mut session = CloudSession::open(open, tokens, context, hidden_row_bytes)?;
    let resumed = match node.registry.claim(open.session, device, open.epoch).await {
        Claim::Resumed(earlier) => {
            session.adopt(&earlier);
            true
        }
        Claim::New => {
            let wanted = (open.prompt_tokens as usize + open.answer_tokens_max as usize).min(context);
            node.admit(device, wanted)
                .map_err(|r| Ending::Refused(RefuseCode::Busy, r.to_string(), r.retry_after_ms()))?;
            false
        }
        Claim::Foreign => return Err(refuse(RefuseCode::OutOfOrder, "the session belongs to another device".into())),
        Claim::Stale(current) => return Err(Ending::from(SessionError::StaleEpoch { got: open.epoch, current })),
    };
    Ok((session, resumed))
}

type Running = oneshot::Receiver<Result<JobDone<Decided>, RunnerError>>;

struct SessionTask {
    node: Arc<CloudNode>,
    link: Arc<Link>,
    id: SessionId,
    epoch: Epoch,
    session: CloudSession,
    sampling: Arc<SamplingParams>,
    top_logprobs: usize,
    constraint: Option<Followed>,
    running: Option<Running>,
    /// Tokens whose trunk state the engine holds.
    trunk_tokens: usize,
    /// The prompt's state is to be offered when it is there: its hidden states so far.
    prompt_state: Option<Vec<f32>>,
    outgoing: Option<(Outgoing, Vec<Bytes>)>,
    bulk: Option<BulkReceiver>,
    pull: Option<Pull>,
    exchanges: u32,
    times: JobTimes,
}

/// A job that waits for trunk state of the edge.
struct Pull {
    job: Job,
    tokens: usize,
    incoming: Option<Incoming>,
    deadline: tokio::time::Instant,
}

impl SessionTask {
    fn new(
        node: Arc<CloudNode>,
        link: Arc<Link>,
        id: SessionId,
        open: &Open,
        session: CloudSession,
        constraint: Option<Followed>,
    ) -> Self {
        Self {
            trunk_tokens: 0,
            prompt_state: None,
            outgoing: None,
            bulk: None,
            pull: None,
            exchanges: 0,
            times: JobTimes::default(),
            node,
            link,
            id,
            epoch: open.epoch,
            session,
            sampling: Arc::new(open.sampling.clone()),
            top_logprobs: open.top_logprobs as usize,
            constraint,
            running: None,
        }
    }

    /// Trunk layers for which this edge's numbers may stand in for ours.
    fn shared_trunk(&self, asked: u32) -> usize {
        let shared = self.node.trunk.as_ref().filter(|t| t.is_shared_with(self.link.peer_hello()));
        shared.map_or(0, |t| t.layers).min(asked as usize)
    }

    async fn run(
        &mut self,
        open: &Open,
        tx: &mut FrameSender,
        rx: &mut FrameReceiver,
        stop: CancellationToken,
    ) -> Result<(), Ending> {
        let shared = self.shared_trunk(open.trunk_layers);
        if open.want_prompt_state && shared > 0 && self.session.processed() == 0 {
            self.prompt_state = Some(Vec::new());
        }
        let opened =
            Opened { epoch: self.epoch, held_tokens: self.session.processed() as u32, trunk_layers: shared as u32 };
        tx.send(&Message::Opened(opened), Bytes::new()).await?;
        let idle = Duration::from_millis(self.node.settings.bounds.idle_ms_max);
        let mut quiet_since = tokio::time::Instant::now();
        loop {
            let ready = self.session.answer_ready(self.times)?;
            self.send_all(tx, ready).await?;
            if self.running.is_none() && self.pull.is_none() {
                self.start_next(tx, shared > 0).await?;
            }
            tokio::select! {
                () = stop.cancelled() => return Err(Ending::Parked),
                () = tokio::time::sleep_until(quiet_since + idle), if self.running.is_none() => {
                    return Err(Ending::Refused(RefuseCode::OutOfOrder, format!("no frame for {} ms", idle.as_millis()), 0));
                }
                frame = rx.next() => {
                    quiet_since = tokio::time::Instant::now();
                    match frame? {
                        Some(frame) => if self.on_frame(frame, tx).await? { return Ok(()) },
                        None => return Ok(()),
                    }
                }
                done = wait(&mut self.running) => {
                    self.running = None;
                    let out = self.on_done(done?, tx).await?;
                    self.send_all(tx, out).await?;
                }
                block = next_block(&mut self.bulk) => self.on_block(block, tx).await?,
                () = at(self.pull.as_ref().map(|p| p.deadline)) => self.give_up_pull()?,
            }
        }
    }

    async fn send_all(&self, tx: &mut FrameSender, messages: Vec<Message>) -> Result<(), Ending> {
        for message in messages {
            match &message {
                Message::Verdict(v) => {
                    counter!(m::DRAFTS_JUDGED).increment(u64::from(v.accepted) + u64::from(v.rejected));
                    counter!(m::DRAFTS_ACCEPTED).increment(u64::from(v.accepted));
                }
                Message::Token(_) => counter!(m::TOKENS_STREAMED).increment(1),
                _ => {}
            }
            tx.send(&message, Bytes::new()).await?;
        }
        Ok(())
    }

    /// True when the edge closes the session.
    async fn on_frame(&mut self, frame: Frame, tx: &mut FrameSender) -> Result<bool, Ending> {
        match frame.message {
            Message::Close(_) => return Ok(true),
            Message::KvWant(want) => {
                let Some((outgoing, blocks)) = self.outgoing.take() else { return Ok(false) };
                let wanted = outgoing.wanted(&want)?;
                for index in wanted {
                    let payload = blocks[index].clone();
                    counter!(m::KV_BYTES, "direction" => "sent").increment(payload.len() as u64);
                    self.link.send_bulk(&Message::KvBlock(outgoing.block(index, &payload)), payload).await?;
                }
            }
            Message::KvAck(ack) => {
                counter!(m::KV_BLOCKS, "direction" => "sent", "result" => "published")
                    .increment(u64::from(ack.published));
                counter!(m::KV_BLOCKS, "direction" => "sent", "result" => "refused").increment(u64::from(ack.refused));
            }
            Message::KvOffer(offer) => {
                let Some(pull) = &mut self.pull else { return Ok(false) };
                let run = trunk_run(&self.node, &self.link, false, &self.session.tokens()[..pull.tokens])?;
                let (want, incoming) = Incoming::answer(self.id, &offer, run);
                pull.incoming = incoming;
                let declined = want.indices.is_empty();
                tx.send(&Message::KvWant(want), Bytes::new()).await?;
                if declined {
                    self.give_up_pull()?;
                }
            }
            other => self.session.handle(&other, &frame.payload)?,
        }
        Ok(false)
    }

    /// Starts the next job, after fetching trunk state it lacks if that pays.
    async fn start_next(&mut self, tx: &mut FrameSender, shared: bool) -> Result<(), Ending> {
        let Some(job) = self.session.next_job(self.node.settings.batch_rows_max) else { return Ok(()) };
        let lacking = if job.hidden.is_some() { 0 } else { job.feed_from.saturating_sub(self.trunk_tokens) };
        if shared && lacking > 0 && self.pull_pays(job.feed_from, lacking) {
            self.exchanges += 1;
            let tokens = job.feed_from;
            let layer_to = self.node.trunk.as_ref().map_or(0, |t| t.layers as u32);
            self.bulk = Some(self.node.bulk.register(self.id));
            let pull =
                KvPull { epoch: self.epoch, exchange: self.exchanges, layer_from: 0, layer_to, tokens: tokens as u32 };
            tx.send(&Message::KvPull(pull), Bytes::new()).await?;
            self.pull =
                Some(Pull { job, tokens, incoming: None, deadline: tokio::time::Instant::now() + PULL_TIMEOUT });
            return Ok(());
        }
        if lacking > 0 {
            counter!(m::TRUNK_FETCHED, "source" => "recomputed").increment(1);
        }
        self.start(&job)
    }

    fn pull_pays(&self, tokens: usize, lacking: usize) -> bool {
        let Some(trunk) = &self.node.trunk else { return false };
        self.node.settings.pull_trunk.moves(|| {
            let (stats, load) = (self.link.stats(), self.node.load());
            let row_s = load.busy_us as f64 / 1e6 / load.rows.max(1) as f64;
            let trunk_share = trunk.layers as f64 / self.node.card.layers.len().max(1) as f64;
            // The exchange carries the state from the start of the sequence.
            let carried = tokens as f64 / lacking as f64;
            CostInputs {
                tokens: lacking,
                bytes_per_token: (bytes_per_token(&trunk.shape(false)) as f64 * carried) as usize,
                rtt_s: stats.rtt_us as f64 / 1e6,
                goodput: stats.goodput_bytes_per_s().map_or(1e6, |g| g as f64),
                holder_delay_s: 0.0,
                recompute_rate: 1.0 / (row_s * trunk_share).max(1e-9),
            }
        })
    }

    fn start(&mut self, job: &Job) -> Result<(), Ending> {
        let end = job.end();
        let hidden = job.hidden.as_deref().map(trunk::numbers);
        let request = EngineJob {
            key: self.id,
            sequence: self.session.tokens()[..end].to_vec(),
            feed_from: job.feed_from,
            hidden,
            outputs_from: job.picks_from,
            prompt_len: self.session.prompt_len(),
            sampling: self.sampling.clone(),
            top_logprobs: self.top_logprobs,
            is_prefill: job.picks() == 1 && job.tokens.len() > 1,
            keep_trunk_hidden: self.prompt_state.is_some(),
            constraint: self.constraint.clone(),
        };
        let (done, running) = oneshot::channel();
        self.node.runner.submit(request, Box::new(move |r| drop(done.send(r))))?;
        self.running = Some(running);
        Ok(())
    }

    async fn on_done(&mut self, done: JobDone<Decided>, tx: &mut FrameSender) -> Result<Vec<Message>, Ending> {
        self.trunk_tokens = done.trunk_tokens;
        self.times = JobTimes { compute_us: done.compute_us, queue_us: done.queue_us };
        histogram!(m::QUEUE_SECONDS).record(f64::from(done.queue_us) / 1e6);
        histogram!(m::COMPUTE_SECONDS).record(f64::from(done.compute_us) / 1e6);
        counter!(m::ROWS, "trunk" => "here").increment(done.trunk_rows.0 as u64);
        counter!(m::ROWS, "trunk" => "edge").increment(done.trunk_rows.1 as u64);
        if let Some(mut hidden) = self.prompt_state.take() {
            hidden.extend_from_slice(&done.trunk_hidden);
            self.offer_prompt(hidden, tx).await?;
        }
        Ok(self.session.complete(done.outputs, self.times)?)
    }

    /// Offers the prompt's trunk state with the hidden states above it.
    async fn offer_prompt(&mut self, hidden: Vec<f32>, tx: &mut FrameSender) -> Result<(), Ending> {
        let prompt = self.session.prompt_len();
        let (done, exported) = oneshot::channel();
        self.node.runner.export_trunk(self.id, prompt, Box::new(move |r| drop(done.send(r))))?;
        let state = exported.await.map_err(|_| RunnerError::Stopped("it has ended".into()))??;
        let run = trunk_run(&self.node, &self.link, true, &self.session.tokens()[..prompt])?;
        let width = self.node.trunk.as_ref().map_or(0, |t| t.hidden_size);
        let mut rows = hidden.chunks_exact(width.max(1));
        let blocks: Vec<Bytes> = state
            .iter()
            .enumerate()
            .map(|(i, kv)| {
                let hidden = rows.by_ref().take(run.block_tokens(i)).flatten();
                trunk::payload(kv.iter().chain(hidden)).into()
            })
            .collect();
        self.exchanges += 1;
        let (outgoing, offer) = Outgoing::new(self.id, self.epoch, self.exchanges, run);
        self.outgoing = Some((outgoing, blocks));
        Ok(tx.send(&Message::KvOffer(offer), Bytes::new()).await?)
    }

    async fn on_block(&mut self, block: Option<(KvBlock, Bytes)>, tx: &mut FrameSender) -> Result<(), Ending> {
        let Some((block, payload)) = block else {
            self.bulk = None;
            return Ok(());
        };
        let Some(incoming) = self.pull.as_mut().and_then(|p| p.incoming.as_mut()) else { return Ok(()) };
        counter!(m::KV_BYTES, "direction" => "received").increment(payload.len() as u64);
        match incoming.accept(&block, payload) {
            Ok(()) => counter!(m::KV_BLOCKS, "direction" => "received", "result" => "published").increment(1),
            Err(e) => {
                tracing::warn!(session = %self.id, "a KV block was refused: {e}");
                counter!(m::KV_BLOCKS, "direction" => "received", "result" => "refused").increment(1);
            }
        }
        if !incoming.is_complete() && !incoming.has_failed() {
            return Ok(());
        }
        let Some(Pull { job, tokens, incoming: Some(incoming), .. }) = self.pull.take() else { return Ok(()) };
        self.bulk = None;
        let (ack, blocks) = incoming.finish();
        tx.send(&Message::KvAck(ack), Bytes::new()).await?;
        let source = if let Some(blocks) = blocks {
            let blocks = blocks.iter().map(|b| trunk::numbers(b)).collect();
            let (done, imported) = oneshot::channel();
            self.node.runner.import_trunk(self.id, blocks, tokens, Box::new(move |r| drop(done.send(r))))?;
            self.trunk_tokens = imported.await.map_err(|_| RunnerError::Stopped("it has ended".into()))??;
            "edge"
        } else {
            "recomputed"
        };
        counter!(m::TRUNK_FETCHED, "source" => source).increment(1);
        self.start(&job)
    }

    /// Computes the state after all.
    fn give_up_pull(&mut self) -> Result<(), Ending> {
        self.bulk = None;
        let Some(pull) = self.pull.take() else { return Ok(()) };
        counter!(m::TRUNK_FETCHED, "source" => "recomputed").increment(1);
        self.start(&pull.job)
    }

    /// Waits for the running job, so that the session's state is at rest.
    async fn settle(&mut self) {
        if let Some(running) = self.running.take()
            && let Ok(Ok(done)) = running.await
        {
            // What the edge missed it will ask for again.
            let _ = self.session.complete(done.outputs, self.times);
        }
    }
}

/// The run of trunk state of `tokens`.
fn trunk_run(node: &CloudNode, link: &Link, with_hidden: bool, tokens: &[u32]) -> Result<StateRun, Ending> {
    let Some(trunk) = &node.trunk else {
        return Err(Ending::Refused(RefuseCode::BadState, "this node has no trunk".into(), 0));
    };
    Ok(trunk.run(development_tenant_key(&link.peer_identity().tenant), tokens, with_hidden)?)
}

async fn wait(running: &mut Option<Running>) -> Result<JobDone<Decided>, RunnerError> {
    match running {
        Some(r) => r.await.unwrap_or_else(|_| Err(RunnerError::Stopped("it has ended".into()))),
        None => std::future::pending().await,
    }
}

async fn next_block(bulk: &mut Option<BulkReceiver>) -> Option<(KvBlock, Bytes)> {
    match bulk {
        Some(b) => b.next().await,
        None => std::future::pending().await,
    }
}

async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(t) => tokio::time::sleep_until(t).await,
        None => std::future::pending().await,
    }
}
