//! KV exchange without I/O: offer(ids) → want(indices) → blocks → ack.
//!
//! Both sides compute the ids themselves from their own tokens and model, so an offer that means
//! other numbers finds no taker. A block is checked before it counts, and nothing is published
//! before every wanted block has passed: a mismatch is a miss and a recompute.

use alloc::{collections::BTreeMap, format, string::String, vec::Vec};

use bytes::Bytes;

use crate::block::BlockChain;
use crate::ids::{Digest, Epoch, SessionId};
use crate::limits::{KV_BLOCK_TOKENS, KV_EXCHANGE_BYTES_MAX, KV_OFFER_BLOCKS_MAX, PAYLOAD_BYTES_MAX};
use crate::message::{KvAck, KvBlock, KvOffer, KvShape, KvWant};

/// Why a frame of an exchange is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The frame is not for this exchange.
    #[error("the frame is for another session, epoch or exchange")]
    Foreign,
    /// An index is out of range, repeated or out of order, or the block was not wanted.
    #[error("block {index} was not wanted or is out of range")]
    Unwanted {
        /// Index in the offer.
        index: u32,
    },
    /// The block does not hold what its id promises.
    #[error("block {index}: {what} differs")]
    Mismatch {
        /// Index in the offer.
        index: u32,
        /// Which check failed.
        what: &'static str,
    },
    /// Past a bound.
    #[error("{0}")]
    Limit(String),
}

/// The run of KV state both sides talk about.
#[derive(Clone, Debug, PartialEq)]
pub struct StateRun {
    /// Shape of every block.
    pub shape: KvShape,
    /// Ids, in order.
    pub ids: Vec<Digest>,
    /// Tokens covered.
    pub tokens: usize,
}

impl StateRun {
    /// The run over `tokens`; fails if it needs more blocks, or larger ones, than the wire allows.
    pub fn new(chain: BlockChain, shape: KvShape, tokens: &[u32]) -> Result<Self, ExchangeError> {
        Self::check(&shape, tokens.len())?;
        Ok(Self { ids: chain.ids(tokens), tokens: tokens.len(), shape })
    }

    /// Whether the wire carries a run over `tokens` tokens: not of every model and every prompt.
    pub fn check(shape: &KvShape, tokens: usize) -> Result<(), ExchangeError> {
        let blocks = tokens.div_ceil(KV_BLOCK_TOKENS);
        if blocks > KV_OFFER_BLOCKS_MAX {
            return Err(ExchangeError::Limit(format!(
                "{blocks} blocks in one offer, at most {KV_OFFER_BLOCKS_MAX} allowed"
            )));
        }
        let bytes = |tokens: usize| tokens.saturating_mul(bytes_per_token(shape));
        let table = [
            ("a block", bytes(tokens.min(KV_BLOCK_TOKENS)), PAYLOAD_BYTES_MAX),
            ("an exchange", bytes(tokens), KV_EXCHANGE_BYTES_MAX),
        ];
        match table.into_iter().find(|(_, bytes, max)| bytes > max) {
            Some((what, bytes, max)) => {
                Err(ExchangeError::Limit(format!("{what} of {bytes} bytes, at most {max} allowed")))
            }
            None => Ok(()),
        }
    }

    /// Tokens in block `index`.
    #[must_use]
    pub fn block_tokens(&self, index: usize) -> usize {
        self.tokens.saturating_sub(index * KV_BLOCK_TOKENS).min(KV_BLOCK_TOKENS)
    }

    /// Bytes of block `index`: f32 `[layer][token][width]`, then `[token][hidden]`.
    #[must_use]
    pub fn payload_bytes(&self, index: usize) -> usize {
        self.block_tokens(index) * bytes_per_token(&self.shape)
    }

    fn offer(&self, epoch: Epoch, exchange: u32) -> KvOffer {
        KvOffer { epoch, exchange, shape: self.shape.clone(), ids: self.ids.clone(), tokens: self.tokens as u32 }
    }
}

/// Bytes that one token's state takes on the wire.
#[must_use]
pub fn bytes_per_token(shape: &KvShape) -> usize {
    let layers = shape.layer_to.saturating_sub(shape.layer_from) as usize;
    4 * (layers * shape.width as usize + shape.hidden as usize)
}

/// The side that has the state.
#[derive(Debug)]
pub struct Outgoing {
    session: SessionId,
    epoch: Epoch,
    exchange: u32,
    run: StateRun,
}

impl Outgoing {
    /// Prepares an exchange of `run` and the offer that begins it.
    #[must_use]
    pub fn new(session: SessionId, epoch: Epoch, exchange: u32, run: StateRun) -> (Self, KvOffer) {
        let offer = run.offer(epoch, exchange);
        (Self { session, epoch, exchange, run }, offer)
    }

    /// The blocks the peer wants; empty if it declines.
    pub fn wanted(&self, want: &KvWant) -> Result<Vec<usize>, ExchangeError> {
        if want.epoch != self.epoch || want.exchange != self.exchange {
            return Err(ExchangeError::Foreign);
        }
        let mut last = None;
        for &index in &want.indices {
            if index as usize >= self.run.ids.len() || last.is_some_and(|l| index <= l) {
                return Err(ExchangeError::Unwanted { index });
            }
            last = Some(index);
        }
        Ok(want.indices.iter().map(|&i| i as usize).collect())
    }

    /// The frame that carries block `index` with `payload`.
    #[must_use]
    pub fn block(&self, index: usize, payload: &[u8]) -> KvBlock {
        KvBlock {
            session: self.session,
            epoch: self.epoch,
            exchange: self.exchange,
            index: index as u32,
            id: self.run.ids[index],
            payload_digest: Digest::of(payload),
            tokens: self.run.block_tokens(index) as u32,
            shape: self.run.shape.clone(),
        }
    }
}

/// The side that wants the state.
#[derive(Debug)]
pub struct Incoming {
    session: SessionId,
    epoch: Epoch,
    exchange: u32,
    run: StateRun,
    received: BTreeMap<u32, Bytes>,
    refused: u32,
}

impl Incoming {
    /// Answers an offer: takes all of it if it is exactly `run`, else declines.
    #[must_use]
    pub fn answer(session: SessionId, offer: &KvOffer, run: StateRun) -> (KvWant, Option<Self>) {
        let same = offer.shape == run.shape && offer.ids == run.ids && offer.tokens as usize == run.tokens;
        let indices = if same { (0..run.ids.len() as u32).collect() } else { Vec::new() };
        let want = KvWant { epoch: offer.epoch, exchange: offer.exchange, indices };
        let incoming = same.then(|| Self {
            session,
            epoch: offer.epoch,
            exchange: offer.exchange,
            run,
            received: BTreeMap::new(),
            refused: 0,
        });
        (want, incoming)
    }

    /// Checks a block and keeps it.
    pub fn accept(&mut self, block: &KvBlock, payload: Bytes) -> Result<(), ExchangeError> {
        if block.session != self.session || block.epoch != self.epoch || block.exchange != self.exchange {
            return Err(ExchangeError::Foreign);
        }
        let index = block.index;
        let i = index as usize;
        if i >= self.run.ids.len() || self.received.contains_key(&index) {
            return Err(ExchangeError::Unwanted { index });
        }
        let check = |ok: bool, what| if ok { Ok(()) } else { Err(ExchangeError::Mismatch { index, what }) };
        let checked = check(block.id == self.run.ids[i], "id")
            .and_then(|()| check(block.shape == self.run.shape, "shape"))
            .and_then(|()| check(block.tokens as usize == self.run.block_tokens(i), "token count"))
            .and_then(|()| check(payload.len() == self.run.payload_bytes(i), "payload length"))
            .and_then(|()| check(Digest::of(&payload) == block.payload_digest, "payload digest"));
        if checked.is_err() {
            self.refused += 1;
            return checked;
        }
        self.received.insert(index, payload);
        Ok(())
    }

    /// True once every block has arrived and passed.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.received.len() == self.run.ids.len()
    }

    /// True once a block has failed a check: the run will not become complete.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.refused > 0
    }

    /// Ends the exchange: the payloads in order if it is complete, and the acknowledgement.
    #[must_use]
    pub fn finish(self) -> (KvAck, Option<Vec<Bytes>>) {
        let complete = self.is_complete();
        let ack = KvAck {
            epoch: self.epoch,
            exchange: self.exchange,
            published: if complete { self.received.len() as u32 } else { 0 },
            refused: self.refused,
        };
        (ack, complete.then(|| self.received.into_values().collect()))
    }
}

/// What a choice between moving state and computing it again depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostInputs {
    /// Tokens of state in question.
    pub tokens: usize,
    /// Bytes per token on the wire.
    pub bytes_per_token: usize,
    /// Round-trip time, seconds.
    pub rtt_s: f64,
    /// Goodput of the link, bytes per second.
    pub goodput: f64,
    /// Time until the holder has the state ready, seconds; 0 if it has it.
    pub holder_delay_s: f64,
    /// Tokens per second at which the receiver computes the same state.
    pub recompute_rate: f64,
}

/// Fewest tokens for which an exchange is worth its round trip.
pub const TRANSFER_TOKENS_MIN: usize = 64;
/// A transfer must beat recomputing by this factor, for its estimate is the less certain one.
pub const TRANSFER_MARGIN: f64 = 0.85;

/// True if moving the state is the faster way: `RTT + delay + bytes/goodput < 0.85 · n/rate`.
#[must_use]
pub fn transfer_pays(c: &CostInputs) -> bool {
    let transfer = c.rtt_s + c.holder_delay_s + (c.tokens * c.bytes_per_token) as f64 / c.goodput.max(1.0);
    let recompute = c.tokens as f64 / c.recompute_rate.max(1e-9);
    c.tokens >= TRANSFER_TOKENS_MIN && transfer < TRANSFER_MARGIN * recompute
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    const SHAPE: KvShape = KvShape { layer_from: 0, layer_to: 2, width: 3, hidden: 1 };

    fn run(tokens: &[u32]) -> StateRun {
        StateRun::new(BlockChain::new([1; 32], Digest::of(b"t"), "n", &SHAPE), SHAPE, tokens).unwrap()
    }
    fn sides() -> (Outgoing, Incoming, Vec<Bytes>) {
        let tokens: Vec<u32> = (0..70).collect();
        let run = run(&tokens);
        let payloads = (0..3).map(|i| Bytes::from(vec![i as u8; run.payload_bytes(i)])).collect();
        let (out, offer) = Outgoing::new(SessionId([2; 16]), Epoch(4), 9, run.clone());
        let (want, incoming) = Incoming::answer(SessionId([2; 16]), &offer, run);
        assert_eq!(out.wanted(&want), Ok(vec![0, 1, 2]));
        (out, incoming.unwrap(), payloads)
    }

    #[test]
    fn blocks_arrive_in_any_order_and_are_published_together() {
        let (out, mut inc, payloads) = sides();
        for i in [2, 0, 1] {
            assert!(!inc.is_complete());
            inc.accept(&out.block(i, &payloads[i]), payloads[i].clone()).unwrap();
        }
        let (ack, got) = inc.finish();
        assert_eq!((ack.published, ack.refused, got), (3, 0, Some(payloads)));
    }

    #[test]
    fn a_block_that_is_not_what_it_says_is_never_used() {
        type Damage = fn(&mut KvBlock, &mut Vec<u8>);
        let cases: [(&str, Damage); 6] = [
            ("flipped", |_, p| p[5] ^= 1),
            ("truncated", |_, p| p.truncate(10)),
            ("other id", |b, _| b.id = Digest::of(b"x")),
            ("other layers", |b, _| b.shape.layer_to = 3),
            ("other length", |b, _| b.tokens -= 1),
            ("other epoch", |b, _| b.epoch = Epoch(3)),
        ];
        for (name, damage) in cases {
            let (out, mut inc, payloads) = sides();
            let (mut block, mut payload) = (out.block(1, &payloads[1]), payloads[1].to_vec());
            damage(&mut block, &mut payload);
            assert!(inc.accept(&block, payload.into()).is_err(), "{name}");
            let (ack, got) = inc.finish();
            assert_eq!((ack.published, got), (0, None), "{name}");
        }
        let (out, mut inc, payloads) = sides();
        inc.accept(&out.block(0, &payloads[0]), payloads[0].clone()).unwrap();
        assert_eq!(
            inc.accept(&out.block(0, &payloads[0]), payloads[0].clone()),
            Err(ExchangeError::Unwanted { index: 0 })
        );
    }

    #[test]
    fn an_offer_of_other_numbers_is_declined_and_a_bad_want_refused() {
        let (out, offer) = Outgoing::new(SessionId([2; 16]), Epoch(4), 9, run(&[1, 2, 3]));
        let (want, incoming) = Incoming::answer(SessionId([2; 16]), &offer, run(&[1, 2, 4]));
        assert!(want.indices.is_empty() && incoming.is_none());
        for indices in [vec![1], vec![0, 0], vec![u32::MAX]] {
            assert!(out.wanted(&KvWant { epoch: Epoch(4), exchange: 9, indices }).is_err());
        }
        let foreign = KvWant { epoch: Epoch(3), exchange: 9, indices: vec![] };
        assert_eq!(out.wanted(&foreign), Err(ExchangeError::Foreign));
    }

    #[test]
    fn runs_past_the_bounds_are_refused() {
        let tokens = vec![0; KV_OFFER_BLOCKS_MAX * KV_BLOCK_TOKENS + 1];
        let chain = |s: &KvShape| BlockChain::new([1; 32], Digest::of(b"t"), "n", s);
        assert!(matches!(StateRun::new(chain(&SHAPE), SHAPE, &tokens), Err(ExchangeError::Limit(_))));
        let wide = KvShape { width: 1 << 14, ..SHAPE };
        let many = KV_EXCHANGE_BYTES_MAX / bytes_per_token(&wide);
        assert_eq!(StateRun::check(&wide, many), Ok(()));
        assert!(matches!(StateRun::check(&wide, many + 1), Err(ExchangeError::Limit(_))));
        let huge = KvShape { width: 1 << 20, ..SHAPE };
        assert!(matches!(StateRun::new(chain(&huge), huge.clone(), &tokens[..40]), Err(ExchangeError::Limit(_))));
    }

    #[test]
    fn the_cost_rule_moves_state_only_when_that_is_faster() {
        let base = CostInputs {
            tokens: 1000,
            bytes_per_token: 1664,
            rtt_s: 0.01,
            goodput: 10e6,
            holder_delay_s: 0.0,
            recompute_rate: 2000.0,
        };
        let table = [
            ("fast link, slow device", base, true),
            ("slow link", CostInputs { goodput: 1e6, ..base }, false),
            ("fast device", CostInputs { recompute_rate: 20_000.0, ..base }, false),
            ("long way", CostInputs { rtt_s: 0.5, ..base }, false),
            ("holder must compute first", CostInputs { holder_delay_s: 0.4, ..base }, false),
            ("short prompt", CostInputs { tokens: 63, recompute_rate: 1.0, ..base }, false),
        ];
        for (name, inputs, expected) in table {
            assert_eq!(transfer_pays(&inputs), expected, "{name}");
        }
    }
}
