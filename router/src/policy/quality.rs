//! From a quality target or a share of cloud tokens to a threshold.

use super::{OperatingPoint, Quality};

/// A quality target that cannot be promised.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum QualityError {
    /// ε is no probability above 0.
    #[error(
        "quality target {target} must lie in 0..1 (share of answers that may fall short of the cloud's), and above 0"
    )]
    BadTarget {
        /// What was asked for.
        target: f32,
    },
    /// The file holds no operating points.
    #[error("the policy file holds no operating points; fit it again with `tandem lab calibrate`")]
    NoPoints,
    /// Too few requests stand behind the table: even zero observed risk would not do.
    #[error(
        "quality target {target} needs at least {needed} calibration requests, the policy file has {requests}; relax the target or calibrate on more"
    )]
    TooFewRequests {
        /// What was asked for.
        target: f32,
        /// Requests behind the file.
        requests: u32,
        /// Requests that the target needs.
        needed: u32,
    },
    /// No threshold of the table is good enough.
    #[error(
        "quality target {target} is not reached by any threshold: the best bound is {best}; any rule without assumptions must escalate at least {escalate_at_least} of the requests"
    )]
    Infeasible {
        /// What was asked for.
        target: f32,
        /// Smallest (n·R̂ + 1)/(n + 1) in the table.
        best: f32,
        /// (μ − ε)/(1 − ε), with μ the risk of the edge alone.
        escalate_at_least: f32,
    },
}

/// A share of cloud tokens that the table cannot give.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum ShareError {
    /// Not in 0..=1.
    #[error("share of cloud tokens {share} must lie in 0..=1")]
    BadShare {
        /// What was asked for.
        share: f32,
    },
    /// Every threshold of the table escalates more.
    #[error("no threshold of the policy file escalates as little as {share}; the least is {least}")]
    TooSmall {
        /// What was asked for.
        share: f32,
        /// Smallest share in the table.
        least: f32,
    },
    /// The file holds no operating points.
    #[error("the policy file holds no operating points; fit it again with `tandem lab calibrate`")]
    NoPoints,
}

/// Conformal risk control (Angelopoulos et al. 2022) with a loss of at most 1: the cheapest τ for
/// which every τ' ≤ τ of the table has (n·R̂(τ') + 1)/(n + 1) ≤ `target`. Looking at all smaller τ'
/// keeps the promise where the measured risk is not monotone.
pub fn for_quality(quality: &Quality, target: f32) -> Result<OperatingPoint, QualityError> {
    if !(target > 0.0 && target < 1.0) {
        return Err(QualityError::BadTarget { target });
    }
    let n = f64::from(quality.requests);
    // The table and the target are f32: what was measured as exactly ε must not fail by rounding.
    let epsilon = f64::from(target) + 1e-7;
    let bound = |point: &OperatingPoint| (n * f64::from(point.risk) + 1.0) / (n + 1.0);
    if quality.points.is_empty() {
        return Err(QualityError::NoPoints);
    }
    let good = |point: &&OperatingPoint| bound(point) <= epsilon;
    if let Some(point) = quality.points.iter().take_while(good).last() {
        return Ok(*point);
    }
    if 1.0 / (n + 1.0) > epsilon {
        let needed = (1.0 / epsilon - 1.0).ceil() as u32;
        return Err(QualityError::TooFewRequests { target, requests: quality.requests, needed });
    }
    let best = quality.points.iter().map(bound).fold(f64::INFINITY, f64::min) as f32;
    let escalate_at_least = ((quality.edge_risk - target) / (1.0 - target)).max(0.0);
    Err(QualityError::Infeasible { target, best, escalate_at_least })
}

/// The operating point with the lowest threshold whose escalated share is at most `share`.
pub fn for_share(quality: &Quality, share: f32) -> Result<OperatingPoint, ShareError> {
    if !(0.0..=1.0).contains(&share) {
        return Err(ShareError::BadShare { share });
    }
    let Some(last) = quality.points.last() else { return Err(ShareError::NoPoints) };
    let found = quality.points.iter().find(|point| point.escalated_share <= share);
    found.copied().ok_or(ShareError::TooSmall { share, least: last.escalated_share })
}
