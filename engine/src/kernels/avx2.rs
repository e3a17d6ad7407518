//! Matrix products with AVX2, FMA and F16C: register tiles of a few rows by one or more panels.
//! The tile shape never changes an output's own chain of operations (see `portable`).

use std::arch::x86_64::{
    __m256, __m256i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32,
    _mm256_and_si256, _mm256_broadcast_ss, _mm256_castsi256_ps, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32,
    _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_load_si256, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_sign_epi8, _mm256_slli_epi32, _mm256_srli_epi16, _mm256_storeu_ps,
};

use super::matmul::Task;
use super::packed::{BLOCK, FLOAT_PANEL, Kind, QUANT_PANEL};

/// How far ahead of a single-row pass the weights are prefetched, bytes.
const PREFETCH_Q4: usize = 4096;
const PREFETCH_Q8: usize = 1024;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;
const Q8_0: u8 = 3;
const Q4_0: u8 = 4;
const Q4_1: u8 = 5;

/// Computes the panels `from..to` of a task for all its rows.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; `task` was checked by `matmul`; no one else touches the
/// columns of these panels.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_panels(task: &Task<'_>, from: usize, to: usize) {
    // SAFETY: the contract is this function's own.
    unsafe {
        match task.w.kind {
            Kind::F32 => float_panels::<F32>(task, from, to),
            Kind::F16 => float_panels::<F16>(task, from, to),
            Kind::Bf16 => float_panels::<BF16>(task, from, to),
            Kind::Q8_0 => quant_panels::<Q8_0>(task, from, to),
            Kind::Q4_0 => quant_panels::<Q4_0>(task, from, to),
            Kind::Q4_1 => quant_panels::<Q4_1>(task, from, to),
        }
    }
}

/// # Safety
/// As [`run_panels`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_panels<const T: u8>(task: &Task<'_>, from: usize, to: usize) {
    // SAFETY: row and panel ranges stay inside the task; see `run_panels`.
    unsafe {
        if task.rows == 1 {
            let mut p = from;
            while p + 4 <= to {
                float_tile::<1, 4, T>(task, p, 0);
                p += 4;
            }
            while p < to {
                float_tile::<1, 1, T>(task, p, 0);
                p += 1;
            }
            return;
        }
        for p in from..to {
            let mut r = 0;
            while r + 6 <= task.rows {
                float_tile::<6, 1, T>(task, p, r);
                r += 6;
            }
            match task.rows - r {
                1 => float_tile::<1, 1, T>(task, p, r),
                2 => float_tile::<2, 1, T>(task, p, r),
                3 => float_tile::<3, 1, T>(task, p, r),
                4 => float_tile::<4, 1, T>(task, p, r),
                5 => float_tile::<5, 1, T>(task, p, r),
                _ => {}
            }
        }
    }
}

/// # Safety
/// `p` points at 8 numbers of kind `T`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn load8<const T: u8>(p: *const u8) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        match T {
            F32 => _mm256_loadu_ps(p.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))),
        }
    }
}

/// Rows `r..r+MR` by panels `p..p+P`.
///
/// # Safety
/// As [`run_panels`]; rows and panels lie inside the task.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_tile<const MR: usize, const P: usize, const T: u8>(task: &Task<'_>, p: usize, r: usize) {
    let w = task.w;
    let k = w.k;
    let bytes = if T == F32 { 4 } else { 2 };
    let panel_bytes = k * FLOAT_PANEL * bytes;
    // SAFETY: panels p..p+P hold k·16 numbers each, rows r..r+MR hold k numbers each.
    unsafe {
        let wp = w.data.bytes().as_ptr().add(p * panel_bytes);
        let xp = task.x.as_ptr().add(r * k);
        let mut acc = [[[_mm256_setzero_ps(); 2]; P]; MR];
        for i in 0..k {
            let mut x = [_mm256_setzero_ps(); MR];
            for j in 0..MR {
                x[j] = _mm256_broadcast_ss(&*xp.add(j * k + i));
            }
            for q in 0..P {
                let at = wp.add(q * panel_bytes + i * FLOAT_PANEL * bytes);
                let lo = load8::<T>(at);
                let hi = load8::<T>(at.add(8 * bytes));
                for j in 0..MR {
                    acc[j][q][0] = _mm256_fmadd_ps(x[j], lo, acc[j][q][0]);
                    acc[j][q][1] = _mm256_fmadd_ps(x[j], hi, acc[j][q][1]);
                }
            }
        }
        for j in 0..MR {
            for q in 0..P {
                let col = (p + q) * FLOAT_PANEL;
                store(acc[j][q][0], task.out.add((r + j) * w.n + col), (w.n - col).min(8));
                if w.n - col > 8 {
                    store(acc[j][q][1], task.out.add((r + j) * w.n + col + 8), (w.n - col - 8).min(8));
                }
            }
        }
    }
}

/// # Safety
/// `out` is valid for `valid ≤ 8` writes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store(v: __m256, out: *mut f32, valid: usize) {
    // SAFETY: the caller's; the copy takes at most 8 numbers of the array.
    unsafe {
        if valid == 8 {
            _mm256_storeu_ps(out, v);
        } else {
            let mut t = [0.0f32; 8];
            _mm256_storeu_ps(t.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(t.as_ptr(), out, valid);
        }
    }
}

/// # Safety
/// As [`run_panels`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quant_panels<const T: u8>(task: &Task<'_>, from: usize, to: usize) {
    // SAFETY: row and panel ranges stay inside the task; see `run_panels`.
    unsafe {
        for p in from..to {
            let mut r = 0;
            while r + 6 <= task.rows {
                quant_tile::<6, T>(task, p, r);
                r += 6;
            }
            match task.rows - r {
                1 => quant_tile::<1, T>(task, p, r),
                2 => quant_tile::<2, T>(task, p, r),
                3 => quant_tile::<3, T>(task, p, r),
                4 => quant_tile::<4, T>(task, p, r),
                5 => quant_tile::<5, T>(task, p, r),
                _ => {}
            }
        }
    }
}

/// Four neighbouring i8 activations in every 32-bit lane.
///
/// # Safety
/// `p` is valid for reading four bytes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn broadcast4(p: *const i8) -> __m256i {
    // SAFETY: the caller's; the intrinsic has no alignment demand beyond the four bytes.
    unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
}

/// Rows `r..r+MR` by panel `p`.
///
/// # Safety
/// As [`run_panels`]; rows and panel lie inside the task, which has quantised input.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quant_tile<const MR: usize, const T: u8>(task: &Task<'_>, p: usize, r: usize) {
    let w = task.w;
    let Some(a) = task.quantized else { return };
    let sums_of = if T == Q4_1 { &a.m } else { &a.s };
    let blocks = w.steps();
    let step = if T == Q8_0 { BLOCK * QUANT_PANEL } else { BLOCK / 2 * QUANT_PANEL };
    let scales = if T == Q4_1 { 2 * QUANT_PANEL } else { QUANT_PANEL };
    // SAFETY: the panel holds `blocks` steps of numbers and scales, the rows `blocks` blocks of
    // quantised input. Prefetching past the end of a buffer has no effect but a lost slot.
    unsafe {
        let qp = w.data.bytes().as_ptr().add(p * blocks * step);
        let dp = w.scales.bytes().as_ptr().cast::<u16>().add(p * blocks * scales);
        let nibble = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        let mut acc = [_mm256_setzero_ps(); MR];
        for b in 0..blocks {
            let q = qp.add(b * step);
            let ap = a.q.as_ptr().add((task.first + r) * w.k + b * BLOCK);
            let mut sums = [_mm256_setzero_si256(); MR];
            if T == Q8_0 {
                if MR == 1 {
                    for i in 0..4 {
                        _mm_prefetch::<_MM_HINT_T0>(q.wrapping_add(PREFETCH_Q8 + i * 64).cast());
                    }
                }
                for g in 0..8 {
                    let v = _mm256_load_si256(q.add(g * 32).cast());
                    let magnitude = _mm256_abs_epi8(v);
                    for j in 0..MR {
                        let x = broadcast4(ap.add(j * w.k + g * 4));
                        // |w| ≤ 128 and |x| ≤ 127: a pair sums to at most 32 512, no saturation.
                        let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, v));
                        sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(pairs, ones));
                    }
                }
            } else {
                if MR == 1 {
                    for i in 0..2 {
                        _mm_prefetch::<_MM_HINT_T0>(q.wrapping_add(PREFETCH_Q4 + i * 64).cast());
                    }
                }
                for g in 0..4 {
                    let v = _mm256_load_si256(q.add(g * 32).cast());
                    let lo = _mm256_and_si256(v, nibble);
                    let hi = _mm256_and_si256(_mm256_srli_epi16::<4>(v), nibble);
                    for j in 0..MR {
                        let x = ap.add(j * w.k + g * 4);
                        // Eight pairs of at most 15·127·2 each stay below 2^15.
                        sums[j] = _mm256_add_epi16(sums[j], _mm256_maddubs_epi16(lo, broadcast4(x)));
                        sums[j] = _mm256_add_epi16(sums[j], _mm256_maddubs_epi16(hi, broadcast4(x.add(16))));
                    }
                }
                for s in &mut sums {
                    *s = _mm256_madd_epi16(*s, ones);
                }
            }
            let d = _mm256_cvtph_ps(_mm_loadu_si128(dp.add(b * scales).cast()));
            let offset = match T {
                Q4_0 => _mm256_mul_ps(d, _mm256_set1_ps(-8.0)),
                Q4_1 => _mm256_cvtph_ps(_mm_loadu_si128(dp.add(b * scales + QUANT_PANEL).cast())),
                _ => d,
            };
            for j in 0..MR {
                let at = (task.first + r + j) * blocks + b;
                let da = _mm256_broadcast_ss(&*a.d.as_ptr().add(at));
                acc[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[j]), _mm256_mul_ps(d, da), acc[j]);
                if T != Q8_0 {
                    acc[j] = _mm256_fmadd_ps(offset, _mm256_broadcast_ss(&*sums_of.as_ptr().add(at)), acc[j]);
                }
            }
        }
        let col = p * QUANT_PANEL;
        for j in 0..MR {
            store(acc[j], task.out.add((r + j) * w.n + col), (w.n - col).min(8));
        }
    }
}
