//! Vector kernels written once over eight lanes. Each is compiled twice: as plain Rust and, inside a
//! function with AVX2 + FMA enabled, for the vector units. Rust never reorders float arithmetic, so
//! both have the same bits.

use super::Level;

/// Lanes of every horizontal sum.
pub(crate) const LANES: usize = 8;

/// Compiles the body for the portable level and for AVX2 (which AVX-512 machines have too), and picks by `level`.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name(level: Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn with_avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if level != Level::Portable {
                    // SAFETY: the other levels are made only by `Level::all`, which has seen these features.
                    return unsafe { with_avx2($($arg),*) };
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = level;
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Folds eight lanes in the order that every kernel uses.
#[inline(always)]
pub(crate) fn fold(l: [f32; LANES]) -> f32 {
    ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7]))
}

/// Loads up to eight numbers; missing lanes are zero.
#[inline(always)]
pub(crate) fn load_tail(x: &[f32]) -> [f32; LANES] {
    let mut l = [0.0; LANES];
    l[..x.len()].copy_from_slice(x);
    l
}

#[inline(always)]
fn load(x: &[f32]) -> [f32; LANES] {
    let mut l = [0.0; LANES];
    l.copy_from_slice(&x[..LANES]);
    l
}

/// e^x per lane: Cody–Waite reduction and a degree-6 polynomial (Cephes' coefficients), about 1 ulp.
/// Inputs are clamped to ±87, so the result is always normal and finite.
#[inline(always)]
pub(crate) fn exp_lanes(x: [f32; LANES]) -> [f32; LANES] {
    // Adding 1.5·2^23 rounds to the nearest integer and leaves it in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        let v = x[i].clamp(-87.0, 87.0);
        let t = v.mul_add(std::f32::consts::LOG2_E, MAGIC);
        let n = t - MAGIC;
        let r = n.mul_add(-0.693_359_4, v);
        let r = n.mul_add(2.121_944_4e-4, r);
        let mut p = 1.987_569_1e-4_f32;
        p = p.mul_add(r, 1.398_199_9e-3);
        p = p.mul_add(r, 8.333_452e-3);
        p = p.mul_add(r, 4.166_579_6e-2);
        p = p.mul_add(r, 1.666_666_5e-1);
        p = p.mul_add(r, 0.5);
        let y = p.mul_add(r * r, r) + 1.0;
        let exponent = t.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127) << 23;
        out[i] = y * f32::from_bits(exponent);
    }
    out
}

multiversion! {
    /// `out = x · weight / sqrt(mean(x²) + eps)`. All slices have one length.
    pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let mut sums = [[0.0f32; LANES]; 2];
        let mut chunks = x.chunks_exact(2 * LANES);
        for c in &mut chunks {
            for h in 0..2 {
                let l = load(&c[h * LANES..]);
                for i in 0..LANES {
                    sums[h][i] = l[i].mul_add(l[i], sums[h][i]);
                }
            }
        }
        for (h, c) in chunks.remainder().chunks(LANES).enumerate() {
            let l = load_tail(c);
            for i in 0..LANES {
                sums[h][i] = l[i].mul_add(l[i], sums[h][i]);
            }
        }
        let mut lanes = sums[0];
        for i in 0..LANES {
            lanes[i] += sums[1][i];
        }
        let scale = 1.0 / (fold(lanes) / x.len() as f32 + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

multiversion! {
    /// `x += y`.
    pub(crate) fn add(x: &mut [f32], y: &[f32]) {
        for (a, b) in x.iter_mut().zip(y) {
            *a += b;
        }
    }
}

multiversion! {
    /// `x += w · y`, fused.
    pub(crate) fn add_scaled(x: &mut [f32], w: f32, y: &[f32]) {
        for (a, b) in x.iter_mut().zip(y) {
            *a = w.mul_add(*b, *a);
        }
    }
}

multiversion! {
    /// `gate = silu(gate) · up`.
    pub(crate) fn silu_mul(gate: &mut [f32], up: &[f32]) {
        let mut g = gate.chunks_exact_mut(LANES);
        let mut u = up.chunks_exact(LANES);
        for (g, u) in (&mut g).zip(&mut u) {
            let v = load(g);
            let e = exp_lanes(v.map(|v| -v));
            for i in 0..LANES {
                g[i] = v[i] / (1.0 + e[i]) * u[i];
            }
        }
        let (g, u) = (g.into_remainder(), u.remainder());
        let e = exp_lanes(load_tail(g).map(|v| -v));
        for i in 0..g.len() {
            g[i] = g[i] / (1.0 + e[i]) * u[i];
        }
    }
}

multiversion! {
    /// Logistic function in place.
    pub(crate) fn sigmoid(x: &mut [f32]) {
        for c in x.chunks_mut(LANES) {
            let e = exp_lanes(load_tail(c).map(|v| -v));
            for (v, e) in c.iter_mut().zip(e) {
                *v = 1.0 / (1.0 + e);
            }
        }
    }
}

multiversion! {
    /// Replaces scores by `exp(score − max)` and returns their sum (the caller divides).
    /// Depends only on the scores before it, never on what lies behind the slice.
    pub(crate) fn exp_scores(scores: &mut [f32]) -> f32 {
        let mut tops = [f32::NEG_INFINITY; LANES];
        let mut chunks = scores.chunks_exact(LANES);
        for c in &mut chunks {
            let v = load(c);
            for i in 0..LANES {
                tops[i] = if v[i] > tops[i] { v[i] } else { tops[i] };
            }
        }
        for (t, v) in tops.iter_mut().zip(chunks.remainder()) {
            *t = if *v > *t { *v } else { *t };
        }
        let top = tops.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut sums = [0.0f32; LANES];
        let mut chunks = scores.chunks_exact_mut(LANES);
        for c in &mut chunks {
            let e = exp_lanes(load(c).map(|v| v - top));
            c.copy_from_slice(&e);
            for i in 0..LANES {
                sums[i] += e[i];
            }
        }
        let c = chunks.into_remainder();
        let e = exp_lanes(load_tail(c).map(|v| v - top));
        for i in 0..c.len() {
            c[i] = e[i];
            sums[i] += e[i];
        }
        fold(sums)
    }
}

multiversion! {
    /// Rotates pairs in place: `(a, b) → (a·cos − b·sin, b·cos + a·sin)`. Interleaved pairs are
    /// neighbours, otherwise element `i` pairs with `i + len/2`. `cos` and `sin` have `x.len()/2` entries.
    pub(crate) fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32], interleaved: bool) {
        if interleaved {
            for ((p, c), s) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
                let (a, b) = (p[0], p[1]);
                p[0] = a.mul_add(*c, -(b * s));
                p[1] = b.mul_add(*c, a * s);
            }
        } else {
            let (lo, hi) = x.split_at_mut(cos.len());
            for (((a, b), c), s) in lo.iter_mut().zip(hi).zip(cos).zip(sin) {
                let (x, y) = (*a, *b);
                *a = x.mul_add(*c, -(y * s));
                *b = y.mul_add(*c, x * s);
            }
        }
    }
}

multiversion! {
    /// `(Σ e^d, Σ d·e^d)` with `d = x − top`. Lanes hold short runs only and the runs are added in
    /// f64, so that a large vocabulary costs no precision.
    pub(crate) fn softmax_sums(x: &[f32], top: f32) -> (f64, f64) {
        const RUN: usize = 512;
        let (mut total, mut weighted) = (0.0f64, 0.0f64);
        for run in x.chunks(RUN) {
            let (mut sums, mut products) = ([0.0f32; LANES], [0.0f32; LANES]);
            let mut chunks = run.chunks_exact(LANES);
            for c in &mut chunks {
                let d = load(c).map(|v| v - top);
                let e = exp_lanes(d);
                for i in 0..LANES {
                    sums[i] += e[i];
                    products[i] = d[i].mul_add(e[i], products[i]);
                }
            }
            let c = chunks.remainder();
            let d = load_tail(c).map(|v| v - top);
            let e = exp_lanes(d);
            for i in 0..c.len() {
                sums[i] += e[i];
                products[i] = d[i].mul_add(e[i], products[i]);
            }
            total += f64::from(fold(sums));
            weighted += f64::from(fold(products));
        }
        (total, weighted)
    }
}
