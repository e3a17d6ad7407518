//! Matrix products with NEON: register tiles of a few rows by some quads (four outputs: one register)
//! of a panel. The tile shape never changes an output's own chain of operations (see `portable`).
//!
//! A plane of codes is `[16 rows][4 values]`, so a register of it is what `sdot` takes: four rows of
//! four values against four values of the input, picked by lane. Machines without the dot product
//! multiply to 16 bits and add pairs; the sums are exact integers either way.
//!
//! The tiles are inlined into one function per format, instruction set and shape of the matrix, since
//! only a function that has the feature `dotprod` itself may hold its instruction.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint8x16_t, vandq_s32, vandq_u8, vcvt_f32_f16, vcvtq_f32_s32, vdupq_lane_s32,
    vdupq_n_f32, vdupq_n_s8, vdupq_n_s32, vdupq_n_u8, veorq_u8, vfmaq_f32, vfmaq_n_f32, vget_high_s32, vget_low_s8,
    vget_low_s32, vld1_u8, vld1_u16, vld1q_f32, vld1q_s8, vld1q_u8, vmlaq_n_s32, vmlaq_s32, vmovl_s8, vmovl_u8,
    vmull_high_s8, vmull_s8, vmulq_n_f32, vmulq_n_s32, vnegq_s32, vorrq_u8, vpadalq_s16, vpaddq_s16, vqtbl1q_u8,
    vreinterpret_f16_u16, vreinterpret_s8_u8, vreinterpretq_f32_u32, vreinterpretq_s8_s32, vreinterpretq_s8_u8,
    vreinterpretq_s32_s8, vreinterpretq_s32_s16, vreinterpretq_s32_u16, vshll_n_u16, vshlq_n_s32, vshlq_u8,
    vshrq_n_s32, vst1q_f32, vsubq_s32,
};

use super::layout::{BLOCK, FP4_CODES, Format, Grain, Kind, PANEL, PLANE, SUPER, with_format};
use super::matmul::Task;
use super::quantize::Quantized;

/// Outputs of one register.
const QUAD: usize = 4;
/// Quads of a panel.
const QUADS: usize = PANEL / QUAD;
/// Groups of four values of half a block: the lanes of a register.
const LANES: usize = 4;

/// Computes the panels `from..to` of a task for all its rows, with the dot product instructions.
///
/// # Safety
/// The machine has `dotprod`; `task` was checked by `matmul`; no one else touches the columns of
/// these panels.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn run_panels_dot(task: &Task<'_>, from: usize, to: usize) {
    /// # Safety
    /// As [`run_panels_dot`].
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn of_format<F: Format>(task: &Task<'_>, from: usize, to: usize) {
        // SAFETY: the caller's.
        unsafe { panels::<true, F>(task, from, to) }
    }
    // SAFETY: the contract is this function's own; row and panel ranges stay inside the task.
    unsafe { with_format!(task.w.kind, F => of_format::<F>(task, from, to)) }
}

/// As [`run_panels_dot`] for machines without the instructions.
///
/// # Safety
/// `task` was checked by `matmul`; no one else touches the columns of these panels.
pub(super) unsafe fn run_panels(task: &Task<'_>, from: usize, to: usize) {
    /// # Safety
    /// As [`run_panels`].
    unsafe fn of_format<F: Format>(task: &Task<'_>, from: usize, to: usize) {
        // SAFETY: the caller's.
        unsafe { panels::<false, F>(task, from, to) }
    }
    // SAFETY: the contract is this function's own; row and panel ranges stay inside the task.
    unsafe { with_format!(task.w.kind, F => of_format::<F>(task, from, to)) }
}

/// # Safety
/// As [`run_panels`]; `DOT` only on machines that have it.
#[inline(always)]
unsafe fn panels<const DOT: bool, F: Format>(task: &Task<'_>, from: usize, to: usize) {
    // SAFETY: row and panel ranges stay inside the task.
    unsafe {
        if const { matches!(F::KIND, Kind::Bf12) } {
            // No kernel of its own, see `Level::narrows`.
            return super::portable::run_panels(task, from, to);
        }
        if const { matches!(F::KIND.grain(), Grain::None) } {
            let mut p = from;
            if task.rows == 1 {
                // Eight chains hide the latency of the multiply-adds.
                while p + 2 <= to {
                    float_tile::<1, 2, F>(task, p, 0);
                    p += 2;
                }
            }
            for p in p..to {
                tiles!(task.rows, [6 5 4 3 2 1], |MR, r| float_tile::<MR, 1, F>(task, p, r));
            }
            return;
        }
        for p in from..to {
            // One and two rows leave registers for all quads.
            tiles!(task.rows, [4 3 2 1], |MR, r| {
                quant_tile::<DOT, MR, { if MR < 3 { QUADS } else { QUADS / 2 } }, F>(task, p, r);
            });
        }
    }
}

#[inline(always)]
fn zero() -> float32x4_t {
    // SAFETY: every aarch64 machine has NEON.
    unsafe { vdupq_n_f32(0.0) }
}

/// Four numbers of a float format.
///
/// # Safety
/// `p` points at them.
#[inline(always)]
unsafe fn load4<F: Format>(p: *const u8) -> float32x4_t {
    // SAFETY: the caller's.
    unsafe {
        match F::KIND {
            Kind::F32 => vld1q_f32(p.cast()),
            Kind::F16 => halves(p),
            _ => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))),
        }
    }
}

/// # Safety
/// `p` points at four f16.
#[inline(always)]
unsafe fn halves(p: *const u8) -> float32x4_t {
    // SAFETY: the caller's.
    unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p.cast()))) }
}

/// Rows `r..r+MR` by panels `p..p+P`.
///
/// # Safety
/// As [`run_panels`]; rows and panels lie inside the task.
#[inline(always)]
unsafe fn float_tile<const MR: usize, const P: usize, F: Format>(task: &Task<'_>, p: usize, r: usize) {
    let w = task.w;
    let k = w.k;
    let step = F::KIND.code_bytes();
    let panel_bytes = w.panel_codes();
    // SAFETY: panels p..p+P hold k·16 numbers each, rows r..r+MR hold k numbers each.
    unsafe {
        let wp = w.codes.bytes().as_ptr().add(p * panel_bytes);
        let xp = task.x.as_ptr().add(r * k);
        let mut acc = [[[zero(); QUADS]; P]; MR];
        for i in 0..k {
            for q in 0..P {
                let at = wp.add(q * panel_bytes + i * step);
                let mut v = [vdupq_n_f32(0.0); QUADS];
                for h in 0..QUADS {
                    v[h] = load4::<F>(at.add(h * step / QUADS));
                }
                for j in 0..MR {
                    let x = *xp.add(j * k + i);
                    for h in 0..QUADS {
                        acc[j][q][h] = vfmaq_n_f32(acc[j][q][h], v[h], x);
                    }
                }
            }
        }
        for j in 0..MR {
            for q in 0..P {
                for h in 0..QUADS {
                    store(task, r + j, (p + q) * PANEL + h * QUAD, acc[j][q][h]);
                }
            }
        }
    }
}

/// Writes four outputs, fewer behind the last column.
///
/// # Safety
/// The row lies inside the task, whose columns from `col` on are the caller's.
#[inline(always)]
unsafe fn store(task: &Task<'_>, row: usize, col: usize, v: float32x4_t) {
    let valid = task.w.n.saturating_sub(col).min(QUAD);
    // SAFETY: the caller's; the copy takes at most 4 numbers of the array.
    unsafe {
        let out = task.out.wrapping_add(row * task.w.n + col);
        if valid == QUAD {
            vst1q_f32(out, v);
        } else {
            let mut t = [0.0f32; QUAD];
            vst1q_f32(t.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(t.as_ptr(), out, valid);
        }
    }
}

/// Rows `r..r+MR` of panel `p`, `Q` quads at a time.
///
/// # Safety
/// As [`panels`]; rows and panel lie inside the task.
#[inline(always)]
unsafe fn quant_tile<const DOT: bool, const MR: usize, const Q: usize, F: Format>(task: &Task<'_>, p: usize, r: usize) {
    let Some(a) = task.quantized else { return };
    // SAFETY: the caller's; the input is quantised at the grain of the format.
    unsafe {
        for first in (0..QUADS).step_by(Q) {
            let acc = if const { matches!(F::KIND.grain(), Grain::Fine) } {
                fine_tile::<DOT, MR, Q, F>(task, a, p, first, r)
            } else {
                coarse_tile::<DOT, MR, Q, F>(task, a, p, first, r)
            };
            for j in 0..MR {
                for q in 0..Q {
                    store(task, r + j, p * PANEL + (first + q) * QUAD, acc[j][q]);
                }
            }
        }
    }
}

/// Group `G` of the codes of four rows (see `layout`), as signed numbers: Q8_0 without its offset.
///
/// # Safety
/// `q` points at these rows in the first plane of a block.
#[inline(always)]
unsafe fn codes<const G: usize, F: Format>(q: *const u8) -> int8x16_t {
    // SAFETY: every aarch64 machine has NEON, every plane read is one that the kind has, the table is
    // sixteen bytes.
    unsafe {
        let shifted = |v: uint8x16_t, left: i8| vshlq_u8(v, vdupq_n_s8(left));
        let masked = |v: uint8x16_t, bits: u8| vandq_u8(v, vdupq_n_u8(bits));
        let plane = |i: usize| vld1q_u8(q.add(i * PLANE));
        let (half, pair) = (G / 4, (G % 4) as i8);
        let low = match F::KIND {
            Kind::Q8_0 => return vreinterpretq_s8_u8(veorq_u8(plane(G), vdupq_n_u8(0x80))),
            Kind::Q2K | Kind::Q3K => masked(shifted(plane(half), -2 * pair), 3),
            _ => masked(shifted(plane(G % 4), -4 * half as i8), 15),
        };
        let high = match F::KIND {
            Kind::Q5_0 | Kind::Q5_1 | Kind::Q5K => masked(shifted(plane(4), 4 - G as i8), 1 << 4),
            Kind::Q3K => masked(shifted(plane(2), 2 - G as i8), 1 << 2),
            Kind::Q6K => masked(shifted(plane(4 + half), 4 - 2 * pair), 3 << 4),
            Kind::Fp4 => return vreinterpretq_s8_u8(vqtbl1q_u8(vld1q_u8(FP4_CODES.as_ptr()), low)),
            _ => return vreinterpretq_s8_u8(low),
        };
        vreinterpretq_s8_u8(vorrq_u8(low, high))
    }
}

/// Adds to each of four sums four products: a row's codes by the four inputs of lane `LANE`.
///
/// # Safety
/// `DOT` only on machines that have it, inside a function that has the feature.
#[inline(always)]
unsafe fn dot4<const DOT: bool, const LANE: i32>(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: every aarch64 machine has NEON; the instruction, whose intrinsic is not stable yet, reads
    // and writes the named registers only.
    unsafe {
        if DOT {
            let mut sums = sums;
            std::arch::asm!(
                "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.4b[{lane}]",
                sums = inout(vreg) sums,
                codes = in(vreg) codes,
                x = in(vreg) x,
                lane = const LANE,
                options(pure, nomem, nostack, preserves_flags),
            );
            return sums;
        }
        let x = vreinterpretq_s32_s8(x);
        let x = match LANE {
            0 => vdupq_lane_s32::<0>(vget_low_s32(x)),
            1 => vdupq_lane_s32::<1>(vget_low_s32(x)),
            2 => vdupq_lane_s32::<0>(vget_high_s32(x)),
            _ => vdupq_lane_s32::<1>(vget_high_s32(x)),
        };
        let x = vreinterpretq_s8_s32(x);
        // |code · x| ≤ 128 · 127, so 16 bits hold the sum of two.
        let pairs = vpaddq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(x)), vmull_high_s8(codes, x));
        vpadalq_s16(sums, pairs)
    }
}

/// Adds `Σ code · x` of half a block (`HALF` 0 or 1) to the sums.
///
/// # Safety
/// As [`dot4`]; `q` points at the first of `Q` quads in the first plane of a block; `x` points at the
/// 16 inputs of the half, and so does `x + j·k` for `j < MR`.
#[inline(always)]
unsafe fn dot_half<const DOT: bool, const MR: usize, const Q: usize, const HALF: usize, F: Format>(
    q: *const u8,
    x: *const i8,
    k: usize,
    sums: &mut [[int32x4_t; Q]; MR],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut inputs = [vdupq_n_s8(0); MR];
        for j in 0..MR {
            inputs[j] = vld1q_s8(x.add(j * k));
        }
        macro_rules! lane {
            ($lane:literal) => {
                for i in 0..Q {
                    // A constant, as the lane has to be one.
                    let c = if HALF == 0 {
                        codes::<$lane, F>(q.add(i * LANES * QUAD))
                    } else {
                        codes::<{ 4 + $lane }, F>(q.add(i * LANES * QUAD))
                    };
                    for j in 0..MR {
                        sums[j][i] = dot4::<DOT, $lane>(sums[j][i], c, inputs[j]);
                    }
                }
            };
        }
        lane!(0);
        lane!(1);
        lane!(2);
        lane!(3);
    }
}

/// # Safety
/// As [`panels`]; rows and quads lie inside the task, whose input is quantised finely.
#[inline(always)]
unsafe fn fine_tile<const DOT: bool, const MR: usize, const Q: usize, F: Format>(
    task: &Task<'_>,
    a: &Quantized,
    p: usize,
    first: usize,
    r: usize,
) -> [[float32x4_t; Q]; MR] {
    let w = task.w;
    let (k, blocks) = (w.k, w.k / BLOCK);
    let (step, sc) = (F::KIND.code_bytes(), F::KIND.scale_bytes());
    let row = task.first + r;
    let mut acc = [[zero(); Q]; MR];
    // SAFETY: the panel holds `blocks` blocks of codes and scales, the rows as many of quantised input.
    unsafe {
        let qp = w.codes.bytes().as_ptr().add(p * w.panel_codes() + first * LANES * QUAD);
        let sp = w.scales.bytes().as_ptr().add(p * w.panel_scales() + first * 2 * QUAD);
        let xp = a.fine.q.as_ptr().add(row * k);
        let dp = a.fine.scales.as_ptr().add(2 * row * blocks);
        let op = a.fine.offsets.as_ptr().add(row * blocks);
        for b in 0..blocks {
            let (q, x) = (qp.add(b * step), xp.add(b * BLOCK));
            let mut sums = [[vdupq_n_s32(0); Q]; MR];
            if F::KIND.offset() > 0 && F::KIND != Kind::Q8_0 {
                for j in 0..MR {
                    sums[j] = [vdupq_n_s32(*op.add(j * blocks + b) * (F::KIND.offset() / 8)); Q];
                }
            }
            dot_half::<DOT, MR, Q, 0, F>(q, x, k, &mut sums);
            dot_half::<DOT, MR, Q, 1, F>(q, x.add(BLOCK / 2), k, &mut sums);
            for i in 0..Q {
                let d = halves(sp.add(b * sc + i * 2 * QUAD));
                for j in 0..MR {
                    let da = vmulq_n_f32(d, *dp.add(2 * j * blocks + b));
                    acc[j][i] = vfmaq_f32(acc[j][i], vcvtq_f32_s32(sums[j][i]), da);
                }
                if F::KIND.minimum() {
                    let m = halves(sp.add(b * sc + 2 * PANEL + i * 2 * QUAD));
                    for j in 0..MR {
                        acc[j][i] = vfmaq_n_f32(acc[j][i], m, *dp.add((2 * j + 1) * blocks + b));
                    }
                }
            }
        }
    }
    acc
}

/// The bytes of a pair of sub-blocks of four rows, `[4 rows][2]`, as the numbers of the even sub-block
/// and of the odd.
///
/// # Safety
/// `p` points at 8 bytes.
#[inline(always)]
unsafe fn sub_pair(signed: bool, p: *const u8) -> [int32x4_t; 2] {
    // SAFETY: the caller's.
    unsafe {
        let v = vld1_u8(p);
        let pair = if signed {
            vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(v)))
        } else {
            vreinterpretq_s32_u16(vmovl_u8(v))
        };
        [vshrq_n_s32::<16>(vshlq_n_s32::<16>(pair)), vshrq_n_s32::<16>(pair)]
    }
}

/// Q2_K: the scale in the low four bits of a byte, the minimum in the high ones.
#[inline(always)]
fn nibbles(pair: [int32x4_t; 2], high: bool) -> [int32x4_t; 2] {
    // SAFETY: every aarch64 machine has NEON.
    pair.map(|v| unsafe { if high { vshrq_n_s32::<4>(v) } else { vandq_s32(v, vdupq_n_s32(15)) } })
}

/// # Safety
/// As [`panels`]; rows and quads lie inside the task, whose input is quantised coarsely.
#[inline(always)]
unsafe fn coarse_tile<const DOT: bool, const MR: usize, const Q: usize, F: Format>(
    task: &Task<'_>,
    a: &Quantized,
    p: usize,
    first: usize,
    r: usize,
) -> [[float32x4_t; Q]; MR] {
    let w = task.w;
    let (k, supers) = (w.k, w.k / SUPER);
    let (step, sc) = (F::KIND.code_bytes(), F::KIND.scale_bytes());
    let wide = const { F::KIND.sub_block() == 32 };
    let signed = const { !F::KIND.minimum() };
    let row = task.first + r;
    let mut acc = [[zero(); Q]; MR];
    // SAFETY: the panel holds `supers` superblocks of codes and scales, the rows as many of quantised
    // input.
    unsafe {
        let qp = w.codes.bytes().as_ptr().add(p * w.panel_codes() + first * LANES * QUAD);
        let sp = w.scales.bytes().as_ptr().add(p * w.panel_scales());
        let xp = a.coarse.q.as_ptr().add(row * k);
        for s in 0..supers {
            let scales = sp.add(s * sc + first * 2 * QUAD);
            let subs = sp.add(s * sc + if F::KIND.minimum() { 4 * PANEL } else { 2 * PANEL } + first * 2 * QUAD);
            let mut total = [[vdupq_n_s32(0); Q]; MR];
            for b in 0..SUPER / BLOCK {
                let q = qp.add((s * (SUPER / BLOCK) + b) * step);
                let x = xp.add(s * SUPER + b * BLOCK);
                let mut pairs = [[vdupq_n_s32(0); 2]; Q];
                for i in 0..Q {
                    pairs[i] = sub_pair(signed, subs.add(if wide { b / 2 } else { b } * 2 * PANEL + i * 2 * QUAD));
                    if F::KIND == Kind::Q2K {
                        pairs[i] = nibbles(pairs[i], false);
                    }
                }
                let mut sums = [[vdupq_n_s32(0); Q]; MR];
                dot_half::<DOT, MR, Q, 0, F>(q, x, k, &mut sums);
                if !wide {
                    for j in 0..MR {
                        for i in 0..Q {
                            total[j][i] = vmlaq_s32(total[j][i], sums[j][i], pairs[i][0]);
                            sums[j][i] = vdupq_n_s32(0);
                        }
                    }
                }
                dot_half::<DOT, MR, Q, 1, F>(q, x.add(BLOCK / 2), k, &mut sums);
                for j in 0..MR {
                    for i in 0..Q {
                        let scale = pairs[i][if wide { b % 2 } else { 1 }];
                        total[j][i] = vmlaq_s32(total[j][i], sums[j][i], scale);
                    }
                }
            }
            for i in 0..Q {
                // Σ q of sub-blocks times their minima, or times their scales for the offset.
                let mut extra = [vdupq_n_s32(0); MR];
                for pair in 0..if wide { 4 } else { 8 } {
                    let at = subs.add(pair * 2 * PANEL + i * 2 * QUAD);
                    let [even, odd] = match F::KIND {
                        Kind::Q4K | Kind::Q5K => sub_pair(false, at.add(8 * PANEL)),
                        Kind::Q2K => nibbles(sub_pair(false, at), true),
                        _ => sub_pair(true, at),
                    };
                    for j in 0..MR {
                        let sums = a.coarse.sums.as_ptr().add((row + j) * supers + s).cast::<i16>();
                        let sums = sums.add(if wide { 16 } else { 0 } + 2 * pair);
                        extra[j] = vmlaq_n_s32(extra[j], even, i32::from(*sums));
                        extra[j] = vmlaq_n_s32(extra[j], odd, i32::from(*sums.add(1)));
                    }
                }
                let d = halves(scales.add(i * 2 * QUAD));
                for j in 0..MR {
                    let ad = *a.coarse.scales.as_ptr().add((row + j) * supers + s);
                    let da = vmulq_n_f32(d, ad);
                    if F::KIND.minimum() {
                        let dm = vmulq_n_f32(halves(scales.add(2 * PANEL + i * 2 * QUAD)), ad);
                        acc[j][i] = vfmaq_f32(acc[j][i], vcvtq_f32_s32(total[j][i]), da);
                        acc[j][i] = vfmaq_f32(acc[j][i], vcvtq_f32_s32(vnegq_s32(extra[j])), dm);
                    } else {
                        let t = vsubq_s32(total[j][i], vmulq_n_s32(extra[j], F::KIND.offset()));
                        acc[j][i] = vfmaq_f32(acc[j][i], vcvtq_f32_s32(t), da);
                    }
                }
            }
        }
    }
    acc
}
