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
use tandem_router::policy::{
    Calibrated, Entropy, FeatureName, HiddenState, Policy, PolicyFile, PolicySpec, Quality, Top1,
};

pub use report::{CalibrateReport, Measured, PartReport, Rival, TriedThreshold};

use crate::equal_share::{at_share, quantile, scores};
use crate::error::LabError;
use crate::explore::{Explorer, Path, Rule, cloud_share};
use crate::pair::Pair;
use crate::progress::Progress;
use crate::rows::{Row, problems};

/// Rows of the table of operating points in the file.
const TABLE_ROWS: usize = 65;
/// Thresholds that are tried in the closed loop.
const TRIED: usize = 24;
/// Part of the data whose mix the share is promised for.
const PROMISED_PART: &str = "fresh";

/// How to calibrate.
#[derive(Clone, Debug)]
pub struct CalibrateOptions {
    /// Least share of answers that must equal the cloud's at the default threshold, on fresh
    /// problems: the cheapest threshold that does it is taken,
    pub equals_cloud_min: f64,
    /// unless the cloud then decides more than this share of the tokens.
    pub share_max: f64,
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
            epochs: 8,
            weight_decay: 1.0,
            seed: 1,
            ..FitConfig::default()
        };
        Self { equals_cloud_min: 0.95, share_max: 0.15, teacher: 0.9, rounds: 2, measured_share: 0.25, fit }
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
        let fitting: Vec<usize> = (0..rows.len()).filter(|&i| !data.measured[i]).collect();
        let threshold = quantile(&mut scores(&explorer, &fitting, &cloud, &*policy), options.share_max);
        let more = explorer.run(&[Rule::Policy(policy, threshold)], progress)?;
        for (seen, path) in visited.iter_mut().zip(&more[0]) {
            seen.extend(&path.nodes);
            seen.sort_unstable();
            seen.dedup();
        }
        fitted = fit_on(&explorer, &data, &visited, options)?;
    }

    let policy: Arc<dyn Policy> = Arc::new(Calibrated::new(Arc::new(draft_file(pair, &fitted)?), None)?);
    let (threshold, tried) = choose_threshold(&mut explorer, &data, &policy, &cloud, options, progress)?;
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
        rivals: rivals(pair, &mut explorer, &data, (threshold, &chosen[0]), &cloud, progress)?,
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

fn scored(explorer: &Explorer<'_>, i: usize, path: &Path, policy: &dyn Policy) -> ScoredRequest {
    let known = explorer.nodes(i);
    let token = |&at: &u32| (policy.score(&known[at as usize].features()), known[at as usize].differs());
    ScoredRequest { tokens: path.nodes.iter().map(token).collect() }
}

/// Tries thresholds in the closed loop on held-back problems and takes the highest that is good
/// enough, or the lowest that is cheap enough if that one is cheaper.
fn choose_threshold(
    explorer: &mut Explorer<'_>,
    data: &Data<'_>,
    policy: &Arc<dyn Policy>,
    cloud: &[Path],
    options: &CalibrateOptions,
    progress: &Progress,
) -> Result<(f32, Vec<TriedThreshold>), LabError> {
    let promised = data.promised();
    let mut replayed = scores(explorer, &promised, cloud, &**policy);
    // Replayed shares are close to, not equal to, those of the closed loop.
    let at = |step: usize| options.share_max * (0.3 + 0.9 * step as f64 / (TRIED - 1) as f64);
    let mut thresholds: Vec<f32> = (0..TRIED).map(|step| quantile(&mut replayed, at(step))).collect();
    thresholds.dedup();
    let rules: Vec<Rule> = thresholds.iter().map(|&t| Rule::Policy(policy.clone(), t)).collect();
    let paths = explorer.run(&rules, progress)?;
    let tried: Vec<TriedThreshold> = thresholds
        .iter()
        .zip(&paths)
        .map(|(&threshold, paths)| TriedThreshold {
            threshold,
            share: cloud_share(promised.iter().map(|&i| &paths[i])),
            equals_cloud: equal_share_of(&promised, paths, cloud),
        })
        .collect();
    // Largest thresholds first, as their shares rise.
    let good = tried.iter().find(|t| t.equals_cloud >= options.equals_cloud_min);
    let cheap = tried.iter().rev().find(|t| t.share <= options.share_max);
    let chosen = match (good, cheap) {
        (Some(good), Some(cheap)) => good.threshold.max(cheap.threshold),
        (None, Some(cheap)) => cheap.threshold,
        (_, None) => thresholds.first().copied().unwrap_or(1.0),
    };
    Ok((chosen, tried))
}

/// Share of the answers to `members` that equal the cloud's, 0 … 1.
fn equal_share_of(members: &[usize], paths: &[Path], cloud: &[Path]) -> f64 {
    let equal = members.iter().filter(|&&i| paths[i].tokens == cloud[i].tokens).count();
    equal as f64 / members.len().max(1) as f64
}

/// The fitted rule and the baselines at its share, on held-back problems of the promised part.
fn rivals(
    pair: &Pair,
    explorer: &mut Explorer<'_>,
    data: &Data<'_>,
    fitted: (f32, &[Path]),
    cloud: &[Path],
    progress: &Progress,
) -> Result<Vec<Rival>, LabError> {
    let promised = data.promised();
    let share = cloud_share(promised.iter().map(|&i| &fitted.1[i]));
    let mut out = vec![Rival::of("calibrated", fitted.0, pair, data, &promised, fitted.1, cloud)?];
    let others: [(&str, Arc<dyn Policy>); 2] =
        [("entropy", Arc::new(Entropy::new(0.0)?)), ("top1", Arc::new(Top1::new(1.0)?))];
    for (name, policy) in others {
        let (threshold, paths) = at_share(explorer, &promised, &policy, cloud, share, progress)?;
        out.push(Rival::of(name, threshold, pair, data, &promised, &paths, cloud)?);
    }
    Ok(out)
}
