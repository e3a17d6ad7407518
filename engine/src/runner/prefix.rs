//! Prefix reuse: which rows a new sequence need not compute, as another one of its tenant has computed
//! them. The index is `kv::prefix`; here it meets the pools and the sequences.
//!
//! Exact, because a row's bits depend on the tokens before it only. Rows that rest on a peer's numbers
//! (hidden states or trunk state that came over the wire) serve their own sequence only.

use tandem_proto::block::BlockChain;
use tandem_proto::limits::KV_BLOCK_TOKENS;
use tandem_proto::message::KvShape;

use crate::error::EngineError;
use crate::kv::prefix::{Held, PrefixIndex};
use crate::kv::{HeldBlock, KvPool, Sequence};
use crate::model::Model;

use super::state::{KvState, Pending};

/// The key under which sequences of one tenant share rows of `model`: it names the model's weights, its
/// arithmetic and the tenant.
#[must_use]
pub fn prefix_key(model: &Model, tenant_key: [u8; 32]) -> BlockChain {
    let spec = model.spec();
    let shape = KvShape { layer_from: 0, layer_to: spec.layers as u32, width: spec.kv_width() as u32, hidden: 0 };
    BlockChain::new(tenant_key, model.digest(), model.numerics(), &shape)
}

/// A block of the index, in both pools.
#[derive(Debug)]
pub(super) struct Block {
    trunk: Option<HeldBlock>,
    upper: HeldBlock,
}

impl Block {
    /// Whether `seq` must copy the block before it writes its next row, only because the index holds it.
    fn costs_a_copy(&self, seq: &Sequence) -> bool {
        std::iter::once(&self.upper).chain(&self.trunk).any(|held| held.is_the_other_holder_of_the_end(seq))
    }
}

impl Held for Block {
    fn is_in_use(&self) -> bool {
        self.upper.is_in_use() || self.trunk.as_ref().is_some_and(HeldBlock::is_in_use)
    }
}

/// Where a sequence stands in its chain of blocks.
#[derive(Debug)]
pub(super) struct Path {
    key: BlockChain,
    /// After the blocks that are in the index.
    chain: BlockChain,
    blocks: usize,
}

impl Path {
    pub(super) fn new(key: BlockChain) -> Self {
        Self { chain: key.clone(), key, blocks: 0 }
    }

    /// The sequence was cut to `len` tokens.
    pub(super) fn cut(&mut self, len: usize) {
        if len < self.blocks * KV_BLOCK_TOKENS {
            *self = Self::new(self.key.clone());
        }
    }

    fn is_of(&self, other: &Self) -> bool {
        self.key.id() == other.key.id()
    }
}

/// The index over the runner's pools.
pub(super) struct Prefixes {
    index: PrefixIndex<Block>,
    /// Sequences that found rows.
    pub(super) hits: u64,
    /// Rows found.
    pub(super) rows: u64,
}

impl Prefixes {
    /// At most `blocks_max` blocks; none switches reuse off.
    pub(super) fn new(blocks_max: usize) -> Self {
        Self { index: PrefixIndex::new(blocks_max), hits: 0, rows: 0 }
    }

    pub(super) fn is_on(&self) -> bool {
        self.index.blocks_max() > 0
    }

    /// Blocks held.
    pub(super) fn blocks(&self) -> usize {
        self.index.len()
    }

    /// Blocks given up so far.
    pub(super) fn evicted(&self) -> u64 {
        self.index.evicted()
    }

    /// How many of the first `tokens` are held.
    pub(super) fn held(&self, key: BlockChain, tokens: &[u32]) -> usize {
        self.index.held(key, tokens)
    }

    /// Puts what is held of a sequence's first tokens in place of its empty state; returns their number.
    pub(super) fn attach<T>(&mut self, p: &mut Pending<T>, trunk_pool: Option<&KvPool>, upper_pool: &KvPool) -> usize {
        let tokens_max = p.reusable();
        let Some(path) = &mut p.kv.path else { return 0 };
        let found = self.index.find(path.key.clone(), &p.job.sequence, tokens_max);
        if found.tokens == 0 {
            return 0;
        }
        let tokens = found.tokens;
        p.kv.trunk =
            trunk_pool.map(|pool| pool.resume(found.blocks.iter().filter_map(|block| block.trunk.as_ref()), tokens));
        p.kv.upper = upper_pool.resume(found.blocks.iter().map(|block| &block.upper), tokens);
        *path = Path { key: path.key.clone(), chain: found.chain, blocks: tokens / KV_BLOCK_TOKENS };
        self.hits += 1;
        self.rows += tokens as u64;
        tokens
    }

    /// Puts the blocks of a sequence in the index, as far as they hold rows of `tokens` that were computed
    /// here; with the `last` one, which may be partly filled.
    pub(super) fn publish(&mut self, kv: &mut KvState, tokens: &[u32], last: bool) {
        let rows = kv.computed_rows().min(tokens.len());
        let Some(path) = &mut kv.path else { return };
        let (trunk, upper) = (&mut kv.trunk, &mut kv.upper);
        let block = |trunk: &Option<Sequence>, upper: &Sequence, index| Block {
            trunk: trunk.as_ref().map(|trunk| trunk.hold(index)),
            upper: upper.hold(index),
        };
        while (path.blocks + 1) * KV_BLOCK_TOKENS <= rows {
            let index = path.blocks;
            let tokens = &tokens[index * KV_BLOCK_TOKENS..][..KV_BLOCK_TOKENS];
            let Some(held) = self.index.publish(&mut path.chain, tokens, || block(&*trunk, &*upper, index)) else {
                return;
            };
            // Where another sequence has computed the same rows, one block is enough.
            upper.adopt(index, &held.upper);
            if let (Some(trunk), Some(held)) = (trunk.as_mut(), &held.trunk) {
                trunk.adopt(index, held);
            }
            path.blocks += 1;
        }
        let rest = &tokens[path.blocks * KV_BLOCK_TOKENS..rows];
        if last && !rest.is_empty() {
            self.index.publish(&mut path.chain.clone(), rest, || block(&*trunk, &*upper, path.blocks));
        }
    }

    /// As [`KvPool::reserve`]; blocks that only the index holds make room. Where one block is missing still, it may
    /// be the copy of a block that the sequence shares with the index alone: then the index lets go of that one.
    pub(super) fn reserve(&mut self, pool: &mut KvPool, seq: &mut Sequence, rows: usize) -> Result<(), EngineError> {
        loop {
            match pool.reserve(seq, rows) {
                Err(EngineError::PoolExhausted { needed, .. }) if self.makes_room(pool, seq, needed) => {}
                other => return other,
            }
        }
    }

    /// Gives up a block if that may leave `needed` ones.
    fn makes_room(&mut self, pool: &KvPool, seq: &Sequence, needed: usize) -> bool {
        let available = pool.available_blocks();
        (needed <= available && self.index.evict())
            || (needed == available + 1 && self.index.let_go(|block| block.costs_a_copy(seq)))
    }

    /// Whether the job at `index` has rows to gain by waiting for an earlier one, which is about to compute
    /// them.
    pub(super) fn waits<T>(&self, pending: &[Pending<T>], index: usize) -> bool {
        let p = &pending[index];
        let Some(path) = &p.kv.path else { return false };
        let wanted = &p.job.sequence[..p.reusable()];
        let mut held = None;
        pending.iter().filter(|other| other.arrival < p.arrival).any(|other| {
            let promised = other.promised().filter(|_| other.kv.path.as_ref().is_some_and(|o| o.is_of(path)));
            let Some(promised) = promised else { return false };
            let shared = wanted.iter().zip(promised).take_while(|(a, b)| a == b).count();
            let there = shared.next_multiple_of(KV_BLOCK_TOKENS).min(promised.len());
            // Looked up only where it matters.
            shared > 0
                && other.cursor < there
                && pays(shared, *held.get_or_insert_with(|| self.held(path.key.clone(), wanted)), wanted.len())
        })
    }
}

/// Whether `shared` rows of which `held` are there are worth waiting for, of `wanted`: a wait costs a pass
/// or more.
fn pays(shared: usize, held: usize, wanted: usize) -> bool {
    let gain = shared.saturating_sub(held);
    gain >= KV_BLOCK_TOKENS || 2 * gain > wanted.saturating_sub(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_must_pay() {
        // (shared, held, wanted, waits)
        let table = [
            (500, 0, 510, true),
            (500, 500, 510, false),
            (500, 496, 510, false),
            (500, 460, 510, true),
            (20, 0, 20, true),
            (20, 0, 1000, false),
            (1, 0, 1, true),
            (0, 0, 10, false),
            (10, 30, 40, false),
            (40, 30, 41, true),
        ];
        for (shared, held, wanted, expected) in table {
            assert_eq!(pays(shared, held, wanted), expected, "{shared} {held} {wanted}");
        }
    }
}
