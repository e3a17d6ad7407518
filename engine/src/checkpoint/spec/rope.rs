//! Rotary position embeddings as data, and their frequencies.

use crate::error::EngineError;

/// A rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Pairs are neighbours (GGUF Llama, DeepSeek); otherwise halves are paired.
    pub interleaved: bool,
    /// Stretching of the frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths longer than `original / low` are divided.
        low: f32,
        /// Wavelengths shorter than `original / high` are kept.
        high: f32,
        /// Context length of the original training.
        original: f32,
    },
    /// YaRN: low frequencies divided, high ones kept, a ramp over the index of the pair between.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Pairs that turn more often than this over the original context are kept.
        fast: f32,
        /// Pairs that turn less often are divided.
        slow: f32,
        /// Context length of the original training.
        original: f32,
        /// The ramp begins and ends at whole pairs.
        whole: bool,
        /// Cosines and sines are multiplied by this.
        magnitude: f32,
    },
    /// A divisor per frequency (longrope; Llama 3 in GGUF).
    Factors {
        /// One per pair.
        divisors: Vec<f32>,
        /// Cosines and sines are multiplied by this.
        magnitude: f32,
    },
    /// A divisor per frequency, and then stretched (GGUF files with factors beside YaRN).
    Divided {
        /// One per pair.
        divisors: Vec<f32>,
        /// What the divided frequencies go through.
        then: Box<RopeScaling>,
    },
}

impl RopeScaling {
    /// Factor on cosines and sines.
    pub(crate) fn magnitude(&self) -> f64 {
        match self {
            Self::Yarn { magnitude, .. } | Self::Factors { magnitude, .. } => f64::from(*magnitude),
            Self::Divided { then, .. } => then.magnitude(),
            Self::None | Self::Linear { .. } | Self::Llama3 { .. } => 1.0,
        }
    }

    /// What comes after any divisors.
    pub(super) fn last_mut(&mut self) -> &mut Self {
        match self {
            Self::Divided { then, .. } => then.last_mut(),
            other => other,
        }
    }

    pub(super) fn check(&self, dim: usize) -> Result<(), EngineError> {
        match self {
            Self::Factors { divisors, .. } | Self::Divided { divisors, .. } if divisors.len() != dim / 2 => {
                Err(EngineError::spec(
                    "rope_scaling",
                    format!("has {} factors, {} pairs are rotated", divisors.len(), dim / 2),
                ))
            }
            Self::Factors { divisors, .. } | Self::Divided { divisors, .. }
                if !divisors.iter().all(|d| d.is_finite() && *d > 0.0) =>
            {
                Err(EngineError::spec("rope_scaling", "holds a factor that is not positive"))
            }
            _ => Ok(()),
        }
    }
}

/// `1 + 0.1 · m · ln(factor)`: YaRN's correction of the attention's temperature.
pub(super) fn yarn_magnitude(factor: f32, m: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1f32.mul_add(m * libm::logf(factor), 1.0) }
}

impl Rope {
    /// Radians per position of pair `i` of `dim / 2`.
    pub(crate) fn frequency(&self, i: usize, dim: usize) -> f64 {
        let theta = f64::from(self.theta);
        self.stretched(&self.scaling, libm::pow(theta, -((2 * i) as f64) / dim as f64), i, dim)
    }

    /// What `scaling` makes of the frequency `f` of pair `i`.
    fn stretched(&self, scaling: &RopeScaling, f: f64, i: usize, dim: usize) -> f64 {
        let turn = 2.0 * std::f64::consts::PI;
        match scaling {
            RopeScaling::None => f,
            RopeScaling::Divided { divisors, then } => self.stretched(then, f / f64::from(divisors[i]), i, dim),
            RopeScaling::Linear { factor } => f / f64::from(*factor),
            RopeScaling::Factors { divisors, .. } => f / f64::from(divisors[i]),
            &RopeScaling::Llama3 { factor, low, high, original } => {
                let (factor, low, high) = (f64::from(factor), f64::from(low), f64::from(high));
                let turns = f64::from(original) * f / turn;
                if turns < low {
                    f / factor
                } else if turns > high {
                    f
                } else {
                    let keep = (turns - low) / (high - low);
                    (1.0 - keep) * f / factor + keep * f
                }
            }
            &RopeScaling::Yarn { factor, fast, slow, original, whole, .. } => {
                // The (fractional) pair that turns `turns` times over the original context.
                let pair = |turns: f32| {
                    let n = libm::log(f64::from(original) / (f64::from(turns) * turn));
                    dim as f64 * n / (2.0 * libm::log(f64::from(self.theta)))
                };
                let (mut from, mut to) = (pair(fast), pair(slow));
                if whole {
                    (from, to) = (libm::floor(from), libm::ceil(to));
                }
                (from, to) = (from.max(0.0), to.min(dim as f64 - 1.0));
                let span = if from == to { 0.001 } else { to - from };
                let divided = ((i as f64 - from) / span).clamp(0.0, 1.0);
                f / f64::from(factor) * divided + f * (1.0 - divided)
            }
        }
    }
}
