//! Prefix reuse: which rows a new sequence need not compute, as another one of its tenant has computed
//! them. The index is `kv::prefix`; here it meets the pool and the sequences.
//!
//! Exact, because a row's bits depend on the tokens before it only. Rows that rest on a peer's numbers
//! (hidden states or trunk state that came over the wire) serve their own sequence only.

use tandem_proto::block::BlockChain;
use tandem_proto::limits::KV_BLOCK_TOKENS;
use tandem_proto::message::KvShape;

use crate::error::EngineError;
use crate::kv::block_file::Place;
use crate::kv::prefix::PrefixIndex;
use crate::kv::{HeldBlock, KvPool, Sequence};
use crate::model::Model;

use super::saved::Saved;
use super::state::{KvState, Pending};

/// The key under which sequences of one tenant share rows of `model`: it names the model's weights, its
/// arithmetic and the tenant.
#[must_use]
pub fn prefix_key(model: &Model, tenant_key: [u8; 32]) -> BlockChain {
    let spec = model.spec();
    let shape = KvShape { layer_from: 0, layer_to: spec.layers as u32, width: spec.kv_width() as u32, hidden: 0 };
    BlockChain::new(tenant_key, model.digest(), model.numerics(), &shape)
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

/// What became of the next block that is to be on disk.
#[derive(Debug, PartialEq)]
pub(super) enum Save {
    /// It is being written, or its text needs none.
    Went,
    /// It must wait for others.
    Waits,
    /// There is none.
    Nothing,
}

/// The index over the runner's pool.
pub(super) struct Prefixes {
    index: PrefixIndex<HeldBlock>,
    /// The blocks on disk, if some are kept there.
    pub(super) saved: Option<Saved>,
    /// Sequences that found rows.
    pub(super) hits: u64,
    /// Rows found.
    pub(super) rows: u64,
}

impl Prefixes {
    /// At most `blocks_max` blocks; none switches reuse off.
    pub(super) fn new(blocks_max: usize, saved: Option<Saved>) -> Self {
        Self { index: PrefixIndex::new(blocks_max), saved: saved.filter(|_| blocks_max > 0), hits: 0, rows: 0 }
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

    /// How many of the first `tokens` are held, in memory or on disk.
    pub(super) fn held(&self, key: BlockChain, tokens: &[u32]) -> usize {
        let saved = self.saved.as_ref().map_or(0, |saved| saved.index.held(key.clone(), tokens));
        self.index.held(key, tokens).max(saved)
    }

    /// Puts what is held of a sequence's first tokens in place of its empty state; returns their number.
    pub(super) fn attach<T>(&mut self, p: &mut Pending<T>, pool: &KvPool) -> usize {
        let tokens_max = p.reusable();
        let Some(path) = &mut p.kv.path else { return 0 };
        let found = self.index.find(path.key.clone(), &p.job.sequence, tokens_max);
        if found.tokens == 0 {
            return 0;
        }
        let tokens = found.tokens;
        p.kv.seq = pool.resume(found.blocks, tokens);
        p.kv.whole = tokens;
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
        let seq = &mut kv.seq;
        while (path.blocks + 1) * KV_BLOCK_TOKENS <= rows {
            let index = path.blocks;
            let tokens = &tokens[index * KV_BLOCK_TOKENS..][..KV_BLOCK_TOKENS];
            let Some(held) = self.index.publish(&mut path.chain, tokens, || seq.hold(index)) else { return };
            // Where another sequence has computed the same rows, one block is enough.
            seq.adopt(index, held);
            path.blocks += 1;
        }
        let rest = &tokens[path.blocks * KV_BLOCK_TOKENS..rows];
        if last && !rest.is_empty() {
            self.index.publish(&mut path.chain.clone(), rest, || seq.hold(path.blocks));
        }
    }

    /// A sequence is over: what is published of its `tokens` belongs on disk.
    pub(super) fn note_to_save(&mut self, kv: &KvState, tokens: &[u32]) {
        if let (Some(saved), Some(path)) = (&mut self.saved, &kv.path)
            && path.key.id() == saved.store.key().id()
        {
            saved.note(&tokens[..kv.computed_rows().min(tokens.len())]);
        }
    }

    /// Whether some may have to be written.
    pub(super) fn has_to_save(&self) -> bool {
        self.saved.as_ref().is_some_and(|saved| saved.store.writes() && !saved.texts.is_empty())
    }

    /// Has the next block written that is to be on disk.
    pub(super) fn save_next(&mut self, pool: &KvPool) -> Save {
        let Some(saved) = self.saved.as_mut().filter(|saved| saved.store.writes()) else { return Save::Nothing };
        let Some(text) = saved.texts.pop_front() else { return Save::Nothing };
        let missing = saved.missing(&text);
        // What memory has given up since cannot be written.
        let Some((place, block)) = missing.and_then(|place| self.index.get(place.id).map(|block| (place, block)))
        else {
            return Save::Went;
        };
        if !saved.store.has_room() {
            saved.texts.push_front(text);
            return Save::Waits;
        }
        let tokens = place.tokens.len();
        let numbers = pool.export_block(&pool.resume([block], tokens), 0);
        if numbers.is_ok_and(|numbers| saved.write(place, numbers)) {
            saved.texts.push_front(text);
        }
        Save::Went
    }

    /// Has the blocks read that a new sequence begins with and only the disk holds; true while it should wait for
    /// them.
    pub(super) fn reads<T>(&mut self, p: &mut Pending<T>) -> bool {
        let (Some(saved), Some(path)) = (&mut self.saved, &p.kv.path) else { return false };
        let wanted = &p.job.sequence[..p.reusable()];
        let (ids, tokens) = saved.index.ids(path.key.clone(), wanted);
        if tokens <= self.index.held(path.key.clone(), wanted) || saved.hangs() {
            return false;
        }
        // Each is asked for once: one that memory has no room for is computed.
        while let Some(id) = ids.get(p.asked) {
            if !self.index.contains(*id) && !saved.ask(*id) {
                return true;
            }
            p.asked += 1;
        }
        saved.reads(&ids)
    }

    /// Puts the blocks that were read into the index.
    pub(super) fn restore(&mut self, pool: &mut KvPool) {
        while let Some((place, numbers)) = self.saved.as_mut().and_then(Saved::arrived) {
            // Without room there is nothing to restore.
            if self.import(pool, &place, &numbers).is_ok_and(|held| held)
                && let Some(saved) = &mut self.saved
            {
                saved.restored += 1;
            }
        }
    }

    fn import(&mut self, pool: &mut KvPool, place: &Place, data: &[f32]) -> Result<bool, EngineError> {
        let tokens = place.tokens.len();
        let mut seq = pool.sequence();
        self.reserve(pool, &mut seq, 0, tokens)?;
        pool.append_imported(&mut seq, tokens, data)?;
        // Making room may have cost the block before it.
        if place.parent != place.root && !self.index.contains(place.parent) {
            return Ok(false);
        }
        Ok(self.index.put(place.parent, place.id, &place.tokens, || seq.hold(0)).is_some())
    }

    /// As [`KvPool::reserve_at`]; blocks that only the index holds make room. Where one block is missing still, it may
    /// be the copy of a block that the sequence shares with the index alone: then the index lets go of that one.
    pub(super) fn reserve(
        &mut self,
        pool: &mut KvPool,
        seq: &mut Sequence,
        from: usize,
        rows: usize,
    ) -> Result<(), EngineError> {
        loop {
            match pool.reserve_at(seq, from, rows) {
                Err(EngineError::PoolExhausted { needed, .. }) if self.makes_room(pool, seq, from, needed) => {}
                other => return other,
            }
        }
    }

    /// Gives up a block if that may leave `needed` ones.
    fn makes_room(&mut self, pool: &KvPool, seq: &Sequence, from: usize, needed: usize) -> bool {
        let available = pool.available_blocks();
        (needed <= available && self.index.evict())
            || (needed == available + 1 && self.index.let_go(|block| block.is_the_other_holder(seq, from)))
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
