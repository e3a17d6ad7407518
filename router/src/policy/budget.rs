//! Budgets: a threshold that follows a share of escalated tokens, and a hard bucket of tokens.

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

/// A hard budget: a bucket of tokens that refills at a steady rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenBucket {
    capacity: f64,
    per_ms: f64,
    level: f64,
    refilled_at_ms: u64,
}

/// Milliseconds of a day.
const DAY_MS: f64 = 86_400_000.0;

impl TokenBucket {
    /// A bucket of `capacity` tokens, full at `now_ms`, that refills `per_day` tokens a day.
    /// With `per_day` 0 it is a budget for once, such as that of one answer.
    #[must_use]
    pub fn new(capacity: u32, per_day: u64, now_ms: u64) -> Self {
        let capacity = f64::from(capacity);
        Self { capacity, per_ms: per_day as f64 / DAY_MS, level: capacity, refilled_at_ms: now_ms }
    }

    /// Whole tokens in the bucket at `now_ms`. A clock that steps back adds nothing.
    #[must_use]
    pub fn available(&self, now_ms: u64) -> u32 {
        let since = now_ms.saturating_sub(self.refilled_at_ms) as f64;
        (self.level + since * self.per_ms).min(self.capacity).floor() as u32
    }

    /// Takes `tokens` if there are as many, else nothing.
    #[must_use]
    pub fn try_take(&mut self, tokens: u32, now_ms: u64) -> bool {
        let since = now_ms.saturating_sub(self.refilled_at_ms) as f64;
        self.level = (self.level + since * self.per_ms).min(self.capacity);
        self.refilled_at_ms = self.refilled_at_ms.max(now_ms);
        let enough = self.level >= f64::from(tokens);
        if enough {
            self.level -= f64::from(tokens);
        }
        enough
    }

    /// Gives back tokens that were taken and not used (the cloud did not answer).
    pub fn give_back(&mut self, tokens: u32) {
        self.level = (self.level + f64::from(tokens)).min(self.capacity);
    }
}
