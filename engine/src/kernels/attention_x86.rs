//! The attention kernels as register tiles for AVX2 and AVX-512. See `attention` for what they compute.

use std::arch::x86_64::{
    __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_permute2f128_ps, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_storeu_ps,
};

use super::attention::{KEYS, Sum};

/// Keys of `n ≤ 16` tokens as `[dim][16]`, the missing ones zero.
///
/// # Safety
/// The machine has AVX2; `rows` holds `n` rows of `dim` numbers `stride` apart, `out` `16 · dim`.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn transpose(rows: &[f32], stride: usize, n: usize, dim: usize, out: &mut [f32]) {
    let (rows, out) = (rows.as_ptr(), out.as_mut_ptr());
    let full = dim / 8 * 8;
    // SAFETY: rows t < n, columns below dim.
    unsafe {
        for half in 0..2 {
            for at in (0..full).step_by(8) {
                let mut v = [_mm256_setzero_ps(); 8];
                for t in 0..8 {
                    if half * 8 + t < n {
                        v[t] = _mm256_loadu_ps(rows.add((half * 8 + t) * stride + at));
                    }
                }
                let columns = transpose_8x8(v);
                for i in 0..8 {
                    _mm256_storeu_ps(out.add((at + i) * KEYS + half * 8), columns[i]);
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

#[target_feature(enable = "avx2")]
#[inline]
fn transpose_8x8(v: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = v;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    let mut fours = v;
    for i in 0..2 {
        let p = &pairs[4 * i..4 * i + 4];
        fours[4 * i] = _mm256_shuffle_ps::<0x44>(p[0], p[2]);
        fours[4 * i + 1] = _mm256_shuffle_ps::<0xee>(p[0], p[2]);
        fours[4 * i + 2] = _mm256_shuffle_ps::<0x44>(p[1], p[3]);
        fours[4 * i + 3] = _mm256_shuffle_ps::<0xee>(p[1], p[3]);
    }
    let mut out = v;
    for i in 0..4 {
        out[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        out[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
    }
    out
}

/// # Safety
/// The machine has AVX-512 F; `keys` is `[dim][16]`, `queries` `[n, dim]`, `out` has `n` rows of
/// `out_stride` with 16 numbers in the last.
#[target_feature(enable = "avx512f,avx2,fma")]
pub(super) unsafe fn scores_avx512(queries: &[f32], keys: &[f32], scale: f32, out: &mut [f32], out_stride: usize) {
    let dim = keys.len() / KEYS;
    let n = queries.len() / dim;
    let (q, k, o) = (queries.as_ptr(), keys.as_ptr(), out.as_mut_ptr());
    // SAFETY: rows j < n only.
    unsafe {
        tiles!(n, [12 8 4 2 1], |MR, j| score_tile_512::<MR>(j, q, k, dim, scale, o, out_stride));
    }
}

/// # Safety
/// As [`scores_avx512`], for the rows `j..j+MR`.
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn score_tile_512<const MR: usize>(
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
        let mut acc = [_mm512_setzero_ps(); MR];
        for i in 0..dim {
            let key = _mm512_loadu_ps(k.add(i * KEYS));
            for r in 0..MR {
                acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(*q.add(r * dim + i)), key, acc[r]);
            }
        }
        for r in 0..MR {
            _mm512_storeu_ps(o.add((j + r) * out_stride), _mm512_mul_ps(acc[r], _mm512_set1_ps(scale)));
        }
    }
}

/// # Safety
/// As [`scores_avx512`] with AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn scores_avx2(queries: &[f32], keys: &[f32], scale: f32, out: &mut [f32], out_stride: usize) {
    let dim = keys.len() / KEYS;
    let n = queries.len() / dim;
    let (q, k, o) = (queries.as_ptr(), keys.as_ptr(), out.as_mut_ptr());
    // SAFETY: rows j < n only.
    unsafe {
        tiles!(n, [6 3 1], |MR, j| score_tile_256::<MR>(j, q, k, dim, scale, o, out_stride));
    }
}

/// # Safety
/// As [`scores_avx2`], for the rows `j..j+MR`.
#[target_feature(enable = "avx2,fma")]
unsafe fn score_tile_256<const MR: usize>(
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
        let mut acc = [[_mm256_setzero_ps(); 2]; MR];
        for i in 0..dim {
            let keys = [_mm256_loadu_ps(k.add(i * KEYS)), _mm256_loadu_ps(k.add(i * KEYS + 8))];
            for r in 0..MR {
                let x = _mm256_set1_ps(*q.add(r * dim + i));
                for h in 0..2 {
                    acc[r][h] = _mm256_fmadd_ps(x, keys[h], acc[r][h]);
                }
            }
        }
        for r in 0..MR {
            for h in 0..2 {
                let v = _mm256_mul_ps(acc[r][h], _mm256_set1_ps(scale));
                _mm256_storeu_ps(o.add((j + r) * out_stride + 8 * h), v);
            }
        }
    }
}

/// # Safety
/// The machine has AVX-512 F; the slices hold what `attention::add_weighted` has checked.
#[target_feature(enable = "avx512f,avx2,fma")]
pub(super) unsafe fn add_weighted_avx512(weights: &[f32], rows: &[f32], sizes: [usize; 4], out: &mut [f32]) {
    let outputs = out.len() / sizes[3];
    let s = Sum::new(weights, rows, sizes, out);
    let mut at = 0;
    // SAFETY: columns at..at+64, or the masked rest, lie below dim; rows j < outputs only.
    unsafe {
        while at + 64 <= s.dim {
            tiles!(outputs, [6 4 3 2 1], |MR, j| sum_tile_512x4::<MR>(j, s, at));
            at += 64;
        }
        while at < s.dim {
            let mask = (0xffff_u32 >> (16 - (s.dim - at).min(16))) as u16;
            tiles!(outputs, [8 4 2 1], |MR, j| sum_tile_512x1::<MR>(j, s, at, mask));
            at += 16;
        }
    }
}

/// # Safety
/// As [`add_weighted_avx512`]: rows `j..j+MR`, columns `at..at+64`.
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn sum_tile_512x4<const MR: usize>(j: usize, s: Sum, at: usize) {
    // SAFETY: the caller's.
    unsafe {
        let out = s.out.add(j * s.dim + at);
        let weights = s.weights.add(j * s.weight_stride);
        let mut acc: [[__m512; 4]; MR] = [[_mm512_setzero_ps(); 4]; MR];
        for r in 0..MR {
            for c in 0..4 {
                acc[r][c] = _mm512_loadu_ps(out.add(r * s.dim + 16 * c));
            }
        }
        for t in 0..s.n {
            let row = s.rows.add(t * s.stride + at);
            let mut v = [_mm512_setzero_ps(); 4];
            for c in 0..4 {
                v[c] = _mm512_loadu_ps(row.add(16 * c));
            }
            for r in 0..MR {
                let w = _mm512_set1_ps(*weights.add(r * s.weight_stride + t));
                for c in 0..4 {
                    acc[r][c] = _mm512_fmadd_ps(w, v[c], acc[r][c]);
                }
            }
        }
        for r in 0..MR {
            for c in 0..4 {
                _mm512_storeu_ps(out.add(r * s.dim + 16 * c), acc[r][c]);
            }
        }
    }
}

/// # Safety
/// As [`add_weighted_avx512`]: rows `j..j+MR`, the columns of the mask from `at` on.
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn sum_tile_512x1<const MR: usize>(j: usize, s: Sum, at: usize, mask: u16) {
    // SAFETY: the caller's; masked lanes are neither read nor written.
    unsafe {
        let out = s.out.add(j * s.dim + at);
        let weights = s.weights.add(j * s.weight_stride);
        let mut acc = [_mm512_setzero_ps(); MR];
        for r in 0..MR {
            acc[r] = _mm512_maskz_loadu_ps(mask, out.add(r * s.dim));
        }
        for t in 0..s.n {
            let v = _mm512_maskz_loadu_ps(mask, s.rows.add(t * s.stride + at));
            for r in 0..MR {
                acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(*weights.add(r * s.weight_stride + t)), v, acc[r]);
            }
        }
        for r in 0..MR {
            _mm512_mask_storeu_ps(out.add(r * s.dim), mask, acc[r]);
        }
    }
}

/// # Safety
/// As [`add_weighted_avx512`] with AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn add_weighted_avx2(weights: &[f32], rows: &[f32], sizes: [usize; 4], out: &mut [f32]) {
    let outputs = out.len() / sizes[3];
    let s = Sum::new(weights, rows, sizes, out);
    let mut at = 0;
    // SAFETY: columns at..at+32 or at..at+8 lie below dim, and single ones behind; rows j < outputs.
    unsafe {
        while at + 32 <= s.dim {
            tiles!(outputs, [2 1], |MR, j| sum_tile_256::<MR, 4>(j, s, at));
            at += 32;
        }
        while at + 8 <= s.dim {
            tiles!(outputs, [6 3 1], |MR, j| sum_tile_256::<MR, 1>(j, s, at));
            at += 8;
        }
        s.columns(at, outputs);
    }
}

/// # Safety
/// As [`add_weighted_avx2`]: rows `j..j+MR`, columns `at..at+8C`.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn sum_tile_256<const MR: usize, const C: usize>(j: usize, s: Sum, at: usize) {
    // SAFETY: the caller's.
    unsafe {
        let out = s.out.add(j * s.dim + at);
        let weights = s.weights.add(j * s.weight_stride);
        let mut acc: [[__m256; C]; MR] = [[_mm256_setzero_ps(); C]; MR];
        for r in 0..MR {
            for c in 0..C {
                acc[r][c] = _mm256_loadu_ps(out.add(r * s.dim + 8 * c));
            }
        }
        for t in 0..s.n {
            let row = s.rows.add(t * s.stride + at);
            for c in 0..C {
                let v = _mm256_loadu_ps(row.add(8 * c));
                for r in 0..MR {
                    let w = _mm256_set1_ps(*weights.add(r * s.weight_stride + t));
                    acc[r][c] = _mm256_fmadd_ps(w, v, acc[r][c]);
                }
            }
        }
        for r in 0..MR {
            for c in 0..C {
                _mm256_storeu_ps(out.add(r * s.dim + 8 * c), acc[r][c]);
            }
        }
    }
}
