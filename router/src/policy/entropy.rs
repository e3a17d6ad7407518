use super::{Features, Policy, PolicyError, Reason, Unit, in_range};

/// Escalates iff the edge's entropy is above a constant: the baseline of the literature, which
/// the calibrated rule must beat at equal share.
#[derive(Debug, Clone, Copy)]
pub struct Entropy {
    nats: f32,
}

impl Entropy {
    /// `nats`: threshold, ≥ 0.
    pub fn new(nats: f32) -> Result<Self, PolicyError> {
        Ok(Self { nats: in_range("entropy", "nats", nats, (0.0, f32::MAX), "0.. (finite)")? })
    }
}

impl Policy for Entropy {
    fn name(&self) -> &'static str {
        "entropy"
    }

    fn reason(&self) -> Reason {
        Reason::Entropy
    }

    fn unit(&self) -> Unit {
        Unit::Nats
    }

    fn score(&self, features: &Features<'_>) -> f32 {
        features.entropy
    }

    fn threshold(&self) -> f32 {
        self.nats
    }
}
