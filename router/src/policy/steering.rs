//! What `auto` is steered by, and one request's steering.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    Decision, Features, Paired, Policy, QualityError, Reason, ShareController, ShareError, for_quality, for_share,
};

/// η of the threshold that follows a share: small, as answers come one after another.
const SHARE_STEP: f32 = 0.002;

/// What a node's operator wants of `auto`. At most one of the first three is given.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Goal {
    /// τ instead of the policy's own.
    pub threshold: Option<f32>,
    /// Share of answers that may fall short of the cloud's (ε): the cheapest τ that promises it.
    pub quality: Option<f32>,
    /// Share of tokens that the cloud decides, over all answers of the node: τ follows it.
    pub cloud_share: Option<f32>,
    /// Tokens that the cloud may decide in one answer.
    pub cloud_tokens_max: Option<u32>,
}

/// A goal that cannot be pursued.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GoalError {
    /// Two goals that move the same threshold.
    #[error("edge.threshold, edge.quality and edge.cloud_share exclude each other; set one of them")]
    Several,
    /// A threshold that no score of the policy can be on both sides of.
    #[error("edge.threshold is {threshold}; policy `{policy}` takes one from 0 to {max} ({unit})")]
    Threshold {
        /// What was given.
        threshold: f32,
        /// Name of the policy.
        policy: &'static str,
        /// Its unit.
        unit: &'static str,
        /// Its largest score.
        max: f32,
    },
    /// A quality target without measured risks.
    #[error(
        "edge.quality needs a rule fitted for this pair of models; fit one with `tandem lab calibrate`, or set edge.cloud_share"
    )]
    NotFitted,
    /// The target is out of reach.
    #[error("edge.quality: {0}")]
    Quality(#[from] QualityError),
    /// The share is none.
    #[error("edge.cloud_share: {0}")]
    Share(#[from] ShareError),
}

/// A goal made ready for a policy. The threshold that follows a share is one for all answers.
#[derive(Debug, Clone)]
pub struct Aim {
    threshold: Option<f32>,
    fitted: Option<Arc<Mutex<ShareController>>>,
    stand_in: Option<Arc<Mutex<ShareController>>>,
    cloud_tokens_max: Option<u32>,
}

impl Aim {
    /// Looks the goal up in what was measured when the policy was fitted.
    ///
    /// # Errors
    /// [`GoalError`]: two goals at once, or one that the measurements do not support.
    pub fn new(goal: Goal, policy: &Paired) -> Result<Self, GoalError> {
        let goals = [goal.threshold, goal.quality, goal.cloud_share];
        if goals.iter().flatten().count() > 1 {
            return Err(GoalError::Several);
        }
        let unit = policy.policy().unit();
        if let Some(threshold) = goal.threshold.filter(|threshold| !(0.0..=unit.max()).contains(threshold)) {
            let policy = policy.policy().name();
            return Err(GoalError::Threshold { threshold, policy, unit: unit.name(), max: unit.max() });
        }
        let file = policy.policy().file();
        let threshold = match goal.quality {
            None => goal.threshold,
            Some(target) => Some(for_quality(&file.ok_or(GoalError::NotFitted)?.quality, target)?.threshold),
        };
        let (mut fitted, mut stand_in) = (None, None);
        if let Some(share) = goal.cloud_share {
            if !(0.0..=1.0).contains(&share) {
                return Err(ShareError::BadShare { share }.into());
            }
            // Where the table ends, the controller finds its way.
            let start = file.and_then(|f| for_share(&f.quality, share).ok()).map(|point| point.threshold);
            let follow = |policy: &Arc<dyn Policy>, start: Option<f32>| {
                let score_max = policy.unit().max();
                let start = start.unwrap_or_else(|| policy.threshold());
                Arc::new(Mutex::new(ShareController::new(start, share, SHARE_STEP * score_max, score_max)))
            };
            fitted = Some(follow(policy.policy(), start));
            stand_in = policy.stand_in().map(|policy| follow(policy, None));
        }
        Ok(Self { threshold, fitted, stand_in, cloud_tokens_max: goal.cloud_tokens_max })
    }

    /// τ that the goal sets once for all.
    #[must_use]
    pub fn threshold(&self) -> Option<f32> {
        self.threshold
    }

    /// Steering of a new request by `policy`, which is the stand-in or not; `threshold` is one for this
    /// request alone.
    #[must_use]
    pub fn steering(&self, policy: &Arc<dyn Policy>, stands_in: bool, threshold: Option<f32>) -> Steering {
        let share = if stands_in { &self.stand_in } else { &self.fitted };
        Steering {
            threshold: threshold.unwrap_or_else(|| policy.threshold()),
            share: share.clone().filter(|_| threshold.is_none()),
            left: self.cloud_tokens_max,
            policy: policy.clone(),
        }
    }
}

/// The policy of one request.
#[derive(Debug, Clone)]
pub struct Steering {
    policy: Arc<dyn Policy>,
    threshold: f32,
    share: Option<Arc<Mutex<ShareController>>>,
    left: Option<u32>,
}

impl Steering {
    /// Goes on by another steering (the cloud is another one now), with what is left of the budget.
    #[must_use]
    pub fn succeeded_by(&self, next: Self) -> Self {
        Self { left: self.left, ..next }
    }

    /// Decides for one token. An escalation takes it from the budget.
    pub fn decide(&mut self, features: &Features<'_>) -> Decision {
        let decision = match &self.share {
            None => self.policy.decide_at(features, self.threshold),
            Some(share) => {
                let mut share = share.lock().unwrap_or_else(PoisonError::into_inner);
                let decision = self.policy.decide_at(features, share.threshold());
                share.record(decision.escalates());
                decision
            }
        };
        match &mut self.left {
            Some(left) if decision.escalates() => match left.checked_sub(1) {
                Some(less) => *left = less,
                None => return Decision::Stay { risk: decision.risk(), reason: Reason::BudgetExhausted },
            },
            _ => {}
        }
        decision
    }
}
