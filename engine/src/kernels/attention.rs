//! Attention over paged KV. Many queries share the cached rows of a block; every score and every
//! output number has its own chain of fused multiply-adds (along the head, and along the tokens in
//! order), so that its bits depend on no other query and on no cut of the prompt.

use super::Level;

/// Tokens of a block of keys.
pub(crate) const KEYS: usize = 16;

/// Pointers and sizes of a weighted sum, for the tiles of the vector levels.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[derive(Clone, Copy)]
pub(super) struct Sum {
    pub(super) weights: *const f32,
    pub(super) rows: *const f32,
    pub(super) out: *mut f32,
    pub(super) weight_stride: usize,
    pub(super) stride: usize,
    pub(super) n: usize,
    pub(super) dim: usize,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Sum {
    /// `sizes` as for [`add_weighted`].
    pub(super) fn new(weights: &[f32], rows: &[f32], sizes: [usize; 4], out: &mut [f32]) -> Self {
        let [weight_stride, stride, n, dim] = sizes;
        let (weights, rows, out) = (weights.as_ptr(), rows.as_ptr(), out.as_mut_ptr());
        Self { weights, rows, out, weight_stride, stride, n, dim }
    }

    /// The columns from `at` on, one by one.
    ///
    /// # Safety
    /// The pointers hold what [`add_weighted`] has checked, for this many outputs.
    #[inline(always)]
    pub(super) unsafe fn columns(self, at: usize, outputs: usize) {
        for j in 0..outputs {
            for t in 0..self.n {
                // SAFETY: the caller's.
                unsafe {
                    let w = *self.weights.add(j * self.weight_stride + t);
                    for i in at..self.dim {
                        let o = self.out.add(j * self.dim + i);
                        *o = w.mul_add(*self.rows.add(t * self.stride + i), *o);
                    }
                }
            }
        }
    }
}

/// Up to 16 keys of `dim` numbers, transposed: `[dim][16]`, missing keys zero.
#[derive(Default)]
pub(crate) struct KeyBlock {
    dim: usize,
    data: Vec<f32>,
}

impl KeyBlock {
    /// Takes the keys `rows[t·stride .. t·stride + dim]`, `t < n`.
    ///
    /// # Panics
    /// If there are more than 16, or `rows` is too short.
    pub(crate) fn fill(&mut self, level: Level, rows: &[f32], stride: usize, n: usize, dim: usize) {
        assert!((1..=KEYS).contains(&n) && (n - 1) * stride + dim <= rows.len(), "keys outside the cache");
        self.dim = dim;
        self.data.resize(dim * KEYS, 0.0);
        match level {
            Level::Portable => {
                for (i, line) in self.data.chunks_exact_mut(KEYS).enumerate() {
                    for (t, v) in line.iter_mut().enumerate() {
                        *v = if t < n { rows[t * stride + i] } else { 0.0 };
                    }
                }
            }
            // SAFETY: sizes checked above; the levels are made only on machines that have AVX2.
            #[cfg(target_arch = "x86_64")]
            _ => unsafe { super::attention_x86::transpose(rows, stride, n, dim, &mut self.data) },
            // SAFETY: sizes checked above.
            #[cfg(target_arch = "aarch64")]
            _ => unsafe { super::attention_neon::transpose(rows, stride, n, dim, &mut self.data) },
        }
    }
}

/// `out[j·out_stride + t] = scale · Σ_i queries[j][i] · keys[t][i]` for all queries `[.., dim]` and 16 keys.
///
/// # Panics
/// If `out` is too short.
pub(crate) fn scores(level: Level, queries: &[f32], keys: &KeyBlock, scale: f32, out: &mut [f32], out_stride: usize) {
    let dim = keys.dim;
    let n = queries.len() / dim;
    assert!(n > 0 && n * dim == queries.len() && (n - 1) * out_stride + KEYS <= out.len(), "scores do not fit");
    match level {
        Level::Portable => {
            for (j, q) in queries.chunks_exact(dim).enumerate() {
                let mut acc = [0.0f32; KEYS];
                for (q, k) in q.iter().zip(keys.data.chunks_exact(KEYS)) {
                    for (a, k) in acc.iter_mut().zip(k) {
                        *a = q.mul_add(*k, *a);
                    }
                }
                out[j * out_stride..j * out_stride + KEYS].copy_from_slice(&acc.map(|a| a * scale));
            }
        }
        // SAFETY: sizes checked above; the levels are made only on machines that have them.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { super::attention_x86::scores_avx2(queries, &keys.data, scale, out, out_stride) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { super::attention_x86::scores_avx512(queries, &keys.data, scale, out, out_stride) },
        // SAFETY: sizes checked above.
        #[cfg(target_arch = "aarch64")]
        Level::Neon | Level::NeonDot => unsafe {
            super::attention_neon::scores(queries, &keys.data, scale, out, out_stride);
        },
    }
}

/// `out[j] += Σ_t weights[j·weight_stride + t] · rows[t·stride .. t·stride + dim]` for `t < n` ascending
/// and all outputs `[.., dim]`.
///
/// # Panics
/// If a slice is too short.
pub(crate) fn add_weighted(
    level: Level,
    [weights, rows]: [&[f32]; 2],
    [weight_stride, stride, n, dim]: [usize; 4],
    out: &mut [f32],
) {
    let outputs = out.len() / dim;
    if n == 0 || outputs == 0 {
        return;
    }
    assert!((n - 1) * stride + dim <= rows.len() && outputs * dim == out.len(), "values outside the cache");
    assert!((outputs - 1) * weight_stride + n <= weights.len(), "too few weights");
    match level {
        Level::Portable => {
            for (j, out) in out.chunks_exact_mut(dim).enumerate() {
                for t in 0..n {
                    let w = weights[j * weight_stride + t];
                    for (o, v) in out.iter_mut().zip(&rows[t * stride..]) {
                        *o = w.mul_add(*v, *o);
                    }
                }
            }
        }
        // SAFETY: sizes checked above; the levels are made only on machines that have them.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe {
            super::attention_x86::add_weighted_avx2(weights, rows, [weight_stride, stride, n, dim], out);
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe {
            super::attention_x86::add_weighted_avx512(weights, rows, [weight_stride, stride, n, dim], out);
        },
        // SAFETY: sizes checked above.
        #[cfg(target_arch = "aarch64")]
        Level::Neon | Level::NeonDot => unsafe {
            super::attention_neon::add_weighted(weights, rows, [weight_stride, stride, n, dim], out);
        },
    }
}
