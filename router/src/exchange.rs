//! Whether KV state crosses a link or is computed again.

use serde::{Deserialize, Serialize};
use tandem_proto::exchange::{CostInputs, transfer_pays};

/// Operator's choice for one direction of KV exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Exchange {
    /// Whichever the cost rule favours.
    #[default]
    Auto,
    /// Always move it.
    Always,
    /// Never move it.
    Never,
}

impl Exchange {
    /// Applies the choice; `costs` is asked for only if it matters.
    pub fn moves(self, costs: impl FnOnce() -> CostInputs) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => transfer_pays(&costs()),
        }
    }
}
