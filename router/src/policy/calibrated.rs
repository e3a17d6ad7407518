//! The calibrated rule: p̂, the probability of what the file [predicts](super::Predicts) (the cloud's
//! token makes a wrong answer right, or is merely another), from standardised scalar features and
//! optionally the hidden state, through a logistic function or a small network and a monotone
//! calibration. Escalate iff p̂ > τ: with the benefit, τ is the gain that an escalation must be worth.

use std::{cell::RefCell, sync::Arc};

use super::{Calibration, Features, HiddenInput, Network, Policy, PolicyError, PolicyFile, Reason, in_range};

/// Standardised inputs are cut here, so that one wild feature cannot outvote all others.
pub(crate) const STANDARDISED_MAX: f32 = 8.0;

thread_local! {
    // Scoring runs once per token on the decode thread: no allocation there.
    static INPUTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The calibrated rule over the parameters of a [`PolicyFile`].
#[derive(Debug, Clone)]
pub struct Calibrated {
    file: Arc<PolicyFile>,
    threshold: f32,
}

impl Calibrated {
    /// Uses `file`, which must have been checked, with τ = `threshold` or the file's own.
    pub fn new(file: Arc<PolicyFile>, threshold: Option<f32>) -> Result<Self, PolicyError> {
        let threshold = in_range("calibrated", "threshold", threshold.unwrap_or(file.threshold), (0.0, 1.0), "0..=1")?;
        Ok(Self { file, threshold })
    }
}

/// 1 / (1 + e^−x), without overflow.
pub(crate) fn sigmoid(x: f32) -> f32 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// Σ aᵢbᵢ, summed in 16 lanes: the order is fixed, and the compiler can use vector registers.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a, b) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (x, y) in a.0.iter().zip(b.0) {
        for lane in 0..16 {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let rest: f32 = a.1.iter().zip(b.1).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f32>() + rest
}

pub(crate) fn standardise(x: f32, mean: f32, std: f32) -> f32 {
    // NaN must stay NaN: it says that the model broke down.
    ((x - mean) / std).clamp(-STANDARDISED_MAX, STANDARDISED_MAX)
}

impl PolicyFile {
    /// Standardised inputs of the network for `features`, into `out`. False if the hidden state is
    /// missing or of another size than the network's, or if a number is NaN.
    pub fn inputs_into(&self, features: &Features<'_>, out: &mut Vec<f32>) -> bool {
        out.clear();
        for ((name, mean), std) in self.features.iter().zip(&self.means).zip(&self.stds) {
            out.push(standardise(name.of(features), *mean, *std));
        }
        if let Some(input) = &self.hidden {
            let Some(hidden) = features.hidden.filter(|h| h.len() == input.size()) else { return false };
            for ((x, mean), std) in hidden.iter().zip(&input.means).zip(&input.stds) {
                out.push(standardise(*x, *mean, *std));
            }
        }
        // A ReLU would turn a NaN into a quiet 0.
        out.iter().all(|x| x.is_finite())
    }
}

impl Network {
    /// The logit for standardised inputs `x`.
    #[must_use]
    pub fn logit(&self, x: &[f32]) -> f32 {
        match self {
            Self::Logistic { weights, bias } => dot(weights, x) + bias,
            Self::Mlp { weights, biases, output, output_bias, .. } => {
                let rows = weights.chunks_exact(x.len().max(1));
                let hidden = rows.zip(biases).map(|(row, bias)| (dot(row, x) + bias).max(0.0));
                hidden.zip(output).map(|(h, weight)| h * weight).sum::<f32>() + output_bias
            }
        }
    }
}

impl Calibration {
    /// The probability for a logit; never falls when the logit rises.
    #[must_use]
    pub fn apply(&self, logit: f32) -> f32 {
        match self {
            Self::Platt { slope, offset } => sigmoid(slope * logit + offset),
            Self::Isotonic { knots } => {
                let raw = sigmoid(logit);
                // The search below would take NaN for a number.
                if raw.is_nan() {
                    return raw;
                }
                let above = knots.partition_point(|[x, _]| *x <= raw);
                match (above.checked_sub(1).map(|i| knots[i]), knots.get(above).copied()) {
                    (Some([x0, p0]), Some([x1, p1])) => (p0 + (p1 - p0) * ((raw - x0) / (x1 - x0))).clamp(p0, p1),
                    (Some([_, p]), None) | (None, Some([_, p])) => p,
                    (None, None) => raw,
                }
            }
        }
    }
}

impl Policy for Calibrated {
    fn name(&self) -> &'static str {
        "calibrated"
    }

    fn reason(&self) -> Reason {
        Reason::Risk
    }

    /// p̂; NaN (escalate) where the hidden state is missing, has another size or holds a NaN.
    fn score(&self, features: &Features<'_>) -> f32 {
        INPUTS.with_borrow_mut(|inputs| {
            if !self.file.inputs_into(features, inputs) {
                return f32::NAN;
            }
            self.file.calibration.apply(self.file.network.logit(inputs))
        })
    }

    fn threshold(&self) -> f32 {
        self.threshold
    }

    fn hidden(&self) -> Option<&HiddenInput> {
        self.file.hidden.as_ref()
    }

    fn file(&self) -> Option<&PolicyFile> {
        Some(&self.file)
    }
}
