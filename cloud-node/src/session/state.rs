//! KV state of a session on its way: the prompt's, offered to the edge, and the trunk's, pulled from
//! it.

use std::time::Duration;

use bytes::Bytes;
use metrics::counter;
use tandem_engine::trunk;
use tandem_proto::exchange::{CostInputs, Incoming, Outgoing, StateRun, bytes_per_token};
use tandem_proto::frame::Message;
use tandem_proto::message::{KvBlock, KvOffer, KvPull, KvWant, RefuseCode};
use tandem_proto::session::cloud::Job;
use tandem_transport::bulk::BulkReceiver;
use tandem_transport::channel::FrameSender;

use super::{Ending, SessionTask};
use crate::metric_definitions as m;
use crate::target::TrunkState;

/// How long the cloud waits for trunk state of the edge before it computes it itself.
const PULL_TIMEOUT: Duration = Duration::from_secs(2);

/// A job that waits for trunk state of the edge.
pub(super) struct Pull {
    job: Job,
    sequence: Vec<u32>,
    incoming: Option<Incoming>,
    pub(super) deadline: tokio::time::Instant,
}

impl Pull {
    /// Tokens whose state is wanted.
    fn tokens(&self) -> &[u32] {
        &self.sequence[..self.job.feed_from]
    }
}

impl SessionTask {
    pub(super) fn pull_pays(&self, tokens: usize, lacking: usize) -> bool {
        let Some(trunk) = self.trunk.as_ref().filter(|trunk| trunk.fits(tokens, false)) else { return false };
        self.node.settings.pull_trunk.moves(|| {
            let (stats, load) = (self.link.stats(), self.node.load());
            let row_s = load.busy_us as f64 / 1e6 / load.rows.max(1) as f64;
            // The exchange carries the state from the start of the sequence.
            let carried = tokens as f64 / lacking as f64;
            CostInputs {
                tokens: lacking,
                bytes_per_token: (bytes_per_token(&trunk.shape(false)) as f64 * carried) as usize,
                rtt_s: stats.rtt_us as f64 / 1e6,
                goodput: stats.expected_receive_bytes_per_s(),
                holder_delay_s: 0.0,
                recompute_rate: 1.0 / (row_s * trunk.share).max(1e-9),
            }
        })
    }

    /// Asks the edge for the trunk's state before the job is run.
    pub(super) async fn pull(&mut self, job: Job, sequence: Vec<u32>, tx: &mut FrameSender) -> Result<(), Ending> {
        self.exchanges += 1;
        self.bulk = Some(self.node.bulk.register(self.id));
        let pull = KvPull {
            epoch: self.epoch,
            exchange: self.exchanges,
            layer_from: 0,
            layer_to: self.trunk_layers() as u32,
            tokens: job.feed_from as u32,
        };
        tx.send(&Message::KvPull(pull), Bytes::new()).await?;
        let deadline = tokio::time::Instant::now() + PULL_TIMEOUT;
        self.pull = Some(Pull { job, sequence, incoming: None, deadline });
        Ok(())
    }

    /// The edge offers what was pulled.
    pub(super) async fn on_offer(&mut self, offer: &KvOffer, tx: &mut FrameSender) -> Result<(), Ending> {
        let Some(pull) = &self.pull else { return Ok(()) };
        let run = self.trunk_run(false, pull.tokens())?;
        let (want, incoming) = Incoming::answer(self.id, offer, run);
        let declined = want.indices.is_empty();
        if let Some(pull) = &mut self.pull {
            pull.incoming = incoming;
        }
        tx.send(&Message::KvWant(want), Bytes::new()).await?;
        if declined {
            self.give_up_pull();
        }
        Ok(())
    }

    /// The edge takes (some of) what was offered.
    pub(super) async fn lend(&mut self, want: &KvWant) -> Result<(), Ending> {
        let Some((outgoing, blocks)) = self.outgoing.take() else { return Ok(()) };
        for index in outgoing.wanted(want)? {
            let payload = blocks[index].clone();
            count_bytes("sent", payload.len());
            self.link.send_bulk(&Message::KvBlock(outgoing.block(index, &payload)), payload).await?;
        }
        Ok(())
    }

    /// Offers the prompt's trunk state with the hidden states above it.
    pub(super) async fn offer_prompt(&mut self, hidden: Vec<f32>, tx: &mut FrameSender) -> Result<(), Ending> {
        let prompt = self.session.prompt_len();
        let state = self.trunk_state()?.export(self.id, self.trunk_layers(), prompt);
        let state = state.await?;
        let run = self.trunk_run(true, &self.session.tokens()[..prompt])?;
        let width = self.trunk.as_ref().map_or(0, |trunk| trunk.hidden_size);
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

    pub(super) async fn on_block(
        &mut self,
        block: Option<(KvBlock, Bytes)>,
        tx: &mut FrameSender,
    ) -> Result<(), Ending> {
        let Some((block, payload)) = block else {
            self.bulk = None;
            return Ok(());
        };
        let Some(incoming) = self.pull.as_mut().and_then(|p| p.incoming.as_mut()) else { return Ok(()) };
        count_bytes("received", payload.len());
        match incoming.accept(&block, payload) {
            Ok(()) => count_blocks("received", "published", 1),
            Err(e) => {
                tracing::warn!("a KV block was refused: {e}");
                count_blocks("received", "refused", 1);
            }
        }
        if !incoming.is_complete() && !incoming.has_failed() {
            return Ok(());
        }
        let Some(Pull { job, sequence, incoming: Some(incoming), .. }) = self.pull.take() else { return Ok(()) };
        self.bulk = None;
        let (ack, blocks) = incoming.finish();
        tx.send(&Message::KvAck(ack), Bytes::new()).await?;
        let source = if let Some(blocks) = blocks {
            let blocks = blocks.iter().map(|b| trunk::numbers(b)).collect();
            let imported = self.trunk_state()?.import(self.id, self.trunk_layers(), blocks, job.feed_from);
            self.trunk_tokens = imported.await?;
            "edge"
        } else {
            "recomputed"
        };
        counter!(m::TRUNK_FETCHED, m::LABEL_SOURCE => source).increment(1);
        self.start(job, sequence);
        Ok(())
    }

    /// Computes the state after all.
    pub(super) fn give_up_pull(&mut self) {
        self.bulk = None;
        let Some(pull) = self.pull.take() else { return };
        counter!(m::TRUNK_FETCHED, m::LABEL_SOURCE => "recomputed").increment(1);
        self.start(pull.job, pull.sequence);
    }

    fn trunk_state(&self) -> Result<&dyn TrunkState, Ending> {
        self.node.target.trunk().ok_or_else(no_trunk)
    }

    /// The run of trunk state of `tokens`.
    fn trunk_run(&self, with_hidden: bool, tokens: &[u32]) -> Result<StateRun, Ending> {
        let trunk = self.trunk.as_ref().ok_or_else(no_trunk)?;
        Ok(trunk.run(self.link.peer_tenant_key(), tokens, with_hidden)?)
    }
}

fn no_trunk() -> Ending {
    Ending::Refused(RefuseCode::BadState, "the session has no trunk".into(), 0)
}

pub(super) fn count_blocks(direction: &'static str, result: &'static str, blocks: u64) {
    counter!(m::KV_BLOCKS, m::LABEL_DIRECTION => direction, m::LABEL_RESULT => result).increment(blocks);
}

fn count_bytes(direction: &'static str, bytes: usize) {
    counter!(m::KV_BYTES, m::LABEL_DIRECTION => direction).increment(bytes as u64);
}

/// The next block of a pull under way.
pub(super) async fn next_block(bulk: &mut Option<BulkReceiver>) -> Option<(KvBlock, Bytes)> {
    match bulk {
        Some(b) => b.next().await,
        None => std::future::pending().await,
    }
}

pub(super) async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(t) => tokio::time::sleep_until(t).await,
        None => std::future::pending().await,
    }
}
