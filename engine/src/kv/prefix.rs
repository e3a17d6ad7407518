//! The prefix index: which blocks of KV state are held for which tokens. Pure: it knows no pool and no
//! model, a block is whatever the caller holds it by.
//!
//! A full block is found by its id in the hash chain of [`BlockChain`], which covers the tenant, the model,
//! the arithmetic and every token before it. What follows the last full block is found by its tokens: of
//! the blocks that continue the chain, the one that shares most of them, in part if need be. So a prefix is
//! found token by token, although blocks are held whole.
//!
//! Bounded in blocks. The least recently used block that no other one continues goes first; a block that a
//! sequence works with stays.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use tandem_proto::block::BlockChain;
use tandem_proto::ids::Digest;
use tandem_proto::limits::KV_BLOCK_TOKENS;

/// A block as the index holds it.
pub(crate) trait Held {
    /// Whether a sequence has it too: then it stays (it is pinned), as dropping it would free nothing.
    fn is_in_use(&self) -> bool;

    /// The index has given up its block `id`, for want of room or for one that holds more.
    fn given_up(self, _id: Digest)
    where
        Self: Sized,
    {
    }
}

#[derive(Debug)]
struct Node<B> {
    parent: Digest,
    tokens: Box<[u32]>,
    block: B,
    /// Blocks that continue this one.
    children: usize,
    used: u64,
}

/// What the index holds of a sequence.
#[derive(Debug)]
pub(crate) struct Found<'a, B> {
    /// The blocks from the start of the sequence; of the last one possibly a part.
    pub(crate) blocks: Vec<&'a B>,
    /// Tokens that they cover.
    pub(crate) tokens: usize,
    /// The chain after the blocks that are covered whole.
    pub(crate) chain: BlockChain,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct PrefixIndex<B> {
    nodes: HashMap<Digest, Node<B>>,
    /// The blocks that continue a chain, in the order of their tokens. Of two that continue the same one,
    /// neither begins with all the tokens of the other.
    continued: BTreeMap<(Digest, Box<[u32]>), Digest>,
    /// Blocks that no other one continues, the least recently used first.
    leaves: BTreeSet<(u64, Digest)>,
    blocks_max: usize,
    clock: u64,
    evicted: u64,
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

impl<B: Held> PrefixIndex<B> {
    /// An empty index of at most `blocks_max` blocks.
    pub(crate) fn new(blocks_max: usize) -> Self {
        Self {
            nodes: HashMap::new(),
            continued: BTreeMap::new(),
            leaves: BTreeSet::new(),
            blocks_max,
            clock: 0,
            evicted: 0,
        }
    }

    /// Blocks held.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Most blocks held.
    pub(crate) fn blocks_max(&self) -> usize {
        self.blocks_max
    }

    /// Blocks given up so far.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// What is held of the first `tokens_max` tokens of a sequence whose chain begins with `chain`. Counts
    /// as a use.
    pub(crate) fn find(&mut self, chain: BlockChain, tokens: &[u32], tokens_max: usize) -> Found<'_, B> {
        let (ids, tokens, chain) = self.walk(chain, &tokens[..tokens_max.min(tokens.len())]);
        self.clock += 1;
        for id in &ids {
            self.touch(*id);
        }
        let blocks = ids.iter().filter_map(|id| self.nodes.get(id)).map(|node| &node.block).collect();
        Found { blocks, tokens, chain }
    }

    /// How many of a sequence's first tokens are held. Counts as no use.
    pub(crate) fn held(&self, chain: BlockChain, tokens: &[u32]) -> usize {
        self.walk(chain, tokens).1
    }

    /// The ids of the blocks that hold them, and their number. Counts as no use.
    pub(crate) fn ids(&self, chain: BlockChain, tokens: &[u32]) -> (Vec<Digest>, usize) {
        let (ids, held, _) = self.walk(chain, tokens);
        (ids, held)
    }

    /// Whether the block is held.
    pub(crate) fn contains(&self, id: Digest) -> bool {
        self.nodes.contains_key(&id)
    }

    /// A block.
    pub(crate) fn get(&self, id: Digest) -> Option<&B> {
        self.nodes.get(&id).map(|node| &node.block)
    }

    /// The block before a block, and the block's tokens.
    pub(crate) fn place(&self, id: Digest) -> Option<(Digest, &[u32])> {
        self.nodes.get(&id).map(|node| (node.parent, &*node.tokens))
    }

    /// The blocks that hold the longest prefix of `tokens`, its length, and the chain after the whole ones.
    fn walk(&self, mut chain: BlockChain, tokens: &[u32]) -> (Vec<Digest>, usize, BlockChain) {
        let mut ids = Vec::new();
        let mut rest = tokens;
        while let Some(block) = rest.get(..KV_BLOCK_TOKENS) {
            let mut next = chain.clone();
            let id = next.push(block);
            if !self.nodes.contains_key(&id) {
                break;
            }
            ids.push(id);
            chain = next;
            rest = &rest[KV_BLOCK_TOKENS..];
        }
        let mut held = tokens.len() - rest.len();
        if let Some((id, shared)) = self.longest(chain.id(), rest) {
            ids.push(id);
            held += shared;
        }
        (ids, held, chain)
    }

    /// Of the blocks that continue `parent`, the one that shares most leading tokens with `rest`, if any
    /// shares one: in their order it is next to where `rest` itself would be.
    fn longest(&self, parent: Digest, rest: &[u32]) -> Option<(Digest, usize)> {
        let beside = self.beside(parent, &rest[..rest.len().min(KV_BLOCK_TOKENS)]).into_iter().flatten();
        let shared = beside.map(|(tokens, id)| (id, common(tokens, rest))).filter(|(_, shared)| *shared > 0);
        shared.max_by_key(|(_, shared)| *shared)
    }

    /// The last block not after `tokens`, and the first one after them, of those that continue `parent`.
    fn beside(&self, parent: Digest, tokens: &[u32]) -> [Option<(&[u32], Digest)>; 2] {
        let at = (parent, Box::from(tokens));
        let before = self.continued.range(..=&at).next_back();
        let after = self.continued.range((Bound::Excluded(&at), Bound::Unbounded)).next();
        [before, after].map(|found| found.filter(|(key, _)| key.0 == parent).map(|(key, id)| (&*key.1, *id)))
    }

    /// Puts the next block of a chain in, which holds the state of `tokens`, and moves the chain on. What
    /// is held of them already stays as it is, and `make` is not asked for the block. Returns the block in
    /// the index; none if there is no room.
    pub(crate) fn publish(&mut self, chain: &mut BlockChain, tokens: &[u32], make: impl FnOnce() -> B) -> Option<&B> {
        let parent = chain.id();
        let mut next = chain.clone();
        let id = next.push(tokens);
        let held = self.put(parent, id, tokens, make)?;
        if held == id {
            *chain = next;
        }
        self.get(held)
    }

    /// As [`Self::publish`] for the block `id` behind `parent`; returns the id of the block that holds the tokens.
    pub(crate) fn put(
        &mut self,
        parent: Digest,
        id: Digest,
        tokens: &[u32],
        make: impl FnOnce() -> B,
    ) -> Option<Digest> {
        self.clock += 1;
        if !self.nodes.contains_key(&id) {
            let [before, after] = self.beside(parent, tokens);
            if let Some((longer, id)) = after
                && longer.starts_with(tokens)
            {
                self.touch(id);
                return Some(id);
            }
            if let Some((shorter, id)) = before
                && tokens.starts_with(shorter)
            {
                self.remove(id);
            }
            let spare = |id: Digest, block: &B| id != parent && !block.is_in_use();
            if self.nodes.len() >= self.blocks_max && !self.evict_where(spare) {
                return None;
            }
            self.insert(id, parent, tokens, make());
        }
        self.touch(id);
        Some(id)
    }

    /// Evicts the least recently used block that no sequence has and no other block continues; false if
    /// there is none.
    pub(crate) fn evict(&mut self) -> bool {
        self.evict_where(|_, block| !block.is_in_use())
    }

    /// Drops a block that `is_it` names and no other one continues, though a sequence has it; false if
    /// there is none. That frees nothing, but the sequence that writes to the block needs no copy then.
    pub(crate) fn let_go(&mut self, is_it: impl Fn(&B) -> bool) -> bool {
        self.evict_where(|_, block| is_it(block))
    }

    /// Evicts the least recently used block that fits and that no other one continues; false if there is none.
    fn evict_where(&mut self, fits: impl Fn(Digest, &B) -> bool) -> bool {
        let found = |(_, id): &&(u64, Digest)| self.nodes.get(id).is_some_and(|node| fits(*id, &node.block));
        let Some(&(_, id)) = self.leaves.iter().find(found) else { return false };
        self.remove(id);
        self.evicted += 1;
        true
    }

    fn insert(&mut self, id: Digest, parent: Digest, tokens: &[u32], block: B) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            if node.children == 0 {
                self.leaves.remove(&(node.used, parent));
            }
            node.children += 1;
        }
        // Blocks may come in any order, as those from a folder do.
        let children = self.children(id).count();
        let used = self.clock;
        if children == 0 {
            self.leaves.insert((used, id));
        }
        self.continued.insert((parent, Box::from(tokens)), id);
        self.nodes.insert(id, Node { parent, tokens: Box::from(tokens), block, children, used });
    }

    fn children(&self, id: Digest) -> impl Iterator<Item = Digest> {
        let from = (id, Box::default());
        self.continued.range(from..).take_while(move |((parent, _), _)| *parent == id).map(|(_, child)| *child)
    }

    /// Gives up a block and all that continue it.
    pub(crate) fn remove_branch(&mut self, id: Digest) {
        let mut branch = vec![id];
        while let Some(id) = branch.pop() {
            branch.extend(self.children(id));
            self.remove(id);
        }
    }

    /// Takes a block out. Those that continue it are found again when it comes back.
    fn remove(&mut self, id: Digest) {
        let Some(node) = self.nodes.remove(&id) else { return };
        self.leaves.remove(&(node.used, id));
        self.continued.remove(&(node.parent, node.tokens));
        if let Some(parent) = self.nodes.get_mut(&node.parent) {
            parent.children -= 1;
            if parent.children == 0 {
                self.leaves.insert((parent.used, node.parent));
            }
        }
        node.block.given_up(id);
    }

    fn touch(&mut self, id: Digest) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.children == 0 {
            self.leaves.remove(&(node.used, id));
            self.leaves.insert((self.clock, id));
        }
        node.used = self.clock;
    }
}

#[cfg(test)]
mod tests;
