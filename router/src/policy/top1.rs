use super::{Features, Policy, PolicyError, Reason, in_range};

/// Escalates iff the likeliest token's probability is under a constant.
#[derive(Debug, Clone, Copy)]
pub struct Top1 {
    probability: f32,
}

impl Top1 {
    /// `probability`: threshold in 0..=1.
    pub fn new(probability: f32) -> Result<Self, PolicyError> {
        Ok(Self { probability: in_range("top1", "probability", probability, (0.0, 1.0), "0..=1")? })
    }
}

impl Policy for Top1 {
    fn name(&self) -> &'static str {
        "top1"
    }

    fn reason(&self) -> Reason {
        Reason::Top1
    }

    /// Probability that the edge gives to every other token.
    fn score(&self, features: &Features<'_>) -> f32 {
        1.0 - features.top1
    }

    fn threshold(&self) -> f32 {
        1.0 - self.probability
    }
}
