//! The choice of the threshold, in the closed loop on held-back problems.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_router::policy::{Policy, Predicts};

use super::{CalibrateOptions, Data, Known, equal_share_of};
use crate::equal_share::{quantile, scores};
use crate::error::LabError;
use crate::explore::{Explorer, Rule, cloud_share};
use crate::pair::Pair;
use crate::progress::Progress;

/// Thresholds that are tried.
const TRIED: usize = 28;

/// One threshold in the closed loop on held-back problems of the promised part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TriedThreshold {
    /// τ.
    pub threshold: f32,
    /// Share of tokens that the cloud decided, 0 … 1.
    pub share: f64,
    /// Share of answers equal to the cloud's, 0 … 1.
    pub equals_cloud: f64,
    /// Share of the distance in exact match from the edge to the cloud; none without a distance.
    pub recovered: Option<f64>,
}

impl TriedThreshold {
    /// What is kept of what the cloud gives: of its gain where answers are known to be right, of its
    /// answers elsewhere.
    fn kept(&self, predicts: Predicts) -> f64 {
        match predicts {
            Predicts::Divergence => self.equals_cloud,
            // Nothing to gain, nothing to lose.
            Predicts::Benefit => self.recovered.unwrap_or(1.0),
        }
    }
}

/// Takes the highest threshold that keeps enough, or the lowest that is cheap enough if that one is
/// cheaper. `tried` is in falling order of thresholds.
fn pick(tried: &[TriedThreshold], predicts: Predicts, kept_min: f64, share_max: f64) -> Option<f32> {
    let good = tried.iter().find(|t| t.kept(predicts) >= kept_min);
    let cheap = tried.iter().rev().find(|t| t.share <= share_max);
    match (good, cheap) {
        (Some(good), Some(cheap)) => Some(good.threshold.max(cheap.threshold)),
        (None, Some(cheap)) => Some(cheap.threshold),
        // Even the dearest share tried is too much: the highest threshold costs least.
        (_, None) => tried.first().map(|t| t.threshold),
    }
}

/// Tries thresholds and chooses one.
pub(super) fn choose(
    pair: &Pair,
    explorer: &mut Explorer<'_>,
    data: &Data<'_>,
    policy: &Arc<dyn Policy>,
    known: Known<'_>,
    options: &CalibrateOptions,
    progress: &Progress,
) -> Result<(f32, Vec<TriedThreshold>), LabError> {
    let promised = data.promised();
    let mut replayed = scores(explorer, &promised, known.cloud, &**policy);
    // Replayed shares are close to, not equal to, those of the closed loop.
    let at = |step: usize| options.share_max * (0.1 + 1.05 * step as f64 / (TRIED - 1) as f64);
    let mut thresholds: Vec<f32> = (0..TRIED).map(|step| quantile(&mut replayed, at(step))).collect();
    thresholds.dedup();
    let rules: Vec<Rule> = thresholds.iter().map(|&t| Rule::Policy(policy.clone(), t)).collect();
    let paths = explorer.run(&rules, progress)?;
    let (edge, cloud) = (data.right(pair, &promised, known.edge)?, data.right(pair, &promised, known.cloud)?);
    let mut tried = Vec::with_capacity(paths.len());
    for (&threshold, paths) in thresholds.iter().zip(&paths) {
        let auto = data.right(pair, &promised, paths)?;
        tried.push(TriedThreshold {
            threshold,
            share: cloud_share(promised.iter().map(|&i| &paths[i])),
            equals_cloud: equal_share_of(&promised, paths, known.cloud),
            recovered: (cloud > edge).then(|| (auto as f64 - edge as f64) / (cloud - edge) as f64),
        });
    }
    let chosen = pick(&tried, known.predicts, options.kept_min, options.share_max).unwrap_or(1.0);
    Ok((chosen, tried))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (τ, share, equal, recovered), dearest last.
    fn tried(rows: &[(f32, f64, f64, Option<f64>)]) -> Vec<TriedThreshold> {
        let row =
            |&(threshold, share, equals_cloud, recovered)| TriedThreshold { threshold, share, equals_cloud, recovered };
        rows.iter().map(row).collect()
    }

    #[test]
    fn the_cheapest_threshold_that_keeps_enough_is_taken() {
        let rows = tried(&[
            (0.8, 0.02, 0.6, Some(0.5)),
            (0.4, 0.06, 0.7, Some(0.95)),
            (0.2, 0.10, 0.96, Some(0.93)),
            (0.1, 0.16, 0.99, Some(1.0)),
        ]);
        for (predicts, kept_min, share_max, chosen) in [
            (Predicts::Benefit, 0.95, 0.15, 0.4),
            (Predicts::Benefit, 0.99, 0.15, 0.2),
            (Predicts::Benefit, 0.99, 0.20, 0.1),
            (Predicts::Divergence, 0.95, 0.15, 0.2),
            (Predicts::Divergence, 0.95, 0.07, 0.4),
            (Predicts::Benefit, 0.95, 0.01, 0.8),
            (Predicts::Benefit, 1.1, 0.15, 0.2),
        ] {
            assert_eq!(pick(&rows, predicts, kept_min, share_max), Some(chosen), "{predicts:?} {kept_min} {share_max}");
        }
        // Where the cloud gains nothing, the highest threshold loses nothing.
        let none = tried(&[(0.8, 0.02, 0.6, None), (0.4, 0.06, 0.7, None)]);
        assert_eq!(pick(&none, Predicts::Benefit, 0.95, 0.15), Some(0.8));
        assert_eq!(pick(&[], Predicts::Benefit, 0.95, 0.15), None);
    }
}
