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
    /// Scale per block: max |x| / 127, rounded to f16.
    pub(super) d: Vec<f32>,
    /// `d · Σ q` per block, for the constant offset of Q4_0.
    pub(super) s: Vec<f32>,
    /// `max |x| / 127 · Σ q` per block, rounded to f16, for the minimum of Q4_1.
    pub(super) m: Vec<f32>,
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
        self.m.resize(x.len() / BLOCK, 0.0);
        quantize(level, x, &mut self.q, [&mut self.d, &mut self.s, &mut self.m]);
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

multiversion! {
    fn quantize(x: &[f32], q: &mut [i8], scales: [&mut [f32]; 3]) {
        // Adding 1.5·2^23 rounds to the nearest even integer and leaves it in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        let [d, s, m] = scales;
        for (b, (x, q)) in x.chunks_exact(BLOCK).zip(q.chunks_exact_mut(BLOCK)).enumerate() {
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
            let sum = sums.iter().sum::<i32>() as f32;
            let scale = top / 127.0;
            d[b] = round_f16(scale);
            s[b] = d[b] * sum;
            m[b] = round_f16(scale * sum);
        }
    }
}
