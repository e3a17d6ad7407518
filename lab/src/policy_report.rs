//! Which rule a report is about.

use serde::{Deserialize, Serialize};
use tandem_router::policy::Policy;

/// The rule that decides in `auto`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyReport {
    /// Its name.
    pub name: String,
    /// Its threshold.
    pub threshold: f32,
    /// What the threshold is in.
    pub unit: String,
    /// What it was fitted on; none for a baseline, which was fitted to no pair.
    pub fitted_on: Option<String>,
}

impl PolicyReport {
    /// What is said of `policy`.
    #[must_use]
    pub fn of(policy: &dyn Policy) -> Self {
        Self {
            name: policy.name().to_owned(),
            threshold: policy.threshold(),
            unit: policy.unit().name().to_owned(),
            fitted_on: policy.file().map(|file| file.fitted_on.clone()),
        }
    }

    /// As a line of Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let fitted = match &self.fitted_on {
            Some(on) => format!("fitted: {on}"),
            None => "a baseline, not fitted to this pair".to_owned(),
        };
        format!("- rule in `auto`: {} at {:.4} {} ({fitted})\n", self.name, self.threshold, self.unit)
    }
}
