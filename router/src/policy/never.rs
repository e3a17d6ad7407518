use super::{Features, Policy, Reason};

/// Escalates nothing: the edge decides everything (`local` mode, lower end of every cost curve).
#[derive(Debug, Clone, Copy)]
pub struct Never;

impl Policy for Never {
    fn name(&self) -> &'static str {
        "never"
    }

    fn reason(&self) -> Reason {
        Reason::Never
    }

    fn stay_reason(&self) -> Reason {
        Reason::Never
    }

    fn score(&self, _: &Features<'_>) -> f32 {
        0.0
    }

    /// Above every score, so that nothing goes.
    fn threshold(&self) -> f32 {
        f32::INFINITY
    }

    /// Not even a broken score leaves the device under this rule.
    fn decide_at(&self, _: &Features<'_>, _: f32) -> super::Decision {
        super::Decision::Stay { risk: 0.0, reason: Reason::Never }
    }
}
