use std::sync::Arc;

use proptest::prelude::*;
use tandem_proto::message::KvShape;

use super::*;

/// In use while there is a clone of it.
type Token = Arc<String>;

impl Held for Token {
    fn is_in_use(&self) -> bool {
        Arc::strong_count(self) > 1
    }
}

fn chain(tenant: u8) -> BlockChain {
    let shape = KvShape { layer_from: 0, layer_to: 2, width: 3, hidden: 0 };
    BlockChain::new([tenant; 32], Digest::of(b"model"), "numerics", &shape)
}

/// `a*40 b*3` is 40 tokens of one kind and three of another.
fn text(pattern: &str) -> Vec<u32> {
    let runs = pattern.split_whitespace().map(|run| run.split_once('*').expect("a run"));
    runs.flat_map(|(name, n)| std::iter::repeat_n(u32::from(name.as_bytes()[0]), n.parse().expect("a number")))
        .collect()
}

/// Publishes a whole sequence as its owner does; returns the blocks that the index has for it.
fn publish(index: &mut PrefixIndex<Token>, tenant: u8, tokens: &[u32]) -> Vec<Token> {
    let mut chain = chain(tenant);
    let mut own = Vec::new();
    for block in tokens.chunks(KV_BLOCK_TOKENS) {
        match index.publish(&mut chain, block, || Arc::new(format!("{tenant}: {block:?}"))) {
            Some(block) => own.push(block.clone()),
            None => break,
        }
    }
    own
}

fn held(index: &PrefixIndex<Token>, pattern: &str) -> usize {
    index.held(chain(1), &text(pattern))
}

#[test]
fn prefixes_are_found_token_by_token() {
    // (published, asked for, tokens held)
    let table: [(&[&str], &str, usize); 12] = [
        (&[], "a*10", 0),
        (&["a*10"], "a*10", 10),
        (&["a*10"], "a*9", 9),
        (&["a*10"], "a*9 b*1", 9),
        (&["a*10"], "b*10", 0),
        (&["a*70"], "a*70 b*5", 70),
        (&["a*70"], "a*50 b*50", 50),
        (&["a*64"], "a*32 b*1", 32),
        (&["a*40 b*5", "a*40 c*5", "a*40 d*5"], "a*40 c*9", 45),
        (&["a*40 b*5", "a*40 d*5"], "a*40 c*9", 40),
        (&["a*5 x*40", "a*9 x*40", "a*7 x*40"], "a*8 y*9", 8),
        (&["a*20 b*60", "a*30 b*60"], "a*30 b*60", 90),
    ];
    for (published, asked, expected) in table {
        let mut index = PrefixIndex::new(100);
        for pattern in published {
            publish(&mut index, 1, &text(pattern));
        }
        assert_eq!(held(&index, asked), expected, "{published:?} {asked}");
        let (asked, found) = (text(asked), index.find(chain(1), &text(asked), usize::MAX));
        assert_eq!((found.tokens, found.blocks.len()), (expected, expected.div_ceil(KV_BLOCK_TOKENS)));
        let mut after = chain(1);
        for block in asked.chunks_exact(KV_BLOCK_TOKENS).take(expected / KV_BLOCK_TOKENS) {
            after.push(block);
        }
        assert_eq!(found.chain.id(), after.id());
        assert_eq!(index.held(chain(2), &asked), 0, "another tenant finds nothing");
        assert_eq!(index.find(chain(1), &asked, 3).tokens, expected.min(3), "no more than asked for");
    }
}

#[test]
fn what_is_held_already_is_held_once() {
    let mut index = PrefixIndex::new(100);
    let first = publish(&mut index, 1, &text("a*70"));
    let again = publish(&mut index, 1, &text("a*70"));
    assert!(first.iter().zip(&again).all(|(a, b)| Arc::ptr_eq(a, b)));
    assert_eq!(index.len(), 3);
    // A partial block gives way to one that goes on, and is not put beside it.
    publish(&mut index, 1, &text("a*80"));
    assert_eq!((index.len(), held(&index, "a*90")), (3, 80));
    publish(&mut index, 1, &text("a*75"));
    assert_eq!((index.len(), held(&index, "a*90")), (3, 80));
    publish(&mut index, 1, &text("a*75 b*9"));
    assert_eq!((index.len(), index.evicted()), (4, 0));
}

/// Asks for `used` in this order, then gives one block up at a time.
#[test]
fn the_least_recently_used_block_goes_first_and_a_pinned_one_stays() {
    let table: [(&[&str], &[&str], &str, &str); 5] = [
        // (published, used, pinned, what is left after one eviction each)
        (&["a*9", "b*9", "c*9"], &[], "", "9 9 9 | 0 9 9 | 0 0 9 | 0 0 0"),
        (&["a*9", "b*9", "c*9"], &["a*9"], "", "9 9 9 | 9 0 9 | 9 0 0 | 0 0 0"),
        (&["a*9", "b*9", "c*9"], &[], "a*9", "9 9 9 | 9 0 9 | 9 0 0"),
        // From the end of a sequence, not from its middle.
        (&["a*80", "b*9"], &[], "", "80 9 | 64 9 | 32 9 | 0 9 | 0 0"),
        (&["a*70", "a*40 c*9"], &[], "a*40", "70 49 | 64 49 | 64 40"),
    ];
    for (published, used, pinned, expected) in table {
        let mut index = PrefixIndex::new(100);
        for pattern in published {
            publish(&mut index, 1, &text(pattern));
        }
        for pattern in used {
            index.find(chain(1), &text(pattern), usize::MAX);
        }
        let pin: Vec<Token> = index.find(chain(1), &text(pinned), usize::MAX).blocks.into_iter().cloned().collect();
        let mut states = Vec::new();
        loop {
            let state: Vec<String> = published.iter().map(|pattern| held(&index, pattern).to_string()).collect();
            states.push(state.join(" "));
            if !index.evict() {
                break;
            }
        }
        assert_eq!(states.join(" | "), expected, "{published:?} {used:?} {pinned}");
        drop(pin);
        while index.evict() {}
        assert_eq!((index.len(), index.leaves.len(), index.continued.len()), (0, 0, 0));
    }
}

#[test]
fn the_bound_holds_under_a_thousand_distinct_prefixes() {
    let mut index = PrefixIndex::new(50);
    for n in 0..1000_u32 {
        let tokens: Vec<u32> = (0..100).map(|i| n * 7 + i).collect();
        publish(&mut index, 1, &tokens);
        assert!(index.len() <= 50, "{}", index.len());
        assert_eq!(index.held(chain(1), &tokens), 100, "the newest is there");
    }
    assert_eq!((index.len(), index.evicted()), (50, 4 * 1000 - 50));
    // All of it in use: nothing goes, and nothing comes.
    let mut index = PrefixIndex::new(3);
    let pins = publish(&mut index, 1, &text("a*90"));
    assert!(publish(&mut index, 1, &text("b*90")).is_empty());
    assert_eq!((index.len(), held(&index, "a*90"), index.evicted()), (3, 90, 0));
    drop(pins);
    assert_eq!(publish(&mut index, 1, &text("b*90")).len(), 3);
    // No bound is too small, and none switches it off.
    assert_eq!(publish(&mut PrefixIndex::new(1), 1, &text("a*90")).len(), 1);
    assert_eq!(publish(&mut PrefixIndex::new(0), 1, &text("a*90")).len(), 0);
}

proptest! {
    /// Whatever is published, used, pinned and given up: what is found is the longest prefix there is of
    /// what the index holds, with blocks of these tokens; and the bound holds.
    #[test]
    fn what_is_found_is_what_was_published(
        ops in prop::collection::vec((0u8..4, prop::collection::vec((0u32..3, 1usize..40), 1..4), 1u8..3), 1..60)
    ) {
        let mut index = PrefixIndex::new(12);
        let mut pins: Vec<Vec<Token>> = Vec::new();
        for (op, runs, tenant) in ops {
            let tokens: Vec<u32> = runs.iter().flat_map(|(t, n)| std::iter::repeat_n(*t, *n)).collect();
            match op {
                0 => { publish(&mut index, tenant, &tokens); }
                1 => pins.push(publish(&mut index, tenant, &tokens)),
                2 => pins.truncate(pins.len() / 2),
                _ => { index.evict(); }
            }
            let found = index.find(chain(tenant), &tokens, usize::MAX);
            for (i, block) in found.blocks.iter().enumerate() {
                let n = (found.tokens - i * KV_BLOCK_TOKENS).min(KV_BLOCK_TOKENS);
                let wanted = format!("{tenant}: {:?}", &tokens[i * KV_BLOCK_TOKENS..][..n]);
                let shared = wanted.trim_end_matches(']');
                prop_assert!(block.starts_with(shared), "{block} for {wanted}");
            }
            prop_assert!(index.len() <= 12);
            prop_assert_eq!(index.len(), index.continued.len());
            let leaves = index.nodes.values().filter(|node| node.children == 0).count();
            prop_assert_eq!(leaves, index.leaves.len());
            for (id, node) in &index.nodes {
                prop_assert!(node.parent == chain(1).id() || node.parent == chain(2).id() || index.nodes.contains_key(&node.parent));
                prop_assert_eq!(node.children, index.nodes.values().filter(|child| child.parent == *id).count());
            }
        }
    }
}
