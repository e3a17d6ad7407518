//! Fits the escalation rule on recorded paths of both models and chooses its threshold.
//!
//! Nothing here reads the evaluation files. The problems (not the rows, not the tokens) are split in
//! two: on one part the rule is fitted, on the other it is measured and its threshold chosen.
//! Contexts are those that a corrected answer really visits: the paths of a plain confidence rule,
//! of the cloud alone, and, in a second round, of the rule that the first round gave.
//!
//! Rows with right answers teach more than where the models differ: each differing context is gone on
//! with both ways, and the label says whether the cloud's token makes the answer right
//! ([`Predicts::Benefit`]). A rule that predicts differences alone spends the most where the cloud is
//! wrong as well.

mod label;
mod report;
#[cfg(test)]
mod tests;
mod threshold;

use std::sync::Arc;

use tandem_router::policy::fit::{
    CalibrationKind, Choice, FitConfig, Fitted, Provenance, Sample, ScoredRequest, fit, operating_points,
};
use tandem_router::policy::{
    Calibrated, Entropy, FeatureName, HiddenState, Policy, PolicyFile, PolicySpec, Predicts, Quality, Top1,
};

pub use report::{CalibrateReport, Measured, PartReport, Rival};
pub use threshold::TriedThreshold;

use crate::equal_share::{at_share, quantile, scores};
use crate::error::LabError;
use crate::explore::{ANSWER_TOKENS_MAX, Explorer, Path, Rule, cloud_share};
use crate::pair::Pair;
use crate::progress::Progress;
use crate::questions::DataReport;
use crate::rows::{Row, problems};
use label::Labels;

/// Rows of the table of operating points in the file.
const TABLE_ROWS: usize = 65;
/// What is kept by default of what the cloud gives. Above the 90 % that is promised, since a split of
/// 300 questions with a gain of 40 answers measures it to within some 5 points.
const KEPT_MIN: f64 = 0.97;
/// Part of the data whose mix the share is promised for.
const PROMISED_PART: &str = "fresh";

/// How to calibrate.
#[derive(Clone, Debug)]
pub struct CalibrateOptions {
    /// What to predict; the benefit if every row has a right answer, else the difference.
    pub predicts: Option<Predicts>,
    /// Least share of what the cloud gives that must be kept at the default threshold on fresh
    /// problems (of its gain in exact match, or, without right answers, of its answers): the cheapest
    /// threshold that does it is taken,
    pub kept_min: f64,
    /// unless the cloud then decides more than this share of the tokens.
    pub share_max: f64,
    /// Probability under which the confidence rule of the first round asks the cloud.
    pub teacher: f32,
    /// Rounds; each after the first adds the paths of the rule fitted before it.
    pub rounds: usize,
    /// Share of the problems that are kept for measuring.
    pub measured_share: f64,
    /// Most tokens of an answer.
    pub answer_tokens: usize,
    /// Network, training and seed.
    pub fit: FitConfig,
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        let mut features = FeatureName::ALL.to_vec();
        // It depends on other requests: a threshold must mean the same everywhere.
        features.retain(|f| *f != FeatureName::RunningAcceptance);
        let fit = FitConfig {
            features,
            // What the edge node passes to the policy.
            hidden: Some(HiddenState::Raw),
            units: Some(32),
            epochs: 8,
            weight_decay: 1.0,
            // The network's own logits are nearly calibrated, and a table would tie rare high scores.
            calibration: CalibrationKind::Platt,
            seed: 1,
            ..FitConfig::default()
        };
        Self {
            predicts: None,
            kept_min: KEPT_MIN,
            share_max: 0.15,
            teacher: 0.9,
            rounds: 2,
            measured_share: 0.25,
            answer_tokens: ANSWER_TOKENS_MAX,
            fit,
        }
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

    /// How many of the answers to `members` are right.
    fn right(&self, pair: &Pair, members: &[usize], paths: &[Path]) -> Result<usize, LabError> {
        let mut right = 0;
        for &i in members {
            right += usize::from(self.rows[i].is_right(&pair.text(&paths[i].tokens)?)?);
        }
        Ok(right)
    }
}

/// Paths that the fitted rule is held against, and what it predicts.
#[derive(Clone, Copy)]
struct Known<'p> {
    edge: &'p [Path],
    cloud: &'p [Path],
    predicts: Predicts,
}

/// Fits the rule on `rows`, which come from the files `from`, and returns the file with a report.
///
/// # Errors
/// A model fails, the rows hold too few labels of one kind to fit anything, or the benefit was asked
/// for and a row has no right answer.
pub fn calibrate(
    pair: &Pair,
    (rows, from): (&[Row], &[DataReport]),
    options: &CalibrateOptions,
    progress: &Progress,
) -> Result<(PolicyFile, CalibrateReport), LabError> {
    let predicts = label::choose(rows, options.predicts)?;
    let data = Data::split(rows, options.measured_share, options.fit.seed);
    let prompts = pair.prompts(rows, options.answer_tokens)?;
    let mut explorer = Explorer::new(pair, prompts).with_answer_max(options.answer_tokens);
    let teacher = PolicySpec::Top1 { probability: options.teacher }.build(None)?;
    let teacher = Rule::Policy(teacher.clone(), teacher.threshold());
    let mut paths = explorer.run(&[teacher, Rule::Cloud, Rule::Edge], progress)?;
    let edge = paths.pop().unwrap_or_default();
    let cloud = paths.pop().unwrap_or_default();
    let on_policy = paths.pop().unwrap_or_default();

    let mut visited: Vec<Vec<u32>> = (0..rows.len()).map(|i| merged(&[&on_policy[i], &cloud[i]])).collect();
    let mut labels = Labels::new(pair, rows, predicts);
    labels.follow(&mut explorer, &visited)?;
    let mut fitted = fit_on(&explorer, &data, &visited, &labels, options)?;
    for _ in 1..options.rounds.max(1) {
        let policy = scorer(pair, &fitted, predicts)?;
        let fitting: Vec<usize> = (0..rows.len()).filter(|&i| !data.measured[i]).collect();
        let threshold = quantile(&mut scores(&explorer, &fitting, &cloud, &*policy), options.share_max);
        let more = explorer.run(&[Rule::Policy(policy, threshold)], progress)?;
        for (seen, path) in visited.iter_mut().zip(&more[0]) {
            seen.extend(&path.nodes);
            seen.sort_unstable();
            seen.dedup();
        }
        labels.follow(&mut explorer, &visited)?;
        fitted = fit_on(&explorer, &data, &visited, &labels, options)?;
    }

    let policy = scorer(pair, &fitted, predicts)?;
    let known = Known { edge: &edge, cloud: &cloud, predicts };
    let (threshold, tried) = threshold::choose(pair, &mut explorer, &data, &policy, known, options, progress)?;
    let requests: Vec<ScoredRequest> =
        data.measured().map(|i| scored(&explorer, i, &cloud[i], &*policy, &labels)).collect();
    let quality = operating_points(&requests, TABLE_ROWS);
    let chosen = explorer.run(&[Rule::Policy(policy.clone(), threshold)], progress)?;
    let report = CalibrateReport {
        pair: pair.report.clone(),
        data: from.to_vec(),
        predicts,
        rows: rows.len(),
        measured_rows: data.measured().count(),
        samples: fitted.report.fitted + fitted.report.calibrated,
        epoch: fitted.report.epoch,
        threshold,
        tried,
        measured: Measured::all(&explorer, data.measured().map(|i| (i, &cloud[i])), &*policy, &labels),
        rivals: rivals(pair, &mut explorer, &data, (threshold, &chosen[0]), &cloud, progress)?,
        parts: PartReport::all(pair, &data, [&edge, &cloud, &chosen[0]])?,
    };
    let fitted_on = format!(
        "{}, on {} calibration rows ({} tokens, {} held back by problem for measuring), seed {}",
        predicts.describe(),
        rows.len(),
        report.samples,
        report.measured_rows,
        options.fit.seed
    );
    let entropy: &dyn Policy = &Entropy::new(0.0)?;
    let entropy_nats = quantile(&mut scores(&explorer, &data.promised(), &cloud, entropy), options.share_max);
    let file = fitted.file(provenance(pair, predicts, fitted_on), Choice { threshold, entropy_nats }, quality)?;
    Ok((file, report))
}

fn provenance(pair: &Pair, predicts: Predicts, fitted_on: String) -> Provenance {
    let (edge_model, cloud_model) = (pair.edge.digest().to_string(), pair.cloud.digest().to_string());
    Provenance { edge_model, cloud_model, predicts, fitted_on }
}

/// The rule as fitted, for scoring; its file has no table and no threshold that means something.
fn scorer(pair: &Pair, fitted: &Fitted, predicts: Predicts) -> Result<Arc<dyn Policy>, LabError> {
    let quality = Quality { requests: 0, edge_risk: 0.0, points: Vec::new() };
    let file = fitted.file(provenance(pair, predicts, String::new()), Choice::default(), quality)?;
    Ok(Arc::new(Calibrated::new(Arc::new(file), None)?))
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
    labels: &Labels<'_>,
    options: &CalibrateOptions,
) -> Result<Fitted, LabError> {
    let mut samples = Vec::new();
    for (i, nodes) in visited.iter().enumerate().filter(|(i, _)| !data.measured[*i]) {
        let known = explorer.nodes(i);
        samples.extend(nodes.iter().map(|&at| (at, &known[at as usize])).map(|(at, node)| Sample {
            features: node.scalars(),
            hidden: node.hidden.clone(),
            label: labels.of(explorer, i, at),
            request: data.problems[i],
        }));
    }
    Ok(fit(&samples, &options.fit)?)
}

fn scored(explorer: &Explorer<'_>, i: usize, path: &Path, policy: &dyn Policy, labels: &Labels<'_>) -> ScoredRequest {
    let known = explorer.nodes(i);
    let token = |&at: &u32| (policy.score(&known[at as usize].features()), labels.of(explorer, i, at));
    ScoredRequest { tokens: path.nodes.iter().map(token).collect() }
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
