//! Attention over paged KV: scores of one query against a run of cached rows, and the weighted sum
//! of cached rows. One query at a time over all tokens in order, so that the bits do not depend on
//! how a prompt was cut into chunks.

use super::Level;
use super::lanes::{LANES, fold, load_tail, multiversion};

multiversion! {
    /// `out[t] = scale · (query · rows[t·stride .. t·stride + query.len()])` for every `t`.
    pub(crate) fn dot_rows(query: &[f32], rows: &[f32], stride: usize, scale: f32, out: &mut [f32]) {
        let n = query.len();
        let full = n / LANES * LANES;
        let tail = load_tail(&query[full..]);
        let mut t = 0;
        // Four rows at a time hide the latency of the chain of each.
        while t + 4 <= out.len() {
            let r: [&[f32]; 4] = std::array::from_fn(|j| &rows[(t + j) * stride..(t + j) * stride + n]);
            let mut acc = [[0.0f32; LANES]; 4];
            let mut i = 0;
            while i < full {
                for j in 0..4 {
                    for l in 0..LANES {
                        acc[j][l] = query[i + l].mul_add(r[j][i + l], acc[j][l]);
                    }
                }
                i += LANES;
            }
            for j in 0..4 {
                if full < n {
                    let v = load_tail(&r[j][full..]);
                    for l in 0..LANES {
                        acc[j][l] = tail[l].mul_add(v[l], acc[j][l]);
                    }
                }
                out[t + j] = fold(acc[j]) * scale;
            }
            t += 4;
        }
        while t < out.len() {
            let r = &rows[t * stride..t * stride + n];
            let mut acc = [0.0f32; LANES];
            let mut i = 0;
            while i < full {
                for l in 0..LANES {
                    acc[l] = query[i + l].mul_add(r[i + l], acc[l]);
                }
                i += LANES;
            }
            if full < n {
                let v = load_tail(&r[full..]);
                for l in 0..LANES {
                    acc[l] = tail[l].mul_add(v[l], acc[l]);
                }
            }
            out[t] = fold(acc) * scale;
            t += 1;
        }
    }
}

multiversion! {
    /// `out += Σ_t weights[t] · rows[t·stride .. t·stride + out.len()]`, t ascending, fused.
    pub(crate) fn add_weighted_rows(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
        let n = out.len();
        let mut at = 0;
        while at + 4 * LANES <= n {
            let mut acc = [0.0f32; 4 * LANES];
            acc.copy_from_slice(&out[at..at + 4 * LANES]);
            for (t, w) in weights.iter().enumerate() {
                let r = &rows[t * stride + at..t * stride + at + 4 * LANES];
                for l in 0..4 * LANES {
                    acc[l] = w.mul_add(r[l], acc[l]);
                }
            }
            out[at..at + 4 * LANES].copy_from_slice(&acc);
            at += 4 * LANES;
        }
        if at < n {
            for (t, w) in weights.iter().enumerate() {
                let r = &rows[t * stride + at..t * stride + n];
                for (o, v) in out[at..].iter_mut().zip(r) {
                    *o = w.mul_add(*v, *o);
                }
            }
        }
    }
}
