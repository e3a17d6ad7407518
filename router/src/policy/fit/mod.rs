//! Fits the calibrated rule: a logistic function or a small network by Adam, then a monotone
//! calibration on requests that the network has not seen.
//!
//! Pure and deterministic: the same samples and the same seed give the same bits. What thresholds
//! cost and buy must then be measured on a third set of requests ([`operating_points`]), since the
//! calibration set also chose the epoch.

mod calibrate;
mod measure;
mod table;
mod train;

pub use self::{
    calibrate::{isotonic, platt},
    measure::{auc, brier, calibration_error},
    table::{ScoredRequest, operating_points},
};
use super::{
    Calibration, FeatureName, Features, HiddenInput, HiddenState, Network, PolicyFile, PolicyFileError, Predicts,
    Quality,
    calibrated::{sigmoid, standardise},
    file::{FORMAT, HIDDEN_SIZE_MAX, UNITS_MAX},
    random::{splitmix64, unit},
};
use train::Matrix;

/// One drafted token with what came of it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sample {
    /// Scalar features; `hidden` is left empty.
    pub features: Features<'static>,
    /// Hidden state, empty if there is none; equally long in all samples.
    pub hidden: Vec<f32>,
    /// True if the token has what is to be predicted, see [`Predicts`].
    pub label: bool,
    /// Which request the token is from: the unit of every split.
    pub request: u32,
}

/// How the output is calibrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CalibrationKind {
    /// Two parameters: keeps the order of all scores; right if the network is nearly calibrated.
    Platt,
    /// A monotone table: follows any shape, ties scores together where data is thin.
    Isotonic,
}

/// How to fit.
#[derive(Debug, Clone, PartialEq)]
pub struct FitConfig {
    /// Scalar inputs.
    pub features: Vec<FeatureName>,
    /// Which hidden state the samples carry; `None` leaves it out.
    pub hidden: Option<HiddenState>,
    /// Hidden units of the network; `None` fits a logistic function.
    pub units: Option<usize>,
    /// Passes over the samples; the one with the least loss on the calibration set is kept.
    pub epochs: usize,
    /// Samples per step.
    pub batch: usize,
    /// Adam's step at the start; it falls to 0 over the epochs.
    pub learning_rate: f32,
    /// Decoupled weight decay per step, times the learning rate.
    pub weight_decay: f32,
    /// Share of the requests that are kept for calibration, in 0.05..=0.5.
    pub calibration_share: f32,
    /// How the output is calibrated.
    pub calibration: CalibrationKind,
    /// Seed of the initial weights, the order and the split.
    pub seed: u64,
}

impl Default for FitConfig {
    fn default() -> Self {
        Self {
            features: FeatureName::ALL.to_vec(),
            hidden: None,
            units: None,
            epochs: 8,
            batch: 256,
            learning_rate: 2e-3,
            weight_decay: 1e-2,
            calibration_share: 0.2,
            calibration: CalibrationKind::Isotonic,
            seed: 0,
        }
    }
}

/// Samples or settings that cannot be fitted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FitError {
    /// A setting is out of its range.
    #[error("fit setting `{field}` {problem}")]
    Setting {
        /// Which.
        field: &'static str,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// A sample holds a number that is not finite.
    #[error("sample {at} holds a number that is not finite")]
    NotFinite {
        /// Its index.
        at: usize,
    },
    /// A sample's hidden state has another length than the first one's.
    #[error("sample {at} has a hidden state of {found} numbers, the first has {expected}")]
    HiddenSize {
        /// Its index.
        at: usize,
        /// Its length.
        found: usize,
        /// Length of the first.
        expected: usize,
    },
    /// Too little to learn from.
    #[error("{set} holds {positive} tokens with the label among {total}; both kinds are needed, collect more traces")]
    OneSided {
        /// Which set.
        set: &'static str,
        /// Samples with the label true.
        positive: usize,
        /// All samples.
        total: usize,
    },
    /// The loss was not finite after any epoch.
    #[error("the fit diverged; lower the learning rate")]
    Diverged,
}

/// How good a fit is, on the calibration set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FitReport {
    /// Tokens fitted on.
    pub fitted: usize,
    /// Tokens calibrated on.
    pub calibrated: usize,
    /// Epoch that was kept, from 0.
    pub epoch: usize,
    /// Mean log loss before calibration, nats.
    pub log_loss: f32,
    /// Area under the ROC curve.
    pub auc: f32,
    /// Brier score after calibration.
    pub brier: f32,
    /// Expected calibration error over 15 bins of equal count, before calibration. After it, the
    /// error on this same set says nothing.
    pub calibration_error_before: f32,
}

/// The result of a fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    features: Vec<FeatureName>,
    means: Vec<f32>,
    stds: Vec<f32>,
    hidden: Option<HiddenInput>,
    network: Network,
    calibration: Calibration,
    /// How good it is.
    pub report: FitReport,
}

/// What a policy file says besides the fitted numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Provenance {
    /// Digest of the edge model's weights, 64 hex digits.
    pub edge_model: String,
    /// Digest of the cloud model's weights, 64 hex digits.
    pub cloud_model: String,
    /// What the labels say.
    pub predicts: Predicts,
    /// What it was fitted on, for people.
    pub fitted_on: String,
}

/// Thresholds of a file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// [`PolicyFile::threshold`].
    pub threshold: f32,
    /// [`PolicyFile::entropy_nats`].
    pub entropy_nats: f32,
}

impl Default for Choice {
    /// For files that only score.
    fn default() -> Self {
        Self { threshold: 0.5, entropy_nats: 0.5 }
    }
}

impl Fitted {
    /// The file to put beside the pair, with the thresholds of `choice`. Pass a `quality` without
    /// points to get a file for scoring the requests that the table is then made of.
    pub fn file(&self, from: Provenance, choice: Choice, quality: Quality) -> Result<PolicyFile, PolicyFileError> {
        let file = PolicyFile {
            format: FORMAT,
            edge_model: from.edge_model,
            cloud_model: from.cloud_model,
            predicts: from.predicts,
            fitted_on: from.fitted_on,
            features: self.features.clone(),
            means: self.means.clone(),
            stds: self.stds.clone(),
            hidden: self.hidden.clone(),
            network: self.network.clone(),
            calibration: self.calibration.clone(),
            threshold: choice.threshold,
            entropy_nats: choice.entropy_nats,
            quality,
        };
        file.check()?;
        Ok(file)
    }
}

fn setting(ok: bool, field: &'static str, problem: &str) -> Result<(), FitError> {
    if ok { Ok(()) } else { Err(FitError::Setting { field, problem: problem.into() }) }
}

fn check(samples: &[Sample], config: &FitConfig) -> Result<usize, FitError> {
    setting((1..=1000).contains(&config.epochs), "epochs", "must lie in 1..=1000")?;
    setting((1..=65_536).contains(&config.batch), "batch", "must lie in 1..=65536")?;
    setting(config.learning_rate > 0.0 && config.learning_rate <= 1.0, "learning_rate", "must lie in 0..=1, above 0")?;
    setting((0.0..=1.0).contains(&config.weight_decay), "weight_decay", "must lie in 0..=1")?;
    setting((0.05..=0.5).contains(&config.calibration_share), "calibration_share", "must lie in 0.05..=0.5")?;
    let units = config.units.is_none_or(|units| (1..=UNITS_MAX).contains(&units));
    setting(units, "units", &format!("must lie in 1..={UNITS_MAX}"))?;
    let repeated = config.features.iter().enumerate().any(|(at, name)| config.features[..at].contains(name));
    setting(!repeated, "features", "must not repeat one")?;
    let expected = match config.hidden {
        None => 0,
        Some(_) => samples.first().map_or(0, |sample| sample.hidden.len()),
    };
    if config.hidden.is_some() {
        let size = (1..=HIDDEN_SIZE_MAX).contains(&expected);
        setting(size, "hidden", &format!("needs samples with 1..={HIDDEN_SIZE_MAX} numbers each"))?;
    }
    setting(config.features.len() + expected > 0, "features", "must name one, or use the hidden state")?;
    for (at, sample) in samples.iter().enumerate() {
        if config.hidden.is_some() && sample.hidden.len() != expected {
            return Err(FitError::HiddenSize { at, found: sample.hidden.len(), expected });
        }
        if !sample.features.finite() || (expected > 0 && sample.hidden.iter().any(|x| !x.is_finite())) {
            return Err(FitError::NotFinite { at });
        }
    }
    Ok(expected)
}

/// True if the request belongs to the calibration set. By request, so that neighbouring tokens of
/// one answer never stand on both sides.
fn in_calibration(request: u32, config: &FitConfig) -> bool {
    unit(splitmix64(splitmix64(config.seed ^ 0x5eed_ca1b) ^ u64::from(request))) < config.calibration_share
}

/// Mean and standard deviation of each column, in f64 so that the order of magnitude of n is safe.
fn moments(rows: &[&Sample], config: &FitConfig, hidden: usize) -> (Vec<f32>, Vec<f32>) {
    let scalars = config.features.len();
    let mut sums = vec![(0.0f64, 0.0f64); scalars + hidden];
    for sample in rows {
        let named = config.features.iter().map(|name| name.of(&sample.features));
        for ((sum, squares), x) in sums.iter_mut().zip(named.chain(sample.hidden[..hidden].iter().copied())) {
            *sum += f64::from(x);
            *squares += f64::from(x) * f64::from(x);
        }
    }
    let n = rows.len().max(1) as f64;
    let moments = sums.into_iter().map(|(sum, squares)| {
        let mean = sum / n;
        let std = (squares / n - mean * mean).max(0.0).sqrt();
        // A constant column becomes 0 everywhere instead of noise blown up.
        (mean as f32, if std < 1e-6 { 1.0 } else { std as f32 })
    });
    moments.unzip()
}

fn matrix(rows: &[&Sample], config: &FitConfig, hidden: usize, means: &[f32], stds: &[f32]) -> Matrix {
    let columns = means.len();
    let mut data = Vec::with_capacity(rows.len() * columns);
    for sample in rows {
        let named = config.features.iter().map(|name| name.of(&sample.features));
        let values = named.chain(sample.hidden[..hidden].iter().copied());
        data.extend(values.zip(means).zip(stds).map(|((x, mean), std)| standardise(x, *mean, *std)));
    }
    Matrix { data, columns }
}

fn both_kinds(set: &'static str, rows: &[&Sample]) -> Result<(), FitError> {
    let positive = rows.iter().filter(|sample| sample.label).count();
    if positive == 0 || positive == rows.len() {
        return Err(FitError::OneSided { set, positive, total: rows.len() });
    }
    Ok(())
}

/// Fits and calibrates.
pub fn fit(samples: &[Sample], config: &FitConfig) -> Result<Fitted, FitError> {
    let hidden = check(samples, config)?;
    let (held, rows): (Vec<_>, Vec<_>) = samples.iter().partition(|sample| in_calibration(sample.request, config));
    both_kinds("the fitting set", &rows)?;
    both_kinds("the calibration set", &held)?;
    let (mut means, mut stds) = moments(&rows, config, hidden);
    let inputs = matrix(&rows, config, hidden, &means, &stds);
    let held_inputs = matrix(&held, config, hidden, &means, &stds);
    let labels: Vec<bool> = rows.iter().map(|sample| sample.label).collect();
    let held_labels: Vec<bool> = held.iter().map(|sample| sample.label).collect();

    let (network, epoch, log_loss) = train::train(&inputs, &labels, &held_inputs, &held_labels, config)?;

    let logits: Vec<f32> = held_inputs.rows().map(|row| network.logit(row)).collect();
    let raw: Vec<_> = logits.iter().map(|z| sigmoid(*z)).zip(held_labels.iter().copied()).collect();
    let calibration = match config.calibration {
        CalibrationKind::Isotonic => Calibration::Isotonic { knots: isotonic(&raw) },
        CalibrationKind::Platt => {
            let (slope, offset) = platt(&logits, &held_labels);
            Calibration::Platt { slope, offset }
        }
    };
    let scored: Vec<_> = logits.iter().map(|z| calibration.apply(*z)).zip(held_labels.iter().copied()).collect();
    let report = FitReport {
        fitted: rows.len(),
        calibrated: held.len(),
        epoch,
        log_loss,
        auc: auc(&raw),
        brier: brier(&scored),
        calibration_error_before: calibration_error(&raw, 15),
    };
    let hidden = config.hidden.map(|state| HiddenInput {
        state,
        means: means.split_off(config.features.len()),
        stds: stds.split_off(config.features.len()),
    });
    Ok(Fitted { features: config.features.clone(), means, stds, hidden, network, calibration, report })
}

#[cfg(test)]
mod tests;
