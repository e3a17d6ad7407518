//! Causal attention of a ragged batch over paged KV, in tiles: the query heads that share a KV head,
//! times a few neighbouring rows of a sequence, read each block of keys and values once.

use std::cell::RefCell;
use std::ops::Range;

use tandem_proto::limits::KV_BLOCK_TOKENS;

use super::{Attend, LayerKv, Place};
use crate::kernels::attention::{self, KEYS, KeyBlock};
use crate::kernels::pool::Pool;
use crate::kernels::{Level, gates, lanes};

/// Most rows of a tile.
const ROWS_MAX: usize = 32;
/// Scores that a tile should keep at most, so that they stay in the second-level cache.
const SCORES_MAX: usize = 1 << 17;
/// Query heads of a tile whose KV head serves more.
const HEADS_MAX: usize = 16;

/// How the heads lie in queries and in cached rows.
pub(super) struct Heads<'a> {
    /// Query heads.
    pub(super) heads: usize,
    /// Query heads per KV head.
    pub(super) group: usize,
    /// Numbers of a key and of a value.
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    /// Where the values begin in a cached row; keys begin at 0.
    pub(super) values_at: usize,
    /// Scale, cap, window and sinks.
    pub(super) how: &'a Attend<'a>,
}

/// Rows and heads of one piece of work.
struct Tile {
    rows: Range<usize>,
    heads: Range<usize>,
}

#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    keys: KeyBlock,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Cuts the batch into tiles, those with the most tokens first.
fn tiles(h: &Heads<'_>, places: &[Place]) -> Vec<Tile> {
    let heads = h.group.min(HEADS_MAX);
    let mut tiles = Vec::new();
    let mut from = 0;
    while from < places.len() {
        let first = places[from];
        let rows_max = (SCORES_MAX / ((first.position + ROWS_MAX) * heads)).clamp(1, ROWS_MAX);
        let run = places[from..].iter().enumerate();
        let rows = run.take_while(|(i, p)| p.item == first.item && p.position == first.position + i).count();
        let rows = from..from + rows.min(rows_max);
        for kv_head in 0..h.heads / h.group {
            let group = kv_head * h.group..(kv_head + 1) * h.group;
            for start in group.clone().step_by(heads) {
                tiles.push(Tile { rows: rows.clone(), heads: start..(start + heads).min(group.end) });
            }
        }
        from = rows.end;
    }
    // Stable, so that equal tiles keep their order.
    tiles.sort_by_key(|t| std::cmp::Reverse(places[t.rows.start].position));
    tiles
}

/// `out[row][head] = softmax(scale · q · Kᵀ) · V` over the row's own past, for `q` = `[rows][heads][key_dim]`
/// and `out` = `[rows][heads][value_dim]`. `parts` is a buffer.
pub(super) fn attend(
    level: Level,
    pool: &mut Pool,
    h: &Heads<'_>,
    kv: &LayerKv<'_>,
    q: &[f32],
    parts: &mut Vec<f32>,
    out: &mut [f32],
) {
    let tiles = tiles(h, kv.places);
    let mut end = 0;
    let ends: Vec<usize> = tiles
        .iter()
        .map(|t| {
            end += t.rows.len() * t.heads.len() * h.value_dim;
            end
        })
        .collect();
    parts.clear();
    parts.resize(end, 0.0);
    let tokens: usize = kv.places.iter().map(|p| p.position + 1).sum();
    pool.for_parts(parts, &ends, tokens * h.heads * h.key_dim, &|i, part| tile(level, h, kv, q, &tiles[i], part));
    for (t, part) in tiles.iter().zip(ends.iter().scan(0, |from, &to| Some(std::mem::replace(from, to)))) {
        let width = t.heads.len() * h.value_dim;
        for (i, row) in t.rows.clone().enumerate() {
            let at = (row * h.heads + t.heads.start) * h.value_dim;
            out[at..at + width].copy_from_slice(&parts[part + i * width..][..width]);
        }
    }
}

/// One tile into `out` = `[rows][heads][value_dim]`, zeroed.
fn tile(level: Level, h: &Heads<'_>, kv: &LayerKv<'_>, q: &[f32], t: &Tile, out: &mut [f32]) {
    SCRATCH.with_borrow_mut(|s| {
        let Scratch { queries, keys, scores } = s;
        let heads = t.heads.len();
        queries.clear();
        for row in t.rows.clone() {
            let at = (row * h.heads + t.heads.start) * h.key_dim;
            queries.extend_from_slice(&q[at..at + heads * h.key_dim]);
        }
        let seen = |row: usize| {
            let position = kv.places[t.rows.start + row].position;
            h.how.first(position)..position + 1
        };
        let all = seen(0).start..seen(t.rows.len() - 1).end;
        let (item, stride) = (kv.places[t.rows.start].item, kv.pool.width());
        let kv_head = t.heads.start / h.group;
        let cached = |from: usize, n: usize, offset: usize, dim: usize| {
            let at = kv.pool.row_at(&kv.tables[item], kv.layer, from) + offset;
            &kv.pool.data()[at..at + (n - 1) * stride + dim]
        };
        // Rows of scores have room for the tail of a block of keys.
        let width = all.len() + KEYS;
        scores.resize(t.rows.len() * heads * width, 0.0);
        for block in blocks(all.clone(), KEYS) {
            let rows = cached(block.start, block.len(), kv_head * h.key_dim, h.key_dim);
            keys.fill(level, rows, stride, block.len(), h.key_dim);
            // Rows that see any of it are neighbours.
            let first = (0..t.rows.len()).find(|&r| seen(r).end > block.start).unwrap_or(t.rows.len());
            let last = (first..t.rows.len()).take_while(|&r| seen(r).start < block.end).last().map_or(first, |r| r + 1);
            if first < last {
                let at = first * heads * width + block.start - all.start;
                let queries = &queries[first * heads * h.key_dim..last * heads * h.key_dim];
                attention::scores(level, queries, keys, h.how.scale, &mut scores[at..], width);
            }
        }
        let mut inverse = Vec::with_capacity(t.rows.len() * heads);
        for (i, s) in scores.chunks_exact_mut(width).enumerate() {
            let seen = seen(i / heads);
            let (from, mut to) = (seen.start - all.start, seen.end - all.start);
            if let Some(cap) = h.how.softcap {
                gates::softcap(level, &mut s[from..to], cap);
            }
            if let Some(sinks) = h.how.sinks {
                // One more score, behind the row's last token, whose weight no value takes.
                s[to] = sinks[t.heads.start + i % heads];
                to += 1;
            }
            inverse.push(1.0 / lanes::exp_scores(level, &mut s[from..to]));
        }
        for block in blocks(all.clone(), KV_BLOCK_TOKENS) {
            let values = cached(block.start, block.len(), h.values_at + kv_head * h.value_dim, h.value_dim);
            // Neighbouring rows that see the same part of the block go together.
            let part = |r: usize| seen(r).start.max(block.start)..seen(r).end.min(block.end);
            let mut from = 0;
            while from < t.rows.len() {
                let tokens = part(from);
                let to = (from..t.rows.len()).take_while(|&r| part(r) == tokens).last().map_or(from, |r| r) + 1;
                if !tokens.is_empty() {
                    let weights = &scores[from * heads * width + tokens.start - all.start..];
                    let values = &values[(tokens.start - block.start) * stride..];
                    let out = &mut out[from * heads * h.value_dim..to * heads * h.value_dim];
                    attention::add_weighted(level, [weights, values], [width, stride, tokens.len(), h.value_dim], out);
                }
                from = to;
            }
        }
        for (o, inverse) in out.chunks_exact_mut(h.value_dim).zip(&inverse) {
            for v in o {
                *v *= inverse;
            }
        }
    });
}

/// The runs of `tokens` within blocks of `size`, which divides the pool's blocks.
fn blocks(tokens: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    (tokens.start / size..tokens.end.div_ceil(size))
        .map(move |b| (b * size).max(tokens.start)..((b + 1) * size).min(tokens.end))
}
