//! The definition of the matrix products' arithmetic in plain Rust. Other levels give the same bits.

use half::{bf16, f16};

use super::layout::{self, BLOCK, Grain, PANEL, PLANE, SUPER};
use super::matmul::Task;
use super::packed::{Kind, half_at, sub_scales};
use super::quantize::Quantized;

/// Computes the panels `from..to` of a task for all its rows.
///
/// # Safety
/// `task.out` is valid for `rows · n` writes, and no one else touches the columns of these panels.
pub(super) unsafe fn run_panels(task: &Task<'_>, from: usize, to: usize) {
    let w = task.w;
    let mut acc = [0.0f32; PANEL];
    for p in from..to {
        for r in 0..task.rows {
            acc.fill(0.0);
            match (w.kind.grain(), task.quantized) {
                (Grain::Fine, Some(a)) => fine_row(task, p, a, task.first + r, &mut acc),
                (Grain::Coarse, Some(a)) => coarse_row(task, p, a, task.first + r, &mut acc),
                _ => float_row(task, p, r, &mut acc),
            }
            let valid = PANEL.min(w.n - p * PANEL);
            for (c, v) in acc[..valid].iter().enumerate() {
                // SAFETY: r < rows and p·16 + c < n; the columns are this call's own.
                unsafe { *task.out.add(r * w.n + p * PANEL + c) = *v };
            }
        }
    }
}

/// One chain of fused multiply-adds per output, k ascending.
fn float_row(task: &Task<'_>, p: usize, r: usize, acc: &mut [f32; PANEL]) {
    let w = task.w;
    let step = w.kind.code_bytes();
    let codes = &w.codes.bytes()[p * w.panel_codes()..(p + 1) * w.panel_codes()];
    let x = &task.x[r * w.k..(r + 1) * w.k];
    if w.kind == Kind::Bf12 {
        for (i, v) in x.iter().enumerate() {
            let line = w.narrow_line(p, i);
            acc.iter_mut().zip(line).for_each(|(a, weight)| *a = v.mul_add(weight, *a));
        }
        return;
    }
    for (v, s) in x.iter().zip(codes.chunks_exact(step)) {
        for (c, a) in acc.iter_mut().enumerate() {
            let weight = match w.kind {
                Kind::F32 => f32::from_le_bytes([s[4 * c], s[4 * c + 1], s[4 * c + 2], s[4 * c + 3]]),
                Kind::Bf16 => bf16::from_le_bytes([s[2 * c], s[2 * c + 1]]).to_f32(),
                _ => f16::from_le_bytes([s[2 * c], s[2 * c + 1]]).to_f32(),
            };
            *a = v.mul_add(weight, *a);
        }
    }
}

/// `Σ code · x` of groups `from..to` of four values, per row of the panel.
#[inline(always)]
fn dot(codes: &[u8; 8 * PLANE], x: &[i8], from: usize, to: usize) -> [i32; PANEL] {
    let mut sums = [0i32; PANEL];
    for g in from..to {
        for c in 0..PANEL {
            for j in 0..4 {
                sums[c] += i32::from(codes[g * PLANE + 4 * c + j]) * i32::from(x[4 * g + j]);
            }
        }
    }
    sums
}

/// Per block of 32 the exact `Σ (code − offset) · x`, then fused multiply-adds, blocks ascending:
/// `sum · (d_w · d_a)`, then the minimum times `d_a · Σ q`.
fn fine_row(task: &Task<'_>, p: usize, a: &Quantized, row: usize, acc: &mut [f32; PANEL]) {
    let w = task.w;
    let blocks = w.k / BLOCK;
    let (step, sc) = (w.kind.code_bytes(), w.kind.scale_bytes());
    let (d, m) = a.fine.scales[2 * row * blocks..2 * (row + 1) * blocks].split_at(blocks);
    let mut codes = [0; 8 * PLANE];
    for b in 0..blocks {
        layout::unpack(w.kind, &w.codes.bytes()[p * w.panel_codes() + b * step..][..step], &mut codes);
        let scales = &w.scales.bytes()[p * w.panel_scales() + b * sc..][..sc];
        let sums = dot(&codes, &a.fine.q[row * w.k + b * BLOCK..][..BLOCK], 0, 8);
        let offset = a.fine.offsets[row * blocks + b] * (w.kind.offset() / 8);
        for (c, acc) in acc.iter_mut().enumerate() {
            *acc = ((sums[c] + offset) as f32).mul_add(half_at(scales, c) * d[b], *acc);
            if w.kind.minimum() {
                *acc = half_at(scales, PANEL + c).mul_add(m[b], *acc);
            }
        }
    }
}

/// Per superblock of 256 the exact `Σ scale_j · Σ_j (code − offset) · x` and `Σ minimum_j · Σ_j q`, then
/// fused multiply-adds, superblocks ascending: `sum · (d_w · d_a)`, then `−sum_min · (dmin_w · d_a)`.
fn coarse_row(task: &Task<'_>, p: usize, a: &Quantized, row: usize, acc: &mut [f32; PANEL]) {
    let w = task.w;
    let supers = w.k / SUPER;
    let (step, sc) = (w.kind.code_bytes(), w.kind.scale_bytes());
    let per = w.kind.sub_block();
    let mut codes = [0; 8 * PLANE];
    for s in 0..supers {
        let scales = &w.scales.bytes()[p * w.panel_scales() + s * sc..][..sc];
        let sums_of = &a.coarse.sums[row * supers + s];
        let sums_of = if per == 32 { &sums_of[16..] } else { &sums_of[..16] };
        let (mut total, mut minima) = ([0i32; PANEL], [0i32; PANEL]);
        for b in 0..SUPER / BLOCK {
            let at = p * w.panel_codes() + (s * (SUPER / BLOCK) + b) * step;
            layout::unpack(w.kind, &w.codes.bytes()[at..][..step], &mut codes);
            let x = &a.coarse.q[row * w.k + s * SUPER + b * BLOCK..][..BLOCK];
            for part in 0..BLOCK / per {
                let sub = b * (BLOCK / per) + part;
                let groups = per / 4;
                let sums = dot(&codes, x, part * groups, (part + 1) * groups);
                let sum = i32::from(sums_of[sub]);
                for c in 0..PANEL {
                    let (scale, minimum) = sub_scales(w.kind, scales, c, sub);
                    total[c] += scale * (sums[c] - w.kind.offset() * sum);
                    minima[c] += minimum * sum;
                }
            }
        }
        let d = a.coarse.scales[row * supers + s];
        for (c, acc) in acc.iter_mut().enumerate() {
            *acc = (total[c] as f32).mul_add(half_at(scales, c) * d, *acc);
            if w.kind.minimum() {
                *acc = (-minima[c] as f32).mul_add(half_at(scales, PANEL + c) * d, *acc);
            }
        }
    }
}
