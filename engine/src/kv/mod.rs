//! Paged KV state. A [`KvPool`] holds the blocks of one layer range of one model; a [`Sequence`] is
//! a table of blocks and a length. Dropping a sequence returns its blocks; forks share them and
//! copy on write.

pub(crate) mod block_file;
pub(crate) mod block_store;
pub(crate) mod prefix;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tandem_proto::limits::KV_BLOCK_TOKENS;

use crate::error::EngineError;
use crate::kernels::arena::Numbers;

/// Largest pool, numbers (guards against absurd block counts).
pub const POOL_NUMBERS_MAX: usize = 1 << 36;

/// Most blocks of a pool.
pub const POOL_BLOCKS_MAX: usize = 1 << 24;

/// Who holds the blocks of a pool. Shared between the pool and its sequences.
#[derive(Debug)]
struct Ledger {
    /// Free blocks; the last is handed out next.
    free: Vec<u32>,
    /// Holders per block.
    holders: Vec<u32>,
    /// Whether a [`HeldBlock`] is one of them.
    held: Vec<bool>,
    /// Blocks whose only holder is a [`HeldBlock`].
    idle: usize,
}

impl Ledger {
    fn release(&mut self, block: u32) {
        let Some(n) = self.holders.get_mut(block as usize) else { return };
        *n -= 1;
        match *n {
            0 => self.free.push(block),
            1 if self.held[block as usize] => self.idle += 1,
            _ => {}
        }
    }

    fn share(&mut self, block: u32) {
        let n = &mut self.holders[block as usize];
        if *n == 1 && self.held[block as usize] {
            self.idle -= 1;
        }
        *n += 1;
    }

    fn take(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        self.holders[block as usize] = 1;
        Some(block)
    }
}

#[derive(Debug)]
struct Shared {
    ledger: Mutex<Ledger>,
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // The ledger is consistent between any two statements that could panic.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shape of the KV state of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers with state.
    pub layers: usize,
    /// Numbers per token and layer.
    pub width: usize,
}

/// Blocks of [`KV_BLOCK_TOKENS`] tokens for a fixed layer range. Numbers are f32; a block is laid
/// out `[layer][token][width]`.
#[derive(Debug)]
pub struct KvPool {
    layers: Range<usize>,
    width: usize,
    blocks: usize,
    data: Numbers,
    shared: Arc<Shared>,
}

impl KvPool {
    /// A pool of `blocks` blocks for the layers `layers` of a model with state of this layout.
    ///
    /// # Errors
    /// [`EngineError::WrongRange`] if the model lacks the layers, [`EngineError::Shape`] if the pool
    /// would be absurdly large.
    pub fn new(layout: KvLayout, layers: Range<usize>, blocks: usize) -> Result<Self, EngineError> {
        if layers.start > layers.end || layers.end > layout.layers {
            return Err(EngineError::WrongRange {
                range: layers,
                problem: format!("the model has {} layers", layout.layers),
            });
        }
        let width = layout.width;
        let numbers = (KV_BLOCK_TOKENS * width)
            .checked_mul(layers.len())
            .and_then(|n| n.checked_mul(blocks))
            .filter(|&n| n <= POOL_NUMBERS_MAX && blocks <= POOL_BLOCKS_MAX)
            .ok_or_else(|| EngineError::Shape(format!("a KV pool of {blocks} blocks is too large")))?;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        free.reverse();
        let ledger = Mutex::new(Ledger { free, holders: vec![0; blocks], held: vec![false; blocks], idle: 0 });
        let shared = Arc::new(Shared { ledger });
        let data = Numbers::zeroed(numbers)
            .map_err(|source| EngineError::Io { path: "memory for the KV pool".into(), source })?;
        Ok(Self { layers, width, blocks, data, shared })
    }

    /// The layers whose state the pool holds.
    #[must_use]
    pub fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    /// Numbers per token and layer.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Blocks of the pool.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Free blocks.
    #[must_use]
    pub fn free_blocks(&self) -> usize {
        self.shared.ledger().free.len()
    }

    /// Blocks that are free, or that only an index of prefixes holds.
    #[must_use]
    pub fn available_blocks(&self) -> usize {
        let ledger = self.shared.ledger();
        ledger.free.len() + ledger.idle
    }

    /// A sequence of `tokens` tokens whose state lies in `blocks`; they are copied before they are written.
    pub(crate) fn resume<'a>(&self, blocks: impl IntoIterator<Item = &'a HeldBlock>, tokens: usize) -> Sequence {
        let table: Vec<u32> = blocks.into_iter().map(|held| held.block).collect();
        debug_assert_eq!(table.len(), tokens.div_ceil(KV_BLOCK_TOKENS));
        let mut ledger = self.shared.ledger();
        table.iter().for_each(|&block| ledger.share(block));
        drop(ledger);
        Sequence { shared: Arc::clone(&self.shared), table, len: tokens }
    }

    /// An empty sequence of this pool.
    #[must_use]
    pub fn sequence(&self) -> Sequence {
        Sequence { shared: Arc::clone(&self.shared), table: Vec::new(), len: 0 }
    }

    /// Makes room for `rows` more tokens behind `seq`'s last, without changing its length. A block
    /// shared with a fork is copied first.
    ///
    /// # Errors
    /// [`EngineError::PoolExhausted`] (nothing is changed), [`EngineError::ForeignSequence`].
    pub fn reserve(&mut self, seq: &mut Sequence, rows: usize) -> Result<(), EngineError> {
        self.reserve_at(seq, seq.len, rows)
    }

    /// As [`KvPool::reserve`], for `rows` tokens from `from` on, some of which the sequence may have: layers of theirs
    /// are written later than others.
    pub(crate) fn reserve_at(&mut self, seq: &mut Sequence, from: usize, rows: usize) -> Result<(), EngineError> {
        self.own(seq)?;
        if rows == 0 {
            return Ok(());
        }
        let wanted = (from + rows).max(seq.len).div_ceil(KV_BLOCK_TOKENS);
        let first = from / KV_BLOCK_TOKENS;
        let mut copies = Vec::new();
        {
            let mut ledger = self.shared.ledger();
            // Every block from the first written one on must be ours alone.
            let shared: Vec<usize> =
                (first..seq.table.len()).filter(|&i| ledger.holders[seq.table[i] as usize] > 1).collect();
            let needed = wanted.saturating_sub(seq.table.len()) + shared.len();
            if needed > ledger.free.len() {
                return Err(EngineError::PoolExhausted { needed, free: ledger.free.len(), total: self.blocks });
            }
            for i in shared {
                let Some(fresh) = ledger.take() else { break };
                let old = std::mem::replace(&mut seq.table[i], fresh);
                copies.push((old, fresh));
                ledger.release(old);
            }
            while seq.table.len() < wanted {
                let Some(fresh) = ledger.take() else { break };
                seq.table.push(fresh);
            }
        }
        // The old blocks have other holders and this call has the pool exclusively, so their
        // contents are still what they were.
        let numbers = self.block_numbers();
        for (old, fresh) in copies {
            let from = old as usize * numbers;
            self.data.copy_within(from..from + numbers, fresh as usize * numbers);
        }
        Ok(())
    }

    /// Appends the state of `tokens` tokens, laid out `[layer][token][width]`, as made by
    /// [`KvPool::export_block`] or by a peer with the same model and numerics.
    ///
    /// # Errors
    /// [`EngineError::Shape`] if `data` has the wrong size, and as [`KvPool::reserve`].
    pub fn append_imported(&mut self, seq: &mut Sequence, tokens: usize, data: &[f32]) -> Result<(), EngineError> {
        let expected = tokens.checked_mul(self.width).and_then(|n| n.checked_mul(self.layers.len()));
        if expected != Some(data.len()) {
            return Err(EngineError::Shape(format!(
                "{tokens} tokens of KV state have {} numbers, {} were given",
                expected.unwrap_or(usize::MAX),
                data.len()
            )));
        }
        self.reserve(seq, tokens)?;
        if tokens == 0 || data.is_empty() {
            seq.len += tokens;
            return Ok(());
        }
        for (layer, rows) in data.chunks_exact(tokens * self.width).enumerate() {
            for (j, row) in rows.chunks_exact(self.width).enumerate() {
                let at = self.row_at(&seq.table, layer, seq.len + j);
                self.data[at..at + self.width].copy_from_slice(row);
            }
        }
        seq.len += tokens;
        Ok(())
    }

    /// Writes the state of the pool's first `taken` layers of the tokens `rows`, for which room was reserved. `blocks`
    /// are the payloads `[layer][token][width]` of `layers` layers, of all blocks up to the end of `rows`.
    ///
    /// # Errors
    /// [`EngineError::Shape`] if a payload has the wrong size; nothing is written then.
    pub(crate) fn import_layers(
        &mut self,
        seq: &Sequence,
        (taken, layers): (usize, usize),
        rows: Range<usize>,
        blocks: &[Vec<f32>],
    ) -> Result<(), EngineError> {
        self.own(seq)?;
        let tokens = |index: usize| rows.end.saturating_sub(index * KV_BLOCK_TOKENS).min(KV_BLOCK_TOKENS);
        let numbers = |index: usize| layers.checked_mul(tokens(index) * self.width);
        let count = rows.end.div_ceil(KV_BLOCK_TOKENS);
        if taken > layers || blocks.len() != count || (0..count).any(|i| Some(blocks[i].len()) != numbers(i)) {
            return Err(EngineError::Shape(format!(
                "{layers} layers of {} tokens announced, {} blocks of {} numbers given",
                rows.end,
                blocks.len(),
                blocks.iter().map(Vec::len).sum::<usize>()
            )));
        }
        for position in rows.clone() {
            let (index, row) = (position / KV_BLOCK_TOKENS, position % KV_BLOCK_TOKENS);
            for layer in 0..taken {
                let (from, to) = ((layer * tokens(index) + row) * self.width, self.row_at(&seq.table, layer, position));
                self.data[to..to + self.width].copy_from_slice(&blocks[index][from..from + self.width]);
            }
        }
        Ok(())
    }

    /// Copies block `index` of a sequence out, laid out `[layer][token][width]`; the last block has
    /// only the tokens the sequence has.
    ///
    /// # Errors
    /// [`EngineError::Shape`] if the sequence has no such block, [`EngineError::ForeignSequence`].
    pub fn export_block(&self, seq: &Sequence, index: usize) -> Result<Vec<f32>, EngineError> {
        self.own(seq)?;
        let from = index.saturating_mul(KV_BLOCK_TOKENS);
        if from >= seq.len {
            return Err(EngineError::Shape(format!("a sequence of {} tokens has no block {index}", seq.len)));
        }
        let tokens = (seq.len - from).min(KV_BLOCK_TOKENS);
        Ok(self.copied(seq, self.layers.len(), from..from + tokens))
    }

    /// Copies the state of the pool's first `layers` layers of `seq`'s first `tokens` tokens out, one payload
    /// `[layer][token][width]` per block.
    ///
    /// # Errors
    /// [`EngineError::Shape`] if there are no such layers or tokens, [`EngineError::ForeignSequence`].
    pub(crate) fn export_layers(
        &self,
        seq: &Sequence,
        layers: usize,
        tokens: usize,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        self.own(seq)?;
        if layers > self.layers.len() || tokens > seq.len {
            let (of, len) = (self.layers.len(), seq.len);
            return Err(EngineError::Shape(format!("{layers} layers of {tokens} tokens wanted of {of}, {len}")));
        }
        let starts = (0..tokens).step_by(KV_BLOCK_TOKENS);
        Ok(starts.map(|from| self.copied(seq, layers, from..tokens.min(from + KV_BLOCK_TOKENS))).collect())
    }

    /// The state of the tokens `rows`, which lie in one block.
    fn copied(&self, seq: &Sequence, layers: usize, rows: Range<usize>) -> Vec<f32> {
        let mut out = Vec::with_capacity(layers * rows.len() * self.width);
        for layer in 0..layers {
            let at = self.row_at(&seq.table, layer, rows.start);
            out.extend_from_slice(&self.data[at..at + rows.len() * self.width]);
        }
        out
    }

    pub(crate) fn own(&self, seq: &Sequence) -> Result<(), EngineError> {
        if Arc::ptr_eq(&self.shared, &seq.shared) { Ok(()) } else { Err(EngineError::ForeignSequence) }
    }

    fn block_numbers(&self) -> usize {
        self.layers.len() * KV_BLOCK_TOKENS * self.width
    }

    /// Index of the first number of a token's row; `layer` counts from the pool's first.
    pub(crate) fn row_at(&self, table: &[u32], layer: usize, position: usize) -> usize {
        let block = table[position / KV_BLOCK_TOKENS] as usize;
        block * self.block_numbers() + (layer * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS) * self.width
    }

    pub(crate) fn data(&self) -> &[f32] {
        &self.data
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

/// The tokens of one text whose state a pool holds.
#[derive(Debug)]
pub struct Sequence {
    shared: Arc<Shared>,
    table: Vec<u32>,
    len: usize,
}

impl Sequence {
    /// Tokens with state.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has state.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Blocks held.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.table.len()
    }

    /// Rolls back to the first `len` tokens; longer than the sequence changes nothing. Blocks behind
    /// the new end are returned.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        let keep = self.len.div_ceil(KV_BLOCK_TOKENS);
        if keep < self.table.len() {
            let mut ledger = self.shared.ledger();
            for block in self.table.drain(keep..) {
                ledger.release(block);
            }
        }
    }

    /// A sequence with the same tokens that shares the blocks (copy on write).
    #[must_use]
    pub fn fork(&self) -> Self {
        let table: Vec<u32> = self.table[..self.len.div_ceil(KV_BLOCK_TOKENS)].to_vec();
        let mut ledger = self.shared.ledger();
        table.iter().for_each(|&block| ledger.share(block));
        drop(ledger);
        Self { shared: Arc::clone(&self.shared), table, len: self.len }
    }

    /// Holds block `index`, which the sequence has, beyond its own life.
    pub(crate) fn hold(&self, index: usize) -> HeldBlock {
        let block = self.table[index];
        let mut ledger = self.shared.ledger();
        ledger.share(block);
        debug_assert!(!ledger.held[block as usize], "a block is held once");
        ledger.held[block as usize] = true;
        drop(ledger);
        HeldBlock { shared: Arc::clone(&self.shared), block }
    }

    /// Takes a block with the same numbers in place of its own block `index`.
    pub(crate) fn adopt(&mut self, index: usize, held: &HeldBlock) {
        let own = std::mem::replace(&mut self.table[index], held.block);
        if own != held.block {
            let mut ledger = self.shared.ledger();
            ledger.share(held.block);
            ledger.release(own);
        }
    }

    pub(crate) fn table(&self) -> &[u32] {
        &self.table
    }

    /// Counts rows that have just been written as part of the sequence.
    pub(crate) fn grow(&mut self, rows: usize) {
        self.len += rows;
        debug_assert!(self.table.len() * KV_BLOCK_TOKENS >= self.len);
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        let mut ledger = self.shared.ledger();
        for block in self.table.drain(..) {
            ledger.release(block);
        }
    }
}

/// A block of a pool that outlives the sequence that wrote it. Dropping it lets the block go.
#[derive(Debug)]
pub(crate) struct HeldBlock {
    shared: Arc<Shared>,
    block: u32,
}

impl HeldBlock {
    /// Whether this is the block in which `seq` has the row `position`, and no other sequence has it.
    pub(crate) fn is_the_other_holder(&self, seq: &Sequence, position: usize) -> bool {
        let block = seq.table.get(position / KV_BLOCK_TOKENS);
        Arc::ptr_eq(&self.shared, &seq.shared)
            && block == Some(&self.block)
            && self.shared.ledger().holders[self.block as usize] == 2
    }
}

impl prefix::Held for HeldBlock {
    fn is_in_use(&self) -> bool {
        self.shared.ledger().holders[self.block as usize] > 1
    }
}

impl Drop for HeldBlock {
    fn drop(&mut self) {
        let mut ledger = self.shared.ledger();
        ledger.held[self.block as usize] = false;
        if ledger.holders[self.block as usize] == 1 {
            ledger.idle -= 1;
        }
        ledger.release(self.block);
    }
}
