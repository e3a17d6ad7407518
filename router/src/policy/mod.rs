//! When to escalate: features of a drafted token in, `Stay` or `Escalate` with a reason out.
//!
//! A [`Policy`] is a pure score and a threshold τ: it escalates iff score > τ. All of them share
//! that shape, so that a share of cloud tokens or a quality target ([`Goal`]) moves τ of any of them and
//! baselines are compared at equal cost. [`Steering`] is what one request has of it.

mod always;
mod budget;
mod calibrated;
mod entropy;
pub mod file;
pub mod fit;
mod never;
mod paired;
mod quality;
mod random;
mod steering;
mod top1;

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

pub use always::Always;
pub use budget::ShareController;
pub use calibrated::Calibrated;
pub use entropy::Entropy;
pub use file::{
    Calibration, FeatureName, HiddenInput, HiddenState, Network, OperatingPoint, PolicyFile, PolicyFileError, Predicts,
    Quality,
};
pub use never::Never;
pub use paired::Paired;
pub use quality::{QualityError, ShareError, for_quality, for_share};
pub use random::Random;
pub use steering::{Aim, Goal, GoalError, Steering};
pub use top1::Top1;

/// What is known about one drafted token before the cloud has judged it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Features<'a> {
    /// Entropy of the edge's distribution at temperature 1, nats, ≥ 0.
    pub entropy: f32,
    /// Probability of the likeliest token at temperature 1, in 0..=1.
    pub top1: f32,
    /// Probability of the likeliest token minus that of the second, in 0..=1.
    pub margin: f32,
    /// Logit of the likeliest token minus that of the second, ≥ 0.
    pub logit_margin: f32,
    /// Share of recently judged tokens that the cloud accepted, in 0..=1 (1 before any verdict).
    pub running_acceptance: f32,
    /// Index of this token in the answer, from 0.
    pub position_in_answer: u32,
    /// Hidden state that the head read for this token. [`PolicyFile::hidden`] says which form
    /// (after the final norm, or before it) and how many numbers it expects.
    pub hidden: Option<&'a [f32]>,
}

impl Features<'_> {
    /// True if every scalar is finite; a NaN here means that the edge model broke down.
    #[must_use]
    pub fn finite(&self) -> bool {
        [self.entropy, self.top1, self.margin, self.logit_margin, self.running_acceptance].iter().all(|x| x.is_finite())
    }
}

/// Why a token was kept or handed over. The names are stable: they appear in the API's answers,
/// in the audit log and as metric labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Reason {
    /// Stay: the score is at most τ.
    Sure,
    /// Escalate: the calibrated probability is above τ, see [`Predicts`].
    Risk,
    /// Escalate: the entropy is above τ.
    Entropy,
    /// Escalate: the likeliest token is not likely enough.
    Top1,
    /// Escalate: the coin said so (baseline).
    Random,
    /// Escalate: the policy escalates every token.
    Always,
    /// Stay: the policy never escalates.
    Never,
    /// Escalate: a feature is not a finite number, so no score means anything.
    NotFinite,
    /// Stay: the score asked for the cloud, but the answer's budget is used up.
    BudgetExhausted,
}

impl Reason {
    /// The stable name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sure => "sure",
            Self::Risk => "risk",
            Self::Entropy => "entropy",
            Self::Top1 => "top1",
            Self::Random => "random",
            Self::Always => "always",
            Self::Never => "never",
            Self::NotFinite => "not-finite",
            Self::BudgetExhausted => "budget-exhausted",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What to do with a drafted token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision {
    /// Keep the edge's token.
    Stay {
        /// The policy's score, see [`Policy::score`].
        risk: f32,
        /// Why it stays.
        reason: Reason,
    },
    /// Ask the cloud to verify the whole unverified tail and this token.
    Escalate {
        /// The policy's score, see [`Policy::score`].
        risk: f32,
        /// Why it goes.
        reason: Reason,
    },
}

impl Decision {
    /// The score behind the decision.
    #[must_use]
    pub fn risk(&self) -> f32 {
        let (Self::Stay { risk, .. } | Self::Escalate { risk, .. }) = self;
        *risk
    }

    /// The reason behind the decision.
    #[must_use]
    pub fn reason(&self) -> Reason {
        let (Self::Stay { reason, .. } | Self::Escalate { reason, .. }) = self;
        *reason
    }

    /// True for [`Decision::Escalate`].
    #[must_use]
    pub fn escalates(&self) -> bool {
        matches!(self, Self::Escalate { .. })
    }
}

/// What a policy scores in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// From 0 to 1.
    Probability,
    /// Of entropy.
    Nats,
}

impl Unit {
    /// Name as users read it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Probability => "probability",
            Self::Nats => "nats",
        }
    }

    /// Largest score that comes up.
    #[must_use]
    pub fn max(self) -> f32 {
        match self {
            Self::Probability => 1.0,
            Self::Nats => ENTROPY_MAX,
        }
    }
}

/// Bound of the entropy in nats, ln of a large vocabulary.
const ENTROPY_MAX: f32 = 12.0;

/// A rule that scores drafted tokens. Pure: the same features give the same score.
pub trait Policy: fmt::Debug + Send + Sync {
    /// Stable name, as in [`PolicySpec`].
    fn name(&self) -> &'static str;

    /// The reason that its escalations carry.
    fn reason(&self) -> Reason;

    /// What [`Policy::score`] and the threshold are in.
    fn unit(&self) -> Unit {
        Unit::Probability
    }

    /// How much this token wants the cloud; more is more. NaN counts as "escalate".
    fn score(&self, features: &Features<'_>) -> f32;

    /// τ as configured or fitted: escalate iff score > τ.
    fn threshold(&self) -> f32;

    /// The reason that its stays carry.
    fn stay_reason(&self) -> Reason {
        Reason::Sure
    }

    /// The hidden state that [`Policy::score`] needs, if any: the edge need not copy one otherwise.
    fn hidden(&self) -> Option<&HiddenInput> {
        None
    }

    /// The fitted parameters behind the score, if there are any: they hold for one pair of models.
    fn file(&self) -> Option<&PolicyFile> {
        None
    }

    /// Applies `threshold` to the score.
    fn decide_at(&self, features: &Features<'_>, threshold: f32) -> Decision {
        let risk = self.score(features);
        if risk.is_nan() || !features.finite() {
            Decision::Escalate { risk: 1.0, reason: Reason::NotFinite }
        } else if risk > threshold {
            Decision::Escalate { risk, reason: self.reason() }
        } else {
            Decision::Stay { risk, reason: self.stay_reason() }
        }
    }

    /// Applies the policy's own threshold.
    fn decide(&self, features: &Features<'_>) -> Decision {
        self.decide_at(features, self.threshold())
    }
}

/// A policy as written in a configuration file or a command line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "policy", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PolicySpec {
    /// Escalate every token.
    Always,
    /// Escalate none.
    Never,
    /// Escalate this share of the tokens, chosen by a seeded coin (baseline).
    Random {
        /// Share in 0..=1.
        share: f32,
        /// Seed of the coin; mix the request's seed in.
        seed: u64,
    },
    /// Escalate iff the entropy is above `nats` (the baseline of the literature).
    Entropy {
        /// Threshold, nats, ≥ 0.
        nats: f32,
    },
    /// Escalate iff the likeliest token's probability is under `probability`.
    Top1 {
        /// Threshold in 0..=1.
        probability: f32,
    },
    /// Escalate iff the calibrated probability is above τ, see [`Predicts`].
    Calibrated {
        /// τ in 0..=1; the file's default if absent.
        #[serde(default)]
        threshold: Option<f32>,
    },
}

/// A policy that cannot be built.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PolicyError {
    /// A number of the specification is out of its range.
    #[error("policy `{policy}`: {field} is {value}, it must lie in {range}")]
    OutOfRange {
        /// Name of the policy.
        policy: &'static str,
        /// Name of the field.
        field: &'static str,
        /// What was given.
        value: f32,
        /// What is allowed.
        range: &'static str,
    },
    /// The calibrated rule was asked for and there is no file of parameters.
    #[error(
        "policy `calibrated` needs its fitted parameters: put policy.json beside the model pair or choose another policy"
    )]
    NoFile,
}

impl PolicySpec {
    /// Builds the policy. `file` holds the parameters of the calibrated rule; others ignore it.
    pub fn build(&self, file: Option<&Arc<PolicyFile>>) -> Result<Arc<dyn Policy>, PolicyError> {
        Ok(match *self {
            Self::Always => Arc::new(Always),
            Self::Never => Arc::new(Never),
            Self::Random { share, seed } => Arc::new(Random::new(share, seed)?),
            Self::Entropy { nats } => Arc::new(Entropy::new(nats)?),
            Self::Top1 { probability } => Arc::new(Top1::new(probability)?),
            Self::Calibrated { threshold } => {
                let file = file.ok_or(PolicyError::NoFile)?;
                Arc::new(Calibrated::new(Arc::clone(file), threshold)?)
            }
        })
    }
}

/// Checks that `value` lies in `low..=high`; NaN never does.
fn in_range(
    policy: &'static str,
    field: &'static str,
    value: f32,
    (low, high): (f32, f32),
    range: &'static str,
) -> Result<f32, PolicyError> {
    if value >= low && value <= high { Ok(value) } else { Err(PolicyError::OutOfRange { policy, field, value, range }) }
}

#[cfg(test)]
mod tests;
