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

/// Options of `lab eval`.
#[derive(Clone, Debug, Args)]
pub struct LabEvalArgs {
    /// Folder with the questions, `NAME.jsonl`.
    #[arg(long, default_value = "models/data", value_name = "DIR")]
    pub data: PathBuf,
    /// Splits; may be repeated [default: eval_heldout, eval_dialogue, eval_seen_facts].
    #[arg(long, value_name = "NAME")]
    pub split: Vec<String>,
    /// Modes; may be repeated [default: all].
    #[arg(long)]
    pub mode: Vec<ModeArg>,
    /// Questions of a split; 0 for all.
    #[arg(long, default_value_t = 300)]
    pub limit: usize,
    /// Answers under way at once; more than 1 says nothing about tokens per second.
    #[arg(long, default_value_t = 1)]
    pub at_once: usize,
    /// Splits with baselines and the curve over thresholds [default: eval_heldout]; `none` for none.
    #[arg(long, value_name = "NAME")]
    pub curve: Vec<String>,
    /// Writes the curve of each such split to DIR/NAME.svg.
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// Parameters of the escalation rule [default: those of the embedded pair].
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Threads of each model; 0 for one per core.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
}

/// Options of `lab calibrate`.
#[derive(Clone, Debug, Args)]
pub struct LabCalibrateArgs {
    /// Questions to fit on; never those of an evaluation.
    #[arg(long, default_value = "models/data/calibration.jsonl", value_name = "FILE")]
    pub data: PathBuf,
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
    /// Folder with the questions.
    #[arg(long, default_value = "models/data", value_name = "DIR")]
    pub data: PathBuf,
    /// Round-trip times to add, milliseconds; may be repeated [default: 0, 50].
    #[arg(long, value_name = "MS")]
    pub rtt: Vec<u64>,
    /// Answers per measurement.
    #[arg(long, default_value_t = 12)]
    pub answers: usize,
    /// Parameters of the escalation rule [default: those of the embedded pair].
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
