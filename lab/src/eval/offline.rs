//! Rules against each other at equal cost, with both models in lock step instead of two nodes: the
//! same tokens (a test compares them), and known contexts cost nothing.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_router::policy::{Entropy, Policy, Top1};

use super::{Interval, Measure};
use crate::equal_share::{HALVINGS, at_share, quantile, scores};
use crate::error::LabError;
use crate::explore::{Explorer, Path, Rule, cloud_share};
use crate::pair::Pair;
use crate::progress::Progress;
use crate::rows::Row;

/// Shares at which the curves are measured, roughly: a threshold is set by replay and its share is
/// then measured.
const SHARES: [f64; 14] = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.125, 0.15, 0.20, 0.30];
/// Part of the distance from the edge to the cloud that a rule is asked to recover.
pub const RECOVERED: f64 = 0.9;
/// Coins of the random baseline: its exact match is their mean.
const COINS: u64 = 3;
/// Passes over the prompts, about, for a progress bar.
pub(super) const RUNS: usize = 3 + 4 * SHARES.len() + 2 * HALVINGS + COINS as usize;

/// A rule at the share of `auto`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// The rule.
    pub rule: String,
    /// Its threshold (the share, for `random`).
    pub threshold: f64,
    /// Share of tokens that the cloud decided, 0 … 1.
    pub share: f64,
    /// Mean score, 0 … 1.
    pub exact_match: f64,
    /// Share of answers equal to the cloud's token for token, 0 … 1.
    pub equals_cloud: f64,
    /// Its 95 % bootstrap interval; for `random`, that of the first coin.
    pub interval: Interval,
    /// Exact match of the rule of `auto` minus this one's, prompt by prompt, with its 95 % bootstrap
    /// interval; none for the rule of `auto` itself.
    pub behind: Option<(f64, Interval)>,
    /// Least share in the rule's curve that recovers [`RECOVERED`] of the distance from the edge to
    /// the cloud; none if none does.
    pub share_needed: Option<f64>,
}

/// Mean score over share for one rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// The rule.
    pub rule: String,
    /// Rising in share.
    pub points: Vec<CurvePoint>,
}

/// A point of a curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Threshold (the share, for `random`).
    pub threshold: f64,
    /// Share of tokens that the cloud decided, 0 … 1.
    pub share: f64,
    /// Mean score, 0 … 1.
    pub exact_match: f64,
    /// Share of answers equal to the cloud's token for token, 0 … 1.
    pub equals_cloud: f64,
}

/// Scores, prompt by prompt.
type Hits = Vec<f64>;

pub(super) struct Bench<'a> {
    pair: &'a Pair,
    rows: &'a [Row],
    measure: Measure,
    explorer: Explorer<'a>,
    /// The cloud's own paths.
    cloud: Vec<Path>,
    progress: &'a Progress,
}

impl Bench<'_> {
    fn run(&mut self, rules: &[Rule]) -> Result<Vec<Vec<Path>>, LabError> {
        self.explorer.run(rules, self.progress)
    }

    fn hits(&self, paths: &[Path]) -> Result<Hits, LabError> {
        let score = |(at, (row, path)): (usize, (&Row, &Path))| {
            let equal = self.cloud.get(at).is_some_and(|cloud| cloud.tokens == path.tokens);
            self.measure.score(row, &self.pair.text(&path.tokens)?, equal)
        };
        self.rows.iter().zip(paths).enumerate().map(score).collect()
    }

    fn point(&self, threshold: f64, paths: &[Path]) -> Result<CurvePoint, LabError> {
        let hits = self.hits(paths)?;
        let exact_match = hits.iter().sum::<f64>() / hits.len().max(1) as f64;
        let equal = paths.iter().zip(&self.cloud).filter(|(a, b)| a.tokens == b.tokens).count();
        let equals_cloud = equal as f64 / paths.len().max(1) as f64;
        Ok(CurvePoint { threshold, share: cloud_share(paths), exact_match, equals_cloud })
    }
}

/// Rules at the share of the one of `auto`, and the levels of both models alone.
#[derive(Clone, Debug)]
pub(super) struct EqualShare {
    /// The rule of `auto` first.
    pub rules: Vec<Baseline>,
    /// Exact match of the edge alone, 0 … 1.
    pub edge: f64,
    /// Of the cloud alone.
    pub cloud: f64,
}

impl<'a> Bench<'a> {
    pub(super) fn new(
        (pair, answer_tokens): (&'a Pair, usize),
        rows: &'a [Row],
        progress: &'a Progress,
    ) -> Result<Self, LabError> {
        let explorer = Explorer::new(pair, pair.prompts(rows, answer_tokens)?).with_answer_max(answer_tokens);
        Ok(Self { pair, rows, measure: Measure::of(rows), explorer, cloud: Vec::new(), progress })
    }

    /// The rule of `auto` at its own threshold, and the baselines at the share that it takes.
    pub(super) fn at_equal_share(&mut self, policy: &Arc<dyn Policy>) -> Result<EqualShare, LabError> {
        let own = Rule::Policy(policy.clone(), policy.threshold());
        let mut paths = self.run(&[own, Rule::Edge, Rule::Cloud])?;
        self.cloud = paths.pop().unwrap_or_default();
        let edge = paths.pop().unwrap_or_default();
        let auto = paths.pop().unwrap_or_default();
        let share = cloud_share(&auto);
        let own_hits = self.hits(&auto)?;
        let mut rules = vec![baseline(self, policy.name(), f64::from(policy.threshold()), &auto)?];
        let members: Vec<usize> = (0..self.rows.len()).collect();
        for (name, policy) in &rivals(policy)? {
            let (threshold, paths) = at_share(&mut self.explorer, &members, policy, &self.cloud, share, self.progress)?;
            let behind = Some(lead(&own_hits, &self.hits(&paths)?));
            rules.push(Baseline { behind, ..baseline(self, name, f64::from(threshold), &paths)? });
        }
        rules.push(random_baseline(self, share, &own_hits)?);
        let (edge, cloud) = (self.point(0.0, &edge)?.exact_match, self.point(1.0, &self.cloud)?.exact_match);
        Ok(EqualShare { rules, edge, cloud })
    }
}

/// A rule and its name.
type Named = (&'static str, Arc<dyn Policy>);

/// The baselines with a score, other than the rule of `auto`.
fn rivals(own: &Arc<dyn Policy>) -> Result<Vec<Named>, LabError> {
    let all: [Named; 2] = [("entropy", Arc::new(Entropy::new(0.0)?)), ("top1", Arc::new(Top1::new(1.0)?))];
    Ok(all.into_iter().filter(|(name, _)| *name != own.name()).collect())
}

/// Baselines at the share of the fitted rule, and all rules over a range of shares.
pub(super) fn compare(
    pair: (&Pair, usize),
    rows: &[Row],
    policy: &Arc<dyn Policy>,
    progress: &Progress,
) -> Result<(Vec<Baseline>, Vec<Curve>), LabError> {
    let mut bench = Bench::new(pair, rows, progress)?;
    let EqualShare { rules: mut baselines, edge, cloud } = bench.at_equal_share(policy)?;
    let members: Vec<usize> = (0..rows.len()).collect();
    let mut curves = Vec::new();
    let policies = std::iter::once((policy.name(), policy.clone())).chain(rivals(policy)?);
    for (name, policy) in policies {
        let mut scores = scores(&bench.explorer, &members, &bench.cloud, &*policy);
        let thresholds = SHARES.map(|share| quantile(&mut scores, share));
        let rules = thresholds.map(|t| Rule::Policy(policy.clone(), t));
        curves.push(curve(&mut bench, name, &thresholds.map(f64::from), &rules)?);
    }
    let coins = SHARES.map(|share| Rule::Random { share: share as f32, seed: 0 });
    curves.push(curve(&mut bench, "random", &SHARES, &coins)?);
    for (baseline, curve) in baselines.iter_mut().zip(&curves) {
        baseline.share_needed = share_needed(&curve.points, edge, cloud);
    }
    Ok((baselines, curves))
}

/// How far `own` is ahead of `other`.
fn lead(own: &[f64], other: &[f64]) -> (f64, Interval) {
    let differences: Hits = own.iter().zip(other).map(|(own, other)| own - other).collect();
    (differences.iter().sum::<f64>() / differences.len().max(1) as f64, Interval::of_mean(&differences))
}

/// Least share of a curve's points that recovers enough. `points` rise in share.
fn share_needed(points: &[CurvePoint], edge: f64, cloud: f64) -> Option<f64> {
    let enough = edge + RECOVERED * (cloud - edge);
    points.iter().find(|p| cloud > edge && p.exact_match >= enough - 1e-9).map(|p| p.share)
}

fn baseline(bench: &Bench<'_>, rule: &str, threshold: f64, paths: &[Path]) -> Result<Baseline, LabError> {
    let point = bench.point(threshold, paths)?;
    let interval = Interval::of_mean(&bench.hits(paths)?);
    let CurvePoint { share, exact_match, equals_cloud, .. } = point;
    let rule = rule.to_owned();
    Ok(Baseline { rule, threshold, share, exact_match, equals_cloud, interval, behind: None, share_needed: None })
}

fn random_baseline(bench: &mut Bench<'_>, share: f64, own: &[f64]) -> Result<Baseline, LabError> {
    let coins: Vec<Rule> = (0..COINS).map(|seed| Rule::Random { share: share as f32, seed }).collect();
    let paths = bench.run(&coins)?;
    let mut of_coins = Vec::with_capacity(paths.len());
    let mut hits = vec![0.0; own.len()];
    for paths in &paths {
        of_coins.push(baseline(bench, "random", share, paths)?);
        hits.iter_mut().zip(bench.hits(paths)?).for_each(|(mean, hit)| *mean += hit / COINS as f64);
    }
    let mean = |of: &dyn Fn(&Baseline) -> f64| of_coins.iter().map(of).sum::<f64>() / of_coins.len().max(1) as f64;
    Ok(Baseline {
        rule: "random".into(),
        threshold: share,
        share: mean(&|b| b.share),
        exact_match: mean(&|b| b.exact_match),
        equals_cloud: mean(&|b| b.equals_cloud),
        interval: of_coins.first().map(|b| b.interval).unwrap_or_default(),
        behind: Some(lead(own, &hits)),
        share_needed: None,
    })
}

fn curve(bench: &mut Bench<'_>, rule: &str, thresholds: &[f64], rules: &[Rule]) -> Result<Curve, LabError> {
    let paths = bench.run(rules)?;
    let points = thresholds.iter().zip(&paths).map(|(&t, paths)| bench.point(t, paths));
    let mut points = points.collect::<Result<Vec<_>, _>>()?;
    points.sort_by(|a, b| a.share.total_cmp(&b.share));
    Ok(Curve { rule: rule.to_owned(), points })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_needed_is_the_least_that_recovers_enough() {
        let point = |share, exact_match| CurvePoint { threshold: 0.5, share, exact_match, equals_cloud: 0.0 };
        let points = [point(0.02, 0.45), point(0.05, 0.54), point(0.08, 0.53), point(0.2, 0.55)];
        for (edge, cloud, needed) in
            [(0.4, 0.55, Some(0.05)), (0.4, 0.5, Some(0.05)), (0.4, 0.6, None), (0.5, 0.5, None), (0.6, 0.5, None)]
        {
            assert_eq!(share_needed(&points, edge, cloud), needed, "{edge} {cloud}");
        }
    }
}
