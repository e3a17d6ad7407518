use super::{Features, Policy, PolicyError, Reason, in_range};

/// Escalates a fixed share of tokens by a counter-based coin keyed by (seed, position): the
/// baseline that shows what the share alone buys.
#[derive(Debug, Clone, Copy)]
pub struct Random {
    share: f32,
    seed: u64,
}

impl Random {
    /// `share` in 0..=1; `seed` should differ between requests.
    pub fn new(share: f32, seed: u64) -> Result<Self, PolicyError> {
        Ok(Self { share: in_range("random", "share", share, (0.0, 1.0), "0..=1")?, seed })
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that mixes every bit.
pub(crate) fn splitmix64(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 24 random bits as a number in 0..1.
pub(crate) fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 24) as f32
}

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn reason(&self) -> Reason {
        Reason::Random
    }

    /// Uniform in (0, 1], so that a threshold of 1 − share escalates that share.
    fn score(&self, features: &Features<'_>) -> f32 {
        1.0 - unit(splitmix64(splitmix64(self.seed) ^ u64::from(features.position_in_answer)))
    }

    fn threshold(&self) -> f32 {
        1.0 - self.share
    }
}
