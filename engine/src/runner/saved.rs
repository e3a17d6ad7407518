//! Blocks of the prefix index on disk: which are to be written, and which are being read back. The engine's thread
//! copies blocks from and to the pools; files are the business of the store's own thread.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use tandem_proto::ids::Digest;
use tandem_proto::limits::KV_BLOCK_TOKENS;

use crate::kv::block_file::Place;
use crate::kv::block_store::{BlockStore, OnDisk};
use crate::kv::prefix::PrefixIndex;

/// Most texts whose blocks wait to be written; the oldest go first.
const TEXTS_MAX: usize = 64;
/// A disk that has given nothing for this long is not waited for.
const READ_WAIT_MAX: Duration = Duration::from_secs(2);

pub(super) struct Saved {
    pub(super) store: BlockStore,
    pub(super) index: PrefixIndex<OnDisk>,
    /// Texts whose blocks may not be on disk.
    pub(super) texts: VecDeque<Vec<u32>>,
    reading: HashSet<Digest>,
    /// When a read was last begun or ended.
    moved: Instant,
    /// Blocks that came back.
    pub(super) restored: u64,
    /// Blocks that were damaged or gone.
    pub(super) refused: u64,
}

impl Saved {
    pub(super) fn new(mut store: BlockStore) -> Self {
        let index = store.index();
        Self {
            store,
            index,
            texts: VecDeque::new(),
            reading: HashSet::new(),
            moved: Instant::now(),
            restored: 0,
            refused: 0,
        }
    }

    /// A text of which blocks may be written.
    pub(super) fn note(&mut self, text: &[u32]) {
        if text.is_empty() || !self.store.writes() {
            return;
        }
        // A conversation's earlier turns are part of it.
        self.texts.retain(|other| !text.starts_with(other));
        if self.texts.len() == TEXTS_MAX {
            self.texts.pop_front();
        }
        self.texts.push_back(text.to_vec());
    }

    /// The first block of `text` that is not on disk, if one is not.
    pub(super) fn missing(&mut self, text: &[u32]) -> Option<Place> {
        let key = self.store.key();
        let found = self.index.find(key.clone(), text, text.len());
        if found.tokens == text.len() {
            return None;
        }
        let tokens = text.chunks(KV_BLOCK_TOKENS).nth(found.tokens / KV_BLOCK_TOKENS)?;
        let mut chain = found.chain;
        let (root, parent) = (key.id(), chain.id());
        let id = chain.push(tokens);
        Some(Place { root, parent, id, tokens: tokens.to_vec() })
    }

    /// Has a block written; false if the bound leaves it no room.
    pub(super) fn write(&mut self, place: Place, numbers: Vec<f32>) -> bool {
        let Self { store, index, .. } = self;
        let mut fresh = false;
        let held = index.put(place.parent, place.id, &place.tokens, || {
            fresh = true;
            store.on_disk(place.tokens.len())
        });
        // Behind the removal of those that make room for it.
        if fresh {
            store.write(place, numbers);
        }
        held.is_some()
    }

    /// Has a block read; false if that must wait.
    pub(super) fn ask(&mut self, id: Digest) -> bool {
        if self.reading.contains(&id) {
            return true;
        }
        if self.reading.len() == BlockStore::READS_MAX {
            return false;
        }
        if let Some(place) = self.place(id) {
            self.store.read(place);
            self.reading.insert(id);
            self.moved = Instant::now();
        }
        true
    }

    fn place(&self, id: Digest) -> Option<Place> {
        let (parent, tokens) = self.index.place(id)?;
        Some(Place { root: self.store.key().id(), parent, id, tokens: tokens.to_vec() })
    }

    /// Whether one of these blocks is being read.
    pub(super) fn reads(&self, ids: &[Digest]) -> bool {
        ids.iter().any(|id| self.reading.contains(id))
    }

    /// Whether blocks are being read.
    pub(super) fn is_reading(&self) -> bool {
        !self.reading.is_empty()
    }

    /// Whether the disk is not worth waiting for.
    pub(super) fn hangs(&self) -> bool {
        self.is_reading() && self.moved.elapsed() > READ_WAIT_MAX
    }

    /// A block that was read, and its numbers.
    pub(super) fn arrived(&mut self) -> Option<(Place, Vec<f32>)> {
        loop {
            let (id, numbers) = self.store.arrived()?;
            self.reading.remove(&id);
            self.moved = Instant::now();
            match (self.place(id), numbers) {
                (Some(place), Some(numbers)) => return Some((place, numbers)),
                (_, Some(_)) => {}
                (_, None) => {
                    self.refused += 1;
                    // Its file goes with it, and those of what cannot be reached without it.
                    self.index.remove_branch(id);
                }
            }
        }
    }
}
