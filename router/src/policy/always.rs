use super::{Features, Policy, Reason};

/// Escalates every token: the cloud decides everything (upper end of every cost curve).
#[derive(Debug, Clone, Copy)]
pub struct Always;

impl Policy for Always {
    fn name(&self) -> &'static str {
        "always"
    }

    fn reason(&self) -> Reason {
        Reason::Always
    }

    fn score(&self, _: &Features<'_>) -> f32 {
        1.0
    }

    /// Under every score, so that nothing stays.
    fn threshold(&self) -> f32 {
        f32::NEG_INFINITY
    }
}
