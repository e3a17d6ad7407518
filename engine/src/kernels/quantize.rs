//! Activations as the quantised kernels take them: i8 with one scale per 32 values, made once per
//! matrix product input and row, from that row alone.

use super::Level;
use super::lanes::multiversion;
use super::packed::BLOCK;

/// Quantised rows `[rows, k]`; buffers are kept between calls.
#[derive(Default)]
pub(crate) struct Quantized {
    pub(super) k: usize,
    pub(super) rows: usize,
    /// `round(x / d)`, within ±127.
    pub(super) q: Vec<i8>,
    /// Scale per block: max |x| / 127.
    pub(super) d: Vec<f32>,
    /// `d · Σ q` per block, for the offset of the unsigned formats.
    pub(super) s: Vec<f32>,
}

impl Quantized {
    /// Quantises `x` = `[rows, k]`; `k` is a multiple of 32.
    ///
    /// # Panics
    /// If `k` is not a multiple of 32 or does not divide `x`.
    pub(crate) fn fill(&mut self, level: Level, x: &[f32], k: usize) {
        assert!(k > 0 && k.is_multiple_of(BLOCK) && x.len().is_multiple_of(k), "row length is not a multiple of 32");
        self.k = k;
        self.rows = x.len() / k;
        self.q.resize(x.len(), 0);
        self.d.resize(x.len() / BLOCK, 0.0);
        self.s.resize(x.len() / BLOCK, 0.0);
        quantize(level, x, &mut self.q, &mut self.d, &mut self.s);
    }
}

multiversion! {
    fn quantize(x: &[f32], q: &mut [i8], d: &mut [f32], s: &mut [f32]) {
        // Adding 1.5·2^23 rounds to the nearest even integer and leaves it in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        for (((x, q), d), s) in x.chunks_exact(BLOCK).zip(q.chunks_exact_mut(BLOCK)).zip(d).zip(s) {
            // On bit patterns NaN is the largest, so it reaches the scale and then the output.
            let mut tops = [0u32; 8];
            for c in x.chunks_exact(8) {
                for (t, v) in tops.iter_mut().zip(c) {
                    *t = (*t).max(v.to_bits() & 0x7fff_ffff);
                }
            }
            let top = f32::from_bits(tops.iter().fold(0, |a, &b| a.max(b)));
            let inverse = if top == 0.0 { 0.0 } else { 127.0 / top };
            let mut sums = [0i32; 8];
            for (c, q) in x.chunks_exact(8).zip(q.chunks_exact_mut(8)) {
                for i in 0..8 {
                    let n = (c[i] * inverse + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()).cast_signed();
                    // Only NaN and infinity leave ±127, and they spoil the scale anyway.
                    let n = n.clamp(-127, 127);
                    sums[i] += n;
                    q[i] = n as i8;
                }
            }
            *d = top / 127.0;
            *s = *d * sums.iter().sum::<i32>() as f32;
        }
    }
}
