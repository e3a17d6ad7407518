//! KV state of a session on its way: the prompt's, offered to the edge, and the trunk's, pulled from
//! it.

use std::time::Duration;

use bytes::Bytes;
use metrics::counter;
use tandem_engine::trunk;
use tandem_proto::exchange::{CostInputs, StateRun, bytes_per_token};
use tandem_proto::frame::Message;
use tandem_proto::message::{KvOffer, KvPull, KvWant};
use tandem_proto::session::cloud::Job;
use tandem_transport::channel::FrameSender;
use tandem_transport::exchange::{Arrived, Borrowed, Borrower};

use super::{Ending, SessionTask};
use crate::metric_definitions as m;

/// How long the cloud waits for trunk state of the edge, and for each block of it, before it computes it itself.
const PULL_TIMEOUT: Duration = Duration::from_secs(2);

/// A job that waits for trunk state of the edge.
pub(super) struct Pull {
    job: Job,
    sequence: Vec<u32>,
    borrower: Borrower,
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
        let borrower = Borrower::new(&self.node.bulk, self.id);
        let pull = KvPull {
            epoch: self.epoch,
            exchange: self.exchanges,
            layer_from: 0,
            layer_to: self.trunk_layers() as u32,
            tokens: job.feed_from as u32,
        };
        tx.send(&Message::KvPull(pull), Bytes::new()).await?;
        let deadline = tokio::time::Instant::now() + PULL_TIMEOUT;
        self.pull = Some(Pull { job, sequence, borrower, deadline });
        Ok(())
    }

    /// The edge offers what was pulled.
    pub(super) async fn on_offer(&mut self, offer: &KvOffer, tx: &mut FrameSender) -> Result<(), Ending> {
        let run = self.pull.as_ref().and_then(|pull| self.trunk_run(false, pull.tokens()));
        let Some(pull) = &mut self.pull else { return Ok(()) };
        let (want, takes) = pull.borrower.answer(offer, run);
        tx.send(&want, Bytes::new()).await?;
        if !takes {
            self.give_up_pull();
        }
        Ok(())
    }

    /// The edge takes (some of) what was offered.
    pub(super) fn lend(&mut self, want: &KvWant) -> Result<(), Ending> {
        count_bytes("sent", self.lender.wanted(want, &self.link)?);
        Ok(())
    }

    /// Offers the prompt's trunk state with the hidden states above it.
    pub(super) async fn offer_prompt(&mut self, hidden: Vec<f32>, tx: &mut FrameSender) -> Result<(), Ending> {
        let prompt = self.session.prompt_len();
        // Both are there, or no state would have been promised.
        let Some((run, trunk)) = self.trunk_run(true, &self.session.tokens()[..prompt]).zip(self.node.target.trunk())
        else {
            return Ok(());
        };
        let state = trunk.export(self.id, self.trunk_layers(), prompt).await?;
        let blocks = trunk::payloads(&run, &state, &hidden).into_iter().map(Bytes::from).collect();
        self.exchanges += 1;
        let offer = self.lender.offer(self.epoch, self.exchanges, run, blocks);
        Ok(tx.send(&offer, Bytes::new()).await?)
    }

    pub(super) async fn on_block(&mut self, arrived: Option<Arrived>, tx: &mut FrameSender) -> Result<(), Ending> {
        let Some(Arrived { bytes, state }) = arrived else {
            self.give_up_pull();
            return Ok(());
        };
        count_bytes("received", bytes);
        match state {
            Borrowed::Part => {
                if let Some(pull) = &mut self.pull {
                    pull.deadline = tokio::time::Instant::now() + PULL_TIMEOUT;
                }
            }
            Borrowed::Whole(ack, blocks) => {
                count_blocks("received", "published", u64::from(ack.published));
                tx.send(&Message::KvAck(ack), Bytes::new()).await?;
                self.take_over(&blocks).await?;
            }
            Borrowed::Refused(ack, e) => {
                tracing::warn!("a KV block was refused: {e}");
                count_blocks("received", "refused", 1);
                tx.send(&Message::KvAck(ack), Bytes::new()).await?;
                self.give_up_pull();
            }
        }
        Ok(())
    }

    /// Puts the state in place that was pulled, and runs the job that waits for it.
    async fn take_over(&mut self, blocks: &[Bytes]) -> Result<(), Ending> {
        let run = self.pull.as_ref().and_then(|pull| self.trunk_run(false, pull.tokens()));
        let Some(((pull, run), trunk)) = self.pull.take().zip(run).zip(self.node.target.trunk()) else { return Ok(()) };
        let (state, _) = trunk::parts(&run, blocks);
        let imported = trunk.import(self.id, self.trunk_layers(), state, pull.job.feed_from);
        self.trunk_tokens = imported.await?;
        counter!(m::TRUNK_FETCHED, m::LABEL_SOURCE => "edge").increment(1);
        self.start(pull.job, pull.sequence);
        Ok(())
    }

    /// Computes the state after all.
    pub(super) fn give_up_pull(&mut self) {
        let Some(pull) = self.pull.take() else { return };
        counter!(m::TRUNK_FETCHED, m::LABEL_SOURCE => "recomputed").increment(1);
        self.start(pull.job, pull.sequence);
    }

    /// The run of trunk state of `tokens`; none without a trunk or past the wire's bounds.
    fn trunk_run(&self, with_hidden: bool, tokens: &[u32]) -> Option<StateRun> {
        self.trunk.as_ref()?.run(self.link.peer_tenant_key(), tokens, with_hidden).ok()
    }
}

pub(super) fn count_blocks(direction: &'static str, result: &'static str, blocks: u64) {
    counter!(m::KV_BLOCKS, m::LABEL_DIRECTION => direction, m::LABEL_RESULT => result).increment(blocks);
}

fn count_bytes(direction: &'static str, bytes: usize) {
    counter!(m::KV_BYTES, m::LABEL_DIRECTION => direction).increment(bytes as u64);
}

/// The next block of a pull under way.
pub(super) async fn next_block(pull: &mut Option<Pull>) -> Option<Arrived> {
    match pull {
        Some(pull) => pull.borrower.next().await,
        None => std::future::pending().await,
    }
}

pub(super) async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(t) => tokio::time::sleep_until(t).await,
        None => std::future::pending().await,
    }
}
