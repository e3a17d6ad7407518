use proptest::prelude::*;
use tandem_proto::limits::KV_BLOCK_TOKENS;

use super::{KvLayout, KvPool, Sequence};
use crate::error::EngineError;

const LAYERS: usize = 2;
const WIDTH: usize = 3;

fn pool(blocks: usize) -> KvPool {
    KvPool::new(KvLayout { layers: 1 + LAYERS, width: WIDTH }, 1..1 + LAYERS, blocks).expect("pool")
}

/// State of `tokens` tokens of a text named `name`, from position `from` on.
fn state(name: usize, from: usize, tokens: usize) -> Vec<f32> {
    (0..LAYERS)
        .flat_map(|l| (from..from + tokens).map(move |t| (l, t)))
        .flat_map(|(l, t)| (0..WIDTH).map(move |w| (name * 1_000_000 + t * 100 + l * 10 + w) as f32))
        .collect()
}

fn append(pool: &mut KvPool, seq: &mut Sequence, name: usize, tokens: usize) -> Result<(), EngineError> {
    let data = state(name, seq.len(), tokens);
    pool.append_imported(seq, tokens, &data)
}

#[test]
fn blocks_come_and_go() {
    let mut p = pool(4);
    let mut a = p.sequence();
    append(&mut p, &mut a, 1, KV_BLOCK_TOKENS + 1).expect("room");
    assert_eq!((a.len(), a.blocks(), p.free_blocks()), (KV_BLOCK_TOKENS + 1, 2, 2));
    let mut b = p.sequence();
    let e = append(&mut p, &mut b, 2, 3 * KV_BLOCK_TOKENS);
    assert!(matches!(e, Err(EngineError::PoolExhausted { needed: 3, free: 2, total: 4 })), "{e:?}");
    assert_eq!((b.len(), b.blocks(), p.free_blocks()), (0, 0, 2));
    a.truncate(KV_BLOCK_TOKENS);
    assert_eq!((a.blocks(), p.free_blocks()), (1, 3));
    a.truncate(1000);
    assert_eq!(a.len(), KV_BLOCK_TOKENS);
    drop(a);
    assert_eq!(p.free_blocks(), 4);
}

#[test]
fn forks_copy_on_write() {
    let mut p = pool(6);
    let mut a = p.sequence();
    append(&mut p, &mut a, 1, KV_BLOCK_TOKENS + 5).expect("room");
    let mut b = a.fork();
    assert_eq!(p.free_blocks(), 4, "a fork takes no block");
    append(&mut p, &mut b, 2, 4).expect("room");
    assert_eq!(p.free_blocks(), 3, "only the written block is copied");
    append(&mut p, &mut a, 1, 4).expect("room");
    assert_eq!(p.free_blocks(), 3, "the original is alone with its block again");
    assert_eq!(p.export_block(&a, 0).expect("block"), p.export_block(&b, 0).expect("block"));
    let (a1, b1) = (p.export_block(&a, 1).expect("block"), p.export_block(&b, 1).expect("block"));
    assert_eq!(a1, state(1, KV_BLOCK_TOKENS, 9));
    assert_eq!(&b1[..5 * WIDTH], &a1[..5 * WIDTH]);
    assert_eq!(&b1[5 * WIDTH..9 * WIDTH], &state(2, KV_BLOCK_TOKENS + 5, 4)[..4 * WIDTH]);
    drop(a);
    drop(b);
    assert_eq!(p.free_blocks(), 6);
}

#[test]
fn wrong_use_is_refused() {
    let (mut p, other) = (pool(2), pool(2));
    let mut foreign = other.sequence();
    assert!(matches!(p.reserve(&mut foreign, 1), Err(EngineError::ForeignSequence)));
    let mut a = p.sequence();
    assert!(matches!(p.append_imported(&mut a, 2, &[0.0; 5]), Err(EngineError::Shape(_))));
    assert!(matches!(p.append_imported(&mut a, usize::MAX, &[]), Err(EngineError::Shape(_))));
    assert!(matches!(p.export_block(&a, 0), Err(EngineError::Shape(_))));
    assert!(matches!(p.import_layers(&a, (1, 1), 0..1, &[vec![0.0; WIDTH + 1]]), Err(EngineError::Shape(_))));
    assert!(matches!(p.export_layers(&a, LAYERS, 1), Err(EngineError::Shape(_))));
    let pool = |layers, width, blocks| KvPool::new(KvLayout { layers, width }, 0..layers, blocks);
    assert!(matches!(pool(1, 1, usize::MAX), Err(EngineError::Shape(_))));
    assert!(matches!(pool(200, 1 << 20, 1 << 24), Err(EngineError::Shape(_))));
}

/// Layers of rows that a sequence has are written later than others, and another holder of the block keeps its own.
#[test]
fn leading_layers_of_a_sequence_come_and_go_by_themselves() {
    let (tokens, from) = (KV_BLOCK_TOKENS + 7, 20);
    let mut p = pool(6);
    let mut a = p.sequence();
    append(&mut p, &mut a, 1, tokens).expect("room");
    let b = a.fork();
    let other = state(2, 0, tokens);
    let first_layer = |state: &[f32], all: usize| state[..all * WIDTH].to_vec();
    let blocks =
        [first_layer(&state(2, 0, KV_BLOCK_TOKENS), KV_BLOCK_TOKENS), first_layer(&state(2, KV_BLOCK_TOKENS, 7), 7)];
    p.reserve_at(&mut a, from, tokens - from).expect("room");
    assert_eq!((a.len(), p.free_blocks()), (tokens, 2), "both blocks are copied");
    let short = p.import_layers(&a, (1, LAYERS), from..tokens, &blocks);
    assert!(matches!(short, Err(EngineError::Shape(_))), "{short:?}");
    p.import_layers(&a, (1, 1), from..tokens, &blocks).expect("fits");
    let (mine, whole) = (p.export_layers(&a, LAYERS, tokens).expect("there"), state(1, 0, tokens));
    for position in 0..tokens {
        let (block, row) = (position / KV_BLOCK_TOKENS, position % KV_BLOCK_TOKENS);
        for layer in 0..LAYERS {
            let of = if layer == 0 && position >= from { &other } else { &whole };
            let wanted = &of[(layer * tokens + position) * WIDTH..][..WIDTH];
            let all = mine[block].len() / WIDTH / LAYERS;
            assert_eq!(&mine[block][(layer * all + row) * WIDTH..][..WIDTH], wanted, "{layer} {position}");
        }
    }
    // Of a payload of more layers, the first ones.
    let mut c = b.fork();
    p.reserve_at(&mut c, from, tokens - from).expect("room");
    let both = [state(2, 0, KV_BLOCK_TOKENS), state(2, KV_BLOCK_TOKENS, 7)];
    p.import_layers(&c, (1, LAYERS), from..tokens, &both).expect("fits");
    assert_eq!(p.export_layers(&c, LAYERS, tokens).expect("there"), mine);
    let theirs = p.export_layers(&b, 1, from).expect("there");
    assert_eq!(theirs, [first_layer(&state(1, 0, from), from)]);
}

proptest! {
    /// Any order of appending, rolling back, forking and dropping: every sequence reads what was
    /// written to it, and no block is lost or held twice.
    #[test]
    fn any_order_of_operations(ops in prop::collection::vec((0usize..5, 0usize..4, 0usize..80), 1..60)) {
        let mut p = pool(24);
        // Per sequence: its name per token, as forks continue under a new name.
        let mut live: Vec<(Sequence, Vec<usize>)> = Vec::new();
        for (i, (op, which, n)) in ops.into_iter().enumerate() {
            if op == 0 || live.is_empty() {
                live.push((p.sequence(), Vec::new()));
                continue;
            }
            let at = which % live.len();
            match op {
                1 | 2 => {
                    let (seq, names) = &mut live[at];
                    if append(&mut p, seq, i, n).is_ok() {
                        names.extend(std::iter::repeat_n(i, n));
                    }
                }
                3 => {
                    let (seq, names) = &mut live[at];
                    seq.truncate(n);
                    names.truncate(n);
                }
                _ if n < 40 => {
                    let fork = (live[at].0.fork(), live[at].1.clone());
                    live.push(fork);
                }
                _ => drop(live.swap_remove(at)),
            }
            for (seq, names) in &live {
                prop_assert_eq!(seq.len(), names.len());
                for block in 0..seq.len().div_ceil(KV_BLOCK_TOKENS) {
                    let data = p.export_block(seq, block).expect("block");
                    let from = block * KV_BLOCK_TOKENS;
                    let tokens = (names.len() - from).min(KV_BLOCK_TOKENS);
                    for (j, &name) in names[from..from + tokens].iter().enumerate() {
                        let expected = state(name, from + j, 1);
                        for l in 0..LAYERS {
                            prop_assert_eq!(&data[(l * tokens + j) * WIDTH..][..WIDTH], &expected[l * WIDTH..][..WIDTH]);
                        }
                    }
                }
            }
        }
        drop(live);
        prop_assert_eq!(p.free_blocks(), 24);
    }
}
