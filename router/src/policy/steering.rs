//! One request's steering: a policy plus what has state.

use std::sync::Arc;

use super::{Decision, Features, Policy, Reason, ShareController, TokenBucket};

/// How a request is steered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SteeringConfig {
    /// τ instead of the policy's own (a caller's setting, or from [`super::for_quality`]).
    pub threshold: Option<f32>,
    /// Escalate when this many tokens stand unverified, however sure; no limit if `None`.
    pub tail_limit: Option<u32>,
    /// Follow this share of escalated tokens by moving τ; τ stands still if `None`.
    pub share: Option<f32>,
    /// η of the moving τ, in units of the score.
    pub share_step: f32,
    /// Cloud tokens that one answer may use; no limit if `None`.
    pub answer_tokens: Option<u32>,
}

impl Default for SteeringConfig {
    fn default() -> Self {
        Self { threshold: None, tail_limit: None, share: None, share_step: 0.02, answer_tokens: None }
    }
}

/// Cloud tokens that an escalation took from the budgets: the tail and the token itself. Hand it
/// to [`Steering::undo`] if the cloud never saw them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spend {
    /// Tokens that the cloud is asked to verify.
    pub tokens: u32,
}

/// The policy of one request with its budgets. Deterministic: a function of the calls made.
#[derive(Debug, Clone)]
pub struct Steering {
    policy: Arc<dyn Policy>,
    config: SteeringConfig,
    share: Option<ShareController>,
    answer: Option<TokenBucket>,
}

impl Steering {
    /// Steering for a new request.
    #[must_use]
    pub fn new(policy: Arc<dyn Policy>, config: SteeringConfig) -> Self {
        let start = config.threshold.unwrap_or_else(|| policy.threshold());
        // Entropy is scored in nats; ln of a large vocabulary bounds it.
        let score_max = if policy.reason() == Reason::Entropy { 12.0 } else { 1.0 };
        let share = config.share.map(|share| ShareController::new(start, share, config.share_step, score_max));
        let answer = config.answer_tokens.map(|tokens| TokenBucket::new(tokens, 0, 0));
        Self { policy, config, share, answer }
    }

    /// The policy behind it.
    #[must_use]
    pub fn policy(&self) -> &Arc<dyn Policy> {
        &self.policy
    }

    /// τ of the next decision.
    #[must_use]
    pub fn threshold(&self) -> f32 {
        self.share.map(|share| share.threshold()).or(self.config.threshold).unwrap_or_else(|| self.policy.threshold())
    }

    /// Cloud tokens left for this answer, if there is a limit.
    #[must_use]
    pub fn answer_tokens_left(&self) -> Option<u32> {
        self.answer.map(|bucket| bucket.available(0))
    }

    /// Decides for one token. `device` is the device's bucket, shared by its requests. An
    /// escalation takes the tail and the token from the budgets at once.
    pub fn decide(
        &mut self,
        features: &Features<'_>,
        device: Option<&mut TokenBucket>,
        now_ms: u64,
    ) -> (Decision, Spend) {
        let mut decision = self.policy.decide_at(features, self.threshold());
        if let (Decision::Stay { risk, .. }, Some(limit)) = (decision, self.config.tail_limit)
            && features.unverified_tail >= limit
            && decision.reason() != Reason::Never
        {
            decision = Decision::Escalate { risk, reason: Reason::TailLimit };
        }
        if let Some(share) = &mut self.share {
            share.record(decision.escalates());
        }
        if !decision.escalates() {
            return (decision, Spend::default());
        }
        let tokens = features.unverified_tail.saturating_add(1);
        if take(tokens, self.answer.as_mut(), device, now_ms) {
            (decision, Spend { tokens })
        } else {
            (Decision::Stay { risk: decision.risk(), reason: Reason::BudgetExhausted }, Spend::default())
        }
    }

    /// Gives back what an escalation took, when the cloud did not answer.
    pub fn undo(&mut self, spend: Spend, device: Option<&mut TokenBucket>) {
        for bucket in [self.answer.as_mut(), device].into_iter().flatten() {
            bucket.give_back(spend.tokens);
        }
    }
}

/// Takes `tokens` from both buckets or from neither.
fn take(tokens: u32, answer: Option<&mut TokenBucket>, device: Option<&mut TokenBucket>, now_ms: u64) -> bool {
    match (answer, device) {
        (Some(answer), Some(device)) => {
            if !answer.try_take(tokens, 0) {
                return false;
            }
            let both = device.try_take(tokens, now_ms);
            if !both {
                answer.give_back(tokens);
            }
            both
        }
        (Some(answer), None) => answer.try_take(tokens, 0),
        (None, Some(device)) => device.try_take(tokens, now_ms),
        (None, None) => true,
    }
}
