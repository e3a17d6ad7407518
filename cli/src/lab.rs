//! `tandem lab`: the experiments of `tandem_lab`, with their results as Markdown or JSON.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tandem_edge_node::request::Mode;
use tandem_lab::calibrate::{CalibrateOptions, calibrate};
use tandem_lab::eval::{EvalOptions, evaluate};
use tandem_lab::link_bench::{LinkOptions, measure};
use tandem_lab::pair::Pair;
use tandem_lab::progress::Progress;
use tandem_lab::{plot, rows};
use tandem_router::policy::{PolicyFile, Predicts};

use crate::args::{Global, LabArgs, LabCalibrateArgs, LabCommand, LabEvalArgs, LabLinkArgs, LabelArg, ModeArg};
use crate::failure::{Code, Failure, OrFail as _};
use crate::ready::{print_json, print_line};
use crate::{config, logging, pair, state};

/// Runs an experiment.
pub(crate) async fn run(global: &Global, args: &LabArgs) -> Result<(), Failure> {
    let settings = config::load(global, &state::path(global)?, Vec::new())?;
    logging::start(&settings.log)?;
    match &args.command {
        LabCommand::Eval(args) => eval(global, args).await,
        LabCommand::Calibrate(args) => calibrated(global, args).await,
        LabCommand::Link(args) => link(global, args).await,
    }
}

async fn eval(global: &Global, args: &LabEvalArgs) -> Result<(), Failure> {
    let mut options = EvalOptions {
        data: args.data.clone(),
        limit: args.limit,
        at_once: args.at_once,
        threads: args.threads,
        ..EvalOptions::default()
    };
    if !args.split.is_empty() {
        options.splits.clone_from(&args.split);
    }
    if !args.mode.is_empty() {
        options.modes = args.mode.iter().map(|mode| mode_of(*mode)).collect();
    }
    if !args.curve.is_empty() {
        options.curves = args.curve.iter().filter(|name| *name != "none").cloned().collect();
    }
    let report = evaluate(&options, &policy(args.policy.as_deref())?).await.or_fail(Code::Failed)?;
    if let Some(dir) = &args.plots {
        std::fs::create_dir_all(dir).or_fail(Code::State)?;
        for split in report.splits.iter().filter(|split| !split.curves.is_empty()) {
            plot::shares(split, &dir.join(format!("{}.svg", split.split))).or_fail(Code::Failed)?;
        }
    }
    print(global, &report, || report.markdown())
}

async fn calibrated(global: &Global, args: &LabCalibrateArgs) -> Result<(), Failure> {
    let mut options = CalibrateOptions::default();
    options.predicts = args.label.map(|label| match label {
        LabelArg::Divergence => Predicts::Divergence,
        LabelArg::Benefit => Predicts::Benefit,
    });
    options.share_max = args.share.unwrap_or(options.share_max);
    options.fit.seed = args.seed.unwrap_or(options.fit.seed);
    if !(0.0..=1.0).contains(&options.share_max) {
        return Err(Failure::new(Code::Usage, format!("--share is {}; give a number from 0 to 1", options.share_max)));
    }
    let (data, out, threads) = (args.data.clone(), args.out.clone(), args.threads);
    let work = tokio::task::spawn_blocking(move || {
        let rows = rows::read(&data).or_fail(Code::Failed)?;
        let pair = Pair::embedded(threads).or_fail(Code::Failed)?;
        let progress = Progress::new("calibrate", rows.len() as u64);
        let fitted = calibrate(&pair, &rows, &options, &progress).or_fail(Code::Failed);
        progress.finish();
        let (file, report) = fitted?;
        file.save(&out).or_fail(Code::Failed)?;
        Ok::<_, Failure>(report)
    });
    let report = work.await.or_fail(Code::Failed)??;
    print(global, &report, || report.markdown())
}

async fn link(global: &Global, args: &LabLinkArgs) -> Result<(), Failure> {
    let mut options =
        LinkOptions { data: args.data.clone(), answers: args.answers, threads: args.threads, ..LinkOptions::default() };
    if !args.rtt.is_empty() {
        options.rtts_ms.clone_from(&args.rtt);
    }
    let report = measure(&options, &policy(args.policy.as_deref())?).await.or_fail(Code::Failed)?;
    print(global, &report, || report.markdown())
}

fn mode_of(mode: ModeArg) -> Mode {
    match mode {
        ModeArg::Local => Mode::Local,
        ModeArg::Auto => Mode::Auto,
        ModeArg::Exact => Mode::Exact,
        ModeArg::Cloud => Mode::Cloud,
    }
}

fn policy(given: Option<&Path>) -> Result<Arc<PolicyFile>, Failure> {
    match given {
        Some(path) => PolicyFile::load(path).map(Arc::new).or_fail(Code::Failed),
        None => pair::policy_file()?.ok_or_else(|| {
            Failure::new(
                Code::Usage,
                "this build has no fitted rule; make one with `tandem lab calibrate` and name it with --policy",
            )
        }),
    }
}

fn print<T: Serialize>(global: &Global, report: &T, markdown: impl FnOnce() -> String) -> Result<(), Failure> {
    if global.json {
        print_json(&serde_json::to_value(report).or_fail(Code::Failed)?);
    } else {
        print_line(markdown().trim_end());
    }
    Ok(())
}
