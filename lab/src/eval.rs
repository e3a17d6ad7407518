//! How good answers are, how much of them the cloud decides, and what that costs: the four modes
//! over real nodes, and baselines and thresholds over the same models in lock step.

mod closed;
mod interval;
mod measure;
mod offline;
mod table;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_edge_node::request::Mode;
use tandem_router::policy::Policy;

pub use closed::{Answer, Asked, ask, ask_watched};
pub(crate) use closed::{median, prompt as closed_prompt};
pub use interval::Interval;
pub use measure::Measure;
pub use offline::{Baseline, Curve, CurvePoint, RECOVERED};

use crate::cluster::{Cluster, ClusterOptions};
use crate::error::LabError;
use crate::explore::ANSWER_TOKENS_MAX;
use crate::pair::{Pair, PairFiles, PairReport};
use crate::policy_report::PolicyReport;
use crate::progress::Progress;
use crate::questions::{DataReport, ReadOptions, read};
use crate::rows::{Row, reference_subset};

/// The splits that are evaluated when none is named.
pub const SPLITS: [&str; 3] = ["eval_heldout", "eval_dialogue", "eval_seen_facts"];
/// Category under which the sums over all categories stand.
pub const TOTAL: &str = "all";

/// Folder of the embedded pair's data, in the repository.
pub const DATA: &str = "models/data";

/// A file of questions under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// The name.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

impl Split {
    /// `NAME.jsonl` in `folder`.
    #[must_use]
    pub fn in_folder(folder: &Path, name: &str) -> Self {
        Self { name: name.to_owned(), path: folder.join(format!("{name}.jsonl")) }
    }

    /// A file, called by its name without the ending.
    #[must_use]
    pub fn of_file(path: &Path) -> Self {
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Self { name, path: path.to_owned() }
    }
}

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// The files of questions.
    pub splits: Vec<Split>,
    /// How to read them.
    pub read: ReadOptions,
    /// Modes that the nodes answer in.
    pub modes: Vec<Mode>,
    /// Prompts of a split: those of the reference evaluation for the same number; 0 for all.
    pub limit: usize,
    /// Most tokens of an answer.
    pub answer_tokens: usize,
    /// Answers under way at once; more than 1 is faster and says nothing about tokens per second.
    pub at_once: usize,
    /// Baselines at equal share and thresholds, for the splits named here.
    pub curves: Vec<String>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            splits: SPLITS.map(|name| Split::in_folder(Path::new(DATA), name)).to_vec(),
            read: ReadOptions::default(),
            modes: vec![Mode::Local, Mode::Auto, Mode::Exact, Mode::Cloud],
            limit: 300,
            answer_tokens: ANSWER_TOKENS_MAX,
            at_once: 1,
            curves: vec![SPLITS[0].to_owned()],
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
    /// Mean score, 0 … 1 (see [`SplitReport::measure`]); with the scorer `exact`, the share of answers equal to
    /// the right one.
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
    /// The file that the prompts come from.
    pub data: DataReport,
    /// What the scores measure.
    pub measure: Measure,
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
    /// The models.
    pub pair: PairReport,
    /// The rule that decides in `auto`.
    pub policy: PolicyReport,
    /// Its threshold.
    pub threshold: f32,
    /// Threads of each model.
    pub threads: usize,
    /// The splits.
    pub splits: Vec<SplitReport>,
}

/// Runs an evaluation on nodes like `nodes`, whose policy decides in `auto`.
///
/// # Errors
/// Data that cannot be read, nodes that do not start, a rule fitted for other models, an answer that fails.
pub async fn evaluate(options: &EvalOptions, nodes: &ClusterOptions) -> Result<EvalReport, LabError> {
    let names: Vec<&str> = options.splits.iter().map(|split| split.name.as_str()).collect();
    if let Some(unknown) = options.curves.iter().find(|name| !names.contains(&name.as_str())) {
        let there_is = names.join(", ");
        let message = format!("a curve is asked for `{unknown}`, which is not evaluated; there is {there_is}");
        return Err(LabError::Empty(message));
    }
    if let Some(twice) = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
        return Err(LabError::Empty(format!("two files are called `{}`; rename one", twice.1)));
    }
    let mut data = Vec::new();
    for split in &options.splits {
        let (rows, report) = read(&split.path, &options.read)?;
        let rows = reference_subset(rows, options.limit);
        if let (false, Some(row)) = (options.modes.contains(&Mode::Cloud), rows.iter().find(|row| !row.has_answer())) {
            return Err(LabError::NoAnswer { at: row.at(), wanted: "an evaluation without the mode `cloud`" });
        }
        data.push((rows, report));
    }
    let mut nodes = nodes.clone();
    nodes.edge.requests_max = options.at_once.max(1);
    let policy = nodes.policy.build(nodes.policy_file.as_ref())?;
    let cluster = Cluster::start(nodes.clone()).await?;
    if let Some(file) = policy.file() {
        file.check_pair(&cluster.edge_card.digest, &cluster.cloud_card.digest)?;
    }
    let pair = PairReport::of(&cluster.edge_card, &cluster.cloud_card);
    let mut splits = Vec::new();
    for (split, (rows, data)) in options.splits.iter().zip(&data) {
        splits.push(closed::split(&cluster, &split.name, (rows, data), options).await?);
    }
    // The curves have the models for themselves.
    drop(cluster);
    for (split, (rows, _)) in splits.iter_mut().zip(data) {
        if options.curves.contains(&split.split) {
            let models = nodes.models.clone();
            (split.baselines, split.curves) =
                offline_part((models, nodes.threads), rows, policy.clone(), options.answer_tokens).await?;
        }
    }
    let threshold = policy.threshold();
    Ok(EvalReport { pair, policy: PolicyReport::of(&*policy), threshold, threads: nodes.threads, splits })
}

/// The offline part, on a thread that may block.
async fn offline_part(
    (models, threads): (PairFiles, usize),
    rows: Vec<Row>,
    policy: Arc<dyn Policy>,
    answer_tokens: usize,
) -> Result<(Vec<Baseline>, Vec<Curve>), LabError> {
    let work = move || {
        let pair = Pair::load(&models, threads)?;
        let progress = Progress::new("thresholds", (rows.len() * offline::RUNS) as u64);
        let found = offline::compare((&pair, answer_tokens), &rows, &policy, &progress);
        progress.finish();
        found
    };
    tokio::task::spawn_blocking(work).await.map_err(|e| LabError::Empty(format!("the offline part stopped: {e}")))?
}
