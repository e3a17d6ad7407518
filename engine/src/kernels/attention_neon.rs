//! The attention kernels as register tiles for NEON. See `attention` for what they compute.

use std::arch::aarch64::{
    float32x4_t, vdupq_n_f32, vfmaq_n_f32, vld1q_f32, vmulq_n_f32, vreinterpretq_f32_f64, vreinterpretq_f64_f32,
    vst1q_f32, vtrn1q_f32, vtrn1q_f64, vtrn2q_f32, vtrn2q_f64,
};

use super::attention::{KEYS, Sum};

/// Numbers of one register.
const QUAD: usize = 4;

/// Keys of `n ≤ 16` tokens as `[dim][16]`, the missing ones zero.
///
/// # Safety
/// `rows` holds `n` rows of `dim` numbers `stride` apart, `out` `16 · dim`.
pub(super) unsafe fn transpose(rows: &[f32], stride: usize, n: usize, dim: usize, out: &mut [f32]) {
    let (rows, out) = (rows.as_ptr(), out.as_mut_ptr());
    let full = dim / QUAD * QUAD;
    // SAFETY: rows t < n, columns below dim.
    unsafe {
        for first in (0..KEYS).step_by(QUAD) {
            for at in (0..full).step_by(QUAD) {
                let mut v = [vdupq_n_f32(0.0); QUAD];
                for t in 0..QUAD {
                    if first + t < n {
                        v[t] = vld1q_f32(rows.add((first + t) * stride + at));
                    }
                }
                let columns = transpose_4x4(v);
                for i in 0..QUAD {
                    vst1q_f32(out.add((at + i) * KEYS + first), columns[i]);
                }
            }
        }
        for i in full..dim {
            for t in 0..KEYS {
                *out.add(i * KEYS + t) = if t < n { *rows.add(t * stride + i) } else { 0.0 };
            }
        }
    }
}

#[inline(always)]
fn transpose_4x4(v: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // SAFETY: every aarch64 machine has NEON.
    unsafe {
        let [a, b, c, d] = v;
        let pairs = [vtrn1q_f32(a, b), vtrn2q_f32(a, b), vtrn1q_f32(c, d), vtrn2q_f32(c, d)];
        let p = pairs.map(|v| vreinterpretq_f64_f32(v));
        [vtrn1q_f64(p[0], p[2]), vtrn1q_f64(p[1], p[3]), vtrn2q_f64(p[0], p[2]), vtrn2q_f64(p[1], p[3])]
            .map(|v| vreinterpretq_f32_f64(v))
    }
}

/// # Safety
/// `keys` is `[dim][16]`, `queries` `[n, dim]`, `out` has `n` rows of `out_stride` with 16 numbers in the
/// last.
pub(super) unsafe fn scores(queries: &[f32], keys: &[f32], scale: f32, out: &mut [f32], out_stride: usize) {
    let dim = keys.len() / KEYS;
    let n = queries.len() / dim;
    let (q, k, o) = (queries.as_ptr(), keys.as_ptr(), out.as_mut_ptr());
    // SAFETY: rows j < n only.
    unsafe {
        tiles!(n, [6 4 3 2 1], |MR, j| score_tile::<MR>(j, q, k, dim, scale, o, out_stride));
    }
}

/// # Safety
/// As [`scores`], for the rows `j..j+MR`.
unsafe fn score_tile<const MR: usize>(
    j: usize,
    q: *const f32,
    k: *const f32,
    dim: usize,
    scale: f32,
    o: *mut f32,
    out_stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let q = q.add(j * dim);
        let mut acc = [[vdupq_n_f32(0.0); KEYS / QUAD]; MR];
        for i in 0..dim {
            let mut keys = [vdupq_n_f32(0.0); KEYS / QUAD];
            for h in 0..KEYS / QUAD {
                keys[h] = vld1q_f32(k.add(i * KEYS + h * QUAD));
            }
            for r in 0..MR {
                let x = *q.add(r * dim + i);
                for h in 0..KEYS / QUAD {
                    acc[r][h] = vfmaq_n_f32(acc[r][h], keys[h], x);
                }
            }
        }
        for r in 0..MR {
            for h in 0..KEYS / QUAD {
                vst1q_f32(o.add((j + r) * out_stride + h * QUAD), vmulq_n_f32(acc[r][h], scale));
            }
        }
    }
}

/// # Safety
/// The slices hold what `attention::add_weighted` has checked.
pub(super) unsafe fn add_weighted(weights: &[f32], rows: &[f32], sizes: [usize; 4], out: &mut [f32]) {
    let outputs = out.len() / sizes[3];
    let s = Sum::new(weights, rows, sizes, out);
    let mut at = 0;
    // SAFETY: columns at..at+16 or at..at+4 lie below dim, and single ones behind; rows j < outputs.
    unsafe {
        while at + 16 <= s.dim {
            tiles!(outputs, [6 4 3 2 1], |MR, j| sum_tile::<MR, 4>(j, s, at));
            at += 16;
        }
        while at + QUAD <= s.dim {
            tiles!(outputs, [8 4 2 1], |MR, j| sum_tile::<MR, 1>(j, s, at));
            at += QUAD;
        }
        s.columns(at, outputs);
    }
}

/// # Safety
/// As [`add_weighted`]: rows `j..j+MR`, columns `at..at+4C`.
#[inline(always)]
unsafe fn sum_tile<const MR: usize, const C: usize>(j: usize, s: Sum, at: usize) {
    // SAFETY: the caller's.
    unsafe {
        let out = s.out.add(j * s.dim + at);
        let weights = s.weights.add(j * s.weight_stride);
        let mut acc = [[vdupq_n_f32(0.0); C]; MR];
        for r in 0..MR {
            for c in 0..C {
                acc[r][c] = vld1q_f32(out.add(r * s.dim + c * QUAD));
            }
        }
        for t in 0..s.n {
            let row = s.rows.add(t * s.stride + at);
            let mut v = [vdupq_n_f32(0.0); C];
            for c in 0..C {
                v[c] = vld1q_f32(row.add(c * QUAD));
            }
            for r in 0..MR {
                let w = *weights.add(r * s.weight_stride + t);
                for c in 0..C {
                    acc[r][c] = vfmaq_n_f32(acc[r][c], v[c], w);
                }
            }
        }
        for r in 0..MR {
            for c in 0..C {
                vst1q_f32(out.add(r * s.dim + c * QUAD), acc[r][c]);
            }
        }
    }
}
