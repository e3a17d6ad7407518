//! The definition of the matrix products' arithmetic in plain Rust. Other levels give the same bits.

use half::{bf16, f16};

use super::matmul::Task;
use super::packed::{BLOCK, FLOAT_PANEL, Kind, QUANT_PANEL};

/// Computes the panels `from..to` of a task for all its rows.
///
/// # Safety
/// `task.out` is valid for `rows · n` writes, and no one else touches the columns of these panels.
pub(super) unsafe fn run_panels(task: &Task<'_>, from: usize, to: usize) {
    let w = task.w;
    let width = w.kind.panel();
    let mut acc = [0.0f32; FLOAT_PANEL];
    for p in from..to {
        for r in 0..task.rows {
            if w.kind.quantised() {
                quant_row(task, p, r, &mut acc);
            } else {
                float_row(task, p, r, &mut acc);
            }
            let valid = width.min(w.n - p * width);
            for (c, v) in acc[..valid].iter().enumerate() {
                // SAFETY: r < rows and p·width + c < n; the columns are this call's own.
                unsafe { *task.out.add(r * w.n + p * width + c) = *v };
            }
        }
    }
}

/// One chain of fused multiply-adds per output, k ascending.
fn float_row(task: &Task<'_>, p: usize, r: usize, acc: &mut [f32; FLOAT_PANEL]) {
    let w = task.w;
    let step = w.kind.step_bytes();
    let data = &w.data.bytes()[p * w.k * step..(p + 1) * w.k * step];
    let x = &task.x[r * w.k..(r + 1) * w.k];
    acc.fill(0.0);
    for (v, s) in x.iter().zip(data.chunks_exact(step)) {
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

/// Exact integer sum per block, then fused multiply-adds, blocks ascending: first
/// `sum · (d_w · d_a)`, then the offset `−8·d_w` (Q4_0) or the minimum (Q4_1) times `d_a · Σ q`.
fn quant_row(task: &Task<'_>, p: usize, r: usize, acc: &mut [f32; FLOAT_PANEL]) {
    let w = task.w;
    let blocks = w.steps();
    let (step, sc) = (w.kind.step_bytes(), w.kind.step_scales());
    let Some(a) = task.quantized else { return };
    let r = task.first + r;
    acc.fill(0.0);
    for b in 0..blocks {
        let at = p * blocks + b;
        let q = &w.data.bytes()[at * step..(at + 1) * step];
        let scales = &w.scales.bytes()[at * sc * 2..(at + 1) * sc * 2];
        let scale = |i: usize| f16::from_le_bytes([scales[2 * i], scales[2 * i + 1]]).to_f32();
        let x = &a.q[r * w.k + b * BLOCK..][..BLOCK];
        let at = r * blocks + b;
        let da = a.d[at];
        for (c, acc) in acc[..QUANT_PANEL].iter_mut().enumerate() {
            let byte = |e: usize| q[(e / 4 * QUANT_PANEL + c) * 4 + e % 4];
            let sum: i32 = x
                .iter()
                .enumerate()
                .map(|(e, v)| {
                    let weight = match w.kind {
                        Kind::Q8_0 => i32::from(byte(e).cast_signed()),
                        _ if e < 16 => i32::from(byte(e) & 15),
                        _ => i32::from(byte(e - 16) >> 4),
                    };
                    weight * i32::from(*v)
                })
                .sum();
            let d = scale(c);
            *acc = (sum as f32).mul_add(d * da, *acc);
            match w.kind {
                Kind::Q4_0 => *acc = (d * -8.0).mul_add(a.s[at], *acc),
                Kind::Q4_1 => *acc = scale(QUANT_PANEL + c).mul_add(a.m[at], *acc),
                _ => {}
            }
        }
    }
}
