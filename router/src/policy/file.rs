//! `policy.json`: the fitted parameters of the calibrated rule, beside the pair they belong to.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tandem_proto::ids::Digest;

use super::Features;

/// Version of the file format that this build reads and writes.
pub const FORMAT: u32 = 2;
/// Largest file that is read, bytes.
pub const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Largest hidden state, numbers.
pub const HIDDEN_SIZE_MAX: usize = 16 * 1024;
/// Most hidden units of the network.
pub const UNITS_MAX: usize = 256;
/// Most knots of a calibration table.
pub const KNOTS_MAX: usize = 4096;
/// Most rows of the table of operating points.
pub const OPERATING_POINTS_MAX: usize = 4096;

/// A scalar input of the network. What is counted enters as ln(1 + x), so that long answers do
/// not dominate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureName {
    /// [`Features::entropy`].
    Entropy,
    /// [`Features::top1`].
    Top1,
    /// −ln of [`Features::top1`], at most 16: resolves what `top1` crowds near 1 and near 0.
    Top1Surprisal,
    /// ln of 1 − [`Features::top1`], at least −16.
    LogRest,
    /// [`Features::margin`].
    Margin,
    /// [`Features::logit_margin`], at most 64.
    LogitMargin,
    /// [`Features::running_acceptance`].
    RunningAcceptance,
    /// ln(1 + [`Features::position_in_answer`]).
    PositionInAnswer,
}

impl FeatureName {
    /// Every scalar feature, in the order that fits use.
    pub const ALL: [Self; 8] = [
        Self::Entropy,
        Self::Top1,
        Self::Top1Surprisal,
        Self::LogRest,
        Self::Margin,
        Self::LogitMargin,
        Self::RunningAcceptance,
        Self::PositionInAnswer,
    ];

    /// The input's value before standardisation.
    #[must_use]
    pub fn of(self, features: &Features<'_>) -> f32 {
        const TINY: f32 = 1e-7;
        match self {
            Self::Entropy => features.entropy,
            Self::Top1 => features.top1,
            Self::Top1Surprisal => -features.top1.max(TINY).ln(),
            Self::LogRest => (1.0 - features.top1).max(TINY).ln(),
            Self::Margin => features.margin,
            Self::LogitMargin => features.logit_margin.min(64.0),
            Self::RunningAcceptance => features.running_acceptance,
            Self::PositionInAnswer => (features.position_in_answer as f32).ln_1p(),
        }
    }
}

/// Which hidden state the network reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HiddenState {
    /// After the final norm: what the head multiplies. The usual choice.
    FinalNorm,
    /// The residual stream after the last layer, before the final norm.
    Raw,
}

/// The hidden state as an input of the network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HiddenInput {
    /// Which state.
    pub state: HiddenState,
    /// Mean of each number over the fitting data; its length is the state's size.
    pub means: Vec<f32>,
    /// Standard deviation of each number, > 0.
    pub stds: Vec<f32>,
}

impl HiddenInput {
    /// Numbers that the network expects.
    #[must_use]
    pub fn size(&self) -> usize {
        self.means.len()
    }
}

/// The function from standardised inputs (scalars, then the hidden state) to a logit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Network {
    /// weights · x + bias.
    Logistic {
        /// One weight per input.
        weights: Vec<f32>,
        /// Constant term.
        bias: f32,
    },
    /// output · ReLU(W x + b) + `output_bias`.
    Mlp {
        /// Hidden units.
        units: usize,
        /// W, units × inputs, row after row.
        weights: Vec<f32>,
        /// b, one per unit.
        biases: Vec<f32>,
        /// One weight per unit.
        output: Vec<f32>,
        /// Constant term.
        output_bias: f32,
    },
}

/// The monotone map from the network's logit to a calibrated probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Calibration {
    /// sigmoid(slope · logit + offset), slope > 0 (Platt 1999).
    Platt {
        /// Factor on the logit.
        slope: f32,
        /// Constant term.
        offset: f32,
    },
    /// Piecewise linear through `knots` of (sigmoid(logit), probability), both rising; constant
    /// outside. Fitted by isotonic regression.
    Isotonic {
        /// At least one knot.
        knots: Vec<[f32; 2]>,
    },
}

/// What a threshold costs and buys, measured on held-out requests.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatingPoint {
    /// τ, in 0..=1.
    pub threshold: f32,
    /// Share of tokens that are escalated, in 0..=1.
    pub escalated_share: f32,
    /// Empirical risk R̂(τ): share of requests in which a token that stays has what the file
    /// [predicts](PolicyFile::predicts), so that the answer falls short of the cloud's, in 0..=1.
    pub risk: f32,
}

/// What the score of a fitted rule is the probability of. In both cases the cloud is taken to go on
/// from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Predicts {
    /// The cloud would choose another token here. Needs no right answers to fit.
    Divergence,
    /// The cloud's token here makes the answer right, and the edge's would make it wrong. Fitted
    /// where right answers are known.
    Benefit,
}

impl Predicts {
    /// In words, for [`PolicyFile::fitted_on`] and reports.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Divergence => "probability that the cloud's token is another",
            Self::Benefit => "probability that the cloud's token makes a wrong answer right",
        }
    }
}

/// The table that turns a quality target or a share into τ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quality {
    /// Requests behind `points`: the n of conformal risk control.
    pub requests: u32,
    /// μ: the risk of the edge alone, in 0..=1.
    pub edge_risk: f32,
    /// Rising in `threshold`, falling in `escalated_share`.
    pub points: Vec<OperatingPoint>,
}

/// The fitted parameters of the calibrated rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// [`FORMAT`].
    pub format: u32,
    /// Digest of the edge model's weights, 64 hex digits.
    pub edge_model: String,
    /// Digest of the cloud model's weights, 64 hex digits.
    pub cloud_model: String,
    /// What the score is the probability of.
    pub predicts: Predicts,
    /// What the parameters were fitted on, for people.
    pub fitted_on: String,
    /// Scalar inputs, in order, each at most once.
    pub features: Vec<FeatureName>,
    /// Mean of each scalar input.
    pub means: Vec<f32>,
    /// Standard deviation of each scalar input, > 0.
    pub stds: Vec<f32>,
    /// The hidden state, if the network reads it.
    #[serde(default)]
    pub hidden: Option<HiddenInput>,
    /// The network.
    pub network: Network,
    /// The calibration of its output.
    pub calibration: Calibration,
    /// τ when nothing else is asked for, in 0..=1.
    pub threshold: f32,
    /// Threshold of the entropy baseline, nats, that asks as often as the fit was allowed to: it
    /// stands in for the rule where the cloud has another model.
    pub entropy_nats: f32,
    /// What thresholds cost and buy.
    pub quality: Quality,
}

/// A file of parameters that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyFileError {
    /// The file cannot be read or written.
    #[error("policy file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than [`FILE_BYTES_MAX`].
    #[error("policy file has {bytes} bytes, at most {FILE_BYTES_MAX} are read")]
    TooLarge {
        /// Size found, bytes.
        bytes: u64,
    },
    /// Not JSON, or a field is missing, unknown or of the wrong type.
    #[error("policy file is not of the expected form: {0}; fit it again with `tandem lab calibrate`")]
    Json(#[from] serde_json::Error),
    /// A field has a value that cannot be right.
    #[error("policy file: field `{field}` {problem}; fit it again with `tandem lab calibrate`")]
    Field {
        /// The field, with an index where there is one.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The file was fitted for other models.
    #[error(
        "policy file was fitted for {which} model {fitted}, the one in use is {loaded}; fit it again with `tandem lab calibrate` or choose a policy without fitted parameters, such as entropy"
    )]
    OtherPair {
        /// `edge` or `cloud`.
        which: &'static str,
        /// Digest in the file.
        fitted: String,
        /// Digest of the model in use.
        loaded: String,
    },
}

fn bad(field: impl Into<String>, problem: impl Into<String>) -> PolicyFileError {
    PolicyFileError::Field { field: field.into(), problem: problem.into() }
}

fn finite(field: &str, values: &[f32]) -> Result<(), PolicyFileError> {
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(bad(format!("{field}[{at}]"), format!("is {}, not a finite number", values[at]))),
        None => Ok(()),
    }
}

fn finite_one(field: &str, value: f32) -> Result<(), PolicyFileError> {
    if value.is_finite() { Ok(()) } else { Err(bad(field, format!("is {value}, not a finite number"))) }
}

fn sized(field: &str, values: &[f32], expected: usize) -> Result<(), PolicyFileError> {
    if values.len() != expected {
        return Err(bad(field, format!("has {} numbers, {expected} are needed", values.len())));
    }
    finite(field, values)
}

fn positive(field: &str, values: &[f32]) -> Result<(), PolicyFileError> {
    match values.iter().position(|x| *x < 1e-12) {
        Some(at) => Err(bad(format!("{field}[{at}]"), format!("is {}, it must be above 0", values[at]))),
        None => Ok(()),
    }
}

fn probability(field: &str, value: f32) -> Result<(), PolicyFileError> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(bad(field, format!("is {value}, it must lie in 0..=1"))) }
}

fn digest(field: &str, text: &str) -> Result<(), PolicyFileError> {
    let hex = text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if hex { Ok(()) } else { Err(bad(field, "is not a digest of 64 lower-case hex digits")) }
}

fn same_model(which: &'static str, fitted: &str, loaded: &Digest) -> Result<(), PolicyFileError> {
    let loaded = loaded.to_string();
    if fitted == loaded { Ok(()) } else { Err(PolicyFileError::OtherPair { which, fitted: fitted.to_owned(), loaded }) }
}

impl PolicyFile {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self, PolicyFileError> {
        let io = |source| PolicyFileError::Io { path: path.to_path_buf(), source };
        let bytes = std::fs::metadata(path).map_err(io)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(PolicyFileError::TooLarge { bytes });
        }
        Self::parse(&std::fs::read(path).map_err(io)?)
    }

    /// Reads and checks the bytes of a file.
    pub fn parse(json: &[u8]) -> Result<Self, PolicyFileError> {
        if json.len() as u64 > FILE_BYTES_MAX {
            return Err(PolicyFileError::TooLarge { bytes: json.len() as u64 });
        }
        let file: Self = serde_json::from_slice(json)?;
        file.check()?;
        Ok(file)
    }

    /// Checks and writes the file to `path`, through a temporary file beside it.
    pub fn save(&self, path: &Path) -> Result<(), PolicyFileError> {
        self.check()?;
        let io = |source| PolicyFileError::Io { path: path.to_path_buf(), source };
        let mut json = serde_json::to_vec(self)?;
        json.push(b'\n');
        let partial = path.with_extension("json.partial");
        std::fs::write(&partial, json).map_err(io)?;
        std::fs::rename(&partial, path).map_err(io)
    }

    /// Inputs of the network: scalars plus the hidden state.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.features.len() + self.hidden.as_ref().map_or(0, HiddenInput::size)
    }

    /// Refuses a file that was fitted for other models than the two loaded.
    pub fn check_pair(&self, edge: &Digest, cloud: &Digest) -> Result<(), PolicyFileError> {
        self.check_edge(edge)?;
        self.check_cloud(cloud)
    }

    /// Refuses a file that was fitted for another edge model.
    pub fn check_edge(&self, loaded: &Digest) -> Result<(), PolicyFileError> {
        same_model("edge", &self.edge_model, loaded)
    }

    /// Refuses a file that was fitted for another cloud model.
    pub fn check_cloud(&self, loaded: &Digest) -> Result<(), PolicyFileError> {
        same_model("cloud", &self.cloud_model, loaded)
    }

    /// Checks every size, range and number.
    pub fn check(&self) -> Result<(), PolicyFileError> {
        if self.format != FORMAT {
            return Err(bad("format", format!("is {}, this build reads {FORMAT}", self.format)));
        }
        digest("edge_model", &self.edge_model)?;
        digest("cloud_model", &self.cloud_model)?;
        let n = self.features.len();
        for (at, name) in self.features.iter().enumerate() {
            if self.features[..at].contains(name) {
                return Err(bad(format!("features[{at}]"), "repeats an earlier one"));
            }
        }
        sized("means", &self.means, n)?;
        sized("stds", &self.stds, n)?;
        positive("stds", &self.stds)?;
        if let Some(hidden) = &self.hidden {
            if hidden.size() == 0 || hidden.size() > HIDDEN_SIZE_MAX {
                return Err(bad(
                    "hidden.means",
                    format!("has {} numbers, 1..={HIDDEN_SIZE_MAX} are allowed", hidden.size()),
                ));
            }
            finite("hidden.means", &hidden.means)?;
            sized("hidden.stds", &hidden.stds, hidden.size())?;
            positive("hidden.stds", &hidden.stds)?;
        }
        self.check_network()?;
        self.check_calibration()?;
        probability("threshold", self.threshold)?;
        if !(self.entropy_nats.is_finite() && self.entropy_nats >= 0.0) {
            return Err(bad("entropy_nats", format!("is {}, it must be a number from 0", self.entropy_nats)));
        }
        self.check_quality()
    }

    fn check_network(&self) -> Result<(), PolicyFileError> {
        let inputs = self.inputs();
        if inputs == 0 {
            return Err(bad("features", "is empty and there is no hidden state either"));
        }
        match &self.network {
            Network::Logistic { weights, bias } => {
                sized("network.weights", weights, inputs)?;
                finite_one("network.bias", *bias)
            }
            Network::Mlp { units, weights, biases, output, output_bias } => {
                if !(1..=UNITS_MAX).contains(units) {
                    return Err(bad("network.units", format!("is {units}, 1..={UNITS_MAX} are allowed")));
                }
                sized("network.weights", weights, units * inputs)?;
                sized("network.biases", biases, *units)?;
                sized("network.output", output, *units)?;
                finite_one("network.output_bias", *output_bias)
            }
        }
    }

    fn check_calibration(&self) -> Result<(), PolicyFileError> {
        match &self.calibration {
            Calibration::Platt { slope, offset } => {
                finite_one("calibration.slope", *slope)?;
                if *slope <= 0.0 {
                    return Err(bad("calibration.slope", format!("is {slope}, it must be above 0")));
                }
                finite_one("calibration.offset", *offset)
            }
            Calibration::Isotonic { knots } => {
                if knots.is_empty() || knots.len() > KNOTS_MAX {
                    return Err(bad(
                        "calibration.knots",
                        format!("has {} knots, 1..={KNOTS_MAX} are allowed", knots.len()),
                    ));
                }
                for (at, [raw, p]) in knots.iter().enumerate() {
                    probability(&format!("calibration.knots[{at}][0]"), *raw)?;
                    probability(&format!("calibration.knots[{at}][1]"), *p)?;
                    if at > 0 && !(knots[at - 1][0] < *raw && knots[at - 1][1] <= *p) {
                        return Err(bad(format!("calibration.knots[{at}]"), "does not rise from the one before"));
                    }
                }
                Ok(())
            }
        }
    }

    fn check_quality(&self) -> Result<(), PolicyFileError> {
        probability("quality.edge_risk", self.quality.edge_risk)?;
        let points = &self.quality.points;
        if points.len() > OPERATING_POINTS_MAX {
            return Err(bad(
                "quality.points",
                format!("has {} rows, at most {OPERATING_POINTS_MAX} are allowed", points.len()),
            ));
        }
        for (at, point) in points.iter().enumerate() {
            let field = |name: &str| format!("quality.points[{at}].{name}");
            probability(&field("threshold"), point.threshold)?;
            probability(&field("escalated_share"), point.escalated_share)?;
            probability(&field("risk"), point.risk)?;
            if let Some(before) = at.checked_sub(1).map(|i| points[i]) {
                if point.threshold <= before.threshold {
                    return Err(bad(field("threshold"), "does not rise from the row before"));
                }
                if point.escalated_share > before.escalated_share {
                    return Err(bad(field("escalated_share"), "rises although the threshold does"));
                }
            }
        }
        Ok(())
    }
}
