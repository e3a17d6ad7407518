//! What the scores of a split measure.

use serde::{Deserialize, Serialize};

use crate::error::LabError;
use crate::rows::Row;
use crate::score::ScorerName;

/// What the scores of a split measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Right answers, by one scorer.
    Scorer(ScorerName),
    /// Right answers, by a scorer for each row.
    Scorers,
    /// Some right answer is not known, so equality with the cloud's answer, token for token.
    EqualsCloud,
}

impl Measure {
    pub(super) fn of(rows: &[Row]) -> Self {
        if rows.iter().any(|row| !row.has_answer()) {
            return Self::EqualsCloud;
        }
        let mut names = rows.iter().map(|row| row.scorer.name());
        let first = names.next().unwrap_or(ScorerName::Exact);
        if names.all(|name| name == first) { Self::Scorer(first) } else { Self::Scorers }
    }

    /// As a column is called.
    #[must_use]
    pub fn title(self) -> String {
        match self {
            Self::Scorer(ScorerName::Exact) => "exact match".into(),
            Self::Scorer(scorer) => format!("score ({})", scorer.name()),
            Self::Scorers => "score".into(),
            Self::EqualsCloud => "equal to the cloud's".into(),
        }
    }

    /// The score of an answer whose text is `reply`; `equal` if its tokens are the cloud's.
    pub(super) fn score(self, row: &Row, reply: &str, equal: bool) -> Result<f64, LabError> {
        match self {
            Self::EqualsCloud => Ok(f64::from(u8::from(equal))),
            Self::Scorer(_) | Self::Scorers => row.score(reply),
        }
    }
}
