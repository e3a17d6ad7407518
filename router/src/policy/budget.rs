//! A budget: a threshold that follows a share of escalated tokens.

/// Moves τ after every decision so that the escalated share follows a target:
/// τ ← τ + η(escalated − b), within bounds (online gradient step on the quantile loss, as in
/// adaptive conformal inference, Gibbs and Candès 2021).
///
/// For scores in 0..=1 and bounds of −η..=1 + η no drift can break it: after T decisions the share
/// differs from b by at most (1 + 2η)/(ηT).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ShareController {
    threshold: f32,
    share: f32,
    step: f32,
    low: f32,
    high: f32,
}

impl ShareController {
    /// Starts at `threshold`; `share` is b, `step` is η > 0; scores lie in 0..=`score_max`.
    /// Values out of range are moved to the nearest allowed one.
    #[must_use]
    pub fn new(threshold: f32, share: f32, step: f32, score_max: f32) -> Self {
        let step = if step.is_finite() { step.clamp(1e-6, 1.0) } else { 1e-6 };
        let score_max = if score_max.is_finite() { score_max.max(1e-6) } else { 1.0 };
        let (low, high) = (-step, score_max + step);
        let threshold = if threshold.is_nan() { high } else { threshold.clamp(low, high) };
        let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) };
        Self { threshold, share, step, low, high }
    }

    /// τ for the next decision.
    #[must_use]
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Records what the policy wanted for one token.
    pub fn record(&mut self, escalated: bool) {
        let step = self.step * (f32::from(u8::from(escalated)) - self.share);
        self.threshold = (self.threshold + step).clamp(self.low, self.high);
    }
}
