//! Rules against each other at equal cost, with both models in lock step instead of two nodes: the
//! same tokens (a test compares them), and known contexts cost nothing.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_router::policy::{Calibrated, Entropy, Policy, PolicyFile, Top1};

use super::Interval;
use crate::equal_share::{HALVINGS, at_share, quantile, scores};
use crate::error::LabError;
use crate::explore::{Explorer, Path, Rule, cloud_share};
use crate::pair::Pair;
use crate::progress::Progress;
use crate::rows::Row;

/// Shares at which the curves are measured, roughly: a threshold is set by replay and its share is
/// then measured.
const SHARES: [f64; 9] = [0.02, 0.04, 0.06, 0.08, 0.10, 0.125, 0.15, 0.20, 0.30];
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
    /// Exact match, 0 … 1.
    pub exact_match: f64,
    /// Share of answers equal to the cloud's token for token, 0 … 1.
    pub equals_cloud: f64,
    /// Its 95 % bootstrap interval; for `random`, that of the first coin.
    pub interval: Interval,
}

/// Exact match over share for one rule.
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
    /// Exact match, 0 … 1.
    pub exact_match: f64,
    /// Share of answers equal to the cloud's token for token, 0 … 1.
    pub equals_cloud: f64,
}

struct Bench<'a> {
    pair: &'a Pair,
    rows: &'a [Row],
    explorer: Explorer<'a>,
    /// The cloud's own paths.
    cloud: Vec<Path>,
    progress: &'a Progress,
}

impl Bench<'_> {
    fn run(&mut self, rules: &[Rule]) -> Result<Vec<Vec<Path>>, LabError> {
        self.explorer.run(rules, self.progress)
    }

    fn right(&self, paths: &[Path]) -> Result<Vec<bool>, LabError> {
        self.rows.iter().zip(paths).map(|(row, path)| Ok(row.is_right(&self.pair.text(&path.tokens)?))).collect()
    }

    fn point(&self, threshold: f64, paths: &[Path]) -> Result<CurvePoint, LabError> {
        let right = self.right(paths)?;
        let exact_match = right.iter().filter(|r| **r).count() as f64 / right.len().max(1) as f64;
        let equal = paths.iter().zip(&self.cloud).filter(|(a, b)| a.tokens == b.tokens).count();
        let equals_cloud = equal as f64 / paths.len().max(1) as f64;
        Ok(CurvePoint { threshold, share: cloud_share(paths), exact_match, equals_cloud })
    }
}

/// Baselines at the share of the fitted rule, and all rules over a range of shares.
pub(super) fn compare(
    pair: &Pair,
    rows: &[Row],
    file: &Arc<PolicyFile>,
    progress: &Progress,
) -> Result<(Vec<Baseline>, Vec<Curve>), LabError> {
    let prompts = rows.iter().map(|r| pair.prompt(&r.prompt)).collect::<Result<_, _>>()?;
    let mut bench = Bench { pair, rows, explorer: Explorer::new(pair, prompts), cloud: Vec::new(), progress };
    let members: Vec<usize> = (0..rows.len()).collect();
    let calibrated: Arc<dyn Policy> = Arc::new(Calibrated::new(file.clone(), None)?);
    let policies: [(&str, Arc<dyn Policy>); 3] = [
        ("calibrated", calibrated.clone()),
        ("entropy", Arc::new(Entropy::new(0.0)?)),
        ("top1", Arc::new(Top1::new(1.0)?)),
    ];
    let own = Rule::Policy(calibrated.clone(), calibrated.threshold());
    let mut paths = bench.run(&[own, Rule::Edge, Rule::Cloud])?;
    bench.cloud = paths.pop().unwrap_or_default();
    let auto = paths.swap_remove(0);
    let share = cloud_share(&auto);

    let mut baselines = vec![baseline(&bench, "calibrated", f64::from(calibrated.threshold()), &auto)?];
    for (name, policy) in &policies[1..] {
        let (threshold, paths) = at_share(&mut bench.explorer, &members, policy, &bench.cloud, share, progress)?;
        baselines.push(baseline(&bench, name, f64::from(threshold), &paths)?);
    }
    baselines.push(random_baseline(&mut bench, share)?);

    let mut curves = Vec::new();
    for (name, policy) in &policies {
        let mut scores = scores(&bench.explorer, &members, &bench.cloud, &**policy);
        let thresholds = SHARES.map(|share| quantile(&mut scores, share));
        let rules = thresholds.map(|t| Rule::Policy(policy.clone(), t));
        curves.push(curve(&mut bench, name, &thresholds.map(f64::from), &rules)?);
    }
    let coins = SHARES.map(|share| Rule::Random { share: share as f32, seed: 0 });
    curves.push(curve(&mut bench, "random", &SHARES, &coins)?);
    Ok((baselines, curves))
}

fn baseline(bench: &Bench<'_>, rule: &str, threshold: f64, paths: &[Path]) -> Result<Baseline, LabError> {
    let point = bench.point(threshold, paths)?;
    let interval = Interval::of(&bench.right(paths)?);
    let CurvePoint { share, exact_match, equals_cloud, .. } = point;
    Ok(Baseline { rule: rule.to_owned(), threshold, share, exact_match, equals_cloud, interval })
}

fn random_baseline(bench: &mut Bench<'_>, share: f64) -> Result<Baseline, LabError> {
    let coins: Vec<Rule> = (0..COINS).map(|seed| Rule::Random { share: share as f32, seed }).collect();
    let paths = bench.run(&coins)?;
    let mut of_coins = Vec::with_capacity(paths.len());
    for paths in &paths {
        of_coins.push(baseline(bench, "random", share, paths)?);
    }
    let mean = |of: &dyn Fn(&Baseline) -> f64| of_coins.iter().map(of).sum::<f64>() / of_coins.len().max(1) as f64;
    Ok(Baseline {
        rule: "random".into(),
        threshold: share,
        share: mean(&|b| b.share),
        exact_match: mean(&|b| b.exact_match),
        equals_cloud: mean(&|b| b.equals_cloud),
        interval: of_coins.first().map(|b| b.interval).unwrap_or_default(),
    })
}

fn curve(bench: &mut Bench<'_>, rule: &str, thresholds: &[f64], rules: &[Rule]) -> Result<Curve, LabError> {
    let paths = bench.run(rules)?;
    let points = thresholds.iter().zip(&paths).map(|(&t, paths)| bench.point(t, paths));
    let mut points = points.collect::<Result<Vec<_>, _>>()?;
    points.sort_by(|a, b| a.share.total_cmp(&b.share));
    Ok(Curve { rule: rule.to_owned(), points })
}
