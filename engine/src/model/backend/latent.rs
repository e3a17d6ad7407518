//! Latent attention on own kernels.

use super::attend::{Heads, attend};
use super::cpu::{Cpu, Inner, quantized};
use super::{LatentWeights, LayerKv};
use crate::kernels::Level;
use crate::kernels::matmul::{Input, Job, matmul};
use crate::kernels::packed::Packed;
use crate::kernels::pool::Pool;
use crate::kernels::quantize::Quantized;

/// Rows of latent attention at a time: as queries and sums in the latent space they are many times wider.
pub(super) const LATENT_ROWS: usize = 64;

impl Cpu {
    /// Latent attention of some rows in the absorbed form: the queries go into the latent space, scores and sums
    /// are taken on the cached latents, and the value part brings the sums back. The same for prefill and decode.
    /// `q` is `[rows, heads, q_dim]`, `out` is `[rows, heads, v_dim]`.
    pub(super) fn absorbed(
        &mut self,
        w: &LatentWeights<Self>,
        h: &Heads<'_>,
        kv: &LayerKv<'_>,
        (q, q_dim): (&[f32], usize),
        (out, v_dim): (&mut [f32], usize),
    ) {
        let (rows, heads, width, kv_rank) = (kv.places.len(), h.heads, h.key_dim, h.value_dim);
        let nope_dim = q_dim - (width - kv_rank);
        let (level, pool) = (self.level, &mut self.pool);
        let Inner { x: inputs, gate: outputs, up: queries, down: sums, parts, shared: common, .. } = &mut self.inner;
        // Rows lie in heads for the products, heads in rows for attention.
        inputs.resize(heads * rows * nope_dim, 0.0);
        exchange(pool, (q, q_dim), [heads, rows], (inputs, nope_dim));
        per_head(level, pool, &w.keys, inputs, common, outputs);
        let up = &*outputs;
        queries.resize(rows * heads * width, 0.0);
        pool.for_pieces(queries, width, width, &|i, query| {
            let from = (i % heads * rows + i / heads) * kv_rank;
            query[..kv_rank].copy_from_slice(&up[from..from + kv_rank]);
            query[kv_rank..].copy_from_slice(&q[i * q_dim + nope_dim..(i + 1) * q_dim]);
        });
        sums.resize(rows * heads * kv_rank, 0.0);
        attend(level, pool, h, kv, queries, parts, sums);
        inputs.resize(heads * rows * kv_rank, 0.0);
        exchange(pool, (sums, kv_rank), [heads, rows], (inputs, kv_rank));
        per_head(level, pool, &w.values, inputs, common, outputs);
        exchange(pool, (outputs, v_dim), [rows, heads], (out, v_dim));
    }
}

/// Rows of heads into heads of rows, or back: the first `width` numbers of each piece of
/// `x [inner, outer, x_width]`, as `out [outer, inner, width]`.
fn exchange(
    pool: &mut Pool,
    (x, x_width): (&[f32], usize),
    [outer, inner]: [usize; 2],
    (out, width): (&mut [f32], usize),
) {
    pool.for_pieces(out, width, width, &|i, piece| {
        let from = (i % inner * outer + i / inner) * x_width;
        piece.copy_from_slice(&x[from..from + width]);
    });
}

/// A product per head: `x [heads, rows, k]` with the head's matrix `[n, k]`, into `out [heads, rows, n]`.
fn per_head(level: Level, pool: &mut Pool, w: &[Packed], x: &[f32], buffer: &mut Quantized, out: &mut Vec<f32>) {
    let Some(Packed { n, k, .. }) = w.first() else { return };
    let rows = x.len() / (w.len() * k);
    let quantized = quantized(level, pool, w.iter(), x, buffer);
    out.resize(w.len() * rows * n, 0.0);
    let pieces = x.chunks_exact(rows * k).zip(out.chunks_exact_mut(rows * n));
    let mut jobs: Vec<Job<'_>> = pieces
        .zip(w)
        .enumerate()
        .map(|(head, ((x, out), weights))| {
            let quantized = quantized.map(|(rows_of_all, _)| (rows_of_all, head * rows));
            Job { input: Input { x, quantized }, weights, out }
        })
        .collect();
    matmul(level, pool, &mut jobs);
}
