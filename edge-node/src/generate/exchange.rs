//! KV state of one answer: the prompt's, fetched from the cloud, and the trunk's, lent to it.

use bytes::Bytes;
use metrics::counter;
use tandem_engine::trunk;
use tandem_proto::exchange::{Incoming, Outgoing, StateRun};
use tandem_proto::frame::Message;
use tandem_proto::ids::SessionId;
use tandem_proto::message::{KvBlock, KvOffer, KvWant};
use tandem_transport::bulk::BulkReceiver;

use super::{Answer, Halt};
use crate::context::NodeContext;
use crate::metric_definitions as m;

/// The prompt's state on its way here.
pub(super) struct PromptFetch {
    blocks: BulkReceiver,
    incoming: Option<Incoming>,
    /// Trunk state that has arrived, to be put in place after the layers above it have run.
    state: Option<Vec<Vec<f32>>>,
}

impl PromptFetch {
    pub(super) fn new(node: &NodeContext, session: SessionId) -> Self {
        let blocks = node.bulk.register(session);
        Self { blocks, incoming: None, state: None }
    }
}

/// The next block of a fetch under way.
pub(super) async fn next_block(fetch: &mut Option<PromptFetch>) -> Option<(KvBlock, Bytes)> {
    match fetch {
        Some(f) if f.state.is_none() => f.blocks.next().await,
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
        let (Some(fetch), Some(run)) = (&mut self.fetch, run) else { return };
        let (want, incoming) = Incoming::answer(fetch.blocks.session(), offer, run);
        fetch.incoming = incoming;
        if fetch.incoming.is_none() {
            tracing::warn!("the cloud offered state of another prompt or model; computing it here");
            self.drop_fetch();
        }
        self.send(Message::KvWant(want), Bytes::new()).await;
    }

    pub(super) async fn on_block(&mut self, block: Option<(KvBlock, Bytes)>) -> Result<(), Halt> {
        self.session.heard(self.now());
        let (Some((block, payload)), Some(fetch)) = (block, &mut self.fetch) else {
            self.drop_fetch();
            return Ok(());
        };
        let Some(incoming) = &mut fetch.incoming else { return Ok(()) };
        counter!(m::KV_BYTES, m::LABEL_DIRECTION => "received").increment(payload.len() as u64);
        if let Some(uplink) = &mut self.uplink {
            uplink.received_bulk(payload.len());
        }
        if let Err(e) = incoming.accept(&block, payload) {
            tracing::warn!("a KV block was refused: {e}");
            counter!(m::KV_BLOCKS_REFUSED).increment(1);
        }
        if !incoming.is_complete() && !incoming.has_failed() {
            return Ok(());
        }
        let Some(incoming) = fetch.incoming.take() else { return Ok(()) };
        let (ack, blocks) = incoming.finish();
        self.send(Message::KvAck(ack), Bytes::new()).await;
        match blocks {
            Some(blocks) => self.use_prompt_state(&blocks)?,
            None => self.drop_fetch(),
        }
        Ok(())
    }

    /// Runs the edge's own layers over the hidden states; the trunk's state follows when they are
    /// done.
    fn use_prompt_state(&mut self, blocks: &[Bytes]) -> Result<(), Halt> {
        let prompt = self.request.prompt.len();
        let Some(run) = self.run_of(prompt, true) else { return Ok(()) };
        let hidden_width = run.shape.hidden as usize;
        let mut hidden = Vec::with_capacity(prompt * hidden_width);
        let state = blocks
            .iter()
            .enumerate()
            .map(|(i, block)| {
                let mut kv = trunk::numbers(block);
                let rows = kv.split_off(kv.len() - run.block_tokens(i) * hidden_width);
                hidden.extend_from_slice(&rows);
                kv
            })
            .collect();
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
        let empty = KvOffer { epoch: pull.epoch, exchange: pull.exchange, shape, ids: Vec::new(), tokens: 0 };
        let offer = match run {
            Some(run) => match self.drafter.export_trunk(trunk.layers, tokens).await {
                Ok(state) => {
                    let (outgoing, offer) = Outgoing::new(self.session.id(), pull.epoch, pull.exchange, run);
                    self.lent = Some((outgoing, state));
                    offer
                }
                Err(e) => {
                    tracing::debug!("no trunk state to lend: {e}");
                    empty
                }
            },
            None => empty,
        };
        self.send(Message::KvOffer(offer), Bytes::new()).await;
    }

    /// The cloud takes (some of) what was offered.
    pub(super) async fn on_want(&mut self, want: &KvWant) {
        let Some((outgoing, state)) = self.lent.take() else { return };
        let wanted = match outgoing.wanted(want) {
            Ok(wanted) => wanted,
            Err(e) => return tracing::warn!("the cloud wants blocks that were not offered: {e}"),
        };
        for index in wanted {
            let payload = Bytes::from(trunk::payload(&state[index]));
            counter!(m::KV_BYTES, m::LABEL_DIRECTION => "sent").increment(payload.len() as u64);
            let block = Message::KvBlock(outgoing.block(index, &payload));
            let Some(uplink) = &mut self.uplink else { return };
            if let Err(e) = uplink.send_bulk(block, payload).await {
                tracing::debug!("the trunk's state did not reach the cloud: {e}");
                return;
            }
        }
    }
}
