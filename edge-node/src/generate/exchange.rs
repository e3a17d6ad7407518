//! KV state of one answer: the prompt's, fetched from the cloud, and the trunk's, lent to it.

use bytes::Bytes;
use metrics::counter;
use tandem_engine::trunk;
use tandem_proto::exchange::StateRun;
use tandem_proto::frame::Message;
use tandem_proto::ids::SessionId;
use tandem_proto::message::{KvOffer, KvWant};
use tandem_transport::exchange::{Arrived, Borrowed, Borrower, Lender};

use super::{Answer, Halt};
use crate::context::NodeContext;
use crate::metric_definitions as m;

/// The prompt's state on its way here.
pub(super) struct PromptFetch {
    borrower: Borrower,
    /// Trunk state that has arrived, to be put in place after the layers above it have run.
    state: Option<Vec<Vec<f32>>>,
}

impl PromptFetch {
    pub(super) fn new(node: &NodeContext, session: SessionId) -> Self {
        Self { borrower: Borrower::new(&node.bulk, session), state: None }
    }
}

/// The next block of a fetch under way.
pub(super) async fn next_block(fetch: &mut Option<PromptFetch>) -> Option<Arrived> {
    match fetch {
        Some(f) if f.state.is_none() => f.borrower.next().await,
        _ => std::future::pending().await,
    }
}

impl Answer {
    fn run_of(&self, tokens: usize, with_hidden: bool) -> Option<StateRun> {
        self.node.trunk_run(self.trunk.as_ref()?, self.session.tokens().get(..tokens)?, with_hidden)
    }

    /// The cloud offers the prompt's state.
    pub(super) async fn on_offer(&mut self, offer: &KvOffer) {
        let run = self.run_of(self.request.prompt.len(), true);
        let Some(fetch) = &mut self.fetch else { return };
        let (want, takes) = fetch.borrower.answer(offer, run);
        if !takes {
            tracing::warn!("the cloud offered state of another prompt or model; computing it here");
            self.drop_fetch();
        }
        self.send(want, Bytes::new()).await;
    }

    pub(super) async fn on_block(&mut self, arrived: Option<Arrived>) -> Result<(), Halt> {
        self.session.heard(self.now());
        let Some(Arrived { bytes, state }) = arrived else {
            self.drop_fetch();
            return Ok(());
        };
        counter!(m::KV_BYTES, m::LABEL_DIRECTION => "received").increment(bytes as u64);
        if let Some(uplink) = &mut self.uplink {
            uplink.received_bulk(bytes);
        }
        match state {
            Borrowed::Part => {}
            Borrowed::Whole(ack, blocks) => {
                self.send(Message::KvAck(ack), Bytes::new()).await;
                self.use_prompt_state(&blocks)?;
            }
            Borrowed::Refused(ack, e) => {
                tracing::warn!("a KV block was refused: {e}");
                counter!(m::KV_BLOCKS_REFUSED).increment(1);
                self.send(Message::KvAck(ack), Bytes::new()).await;
                self.drop_fetch();
            }
        }
        Ok(())
    }

    /// Runs the edge's own layers over the hidden states; the trunk's state follows when they are
    /// done.
    fn use_prompt_state(&mut self, blocks: &[Bytes]) -> Result<(), Halt> {
        let prompt = self.request.prompt.len();
        let Some(run) = self.run_of(prompt, true) else { return Ok(()) };
        let (state, hidden) = trunk::parts(&run, blocks);
        self.drafter.start(&self.session.tokens()[..prompt], Some(hidden))?;
        if let Some(fetch) = &mut self.fetch {
            fetch.state = Some(state);
        }
        self.session.state_settled();
        Ok(())
    }

    /// Called when a step has ended: puts the fetched trunk state in place.
    pub(super) async fn finish_fetch(&mut self) {
        let Some(state) = self.fetch.as_mut().and_then(|f| f.state.take()) else { return };
        self.drop_fetch();
        let prompt = self.request.prompt.len();
        match self.drafter.import_trunk(state, prompt).await {
            Ok(_) => counter!(m::PROMPTS_FETCHED).increment(1),
            // The engine computes what is missing.
            Err(e) => tracing::warn!("the prompt's state could not be used: {e}"),
        }
    }

    /// The cloud wants the trunk's state. Offered once no step is running.
    pub(super) async fn serve_pull(&mut self) {
        if self.drafter.is_running() {
            return;
        }
        let Some(pull) = self.pull.take() else { return };
        let Some(trunk) = self.trunk.clone() else { return };
        let (shape, tokens) = (trunk.shape(false), pull.tokens as usize);
        let have = self.drafter.fed() >= tokens;
        let run = self.run_of(tokens, false).filter(|_| have);
        let mut offer = Lender::nothing(&pull, shape);
        if let Some(run) = run {
            match self.drafter.export_trunk(trunk.layers, tokens).await {
                Ok(state) => {
                    let blocks = trunk::payloads(&run, &state, &[]).into_iter().map(Bytes::from).collect();
                    offer = self.lender.offer(pull.epoch, pull.exchange, run, blocks);
                }
                Err(e) => tracing::debug!("no trunk state to lend: {e}"),
            }
        }
        self.send(offer, Bytes::new()).await;
    }

    /// The cloud takes (some of) what was offered.
    pub(super) fn on_want(&mut self, want: &KvWant) {
        let Some(uplink) = &mut self.uplink else { return };
        match self.lender.wanted(want, &uplink.link) {
            Ok(bytes) => {
                counter!(m::KV_BYTES, m::LABEL_DIRECTION => "sent").increment(bytes as u64);
                uplink.sent_bulk(bytes);
            }
            Err(e) => tracing::warn!("the cloud wants blocks that were not offered: {e}"),
        }
    }
}
