//! How sure a model is of its next token: features of the untempered distribution, in one pass.

use crate::constraint::TokenMask;
use crate::error::EngineError;
use crate::kernels::{Level, lanes};

/// Features of one distribution over the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Uncertainty {
    /// Shannon entropy, nats.
    pub entropy: f32,
    /// Probability of the likeliest token.
    pub top1_probability: f32,
    /// Probability of the likeliest minus that of the second.
    pub margin_probability: f32,
    /// Logit of the likeliest minus that of the second.
    pub margin_logit: f32,
    /// The likeliest token; ties go to the lowest id.
    pub top1: u32,
    /// The second likeliest token (the likeliest itself in a vocabulary of one).
    pub top2: u32,
}

/// Measures logits as the model gave them (no temperature, no penalties).
///
/// # Errors
/// [`EngineError::NotFinite`] for a NaN or infinite logit, [`EngineError::Shape`] for none at all.
pub fn measure(logits: &[f32]) -> Result<Uncertainty, EngineError> {
    let (mut top1, mut top2) = ((0, f32::NEG_INFINITY), (0, f32::NEG_INFINITY));
    for (i, &v) in logits.iter().enumerate() {
        if v > top2.1 {
            if v > top1.1 {
                top2 = top1;
                top1 = (i, v);
            } else {
                top2 = (i, v);
            }
        }
    }
    crate::sampling::check_finite(logits)?;
    if logits.len() == 1 {
        top2 = top1;
    }
    // H = ln Z − Σ p·(l − max).
    let (sum, weighted) = lanes::softmax_sums(Level::detect(), logits, top1.1);
    let second = libm::exp(f64::from(top2.1 - top1.1));
    Ok(Uncertainty {
        entropy: (libm::log(sum) - weighted / sum).max(0.0) as f32,
        top1_probability: (1.0 / sum) as f32,
        margin_probability: if logits.len() == 1 { 1.0 } else { ((1.0 - second) / sum) as f32 },
        margin_logit: if logits.len() == 1 { f32::INFINITY } else { top1.1 - top2.1 },
        top1: top1.0 as u32,
        top2: top2.0 as u32,
    })
}

/// As [`measure`], over the tokens that a grammar leaves.
///
/// # Errors
/// As [`measure`].
pub fn measure_allowed(logits: &[f32], allowed: &TokenMask) -> Result<Uncertainty, EngineError> {
    let ids: Vec<u32> = allowed.ids().take_while(|&id| (id as usize) < logits.len()).collect();
    let left: Vec<f32> = ids.iter().map(|&id| logits[id as usize]).collect();
    let u = measure(&left)?;
    Ok(Uncertainty { top1: ids[u.top1 as usize], top2: ids[u.top2 as usize], ..u })
}

#[cfg(test)]
mod tests {
    use super::measure;
    use proptest::prelude::*;

    #[test]
    fn known_distributions() {
        let u = measure(&[0.0; 8]).expect("finite");
        assert!((u.entropy - 8f32.ln()).abs() < 1e-6);
        assert_eq!((u.top1, u.top2), (0, 1));
        assert!((u.top1_probability - 0.125).abs() < 1e-7 && u.margin_probability.abs() < 1e-7);
        let u = measure(&[0.0, 100.0, 0.0]).expect("finite");
        assert!(u.entropy < 1e-6 && u.top1 == 1 && u.top2 == 0 && u.margin_logit == 100.0);
        assert!(measure(&[0.0, f32::NAN]).is_err());
        assert!(measure(&[0.0, f32::INFINITY]).is_err());
        assert!(measure(&[]).is_err());
        assert_eq!(measure(&[3.0]).expect("finite").entropy, 0.0);
    }

    proptest! {
        #[test]
        fn equals_the_definition(logits in prop::collection::vec(-20.0f32..20.0, 2..200)) {
            let u = measure(&logits).expect("finite");
            let top = logits.iter().copied().fold(f32::MIN, f32::max);
            let e: Vec<f64> = logits.iter().map(|v| f64::from(v - top).exp()).collect();
            let z: f64 = e.iter().sum();
            let entropy: f64 = e.iter().map(|e| e / z).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
            let mut p: Vec<f64> = e.iter().map(|e| e / z).collect();
            p.sort_by(|a, b| b.total_cmp(a));
            prop_assert!((f64::from(u.entropy) - entropy).abs() < 1e-5, "{} {entropy}", u.entropy);
            prop_assert!((f64::from(u.top1_probability) - p[0]).abs() < 1e-6);
            prop_assert!((f64::from(u.margin_probability) - (p[0] - p[1])).abs() < 1e-6);
        }
    }
}
