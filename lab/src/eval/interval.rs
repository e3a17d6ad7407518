//! Bootstrap intervals over prompts.

use serde::{Deserialize, Serialize};

/// Resamples.
const RESAMPLES: usize = 2000;
const SEED: u64 = 0x7a4d;

/// A 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Percentile bootstrap (Efron 1979) of the mean of `values`, the same for the same values: of scores, or of
    /// differences between two rules prompt by prompt.
    #[must_use]
    pub fn of_mean(values: &[f64]) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        let mut rng = fastrand::Rng::with_seed(SEED);
        let mut mean =
            |_| (0..values.len()).map(|_| values[rng.usize(..values.len())]).sum::<f64>() / values.len() as f64;
        let mut means: Vec<f64> = (0..RESAMPLES).map(&mut mean).collect();
        means.sort_by(f64::total_cmp);
        let at = |q: f64| means[((q * RESAMPLES as f64) as usize).min(RESAMPLES - 1)];
        Self { low: at(0.025), high: at(0.975) }
    }
}

#[cfg(test)]
mod tests {
    use super::Interval;

    #[test]
    fn intervals_are_those_of_a_proportion() {
        let hits: Vec<f64> = (0..300).map(|i| f64::from(i % 2)).collect();
        let i = Interval::of_mean(&hits);
        // The normal approximation: 0.5 ± 1.96·√(0.25/300) = 0.5 ± 0.0566.
        assert!((i.low - 0.443).abs() < 0.01 && (i.high - 0.557).abs() < 0.01, "{i:?}");
        assert_eq!(i, Interval::of_mean(&hits));
        assert_eq!(Interval::of_mean(&[1.0; 9]), Interval { low: 1.0, high: 1.0 });
        assert_eq!(Interval::of_mean(&[]), Interval::default());
        // Differences of 1, 0 and −1 in equal parts: ± 1.96·√(2/3/300) = ± 0.0924.
        let differences: Vec<f64> = (0..300).map(|i| f64::from(i % 3 - 1)).collect();
        let i = Interval::of_mean(&differences);
        assert!((i.low + 0.092).abs() < 0.015 && (i.high - 0.092).abs() < 0.015, "{i:?}");
    }
}
