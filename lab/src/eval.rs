//! How good answers are, how much of them the cloud decides, and what that costs: the four modes
//! over real nodes, and baselines and thresholds over the same models in lock step.

mod closed;
mod interval;
mod offline;
mod table;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_edge_node::request::Mode;
use tandem_router::policy::PolicyFile;

pub use closed::{Answer, Asked, ask, ask_watched};
pub(crate) use closed::{median, prompt as closed_prompt};
pub use interval::Interval;
pub use offline::{Baseline, Curve, CurvePoint, RECOVERED};

use crate::cluster::{Cluster, ClusterOptions};
use crate::error::LabError;
use crate::pair::Pair;
use crate::progress::Progress;
use crate::rows::{Row, read, reference_subset};

/// The splits that are evaluated when none is named.
pub const SPLITS: [&str; 3] = ["eval_heldout", "eval_dialogue", "eval_seen_facts"];
/// Category under which the sums over all categories stand.
pub const TOTAL: &str = "all";

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// Folder with the splits, `NAME.jsonl`.
    pub data: PathBuf,
    /// Names of the splits.
    pub splits: Vec<String>,
    /// Modes that the nodes answer in.
    pub modes: Vec<Mode>,
    /// Prompts of a split: those of the reference evaluation for the same number; 0 for all.
    pub limit: usize,
    /// Answers under way at once; more than 1 is faster and says nothing about tokens per second.
    pub at_once: usize,
    /// Baselines at equal share and thresholds, for the splits named here.
    pub curves: Vec<String>,
    /// Threads of each model.
    pub threads: usize,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            data: PathBuf::from("models/data"),
            splits: SPLITS.map(str::to_owned).to_vec(),
            modes: vec![Mode::Local, Mode::Auto, Mode::Exact, Mode::Cloud],
            limit: 300,
            at_once: 1,
            curves: vec![SPLITS[0].to_owned()],
            threads: 1,
        }
    }
}

/// One category of one split in one mode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CategoryReport {
    /// The category, or [`TOTAL`].
    pub category: String,
    /// Prompts.
    pub prompts: usize,
    /// Share of answers equal to the right one, 0 … 1.
    pub exact_match: f64,
    /// Its 95 % bootstrap interval over prompts.
    pub interval: Interval,
    /// Share of tokens that the cloud decided: those it wrote and those it judged before they were
    /// sent, 0 … 1.
    pub cloud_share: f64,
    /// Share of tokens that the cloud wrote itself, 0 … 1.
    pub written_by_cloud: f64,
    /// Questions to the cloud per answer.
    pub round_trips: f64,
    /// Bytes sent to the cloud per answer.
    pub bytes_up: f64,
    /// Bytes received from it per answer.
    pub bytes_down: f64,
    /// Tokens per answer.
    pub tokens: f64,
    /// Tokens per second of an answer, median; 0 if answers ran side by side.
    pub tokens_per_s: f64,
}

/// One mode on one split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModeReport {
    /// The mode.
    pub mode: Mode,
    /// Answers that fell back to the edge because the cloud was away: 0 in a sound run.
    pub degraded: usize,
    /// Sums first, then the categories by name.
    pub categories: Vec<CategoryReport>,
}

impl ModeReport {
    /// The sums over all categories.
    #[must_use]
    pub fn total(&self) -> Option<&CategoryReport> {
        self.categories.iter().find(|c| c.category == TOTAL)
    }
}

/// One split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitReport {
    /// Its name.
    pub split: String,
    /// Prompts.
    pub prompts: usize,
    /// The modes over real nodes.
    pub modes: Vec<ModeReport>,
    /// Share of the distance from `local` to `cloud` that `auto` recovers; none without these modes
    /// or without a distance.
    pub recovered: Option<f64>,
    /// Share of `exact` answers that equal the `cloud` answer token for token.
    pub exact_equals_cloud: Option<f64>,
    /// Other rules at the share of `auto`, offline.
    pub baselines: Vec<Baseline>,
    /// Exact match over share, offline.
    pub curves: Vec<Curve>,
}

impl SplitReport {
    /// The sums of a mode.
    #[must_use]
    pub fn total(&self, mode: Mode) -> Option<&CategoryReport> {
        self.modes.iter().find(|m| m.mode == mode)?.total()
    }
}

/// An evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// The policy's threshold in `auto`.
    pub threshold: f32,
    /// Threads of each model.
    pub threads: usize,
    /// The splits.
    pub splits: Vec<SplitReport>,
}

/// Runs an evaluation with the fitted rule `policy`.
///
/// # Errors
/// Data that cannot be read, nodes that do not start, an answer that fails.
pub async fn evaluate(options: &EvalOptions, policy: &Arc<PolicyFile>) -> Result<EvalReport, LabError> {
    let mut cluster =
        ClusterOptions { threads: options.threads, policy_file: Some(policy.clone()), ..ClusterOptions::default() };
    cluster.policy = tandem_router::policy::PolicySpec::Calibrated { threshold: None };
    cluster.edge.requests_max = options.at_once.max(1);
    let cluster = Cluster::start(cluster).await?;
    let mut splits = Vec::new();
    for split in &options.splits {
        let rows = reference_subset(read(&options.data.join(format!("{split}.jsonl")))?, options.limit);
        if let Some(row) = rows.iter().find(|row| !row.has_answer()) {
            return Err(LabError::NoAnswer { prompt: row.prompt.clone(), wanted: "an evaluation" });
        }
        let mut report = closed::split(&cluster, split, &rows, options).await?;
        if options.curves.contains(split) {
            (report.baselines, report.curves) = offline_part(options.threads, rows, policy.clone()).await?;
        }
        splits.push(report);
    }
    Ok(EvalReport { threshold: policy.threshold, threads: options.threads, splits })
}

/// The offline part, on a thread that may block.
async fn offline_part(
    threads: usize,
    rows: Vec<Row>,
    policy: Arc<PolicyFile>,
) -> Result<(Vec<Baseline>, Vec<Curve>), LabError> {
    let work = move || {
        let pair = Pair::embedded(threads)?;
        let progress = Progress::new("thresholds", (rows.len() * offline::RUNS) as u64);
        let found = offline::compare(&pair, &rows, &policy, &progress);
        progress.finish();
        found
    };
    tokio::task::spawn_blocking(work).await.map_err(|e| LabError::Empty(format!("the offline part stopped: {e}")))?
}
