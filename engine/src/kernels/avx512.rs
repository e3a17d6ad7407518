//! Matrix products with AVX-512 and VNNI: register tiles of up to eight rows by one panel of 16
//! outputs (floats: twelve by two). The tile shape never changes an output's own chain of operations
//! (see `portable`).

use std::arch::x86_64::{
    __m256i, __m512, __m512i, _MM_HINT_T0, _mm_cvtsi32_si128, _mm_loadu_si128, _mm_prefetch, _mm256_loadu_si256,
    _mm512_add_epi32, _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castsi512_ps, _mm512_cvtepi8_epi16,
    _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_dpbusd_epi32,
    _mm512_dpwssd_epi32, _mm512_fmadd_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_mul_ps,
    _mm512_mullo_epi32, _mm512_or_si512, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_sll_epi16, _mm512_slli_epi32, _mm512_srai_epi32,
    _mm512_srl_epi16, _mm512_srli_epi16, _mm512_storeu_ps, _mm512_sub_epi32,
};

use std::cell::RefCell;

use super::avx512_narrow;
use super::layout::{BLOCK, FP4_CODES, Format, Grain, Kind, PANEL, PLANE, SUPER, with_format};
use super::matmul::Task;
use super::quantize::Quantized;

/// How far ahead of the first pass over a panel its numbers are prefetched, bytes. A single row goes
/// without: it reads in sequence, and the hardware's prefetchers reach the memory's limit alone, while
/// more rows compute too long between two lines.
pub(super) const PREFETCH: usize = 4096;

/// Most rows of a tile of floats.
const TILE_ROWS: usize = 12;
/// Rows from which numbers of 16 bits are widened once for all tiles, not once in each.
const WIDEN_ROWS: usize = 2 * TILE_ROWS;

/// Computes the panels `from..to` of a task for all its rows.
///
/// # Safety
/// The machine has the features; `task` was checked by `matmul`; no one else touches the columns of
/// these panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run_panels(task: &Task<'_>, from: usize, to: usize) {
    // SAFETY: the contract is this function's own; row and panel ranges stay inside the task.
    unsafe { with_format!(task.w.kind, F => panels::<F>(task, from, to)) }
}

/// # Safety
/// As [`run_panels`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn panels<F: Format>(task: &Task<'_>, from: usize, to: usize) {
    // SAFETY: row and panel ranges stay inside the task; see `run_panels`.
    unsafe {
        let float = const { matches!(F::KIND.grain(), Grain::None) };
        if float {
            let mut p = from;
            if task.rows == 1 {
                while p + 4 <= to && const { !matches!(F::KIND, Kind::Bf12) } {
                    float_tile::<1, 4, F>(task, p, 0, stored(task, p));
                    p += 4;
                }
            }
            while p < to {
                if p + 2 <= to {
                    float_rows::<2, F>(task, p);
                    p += 2;
                } else {
                    float_rows::<1, F>(task, p);
                    p += 1;
                }
            }
        } else {
            for p in from..to {
                quant_rows::<F>(task, p);
            }
        }
    }
}

thread_local! {
    /// The panels at work as f32.
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// # Safety
/// As [`run_panels`]; the panels lie inside the task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn float_rows<const P: usize, F: Format>(task: &Task<'_>, p: usize) {
    let k = task.w.k;
    // SAFETY: panels p..p+P hold k·16 numbers each and lie one behind the other, in the buffer too.
    unsafe {
        let panels = stored(task, p);
        if const { matches!(F::KIND, Kind::F32) } || task.rows < WIDEN_ROWS {
            return if const { matches!(F::KIND, Kind::Bf12) } {
                avx512_narrow::row_tiles::<P>(task, p);
            } else {
                row_tiles::<P, F>(task, p, panels);
            };
        }
        WIDE.with_borrow_mut(|wide| {
            wide.resize(P * k * PANEL, 0.0);
            if const { matches!(F::KIND, Kind::Bf12) } {
                avx512_narrow::widen::<P>(task, p, wide);
            } else {
                for (i, out) in wide.chunks_exact_mut(PANEL).enumerate() {
                    _mm512_storeu_ps(out.as_mut_ptr(), load16::<F>(panels.at.add(i * F::KIND.code_bytes())));
                }
            }
            let stride = k * PANEL * size_of::<f32>();
            row_tiles::<P, Single>(task, p, Panels { at: wide.as_ptr().cast(), stride });
        });
    }
}

/// Where panels of numbers lie.
#[derive(Clone, Copy)]
struct Panels {
    at: *const u8,
    /// Bytes from one to the next.
    stride: usize,
}

/// The panels from `p` on as the matrix has them.
fn stored(task: &Task<'_>, p: usize) -> Panels {
    let stride = task.w.panel_codes();
    Panels { at: task.w.codes.bytes()[p * stride..].as_ptr(), stride }
}

/// Numbers of single precision.
struct Single;

impl Format for Single {
    const KIND: Kind = Kind::F32;
}

/// # Safety
/// As [`run_panels`]; the panels lie inside the task, their numbers of the format where `w` says.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn row_tiles<const P: usize, F: Format>(task: &Task<'_>, p: usize, w: Panels) {
    // SAFETY: rows stay inside the task.
    unsafe {
        tiles!(task.rows, [TILE_ROWS 8 4 2 1], |MR, r| float_tile::<MR, P, F>(task, p, r, w));
    }
}

/// # Safety
/// `p` points at 16 numbers of the format.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn load16<F: Format>(p: *const u8) -> __m512 {
    // SAFETY: the caller's.
    unsafe {
        match F::KIND {
            Kind::F32 => _mm512_loadu_ps(p.cast()),
            Kind::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
            _ => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))),
        }
    }
}

/// Rows `r..r+MR` by panels `p..p+P`.
///
/// # Safety
/// As [`row_tiles`]; the rows lie inside the task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn float_tile<const MR: usize, const P: usize, F: Format>(task: &Task<'_>, p: usize, r: usize, w: Panels) {
    let k = task.w.k;
    let step = F::KIND.code_bytes();
    let panel_bytes = w.stride;
    // SAFETY: panels p..p+P hold k·16 numbers each, rows r..r+MR hold k numbers each. Prefetching past
    // the end of a buffer has no effect but a lost slot.
    unsafe {
        let wp = w.at;
        let xp = task.x.as_ptr().add(r * k);
        let mut acc = [[_mm512_setzero_ps(); P]; MR];
        // Near a panel's end its stream goes on in the next tile, `P` panels further on: what follows it
        // in memory is the tile's own next panel, which another stream has fetched.
        let tail = k.saturating_sub(PREFETCH / step);
        for i in 0..k {
            let mut v = [_mm512_setzero_ps(); P];
            let ahead = PREFETCH + if i < tail { 0 } else { (P - 1) * panel_bytes };
            for q in 0..P {
                let at = wp.add(q * panel_bytes + i * step);
                if MR > 1 && r == 0 && i % (PLANE / step).max(1) == 0 {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead).cast());
                }
                v[q] = load16::<F>(at);
            }
            for j in 0..MR {
                let x = _mm512_set1_ps(*xp.add(j * k + i));
                for q in 0..P {
                    acc[j][q] = _mm512_fmadd_ps(x, v[q], acc[j][q]);
                }
            }
        }
        for j in 0..MR {
            for q in 0..P {
                store(task, r + j, p + q, acc[j][q]);
            }
        }
    }
}

/// Writes 16 outputs, fewer in the last panel.
///
/// # Safety
/// Row and panel lie inside the task, whose columns of this panel are the caller's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
pub(super) unsafe fn store(task: &Task<'_>, row: usize, panel: usize, v: __m512) {
    let valid = (task.w.n - panel * PANEL).min(PANEL);
    let mask = (0xffff_u32 >> (PANEL - valid)) as u16;
    // SAFETY: the caller's; the mask covers the columns that exist.
    unsafe { _mm512_mask_storeu_ps(task.out.add(row * task.w.n + panel * PANEL), mask, v) };
}

/// # Safety
/// As [`run_panels`]; the panel lies inside the task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn quant_rows<F: Format>(task: &Task<'_>, p: usize) {
    // SAFETY: rows stay inside the task.
    unsafe {
        tiles!(task.rows, [8 7 6 5 4 3 2 1], |MR, r| quant_tile::<MR, F>(task, p, r));
    }
}

/// # Safety
/// As [`run_panels`]; rows and panel lie inside the task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn quant_tile<const MR: usize, F: Format>(task: &Task<'_>, p: usize, r: usize) {
    let Some(a) = task.quantized else { return };
    // SAFETY: the caller's; the input is quantised at the grain of the format.
    unsafe {
        let acc = if const { matches!(F::KIND.grain(), Grain::Fine) } {
            fine_tile::<MR, F>(task, a, p, r)
        } else {
            coarse_tile::<MR, F>(task, a, p, r)
        };
        for j in 0..MR {
            store(task, r + j, p, acc[j]);
        }
    }
}

/// Shifts 16-bit lanes left (right if negative); the caller masks what crosses bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn shifted(v: __m512i, left: i32) -> __m512i {
    if left >= 0 { _mm512_sll_epi16(v, _mm_cvtsi32_si128(left)) } else { _mm512_srl_epi16(v, _mm_cvtsi32_si128(-left)) }
}

/// The eight groups of codes of a block (see `layout`).
///
/// # Safety
/// `q` points at the planes of a block, 64-byte aligned.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn unpack<F: Format>(q: *const u8) -> [__m512i; 8] {
    let mut out = [_mm512_setzero_si512(); 8];
    // SAFETY: every plane read is one that the kind has; the table is sixteen bytes.
    unsafe {
        let plane = |i: usize| _mm512_load_si512(q.add(i * PLANE).cast());
        match F::KIND {
            Kind::Q8_0 => {
                for g in 0..8 {
                    out[g] = plane(g);
                }
            }
            Kind::Q2K | Kind::Q3K => {
                let three = _mm512_set1_epi8(3);
                for h in 0..2 {
                    let v = plane(h);
                    for i in 0..4 {
                        out[4 * h + i] = _mm512_and_si512(shifted(v, -2 * i as i32), three);
                    }
                }
            }
            _ => {
                let nibble = _mm512_set1_epi8(15);
                for g in 0..4 {
                    let v = plane(g);
                    out[g] = _mm512_and_si512(v, nibble);
                    out[g + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(v), nibble);
                }
                if F::KIND == Kind::Fp4 {
                    let codes = _mm512_broadcast_i32x4(_mm_loadu_si128(FP4_CODES.as_ptr().cast()));
                    out = out.map(|nibbles| _mm512_shuffle_epi8(codes, nibbles));
                }
            }
        }
        match F::KIND {
            Kind::Q5_0 | Kind::Q5_1 | Kind::Q5K => {
                let (v, bit) = (plane(4), _mm512_set1_epi8(1 << 4));
                for g in 0..8 {
                    out[g] = _mm512_or_si512(out[g], _mm512_and_si512(shifted(v, 4 - g as i32), bit));
                }
            }
            Kind::Q3K => {
                let (v, bit) = (plane(2), _mm512_set1_epi8(1 << 2));
                for g in 0..8 {
                    out[g] = _mm512_or_si512(out[g], _mm512_and_si512(shifted(v, 2 - g as i32), bit));
                }
            }
            Kind::Q6K => {
                let bits = _mm512_set1_epi8(3 << 4);
                for h in 0..2 {
                    let v = plane(4 + h);
                    for i in 0..4 {
                        let high = _mm512_and_si512(shifted(v, 4 - 2 * i as i32), bits);
                        out[4 * h + i] = _mm512_or_si512(out[4 * h + i], high);
                    }
                }
            }
            _ => {}
        }
    }
    out
}

/// Four neighbouring i8 activations in every 32-bit lane.
///
/// # Safety
/// `p` is valid for reading four bytes.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn broadcast4<T>(p: *const T) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
}

/// # Safety
/// `p` points at 16 f16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn halves(p: *const u8) -> __m512 {
    // SAFETY: the caller's.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
}

/// # Safety
/// As [`run_panels`]; rows and panel lie inside the task, whose input is quantised finely.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn fine_tile<const MR: usize, F: Format>(task: &Task<'_>, a: &Quantized, p: usize, r: usize) -> [__m512; MR] {
    let w = task.w;
    let (k, blocks) = (w.k, w.k / BLOCK);
    let (step, sc) = (F::KIND.code_bytes(), F::KIND.scale_bytes());
    let row = task.first + r;
    let mut acc = [_mm512_setzero_ps(); MR];
    // SAFETY: the panel holds `blocks` blocks of codes and scales, the rows as many of quantised input.
    // Prefetching past the end of a buffer has no effect but a lost slot.
    unsafe {
        let qp = w.codes.bytes().as_ptr().add(p * w.panel_codes());
        let sp = w.scales.bytes().as_ptr().add(p * w.panel_scales());
        let xp = a.fine.q.as_ptr().add(row * k);
        let dp = a.fine.scales.as_ptr().add(2 * row * blocks);
        let op = a.fine.offsets.as_ptr().add(row * blocks);
        for b in 0..blocks {
            let q = qp.add(b * step);
            if MR > 1 && r == 0 {
                for i in 0..step / PLANE {
                    _mm_prefetch::<_MM_HINT_T0>(q.wrapping_add(PREFETCH + i * PLANE).cast());
                }
            }
            let codes = unpack::<F>(q);
            let mut sums = [_mm512_setzero_si512(); MR];
            if F::KIND.offset() > 0 {
                for j in 0..MR {
                    let o = _mm512_set1_epi32(*op.add(j * blocks + b));
                    sums[j] = match F::KIND.offset() {
                        8 => o,
                        16 => _mm512_slli_epi32::<1>(o),
                        _ => _mm512_slli_epi32::<4>(o),
                    };
                }
            }
            let x = xp.add(b * BLOCK);
            for g in 0..8 {
                for j in 0..MR {
                    sums[j] = _mm512_dpbusd_epi32(sums[j], codes[g], broadcast4(x.add(j * k + 4 * g)));
                }
            }
            let d = halves(sp.add(b * sc));
            for j in 0..MR {
                let da = _mm512_mul_ps(d, _mm512_set1_ps(*dp.add(2 * j * blocks + b)));
                acc[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[j]), da, acc[j]);
            }
            if F::KIND.minimum() {
                let m = halves(sp.add(b * sc + 2 * PANEL));
                for j in 0..MR {
                    acc[j] = _mm512_fmadd_ps(m, _mm512_set1_ps(*dp.add((2 * j + 1) * blocks + b)), acc[j]);
                }
            }
        }
    }
    acc
}

/// Bytes of a pair of sub-blocks as 16-bit numbers `[16 rows][2]`.
///
/// # Safety
/// `p` points at 32 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn sub_pair(signed: bool, p: *const u8) -> __m512i {
    // SAFETY: the caller's.
    let v: __m256i = unsafe { _mm256_loadu_si256(p.cast()) };
    if signed { _mm512_cvtepi8_epi16(v) } else { _mm512_cvtepu8_epi16(v) }
}

/// # Safety
/// As [`run_panels`]; rows and panel lie inside the task, whose input is quantised coarsely.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn coarse_tile<const MR: usize, F: Format>(task: &Task<'_>, a: &Quantized, p: usize, r: usize) -> [__m512; MR] {
    let w = task.w;
    let (k, supers) = (w.k, w.k / SUPER);
    let (step, sc) = (F::KIND.code_bytes(), F::KIND.scale_bytes());
    let wide = const { F::KIND.sub_block() == 32 };
    let signed = const { !F::KIND.minimum() };
    let row = task.first + r;
    let mut acc = [_mm512_setzero_ps(); MR];
    // SAFETY: the panel holds `supers` superblocks of codes and scales, the rows as many of quantised
    // input. Prefetching past the end of a buffer has no effect but a lost slot.
    unsafe {
        let qp = w.codes.bytes().as_ptr().add(p * w.panel_codes());
        let sp = w.scales.bytes().as_ptr().add(p * w.panel_scales());
        let xp = a.coarse.q.as_ptr().add(row * k);
        for s in 0..supers {
            let scales = sp.add(s * sc);
            let subs = scales.add(if F::KIND.minimum() { 4 * PANEL } else { 2 * PANEL });
            let mut total = [_mm512_setzero_si512(); MR];
            for b in 0..SUPER / BLOCK {
                let q = qp.add((s * (SUPER / BLOCK) + b) * step);
                if MR > 1 && r == 0 {
                    for i in 0..step / PLANE {
                        _mm_prefetch::<_MM_HINT_T0>(q.wrapping_add(PREFETCH + i * PLANE).cast());
                    }
                }
                let codes = unpack::<F>(q);
                let x = xp.add(s * SUPER + b * BLOCK);
                // The pair that holds this block's sub-scales: two halves of it, or one whole and its
                // neighbour's.
                let mut pair = sub_pair(signed, subs.add(if wide { b / 2 } else { b } * 2 * PANEL));
                if F::KIND == Kind::Q2K {
                    pair = _mm512_and_si512(pair, _mm512_set1_epi32(0x000f_000f));
                }
                let even = _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pair));
                let odd = _mm512_srai_epi32::<16>(pair);
                for part in 0..if wide { 1 } else { 2 } {
                    let scale = if if wide { b % 2 } else { part } == 0 { even } else { odd };
                    let groups = if wide { 0..8 } else { 4 * part..4 * part + 4 };
                    let mut sums = [_mm512_setzero_si512(); MR];
                    for g in groups {
                        for j in 0..MR {
                            sums[j] = _mm512_dpbusd_epi32(sums[j], codes[g], broadcast4(x.add(j * k + 4 * g)));
                        }
                    }
                    for j in 0..MR {
                        total[j] = _mm512_add_epi32(total[j], _mm512_mullo_epi32(sums[j], scale));
                    }
                }
            }
            // Σ q of sub-blocks times their minima, or times their scales for the offset.
            let mut extra = [_mm512_setzero_si512(); MR];
            for i in 0..if wide { 4 } else { 8 } {
                let pair = match F::KIND {
                    Kind::Q4K | Kind::Q5K => sub_pair(false, subs.add(8 * PANEL + i * 2 * PANEL)),
                    Kind::Q2K => {
                        let v = _mm512_srli_epi16::<4>(sub_pair(false, subs.add(i * 2 * PANEL)));
                        _mm512_and_si512(v, _mm512_set1_epi32(0x000f_000f))
                    }
                    _ => sub_pair(true, subs.add(i * 2 * PANEL)),
                };
                for j in 0..MR {
                    let of = a.coarse.sums.as_ptr().add((row + j) * supers + s).cast::<i16>();
                    extra[j] =
                        _mm512_dpwssd_epi32(extra[j], pair, broadcast4(of.add(if wide { 16 } else { 0 } + 2 * i)));
                }
            }
            let d = halves(scales);
            for j in 0..MR {
                let ad = _mm512_set1_ps(*a.coarse.scales.as_ptr().add((row + j) * supers + s));
                if F::KIND.minimum() {
                    acc[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[j]), _mm512_mul_ps(d, ad), acc[j]);
                    let m = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_setzero_si512(), extra[j]));
                    let dm = _mm512_mul_ps(halves(scales.add(2 * PANEL)), ad);
                    acc[j] = _mm512_fmadd_ps(m, dm, acc[j]);
                } else {
                    let o = if F::KIND.offset() == 32 {
                        _mm512_slli_epi32::<5>(extra[j])
                    } else {
                        _mm512_slli_epi32::<2>(extra[j])
                    };
                    let t = _mm512_cvtepi32_ps(_mm512_sub_epi32(total[j], o));
                    acc[j] = _mm512_fmadd_ps(t, _mm512_mul_ps(d, ad), acc[j]);
                }
            }
        }
    }
    acc
}
