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
    /// Percentile bootstrap (Efron 1979) of the mean of `hits`, the same for the same hits.
    #[must_use]
    pub fn of(hits: &[bool]) -> Self {
        if hits.is_empty() {
            return Self::default();
        }
        let mut rng = fastrand::Rng::with_seed(SEED);
        let mut means: Vec<f64> = (0..RESAMPLES)
            .map(|_| (0..hits.len()).filter(|_| hits[rng.usize(..hits.len())]).count() as f64 / hits.len() as f64)
            .collect();
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
        let hits: Vec<bool> = (0..300).map(|i| i % 2 == 0).collect();
        let i = Interval::of(&hits);
        // The normal approximation: 0.5 ± 1.96·√(0.25/300) = 0.5 ± 0.0566.
        assert!((i.low - 0.443).abs() < 0.01 && (i.high - 0.557).abs() < 0.01, "{i:?}");
        assert_eq!(i, Interval::of(&hits));
        assert_eq!(Interval::of(&[true; 9]), Interval { low: 1.0, high: 1.0 });
        assert_eq!(Interval::of(&[]), Interval::default());
    }
}
