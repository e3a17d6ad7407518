//! Activations as the quantised kernels take them: i8 with one scale per 32 values, or per 256 for the
//! k-quants; made once per matrix product input and row, from that row alone.

use super::Level;
use super::lanes::multiversion;
use super::layout::{BLOCK, Grain, SUPER};
use super::pool::{Pieces, Pool};

/// Operations per value, next to which the pool judges whether threads pay.
const WORK_PER_VALUE: usize = 4;

/// Quantised rows `[rows, k]`; buffers are kept between calls.
#[derive(Default)]
pub(crate) struct Quantized {
    pub(super) k: usize,
    pub(super) rows: usize,
    pub(super) fine: Fine,
    pub(super) coarse: Coarse,
    /// Which of the two the last fill made.
    filled: [bool; 2],
}

/// One scale per 32 values.
#[derive(Default)]
pub(super) struct Fine {
    /// `round(x / d)`, within ±127; `[rows, k]`.
    pub(super) q: Vec<i8>,
    /// Per block: scale (max |x| / 127, rounded to f16) and `max |x| / 127 · Σ q`, rounded to f16, for
    /// weights with a minimum. `[rows][2][k/32]`.
    pub(super) scales: Vec<f32>,
    /// `−8 · Σ q` per block, for the offset of codes.
    pub(super) offsets: Vec<i32>,
}

/// One scale per 256 values.
#[derive(Default)]
pub(super) struct Coarse {
    /// `round(x / d)`, within ±127; `[rows, k]`.
    pub(super) q: Vec<i8>,
    /// `max |x| / 127` per 256 values.
    pub(super) scales: Vec<f32>,
    /// Per 256 values: Σ q of each 16 values, then of each 32.
    pub(super) sums: Vec<[i16; SUMS]>,
}

/// Sums per 256 values: 16 of 16 values, 8 of 32.
pub(super) const SUMS: usize = 24;

impl Quantized {
    /// Whether a product of this grain, width and number of rows can read these.
    pub(super) fn fits(&self, grain: Grain, k: usize, rows: usize) -> bool {
        let filled = match grain {
            Grain::None => true,
            Grain::Fine => self.fine.q.len() == self.rows * self.k && self.filled[0],
            Grain::Coarse => self.coarse.q.len() == self.rows * self.k && self.filled[1],
        };
        filled && self.k == k && rows <= self.rows
    }

    /// Quantises `x` = `[rows, k]` for matrices of the grains `grains`.
    ///
    /// # Panics
    /// If `k` does not fit the blocks or does not divide `x`.
    pub(crate) fn fill(&mut self, level: Level, pool: &mut Pool, x: &[f32], k: usize, grains: &[Grain]) {
        self.k = k;
        self.rows = x.len().checked_div(k).unwrap_or(0);
        self.filled = [grains.contains(&Grain::Fine), grains.contains(&Grain::Coarse)];
        if self.filled[0] {
            assert!(k.is_multiple_of(BLOCK) && x.len().is_multiple_of(k), "row length is not a multiple of 32");
            let (f, blocks) = (&mut self.fine, k / BLOCK);
            f.q.resize(x.len(), 0);
            f.scales.resize(x.len() / BLOCK * 2, 0.0);
            f.offsets.resize(x.len() / BLOCK, 0);
            let parts = (Pieces(&mut f.q, k), Pieces(&mut f.scales, 2 * blocks), Pieces(&mut f.offsets, blocks));
            pool.for_rows(self.rows, k * WORK_PER_VALUE, parts, |i, q, scales, offsets| {
                quantize_fine(level, &x[i * k..(i + 1) * k], q, scales, offsets);
            });
        }
        if self.filled[1] {
            assert!(k.is_multiple_of(SUPER) && x.len().is_multiple_of(k), "row length is not a multiple of 256");
            let (c, blocks) = (&mut self.coarse, k / SUPER);
            c.q.resize(x.len(), 0);
            c.scales.resize(x.len() / SUPER, 0.0);
            c.sums.resize(x.len() / SUPER, [0; SUMS]);
            let parts = (Pieces(&mut c.q, k), Pieces(&mut c.scales, blocks), Pieces(&mut c.sums, blocks));
            pool.for_rows(self.rows, k * WORK_PER_VALUE, parts, |i, q, scales, sums| {
                quantize_coarse(level, &x[i * k..(i + 1) * k], q, scales, sums);
            });
        }
    }
}

/// Rounds to the 11 significant bits of f16, ties to even, if f16 has the number as a normal one;
/// otherwise leaves it. llama.cpp keeps these scales as f16: the same rounding here makes its files
/// say the same text (the step it costs is a tenth of that of 8 bits).
#[inline(always)]
fn round_f16(x: f32) -> f32 {
    const DROPPED: u32 = 13;
    let size = x.abs();
    if !(6.104e-5..65_504.0).contains(&size) {
        return x;
    }
    let bits = x.to_bits();
    let half = (1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1);
    f32::from_bits(bits.wrapping_add(half) & !((1 << DROPPED) - 1))
}

/// Largest |x|. On bit patterns NaN is the largest, so it reaches the scale and then the output.
#[inline(always)]
fn top(x: &[f32]) -> f32 {
    let mut tops = [0u32; 16];
    for c in x.chunks_exact(16) {
        for (t, v) in tops.iter_mut().zip(c) {
            *t = (*t).max(v.to_bits() & 0x7fff_ffff);
        }
    }
    f32::from_bits(tops.iter().fold(0, |a, &b| a.max(b)))
}

/// Quantises with the given inverse scale; returns Σ q.
#[inline(always)]
fn round_all<const N: usize>(x: &[f32], inverse: f32, q: &mut [i8]) -> i32 {
    // Adding 1.5·2^23 rounds to the nearest even integer and leaves it in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let mut n = [0i32; N];
    for (n, x) in n.iter_mut().zip(x) {
        let v = (x * inverse + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()).cast_signed();
        // Only NaN and infinity leave ±127, and they spoil the scale anyway.
        *n = v.clamp(-127, 127);
    }
    for (q, n) in q.iter_mut().zip(&n) {
        *q = *n as i8;
    }
    n.iter().sum()
}

multiversion! {
    fn quantize_fine(x: &[f32], q: &mut [i8], scales: &mut [f32], offsets: &mut [i32]) {
        let (d, m) = scales.split_at_mut(x.len() / BLOCK);
        for (b, (x, q)) in x.chunks_exact(BLOCK).zip(q.chunks_exact_mut(BLOCK)).enumerate() {
            let top = top(x);
            let inverse = if top == 0.0 { 0.0 } else { 127.0 / top };
            let sum = round_all::<BLOCK>(x, inverse, q);
            let scale = top / 127.0;
            d[b] = round_f16(scale);
            m[b] = round_f16(scale * sum as f32);
            offsets[b] = -8 * sum;
        }
    }
}

multiversion! {
    fn quantize_coarse(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [[i16; SUMS]]) {
        for (b, (x, q)) in x.chunks_exact(SUPER).zip(q.chunks_exact_mut(SUPER)).enumerate() {
            let top = top(x);
            let inverse = if top == 0.0 { 0.0 } else { 127.0 / top };
            for (j, (x, q)) in x.chunks_exact(16).zip(q.chunks_exact_mut(16)).enumerate() {
                sums[b][j] = round_all::<16>(x, inverse, q) as i16;
            }
            for j in 0..8 {
                sums[b][16 + j] = sums[b][2 * j] + sums[b][2 * j + 1];
            }
            scales[b] = top / 127.0;
        }
    }
}
