//! Fits the escalation rule on recorded paths of both models and chooses its threshold.
//!
//! Nothing here reads the evaluation files. The problems (not the rows, not the tokens) are split in
//! two: on one part the rule is fitted, on the other it is measured and its threshold chosen.
//! Contexts are those that a corrected answer really visits: the paths of a plain confidence rule,
//! of the cloud alone, and, in a second round, of the rule that the first round gave.

mod report;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tandem_router::policy::fit::{FitConfig, Fitted, Provenance, Sample, ScoredRequest, fit, operating_points};
use tandem_router::policy::{Calibrated, FeatureName, HiddenState, Policy, PolicyFile, PolicySpec, Quality};

pub use report::{CalibrateReport, Measured, PartReport, TriedThreshold};

use crate::error::LabError;
use crate::explore::{Explorer, Path, Rule, cloud_share};
use crate::pair::Pair;
use crate::progress::Progress;
use crate::rows::{Row, problems};

/// Rows of the table of operating points in the file.
const TABLE_ROWS: usize = 65;
/// Thresholds that are tried in the closed loop.
const TRIED: usize = 16;
/// Part of the data whose mix the share is promised for.
const PROMISED_PART: &str = "fresh";

/// How to calibrate.
#[derive(Clone, Debug)]
pub struct CalibrateOptions {
    /// Largest share of tokens that the cloud may decide at the default threshold, on fresh problems.
    pub share: f64,
    /// Probability under which the confidence rule of the first round asks the cloud.
    pub teacher: f32,
    /// Rounds; each after the first adds the paths of the rule fitted before it.
    pub rounds: usize,
    /// Share of the problems that are kept for measuring.
    pub measured_share: f64,
    /// Network, training and seed.
    pub fit: FitConfig,
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        let mut features = FeatureName::ALL.to_vec();
        // They depend on other requests and on the link: a threshold must mean the same everywhere.
        features.retain(|f| !matches!(f, FeatureName::RunningAcceptance | FeatureName::UnverifiedTail));
        let fit = FitConfig {
            features,
            // What the edge node passes to the policy.
            hidden: Some(HiddenState::Raw),
            units: Some(32),
            epochs: 12,
            weight_decay: 0.1,
            seed: 1,
            ..FitConfig::default()
        };
        Self { share: 0.125, teacher: 0.9, rounds: 2, measured_share: 0.25, fit }
    }
}

/// The data with its split.
struct Data<'a> {
    rows: &'a [Row],
    problems: Vec<u32>,
    measured: Vec<bool>,
}

impl<'a> Data<'a> {
    fn split(rows: &'a [Row], share: f64, seed: u64) -> Self {
        let problems = problems(rows);
        let coin = |problem: u32| fastrand::Rng::with_seed(seed.rotate_left(32) ^ u64::from(problem)).f64() < share;
        let measured = problems.iter().map(|&p| coin(p)).collect();
        Self { rows, problems, measured }
    }

    fn measured(&self) -> impl Iterator<Item = usize> + Clone {
        (0..self.rows.len()).filter(|&i| self.measured[i])
    }

    /// Measured rows of the part whose share is promised; all of them in data without parts.
    fn promised(&self) -> Vec<usize> {
        let of_part: Vec<usize> = self.measured().filter(|&i| self.rows[i].part == PROMISED_PART).collect();
        if of_part.is_empty() { self.measured().collect() } else { of_part }
    }
}

/// Fits the rule on `rows` and returns the file with a report.
///
/// # Errors
/// A model fails, or the rows hold too few disagreements to fit anything.
pub fn calibrate(
    pair: &Pair,
    rows: &[Row],
    options: &CalibrateOptions,
    progress: &Progress,
) -> Result<(PolicyFile, CalibrateReport), LabError> {
    let data = Data::split(rows, options.measured_share, options.fit.seed);
    let prompts = rows.iter().map(|r| pair.prompt(&r.prompt)).collect::<Result<_, _>>()?;
    let mut explorer = Explorer::new(pair, prompts);
    let teacher = PolicySpec::Top1 { probability: options.teacher }.build(None)?;
    let teacher = Rule::Policy(teacher.clone(), teacher.threshold());
    let mut paths = explorer.run(&[teacher, Rule::Cloud, Rule::Edge], progress)?;
    let edge = paths.pop().unwrap_or_default();
    let cloud = paths.pop().unwrap_or_default();
    let on_policy = paths.pop().unwrap_or_default();

    let mut visited: Vec<Vec<u32>> = (0..rows.len()).map(|i| merged(&[&on_policy[i], &cloud[i]])).collect();
    let mut fitted = fit_on(&explorer, &data, &visited, options)?;
    for _ in 1..options.rounds.max(1) {
        let rule = Arc::new(draft_file(pair, &fitted)?);
        let policy: Arc<dyn Policy> = Arc::new(Calibrated::new(rule, None)?);
        let fitting = (0..rows.len()).filter(|&i| !data.measured[i]);
        let threshold = quantile(fitting.flat_map(|i| scores(&explorer, i, &cloud[i], &*policy)), options.share);
        let more = explorer.run(&[Rule::Policy(policy, threshold)], progress)?;
        for (seen, path) in visited.iter_mut().zip(&more[0]) {
            seen.extend(&path.nodes);
            seen.sort_unstable();
            seen.dedup();
        }
        fitted = fit_on(&explorer, &data, &visited, options)?;
    }

    let policy: Arc<dyn Policy> = Arc::new(Calibrated::new(Arc::new(draft_file(pair, &fitted)?), None)?);
    let (threshold, tried) = choose_threshold(&mut explorer, &data, &policy, &cloud, options.share, progress)?;
    let requests: Vec<ScoredRequest> = data.measured().map(|i| scored(&explorer, i, &cloud[i], &*policy)).collect();
    let quality = operating_points(&requests, TABLE_ROWS);
    let chosen = explorer.run(&[Rule::Policy(policy.clone(), threshold)], progress)?;
    let report = CalibrateReport {
        rows: rows.len(),
        measured_rows: data.measured().count(),
        samples: fitted.report.fitted + fitted.report.calibrated,
        epoch: fitted.report.epoch,
        threshold,
        tried,
        measured: Measured::all(&explorer, data.measured().map(|i| (i, &cloud[i])), &*policy),
        parts: PartReport::all(pair, &data, [&edge, &cloud, &chosen[0]])?,
    };
    let fitted_on = format!(
        "{} calibration rows ({} tokens, {} held back by problem for measuring), seed {}",
        rows.len(),
        report.samples,
        report.measured_rows,
        options.fit.seed
    );
    let file = fitted.file(provenance(pair, fitted_on), threshold, quality)?;
    Ok((file, report))
}

fn provenance(pair: &Pair, fitted_on: String) -> Provenance {
    Provenance { edge_model: pair.edge.digest().to_string(), cloud_model: pair.cloud.digest().to_string(), fitted_on }
}

/// A file without a table, for scoring.
fn draft_file(pair: &Pair, fitted: &Fitted) -> Result<PolicyFile, LabError> {
    let quality = Quality { requests: 0, edge_risk: 0.0, points: Vec::new() };
    Ok(fitted.file(provenance(pair, String::new()), 0.5, quality)?)
}

/// Contexts that any of the paths visits.
fn merged(paths: &[&Path]) -> Vec<u32> {
    let mut all: Vec<u32> = paths.iter().flat_map(|p| p.nodes.iter().copied()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn fit_on(
    explorer: &Explorer<'_>,
    data: &Data<'_>,
    visited: &[Vec<u32>],
    options: &CalibrateOptions,
) -> Result<Fitted, LabError> {
    let mut samples = Vec::new();
    for (i, nodes) in visited.iter().enumerate().filter(|(i, _)| !data.measured[*i]) {
        let known = explorer.nodes(i);
        samples.extend(nodes.iter().map(|&at| &known[at as usize]).map(|node| Sample {
            features: node.scalars(),
            hidden: node.hidden.clone(),
            label: node.differs(),
            request: data.problems[i],
        }));
    }
    Ok(fit(&samples, &options.fit)?)
}

fn scores<'a>(
    explorer: &'a Explorer<'_>,
    i: usize,
    path: &'a Path,
    policy: &'a dyn Policy,
) -> impl Iterator<Item = f32> + 'a {
    path.nodes.iter().map(move |&at| policy.score(&explorer.nodes(i)[at as usize].features()))
}

fn scored(explorer: &Explorer<'_>, i: usize, path: &Path, policy: &dyn Policy) -> ScoredRequest {
    let known = explorer.nodes(i);
    let token = |&at: &u32| (policy.score(&known[at as usize].features()), known[at as usize].differs());
    ScoredRequest { tokens: path.nodes.iter().map(token).collect() }
}

/// The score that a share of `share` of the scores is above.
pub(crate) fn quantile(scores: impl Iterator<Item = f32>, share: f64) -> f32 {
    let mut scores: Vec<f32> = scores.collect();
    scores.sort_by(f32::total_cmp);
    let at = ((1.0 - share.clamp(0.0, 1.0)) * scores.len() as f64) as usize;
    scores.get(at.min(scores.len().saturating_sub(1))).copied().unwrap_or(1.0)
}

/// Tries thresholds in the closed loop on held-back problems and takes the lowest whose share is
/// within the bound: quality can only gain from asking more.
fn choose_threshold(
    explorer: &mut Explorer<'_>,
    data: &Data<'_>,
    policy: &Arc<dyn Policy>,
    cloud: &[Path],
    share: f64,
    progress: &Progress,
) -> Result<(f32, Vec<TriedThreshold>), LabError> {
    let promised = data.promised();
    let replayed: Vec<f32> = promised.iter().flat_map(|&i| scores(explorer, i, &cloud[i], &**policy)).collect();
    // Replayed shares are close to, not equal to, those of the closed loop.
    let at = |step: usize| share * (0.6 + 0.8 * step as f64 / (TRIED - 1) as f64);
    let mut thresholds: Vec<f32> = (0..TRIED).map(|step| quantile(replayed.iter().copied(), at(step))).collect();
    thresholds.dedup();
    let rules: Vec<Rule> = thresholds.iter().map(|&t| Rule::Policy(policy.clone(), t)).collect();
    let paths = explorer.run(&rules, progress)?;
    let tried: Vec<TriedThreshold> = thresholds
        .iter()
        .zip(&paths)
        .map(|(&threshold, paths)| {
            let equal = promised.iter().filter(|&&i| paths[i].tokens == cloud[i].tokens).count();
            TriedThreshold {
                threshold,
                share: cloud_share(promised.iter().map(|&i| &paths[i])),
                equals_cloud: equal as f64 / promised.len().max(1) as f64,
            }
        })
        .collect();
    let within = tried.iter().filter(|t| t.share <= share).min_by(|a, b| a.threshold.total_cmp(&b.threshold));
    let threshold = within.map_or_else(|| thresholds.first().copied().unwrap_or(1.0), |t| t.threshold);
    Ok((threshold, tried))
}
