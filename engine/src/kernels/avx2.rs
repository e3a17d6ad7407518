//! Matrix products with AVX2, FMA and F16C: register tiles of a few rows by half a panel or more.
//! The tile shape never changes an output's own chain of operations (see `portable`).

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T0, _mm_cvtsi32_si128, _mm_loadu_si128, _mm_prefetch, _mm256_abs_epi8,
    _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_broadcastsi128_si256, _mm256_castsi256_ps,
    _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
    _mm256_fmadd_ps, _mm256_load_si256, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps,
    _mm256_mullo_epi32, _mm256_or_si256, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_sign_epi8, _mm256_sll_epi16,
    _mm256_slli_epi32, _mm256_srai_epi32, _mm256_srl_epi16, _mm256_srli_epi16, _mm256_storeu_ps, _mm256_sub_epi32,
    _mm256_xor_si256,
};

use super::layout::{BLOCK, FP4_CODES, Format, Grain, Kind, PANEL, PLANE, SUPER, with_format};
use super::matmul::Task;
use super::quantize::Quantized;

/// How far ahead of a single-row pass the codes are prefetched, bytes.
const PREFETCH: usize = 4096;
/// Outputs of half a panel: one register.
const HALF: usize = PANEL / 2;

/// Computes the panels `from..to` of a task for all its rows.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; `task` was checked by `matmul`; no one else touches the
/// columns of these panels.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_panels(task: &Task<'_>, from: usize, to: usize) {
    // SAFETY: the contract is this function's own; row and panel ranges stay inside the task.
    unsafe { with_format!(task.w.kind, F => panels::<F>(task, from, to)) }
}

/// # Safety
/// As [`run_panels`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn panels<F: Format>(task: &Task<'_>, from: usize, to: usize) {
    // SAFETY: row and panel ranges stay inside the task; see `run_panels`.
    unsafe {
        if const { matches!(F::KIND, Kind::Bf12) } {
            // No kernel of its own, see `Level::narrows`.
            return super::portable::run_panels(task, from, to);
        }
        if const { matches!(F::KIND.grain(), Grain::None) } {
            let mut p = from;
            if task.rows == 1 {
                while p + 4 <= to {
                    float_tile::<1, 4, F>(task, p, 0);
                    p += 4;
                }
            }
            for p in p..to {
                tiles!(task.rows, [6 5 4 3 2 1], |MR, r| float_tile::<MR, 1, F>(task, p, r));
            }
            return;
        }
        for p in from..to {
            // Formats that need more registers take fewer rows at once.
            if const { groups_max(F::KIND) == 8 && matches!(F::KIND.grain(), Grain::Fine) } {
                tiles!(task.rows, [6 4 3 2 1], |MR, r| quant_tile::<MR, F>(task, p, r));
            } else {
                tiles!(task.rows, [4 3 2 1], |MR, r| quant_tile::<MR, F>(task, p, r));
            }
        }
    }
}

/// # Safety
/// `p` points at 8 numbers of the format.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn load8<F: Format>(p: *const u8) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        match F::KIND {
            Kind::F32 => _mm256_loadu_ps(p.cast()),
            Kind::F16 => halves(p),
            _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))),
        }
    }
}

/// Rows `r..r+MR` by panels `p..p+P`.
///
/// # Safety
/// As [`run_panels`]; rows and panels lie inside the task.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_tile<const MR: usize, const P: usize, F: Format>(task: &Task<'_>, p: usize, r: usize) {
    let w = task.w;
    let k = w.k;
    let step = F::KIND.code_bytes();
    let panel_bytes = w.panel_codes();
    // SAFETY: panels p..p+P hold k·16 numbers each, rows r..r+MR hold k numbers each.
    unsafe {
        let wp = w.codes.bytes().as_ptr().add(p * panel_bytes);
        let xp = task.x.as_ptr().add(r * k);
        let mut acc = [[[_mm256_setzero_ps(); 2]; P]; MR];
        for i in 0..k {
            let mut x = [_mm256_setzero_ps(); MR];
            for j in 0..MR {
                x[j] = _mm256_set1_ps(*xp.add(j * k + i));
            }
            for q in 0..P {
                let at = wp.add(q * panel_bytes + i * step);
                for h in 0..2 {
                    let v = load8::<F>(at.add(h * step / 2));
                    for j in 0..MR {
                        acc[j][q][h] = _mm256_fmadd_ps(x[j], v, acc[j][q][h]);
                    }
                }
            }
        }
        for j in 0..MR {
            for q in 0..P {
                for h in 0..2 {
                    store(task, r + j, (p + q) * PANEL + h * HALF, acc[j][q][h]);
                }
            }
        }
    }
}

/// Writes eight outputs, fewer behind the last column.
///
/// # Safety
/// The row lies inside the task, whose columns from `col` on are the caller's.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store(task: &Task<'_>, row: usize, col: usize, v: __m256) {
    let valid = task.w.n.saturating_sub(col).min(HALF);
    // SAFETY: the caller's; the copy takes at most 8 numbers of the array.
    unsafe {
        let out = task.out.wrapping_add(row * task.w.n + col);
        if valid == HALF {
            _mm256_storeu_ps(out, v);
        } else {
            let mut t = [0.0f32; HALF];
            _mm256_storeu_ps(t.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(t.as_ptr(), out, valid);
        }
    }
}

/// # Safety
/// As [`run_panels`]; rows and panel lie inside the task.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn quant_tile<const MR: usize, F: Format>(task: &Task<'_>, p: usize, r: usize) {
    let Some(a) = task.quantized else { return };
    // SAFETY: the caller's; the input is quantised at the grain of the format.
    unsafe {
        for half in 0..2 {
            let acc = if const { matches!(F::KIND.grain(), Grain::Fine) } {
                fine_tile::<MR, F>(task, a, p, half, r)
            } else {
                coarse_tile::<MR, F>(task, a, p, half, r)
            };
            for j in 0..MR {
                store(task, r + j, p * PANEL + half * HALF, acc[j]);
            }
        }
    }
}

/// Groups of four products that 16-bit sums hold.
const fn groups_max(kind: Kind) -> usize {
    match kind {
        // |w| ≤ 128: a pair sums to at most 32 512.
        Kind::Q8_0 => 1,
        // 4 · 2·31·127 < 2^15.
        Kind::Q5_0 | Kind::Q5_1 | Kind::Q5K | Kind::Fp4 => 4,
        // 2 · 2·63·127 < 2^15.
        Kind::Q6K => 2,
        // 8 · 2·15·127 < 2^15.
        _ => 8,
    }
}

/// Shifts 16-bit lanes left (right if negative); the caller masks what crosses bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn shifted(v: __m256i, left: i32) -> __m256i {
    if left >= 0 { _mm256_sll_epi16(v, _mm_cvtsi32_si128(left)) } else { _mm256_srl_epi16(v, _mm_cvtsi32_si128(-left)) }
}

/// Group `g` of the codes of eight rows (see `layout`).
///
/// # Safety
/// `q` points at these rows in the first plane of a block, 32-byte aligned.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn codes<F: Format>(q: *const u8, g: usize) -> __m256i {
    // SAFETY: every plane read is one that the kind has; the table is sixteen bytes.
    unsafe {
        let plane = |i: usize| _mm256_load_si256(q.add(i * PLANE).cast());
        let (half, pair) = (g / 4, g as i32 % 4);
        let low = match F::KIND {
            Kind::Q8_0 => return plane(g),
            Kind::Q2K | Kind::Q3K => _mm256_and_si256(shifted(plane(half), -2 * pair), _mm256_set1_epi8(3)),
            _ => _mm256_and_si256(shifted(plane(g % 4), -4 * half as i32), _mm256_set1_epi8(15)),
        };
        let high = match F::KIND {
            Kind::Q5_0 | Kind::Q5_1 | Kind::Q5K => {
                _mm256_and_si256(shifted(plane(4), 4 - g as i32), _mm256_set1_epi8(1 << 4))
            }
            Kind::Q3K => _mm256_and_si256(shifted(plane(2), 2 - g as i32), _mm256_set1_epi8(1 << 2)),
            Kind::Q6K => _mm256_and_si256(shifted(plane(4 + half), 4 - 2 * pair), _mm256_set1_epi8(3 << 4)),
            Kind::Fp4 => {
                let codes = _mm256_broadcastsi128_si256(_mm_loadu_si128(FP4_CODES.as_ptr().cast()));
                return _mm256_shuffle_epi8(codes, low);
            }
            _ => return low,
        };
        _mm256_or_si256(low, high)
    }
}

/// Four neighbouring i8 activations (or two i16 sums) in every 32-bit lane.
///
/// # Safety
/// `p` is valid for reading four bytes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn broadcast4<T>(p: *const T) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
}

/// # Safety
/// `p` points at 8 f16.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn halves(p: *const u8) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
}

/// Adds `Σ code · x` of the groups `from..to` to `sums`.
///
/// # Safety
/// `q` as for [`codes`]; `x` points at 32 activations, and so does `x + j·k` for `j < MR`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn dot<const MR: usize, F: Format>(
    q: *const u8,
    x: *const i8,
    k: usize,
    groups: std::ops::Range<usize>,
    sums: &mut [__m256i; MR],
) {
    let ones = _mm256_set1_epi16(1);
    // SAFETY: the caller's.
    unsafe {
        let mut pairs = [_mm256_setzero_si256(); MR];
        for g in groups {
            let c = codes::<F>(q, g);
            if F::KIND == Kind::Q8_0 {
                let w = _mm256_xor_si256(c, _mm256_set1_epi8(-128));
                let magnitude = _mm256_abs_epi8(w);
                for j in 0..MR {
                    let signed = _mm256_sign_epi8(broadcast4(x.add(j * k + 4 * g)), w);
                    let t = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed), ones);
                    sums[j] = _mm256_add_epi32(sums[j], t);
                }
                continue;
            }
            for j in 0..MR {
                let t = _mm256_maddubs_epi16(c, broadcast4(x.add(j * k + 4 * g)));
                pairs[j] = _mm256_add_epi16(pairs[j], t);
            }
            if (g + 1) % groups_max(F::KIND) == 0 || g + 1 == 8 {
                for j in 0..MR {
                    sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(pairs[j], ones));
                    pairs[j] = _mm256_setzero_si256();
                }
            } else if g + 1 == 4 && F::KIND.grain() == Grain::Coarse && F::KIND.sub_block() == 16 {
                for j in 0..MR {
                    sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(pairs[j], ones));
                }
            }
        }
    }
}

/// # Safety
/// As [`run_panels`]; rows and half panel lie inside the task, whose input is quantised finely.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn fine_tile<const MR: usize, F: Format>(
    task: &Task<'_>,
    a: &Quantized,
    p: usize,
    half: usize,
    r: usize,
) -> [__m256; MR] {
    let w = task.w;
    let (k, blocks) = (w.k, w.k / BLOCK);
    let (step, sc) = (F::KIND.code_bytes(), F::KIND.scale_bytes());
    let row = task.first + r;
    let mut acc = [_mm256_setzero_ps(); MR];
    // SAFETY: the panel holds `blocks` blocks of codes and scales, the rows as many of quantised input.
    // Prefetching past the end of a buffer has no effect but a lost slot.
    unsafe {
        let qp = w.codes.bytes().as_ptr().add(p * w.panel_codes() + half * PLANE / 2);
        let sp = w.scales.bytes().as_ptr().add(p * w.panel_scales() + half * PANEL);
        let xp = a.fine.q.as_ptr().add(row * k);
        let dp = a.fine.scales.as_ptr().add(2 * row * blocks);
        let op = a.fine.offsets.as_ptr().add(row * blocks);
        for b in 0..blocks {
            let q = qp.add(b * step);
            if MR == 1 && half == 0 {
                for i in 0..step / PLANE {
                    _mm_prefetch::<_MM_HINT_T0>(q.wrapping_add(PREFETCH + i * PLANE).cast());
                }
            }
            let mut sums = [_mm256_setzero_si256(); MR];
            if F::KIND.offset() > 0 && F::KIND != Kind::Q8_0 {
                for j in 0..MR {
                    sums[j] = _mm256_set1_epi32(*op.add(j * blocks + b) * (F::KIND.offset() / 8));
                }
            }
            dot::<MR, F>(q, xp.add(b * BLOCK), k, 0..8, &mut sums);
            let d = halves(sp.add(b * sc));
            for j in 0..MR {
                let da = _mm256_mul_ps(d, _mm256_set1_ps(*dp.add(2 * j * blocks + b)));
                acc[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[j]), da, acc[j]);
            }
            if F::KIND.minimum() {
                let m = halves(sp.add(b * sc + 2 * PANEL));
                for j in 0..MR {
                    acc[j] = _mm256_fmadd_ps(m, _mm256_set1_ps(*dp.add((2 * j + 1) * blocks + b)), acc[j]);
                }
            }
        }
    }
    acc
}

/// Bytes of a pair of sub-blocks as 16-bit numbers `[8 rows][2]`.
///
/// # Safety
/// `p` points at 16 bytes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn sub_pair(signed: bool, p: *const u8) -> __m256i {
    // SAFETY: the caller's.
    let v: __m128i = unsafe { _mm_loadu_si128(p.cast()) };
    if signed { _mm256_cvtepi8_epi16(v) } else { _mm256_cvtepu8_epi16(v) }
}

/// # Safety
/// As [`run_panels`]; rows and half panel lie inside the task, whose input is quantised coarsely.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn coarse_tile<const MR: usize, F: Format>(
    task: &Task<'_>,
    a: &Quantized,
    p: usize,
    half: usize,
    r: usize,
) -> [__m256; MR] {
    let w = task.w;
    let (k, supers) = (w.k, w.k / SUPER);
    let (step, sc) = (F::KIND.code_bytes(), F::KIND.scale_bytes());
    let wide = const { F::KIND.sub_block() == 32 };
    let signed = const { !F::KIND.minimum() };
    let row = task.first + r;
    let mut acc = [_mm256_setzero_ps(); MR];
    // SAFETY: the panel holds `supers` superblocks of codes and scales, the rows as many of quantised
    // input.
    unsafe {
        let qp = w.codes.bytes().as_ptr().add(p * w.panel_codes() + half * PLANE / 2);
        let sp = w.scales.bytes().as_ptr().add(p * w.panel_scales());
        let xp = a.coarse.q.as_ptr().add(row * k);
        for s in 0..supers {
            let scales = sp.add(s * sc);
            let subs = scales.add(if F::KIND.minimum() { 4 * PANEL } else { 2 * PANEL } + half * PANEL);
            let mut total = [_mm256_setzero_si256(); MR];
            for b in 0..SUPER / BLOCK {
                let q = qp.add((s * (SUPER / BLOCK) + b) * step);
                let mut pair = sub_pair(signed, subs.add(if wide { b / 2 } else { b } * 2 * PANEL));
                if F::KIND == Kind::Q2K {
                    pair = _mm256_and_si256(pair, _mm256_set1_epi32(0x000f_000f));
                }
                for part in 0..if wide { 1 } else { 2 } {
                    let scale = if if wide { b % 2 } else { part } == 0 {
                        _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(pair))
                    } else {
                        _mm256_srai_epi32::<16>(pair)
                    };
                    let groups = if wide { 0..8 } else { 4 * part..4 * part + 4 };
                    let mut sums = [_mm256_setzero_si256(); MR];
                    dot::<MR, F>(q, xp.add(s * SUPER + b * BLOCK), k, groups, &mut sums);
                    for j in 0..MR {
                        total[j] = _mm256_add_epi32(total[j], _mm256_mullo_epi32(sums[j], scale));
                    }
                }
            }
            let (d, dm) = (halves(scales.add(half * PANEL)), halves(scales.add(2 * PANEL + half * PANEL)));
            for j in 0..MR {
                // Σ q of sub-blocks times their minima, or times their scales for the offset.
                let mut extra = _mm256_setzero_si256();
                let of = a.coarse.sums.as_ptr().add((row + j) * supers + s).cast::<i16>();
                for i in 0..if wide { 4 } else { 8 } {
                    let pair = match F::KIND {
                        Kind::Q4K | Kind::Q5K => sub_pair(false, subs.add(8 * PANEL + i * 2 * PANEL)),
                        Kind::Q2K => {
                            let v = _mm256_srli_epi16::<4>(sub_pair(false, subs.add(i * 2 * PANEL)));
                            _mm256_and_si256(v, _mm256_set1_epi32(0x000f_000f))
                        }
                        _ => sub_pair(true, subs.add(i * 2 * PANEL)),
                    };
                    let sums = broadcast4(of.add(if wide { 16 } else { 0 } + 2 * i));
                    extra = _mm256_add_epi32(extra, _mm256_madd_epi16(pair, sums));
                }
                let ad = _mm256_set1_ps(*a.coarse.scales.as_ptr().add((row + j) * supers + s));
                if F::KIND.minimum() {
                    acc[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[j]), _mm256_mul_ps(d, ad), acc[j]);
                    let m = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_setzero_si256(), extra));
                    acc[j] = _mm256_fmadd_ps(m, _mm256_mul_ps(dm, ad), acc[j]);
                } else {
                    let o = if F::KIND.offset() == 32 {
                        _mm256_slli_epi32::<5>(extra)
                    } else {
                        _mm256_slli_epi32::<2>(extra)
                    };
                    let t = _mm256_cvtepi32_ps(_mm256_sub_epi32(total[j], o));
                    acc[j] = _mm256_fmadd_ps(t, _mm256_mul_ps(d, ad), acc[j]);
                }
            }
        }
    }
    acc
}
