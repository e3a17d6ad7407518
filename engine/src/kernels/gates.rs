//! Activations of gated MLPs other than SiLU, and soft caps. Lane by lane, so that a number's bits do
//! not depend on its place.

use super::Level;
use super::lanes::{LANES, exp_lanes, exp_scores, load_tail, multiversion};

multiversion! {
    /// `gate = gelu(gate) · up` in the tanh form: `x · σ(2·√(2/π)·(x + 0.044715·x³))`.
    pub(crate) fn gelu_mul(gate: &mut [f32], up: &[f32]) {
        const TWICE_ROOT: f32 = 1.595_769_2;
        for (g, u) in gate.chunks_mut(LANES).zip(up.chunks(LANES)) {
            let x = load_tail(g);
            let e = exp_lanes(x.map(|x| -TWICE_ROOT * (0.044_715 * x * x).mul_add(x, x)));
            for i in 0..g.len() {
                g[i] = x[i] / (1.0 + e[i]) * u[i];
            }
        }
    }
}

multiversion! {
    /// `gate = g · σ(alpha·g) · (u + 1)` with `g = min(gate, limit)`, `u` within `±limit`.
    pub(crate) fn clamped_swiglu(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) {
        for (g, u) in gate.chunks_mut(LANES).zip(up.chunks(LANES)) {
            // Not `min`, which would hide that a model has gone wrong: it drops a NaN.
            let x = load_tail(g).map(|x| if x > limit { limit } else { x });
            let e = exp_lanes(x.map(|x| -alpha * x));
            for i in 0..g.len() {
                g[i] = x[i] / (1.0 + e[i]) * (u[i].clamp(-limit, limit) + 1.0);
            }
        }
    }
}

multiversion! {
    /// `x = cap · tanh(x / cap)`.
    pub(crate) fn softcap(x: &mut [f32], cap: f32) {
        for c in x.chunks_mut(LANES) {
            let e = exp_lanes(load_tail(c).map(|v| v / cap * 2.0));
            for i in 0..c.len() {
                c[i] = cap * (1.0 - 2.0 / (1.0 + e[i]));
            }
        }
    }
}

/// Softmax in place, with the sum that every softmax here takes.
pub(crate) fn softmax(level: Level, x: &mut [f32]) {
    let sum = exp_scores(level, x);
    x.iter_mut().for_each(|v| *v /= sum);
}

#[cfg(test)]
mod tests {
    use super::{clamped_swiglu, gelu_mul, softcap, softmax};
    use crate::kernels::Level;

    type Gate<'a> = &'a dyn Fn(Level, &mut [f32], &[f32]);

    /// Against f64 arithmetic, and the same bits on every level and at every place of a slice.
    #[test]
    fn gates_compute_their_formulas() {
        let x: Vec<f32> = (-400..400).map(|i| i as f32 * 0.037).collect();
        let up: Vec<f32> = x.iter().rev().map(|v| v * 0.7).collect();
        let check = |run: Gate<'_>, exact: &dyn Fn(f64, f64) -> f64| {
            let mut out = x.clone();
            run(Level::detect(), &mut out, &up);
            let mut portable = x.clone();
            run(Level::Portable, &mut portable, &up);
            assert_eq!(out, portable);
            for i in 0..x.len() {
                let want = exact(f64::from(x[i]), f64::from(up[i]));
                assert!((f64::from(out[i]) - want).abs() <= 2e-6 * want.abs().max(1.0), "{} {want} {}", x[i], out[i]);
                let mut one = [x[i]];
                run(Level::detect(), &mut one, &up[i..=i]);
                assert_eq!(one[0].to_bits(), out[i].to_bits());
            }
        };
        let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
        check(&gelu_mul, &|x, u| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()) * u
        });
        check(&|l, g, u| clamped_swiglu(l, g, u, 1.702, 7.0), &|x, u| {
            let x = x.min(7.0);
            x * sigma(1.702 * x) * (u.clamp(-7.0, 7.0) + 1.0)
        });
        check(&|l, g, _| softcap(l, g, 5.0), &|x, _| 5.0 * (x / 5.0).tanh());
        let mut p = x.clone();
        softmax(Level::detect(), &mut p);
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
