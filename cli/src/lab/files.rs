//! The files of questions of an experiment, out of its flags.

use std::path::Path;
use std::sync::Arc;

use tandem_lab::eval::{DATA, SPLITS, Split};
use tandem_lab::questions::{Layout, ReadOptions};
use tandem_lab::score::{CommandScorer, ScorerName};

use crate::args::{FormatArg, LabEvalArgs, LabReadArgs, ScorerArg};
use crate::failure::{Code, Failure};

/// How to read files.
pub(super) fn read_options(args: &LabReadArgs) -> Result<ReadOptions, Failure> {
    if args.score_command.is_some() && !matches!(args.scorer, None | Some(ScorerArg::Command)) {
        return Err(Failure::new(Code::Usage, "--score-command is what `--scorer command` runs; give one of the two"));
    }
    Ok(ReadOptions {
        layout: args.format.map(|format| match format {
            FormatArg::Own => Layout::Own,
            FormatArg::Gsm8k => Layout::Gsm8k,
            FormatArg::Choice => Layout::Choice,
            FormatArg::Humaneval => Layout::HumanEval,
        }),
        scorer: match args.scorer {
            // A command that is named is meant to be used.
            None => args.score_command.as_ref().map(|_| ScorerName::Command),
            Some(ScorerArg::Exact) => Some(ScorerName::Exact),
            Some(ScorerArg::Text) => Some(ScorerName::Text),
            Some(ScorerArg::Number) => Some(ScorerName::Number),
            Some(ScorerArg::Choice) => Some(ScorerName::Choice),
            Some(ScorerArg::Json) => Some(ScorerName::Json),
            Some(ScorerArg::Regex) => Some(ScorerName::Regex),
            Some(ScorerArg::Command) => Some(ScorerName::Command),
        },
        command: args.score_command.as_deref().map(|line| Arc::new(CommandScorer::new(line))),
    })
}

/// The files to evaluate: those given, or splits of a folder.
pub(super) fn splits(args: &LabEvalArgs) -> Result<Vec<Split>, Failure> {
    let folder = match args.data.as_slice() {
        [] => Some(Path::new(DATA)),
        [one] if one.is_dir() => Some(one.as_path()),
        _ => None,
    };
    match (folder, args.split.as_slice()) {
        (Some(folder), []) => Ok(SPLITS.iter().map(|name| Split::in_folder(folder, name)).collect()),
        (Some(folder), names) => Ok(names.iter().map(|name| Split::in_folder(folder, name)).collect()),
        (None, []) => Ok(args.data.iter().map(|path| Split::of_file(path)).collect()),
        (None, _) => {
            Err(Failure::new(Code::Usage, "--split names files of a folder, and --data gives files; leave one out"))
        }
    }
}
