//! The noise: a counter-based generator. Philox-4×32-10 (Salmon et al., SC'11) keyed by the seed,
//! with (token / 2, position) as the counter; two 64-bit draws per block.

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Third and fourth counter word: keeps this use of the generator apart from any other.
const DOMAIN: [u32; 2] = [0x7461_6e64, 0x656d_0001];

/// Philox-4×32 with ten rounds.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The noise of one position.
#[derive(Clone, Copy)]
pub(super) struct Noise {
    key: [u32; 2],
    position: u32,
}

impl Noise {
    pub(super) fn new(seed: u64, position: u32) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], position }
    }

    /// Standard Gumbel noise of a token: −ln(−ln u) with u uniform in (0, 1). `libm`, so that every
    /// machine has the same number.
    pub(super) fn gumbel(self, token: u32) -> f64 {
        of_uniform(self.uniform(token))
    }

    /// As [`Noise::gumbel`], or `None` if it is surely not above `floor`; saves the logarithms.
    pub(super) fn gumbel_above(self, token: u32, floor: f64) -> Option<f64> {
        if floor >= GUMBEL_MAX {
            return None;
        }
        let u = self.uniform(token);
        // −ln u ≥ 1 − u, so the noise is at most −ln(1 − u) ≤ ln 2 · (exponent of 1/(1 − u) + 1).
        let exponent = 1023 - ((1.0 - u).to_bits() >> 52) as i64;
        let most = std::f64::consts::LN_2 * (exponent + 1) as f64;
        if most <= floor { None } else { Some(of_uniform(u)) }
    }

    /// What the noise is a growing function of, uniform in (0, 1).
    pub(super) fn uniform(self, token: u32) -> f64 {
        let r = philox([token >> 1, self.position, DOMAIN[0], DOMAIN[1]], self.key);
        let (lo, hi) = if token.is_multiple_of(2) { (r[0], r[1]) } else { (r[2], r[3]) };
        unit((u64::from(hi) << 32 | u64::from(lo)) >> 11)
    }
}

/// 53 bits, shifted by half a step: never 0, and never 1, to which the largest would be rounded.
fn unit(bits: u64) -> f64 {
    ((bits as f64 + 0.5) * (1.0 / 9_007_199_254_740_992.0)).min(1.0 - f64::EPSILON / 2.0)
}

/// No noise of 53 bits is larger.
const GUMBEL_MAX: f64 = 38.0;

fn of_uniform(u: f64) -> f64 {
    -libm::log(-libm::log(u))
}

/// Gumbel noise of (seed, position, token).
#[must_use]
pub fn gumbel(seed: u64, position: u32, token: u32) -> f64 {
    Noise::new(seed, position).gumbel(token)
}

#[cfg(test)]
mod tests {
    use super::{GUMBEL_MAX, Noise, of_uniform, philox, unit};

    #[test]
    fn every_draw_is_finite() {
        const LAST: u64 = (1 << 53) - 1;
        for bits in [0, 1, 1 << 52, LAST - 2, LAST - 1, LAST] {
            let u = unit(bits);
            assert!(u > 0.0 && u < 1.0, "{bits}: {u}");
            assert!(of_uniform(u).is_finite() && of_uniform(u) < GUMBEL_MAX, "{bits}: {}", of_uniform(u));
        }
        // All others are what they have always been: a stream must repeat itself on any version.
        assert_eq!(unit(0), 0.5f64.powi(54));
        assert_eq!(unit(1 << 51), 0.25 + 0.5f64.powi(54));
        assert_eq!(unit(LAST - 1), 1.0 - 0.5f64.powi(52));
    }

    #[test]
    fn the_shortcut_never_hides_a_value() {
        let noise = Noise::new(3, 4);
        for token in 0..20_000 {
            let g = noise.gumbel(token);
            assert_eq!(noise.gumbel_above(token, g - 1e-12), Some(g));
            assert_eq!(noise.gumbel_above(token, f64::NEG_INFINITY), Some(g));
        }
        assert_eq!(noise.gumbel_above(0, 40.0), None);
    }

    /// Known answers of the authors' library (Random123, kat_vectors).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
