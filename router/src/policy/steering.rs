//! One request's steering: a policy at a threshold of the request's own.

use std::sync::Arc;

use super::{Decision, Features, Policy};

/// The policy of one request.
#[derive(Debug, Clone)]
pub struct Steering {
    policy: Arc<dyn Policy>,
    threshold: f32,
}

impl Steering {
    /// Steering for a new request; `threshold` is τ instead of the policy's own.
    #[must_use]
    pub fn new(policy: Arc<dyn Policy>, threshold: Option<f32>) -> Self {
        let threshold = threshold.unwrap_or_else(|| policy.threshold());
        Self { policy, threshold }
    }

    /// Decides for one token.
    #[must_use]
    pub fn decide(&self, features: &Features<'_>) -> Decision {
        self.policy.decide_at(features, self.threshold)
    }
}
