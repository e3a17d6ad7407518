//! What can be typed after `lab`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{ModeArg, finite};

/// Options of `lab`.
#[derive(Clone, Debug, Args)]
pub struct LabArgs {
    /// Which experiment.
    #[command(subcommand)]
    pub command: LabCommand,
}

/// The experiments.
#[derive(Clone, Debug, Subcommand)]
pub enum LabCommand {
    /// Quality, cloud share, bytes and speed of each mode on files of questions.
    Eval(LabEvalArgs),
    /// Fits the escalation rule's parameters.
    Calibrate(LabCalibrateArgs),
    /// Speed of each mode over emulated links, and what the exchanges of state save.
    Link(LabLinkArgs),
}

/// The models of an experiment.
#[derive(Clone, Debug, Default, Args)]
pub struct LabModelArgs {
    /// Model on the device: a GGUF file, a folder in Hugging Face layout, org/name or
    /// org/name:file.gguf from the local store, or `demo-edge` [default: the setting `edge.model`].
    #[arg(long, value_name = "MODEL")]
    pub edge_model: Option<String>,
    /// Model in the cloud, named in the same way [default: the setting `cloud.model`].
    #[arg(long, value_name = "MODEL")]
    pub cloud_model: Option<String>,
}

/// How files of questions are read and replies are scored.
#[derive(Clone, Debug, Args)]
pub struct LabReadArgs {
    /// Layout of the files [default: told by each row's fields].
    #[arg(long, value_name = "LAYOUT")]
    pub format: Option<FormatArg>,
    /// Scorer of rows that name none [default: exact, or the layout's].
    #[arg(long, value_name = "SCORER")]
    pub scorer: Option<ScorerArg>,
    /// Command of the scorer `command`: JSON with prompt, answer, reply and row on its standard
    /// input, a number from 0 to 1 on its standard output.
    #[arg(long, value_name = "COMMAND")]
    pub score_command: Option<String>,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 96, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub answer_tokens: u32,
}

/// Options of `lab eval`.
#[derive(Clone, Debug, Args)]
pub struct LabEvalArgs {
    /// The models.
    #[command(flatten)]
    pub models: LabModelArgs,
    /// A file of questions (JSONL); may be repeated. Or the folder with the embedded pair's
    /// [default: models/data].
    #[arg(long, value_name = "PATH")]
    pub data: Vec<PathBuf>,
    /// Which files of the folder, `NAME.jsonl`; may be repeated [default: eval_heldout,
    /// eval_dialogue, eval_seen_facts].
    #[arg(long, value_name = "NAME")]
    pub split: Vec<String>,
    /// How files are read.
    #[command(flatten)]
    pub read: LabReadArgs,
    /// Modes; may be repeated [default: all].
    #[arg(long)]
    pub mode: Vec<ModeArg>,
    /// Questions of a split; 0 for all.
    #[arg(long, default_value_t = 300)]
    pub limit: usize,
    /// Answers under way at once; more than 1 says nothing about tokens per second.
    #[arg(long, default_value_t = 1)]
    pub at_once: usize,
    /// Splits or files (without .jsonl) with baselines and the curve over thresholds [default: the
    /// first]; `none` for none.
    #[arg(long, value_name = "NAME")]
    pub curve: Vec<String>,
    /// Writes the curve of each such split to DIR/NAME.svg.
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// Parameters of the escalation rule, fitted for these models [default: the setting `policy`].
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Threads of each model; 0 for one per core.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
}

/// Options of `lab calibrate`.
#[derive(Clone, Debug, Args)]
pub struct LabCalibrateArgs {
    /// The models.
    #[command(flatten)]
    pub models: LabModelArgs,
    /// Questions to fit on (JSONL), never those of an evaluation; may be repeated
    /// [default: models/data/calibration.jsonl].
    #[arg(long, value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// How files are read.
    #[command(flatten)]
    pub read: LabReadArgs,
    /// Where the parameters go.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Largest share of tokens that the cloud may decide, 0 … 1.
    #[arg(long, value_parser = finite::<f64>)]
    pub share: Option<f64>,
    /// What the rule predicts [default: benefit if every question has its right answer, else
    /// divergence].
    #[arg(long)]
    pub label: Option<LabelArg>,
    /// Seed of the fit.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Threads of each model; 0 for one per core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

/// Options of `lab link`.
#[derive(Clone, Debug, Args)]
pub struct LabLinkArgs {
    /// The models.
    #[command(flatten)]
    pub models: LabModelArgs,
    /// A file of questions, or the folder with the embedded ones.
    #[arg(long, default_value = "models/data", value_name = "DIR")]
    pub data: PathBuf,
    /// Round-trip times to add, milliseconds; may be repeated [default: 0, 50].
    #[arg(long, value_name = "MS")]
    pub rtt: Vec<u64>,
    /// Answers per measurement.
    #[arg(long, default_value_t = 12)]
    pub answers: usize,
    /// Parameters of the escalation rule, fitted for these models [default: the setting `policy`].
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Threads of each model; 0 for one per core.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
}

/// What a fitted rule predicts of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LabelArg {
    /// The cloud would choose another one.
    Divergence,
    /// The cloud's makes a wrong answer right; needs questions with right answers.
    Benefit,
}

/// Layouts of files of questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// `prompt` or `messages`, `answer`, `category`.
    Own,
    /// `question`, and an `answer` that ends with `#### n`.
    Gsm8k,
    /// A question, choices and the right one: MMLU, ARC, HellaSwag, TruthfulQA (mc1).
    Choice,
    /// `prompt`, `entry_point` and `test`.
    Humaneval,
}

/// What says whether a reply is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScorerArg {
    /// Equal, but for white space around it.
    Exact,
    /// Equal words.
    Text,
    /// Equal last numbers.
    Number,
    /// The letter of the right choice.
    Choice,
    /// Equal as JSON.
    Json,
    /// The answer is a regular expression that is found in the reply.
    Regex,
    /// What --score-command says.
    Command,
}
