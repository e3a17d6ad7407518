//! The task of one session: frames in, jobs to the target, frames out. What a frame means is
//! decided by [`CloudSession`]; what happens to KV state by `tandem_proto::exchange`.

mod entry;
mod state;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use metrics::{counter, histogram};
use tandem_engine::constraint::Followed;
use tandem_engine::trunk::Trunk;
use tandem_proto::exchange::ExchangeError;
use tandem_proto::frame::{Frame, Message};
use tandem_proto::ids::{Epoch, SessionId};
use tandem_proto::limits::{HANDSHAKE_MS_MAX, PROGRESS_MS};
use tandem_proto::message::{Open, Opened, Progress, Refuse, RefuseCode, SamplingParams};
use tandem_proto::session::SessionError;
use tandem_proto::session::cloud::{CloudSession, Job, JobTimes};
use tandem_transport::channel::{Channel, FrameReceiver, FrameSender};
use tandem_transport::error::TransportError;
use tandem_transport::exchange::Lender;
use tandem_transport::link::Link;

use self::entry::Entered;
use self::state::{Pull, at, count_blocks, next_block};
use crate::context::NodeContext;
use crate::metric_definitions as m;
use crate::target::{self, JobDone, Lacking, Pending, Submitted, TargetError};

/// See [`PROGRESS_MS`].
const REPORT_EVERY: Duration = Duration::from_millis(PROGRESS_MS);

/// Why a session's task ends.
#[derive(Debug)]
enum Ending {
    /// The edge is done.
    Closed,
    /// The link is gone or a newer stream took over; the session may be resumed.
    Parked,
    /// A `Refuse` frame says why, and the session is dropped.
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

impl From<Lacking> for Ending {
    fn from(e: Lacking) -> Self {
        Self::Refused(e.code(), e.to_string(), 0)
    }
}

impl From<TargetError> for Ending {
    fn from(e: TargetError) -> Self {
        let text = e.to_string();
        match e {
            TargetError::Busy { retry_after_ms, .. } => Self::Refused(RefuseCode::Busy, text, retry_after_ms),
            TargetError::Gone(_) => Self::Refused(RefuseCode::Stalled, text, 0),
            TargetError::Failed(_) => Self::Refused(RefuseCode::Internal, text, 0),
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
pub(crate) async fn run(node: Arc<NodeContext>, link: Arc<Link>, channel: Channel) {
    let (mut tx, mut rx) = channel.split();
    let ending = match tokio::time::timeout(Duration::from_millis(HANDSHAKE_MS_MAX), rx.next()).await {
        Ok(Ok(Some(frame))) => serve(&node, &link, frame, &mut tx, &mut rx).await,
        Ok(Ok(None)) => Ending::Closed,
        Ok(Err(e)) => Ending::from(e),
        Err(_) => Ending::Refused(RefuseCode::Malformed, format!("no frame within {HANDSHAKE_MS_MAX} ms"), 0),
    };
    if let Ending::Refused(code, message, retry_after_ms) = ending {
        tracing::debug!(?code, message, "session refused");
        counter!(m::SESSIONS_REFUSED, m::LABEL_CODE => format!("{code:?}")).increment(1);
        let message: String = message.chars().take(250).collect();
        // The peer may be gone already; then it needs no reason.
        let _ = tx.send(&Message::Refuse(Refuse { code, message, retry_after_ms }), Bytes::new()).await;
    }
    let _ = tx.finish();
}

async fn serve(
    node: &Arc<NodeContext>,
    link: &Arc<Link>,
    first: Frame,
    tx: &mut FrameSender,
    rx: &mut FrameReceiver,
) -> Ending {
    let Message::Open(open) = first.message else {
        return Ending::Refused(RefuseCode::OutOfOrder, "a session begins with Open".into(), 0);
    };
    // Quoted and escaped: the name is the peer's.
    let span = tracing::Span::current();
    span.record("id", tracing::field::display(open.session)).record("request", tracing::field::debug(&open.request_id));
    tracing::debug!(epoch = open.epoch.0, tokens = open.prompt_tokens, "opened");
    let entering = entry::enter(node, link, &open, &first.payload);
    let Entered { seat, session, trunk } = match reporting(node, &open, tx, entering).await.flatten() {
        Ok(entered) => entered,
        Err(e) => return e,
    };
    let stop = seat.stop();
    let answer = &session.tokens()[session.prompt_len()..];
    let constraint = tokio::select! {
        constraint = reporting(node, &open, tx, node.grammars.follow(&open, answer)) => constraint,
        () = stop.cancelled() => {
            seat.park(session);
            return Ending::Parked;
        }
    };
    let constraint = match constraint {
        Ok(Ok(constraint)) => constraint,
        Err(ending) => {
            if matches!(ending, Ending::Parked) {
                seat.park(session);
            }
            return ending;
        }
        Ok(Err(e)) => return Ending::Refused(RefuseCode::BadGrammar, e.to_string(), 0),
    };
    let mut task = SessionTask::new(node.clone(), link.clone(), &open, session, trunk, constraint);
    let ending = tokio::select! {
        ended = task.run(&open, tx, rx) => ended.err().unwrap_or(Ending::Closed),
        // Wherever it stands, on a link that takes nothing any more too: what a successor builds on
        // is at rest once the running job has ended.
        () = stop.cancelled() => Ending::Parked,
    };
    task.settle().await;
    if matches!(ending, Ending::Parked) {
        seat.park(task.session);
    }
    ending
}

/// Waits for `work` and tells the edge all the while that it goes on.
async fn reporting<T>(
    node: &NodeContext,
    open: &Open,
    tx: &mut FrameSender,
    work: impl Future<Output = T>,
) -> Result<T, Ending> {
    let mut work = std::pin::pin!(work);
    loop {
        if let Ok(done) = tokio::time::timeout(REPORT_EVERY, &mut work).await {
            return Ok(done);
        }
        let rows_left = open.prompt_tokens.saturating_add(open.committed_tokens);
        let stalled_ms = node.target.load().stalled_ms;
        let progress = Progress { epoch: open.epoch, rows_left, working: true, stalled_ms };
        tx.send(&Message::Progress(progress), Bytes::new()).await?;
    }
}

struct SessionTask {
    node: Arc<NodeContext>,
    link: Arc<Link>,
    id: SessionId,
    epoch: Epoch,
    session: Box<CloudSession>,
    /// The layers for which the edge's numbers stand in for ours.
    trunk: Option<Trunk>,
    sampling: Arc<SamplingParams>,
    top_logprobs: usize,
    constraint: Option<Followed>,
    running: Option<Submitted>,
    /// Tokens whose trunk state the target holds.
    trunk_tokens: usize,
    /// The prompt's state is to be offered when it is there: its hidden states so far.
    prompt_state: Option<Vec<f32>>,
    lender: Lender,
    pull: Option<Pull>,
    exchanges: u32,
    times: JobTimes,
    /// When the next `Progress` frame is due.
    report_at: tokio::time::Instant,
}

impl SessionTask {
    fn new(
        node: Arc<NodeContext>,
        link: Arc<Link>,
        open: &Open,
        session: Box<CloudSession>,
        trunk: Option<Trunk>,
        constraint: Option<Followed>,
    ) -> Self {
        Self {
            trunk_tokens: 0,
            prompt_state: None,
            lender: Lender::new(open.session),
            pull: None,
            exchanges: 0,
            times: JobTimes::default(),
            report_at: tokio::time::Instant::now(),
            node,
            link,
            id: open.session,
            epoch: open.epoch,
            session,
            trunk,
            sampling: Arc::new(open.sampling.clone()),
            top_logprobs: open.top_logprobs as usize,
            constraint,
            running: None,
        }
    }

    async fn run(&mut self, open: &Open, tx: &mut FrameSender, rx: &mut FrameReceiver) -> Result<(), Ending> {
        let lends = |trunk: &Trunk| trunk.fits(self.session.prompt_len(), true);
        if open.want_prompt_state && self.trunk.as_ref().is_some_and(lends) && self.session.processed() == 0 {
            self.prompt_state = Some(Vec::new());
        }
        let held_tokens = reporting(&self.node, open, tx, self.held()).await?? as u32;
        let trunk_layers = self.trunk_layers() as u32;
        let opened = Opened { epoch: self.epoch, held_tokens, trunk_layers };
        tx.send(&Message::Opened(opened), Bytes::new()).await?;
        let idle = Duration::from_millis(self.node.settings.bounds.idle_ms_max);
        let mut quiet_since = tokio::time::Instant::now();
        loop {
            let ready = self.session.answer_ready(self.times)?;
            self.send_all(tx, ready).await?;
            if self.running.is_none() && self.pull.is_none() {
                self.start_next(tx).await?;
            }
            let pulled_by = self.pull.as_ref().map(|p| p.deadline);
            tokio::select! {
                () = tokio::time::sleep_until(quiet_since + idle), if self.running.is_none() => {
                    // Nothing is wrong: an edge that needs the session again opens it again.
                    tracing::debug!("no frame for {idle:?}");
                    return Ok(());
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
                arrived = next_block(&mut self.pull) => self.on_block(arrived, tx).await?,
                () = at(pulled_by) => self.give_up_pull(),
                () = tokio::time::sleep_until(self.report_at), if self.running.is_some() || self.pull.is_some() => {
                    self.report_at = tokio::time::Instant::now() + REPORT_EVERY;
                    tx.send(&Message::Progress(self.progress()), Bytes::new()).await?;
                }
            }
        }
    }

    /// Tokens that need not be computed: of an earlier stream of this session, or of the tenant's other ones.
    fn held(&self) -> Pending<usize> {
        let processed = self.session.processed();
        // The hidden states of the prompt are wanted: all of it is computed.
        if processed > 0 || self.prompt_state.is_some() {
            return Box::pin(std::future::ready(Ok(processed)));
        }
        let tokens = self.session.tokens()[..self.session.tokens().len() - 1].to_vec();
        self.node.target.held(self.link.peer_tenant_key(), tokens)
    }

    fn trunk_layers(&self) -> usize {
        self.trunk.as_ref().map_or(0, |trunk| trunk.layers)
    }

    async fn send_all(&mut self, tx: &mut FrameSender, messages: Vec<Message>) -> Result<(), Ending> {
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
            Message::KvWant(want) => self.lend(&want)?,
            Message::KvAck(ack) => {
                count_blocks("sent", "published", u64::from(ack.published));
                count_blocks("sent", "refused", u64::from(ack.refused));
            }
            Message::KvOffer(offer) => self.on_offer(&offer, tx).await?,
            other => {
                if matches!(other, Message::Draft(_)) {
                    self.node.target.capabilities().allow_drafts()?;
                }
                self.session.handle(&other, &frame.payload)?;
            }
        }
        Ok(false)
    }

    /// Starts the next job, after fetching trunk state it lacks if that pays.
    async fn start_next(&mut self, tx: &mut FrameSender) -> Result<(), Ending> {
        let Some(job) = self.session.next_job(self.node.settings.batch_rows_max) else { return Ok(()) };
        let sequence = self.session.tokens()[..job.end()].to_vec();
        let lacks = job.hidden.is_none() && self.trunk.is_some();
        let lacking = if lacks { job.feed_from.saturating_sub(self.trunk_tokens) } else { 0 };
        if lacking > 0 && self.pull_pays(job.feed_from, lacking) {
            return self.pull(job, sequence, tx).await;
        }
        if lacking > 0 {
            counter!(m::TRUNK_FETCHED, m::LABEL_SOURCE => "recomputed").increment(1);
        }
        self.start(job, sequence);
        Ok(())
    }

    /// Hands a job to the target. `sequence` is the path as it was when the job was made: a newer
    /// round may have shortened it since.
    fn start(&mut self, job: Job, sequence: Vec<u32>) {
        let request = target::Job {
            session: self.id,
            tenant_key: self.link.peer_tenant_key(),
            tokens: sequence,
            feed_from: job.feed_from,
            picks_from: job.picks_from,
            judged: job.judged,
            ahead: job.ahead,
            prompt_len: self.session.prompt_len(),
            sampling: self.sampling.clone(),
            top_logprobs: self.top_logprobs,
            constraint: self.constraint.clone(),
            trunk_layers: self.trunk_layers(),
            hidden: job.hidden,
            keep_hidden: self.prompt_state.is_some(),
        };
        self.running = Some(self.node.target.submit(request));
        self.report_at = tokio::time::Instant::now() + REPORT_EVERY;
    }

    /// How far the work is that the edge waits for.
    fn progress(&self) -> Progress {
        let job = self.running.as_ref().map(|running| (running.progress)());
        Progress {
            epoch: self.epoch,
            rows_left: job.map_or(0, |job| u32::try_from(job.rows_left).unwrap_or(u32::MAX)),
            // A pull of trunk state is under way where there is no job.
            working: job.is_none_or(|job| job.working),
            stalled_ms: self.node.target.load().stalled_ms,
        }
    }

    async fn on_done(&mut self, done: JobDone, tx: &mut FrameSender) -> Result<Vec<Message>, Ending> {
        let JobDone { picks, times, trunk } = done;
        self.trunk_tokens = trunk.tokens;
        self.times = times;
        histogram!(m::QUEUE_SECONDS).record(f64::from(times.queue_us) / 1e6);
        histogram!(m::COMPUTE_SECONDS).record(f64::from(times.compute_us) / 1e6);
        counter!(m::ROWS, m::LABEL_TRUNK => "here").increment(trunk.rows_computed as u64);
        counter!(m::ROWS, m::LABEL_TRUNK => "edge").increment(trunk.rows_given as u64);
        if let Some(mut hidden) = self.prompt_state.take() {
            hidden.extend_from_slice(&trunk.hidden);
            self.offer_prompt(hidden, tx).await?;
        }
        Ok(self.session.complete(picks, self.times)?)
    }

    /// Waits for the running job, so that the session's state is at rest.
    async fn settle(&mut self) {
        if let Some(running) = self.running.take()
            && let Ok(done) = running.done.await
        {
            // What the edge missed it will ask for again.
            let _ = self.session.complete(done.picks, self.times);
        }
    }
}

async fn wait(running: &mut Option<Submitted>) -> Result<JobDone, TargetError> {
    match running {
        Some(r) => (&mut r.done).await,
        None => std::future::pending().await,
    }
}
