//! `tandem lab`: the experiments of `tandem_lab`, with their results as Markdown or JSON.

mod files;
mod nodes;

use std::path::Path;

use serde::Serialize;
use tandem_edge_node::request::Mode;
use tandem_lab::calibrate::{CalibrateOptions, calibrate};
use tandem_lab::eval::{DATA, EvalOptions, evaluate};
use tandem_lab::link_bench::{LinkOptions, measure};
use tandem_lab::pair::Pair;
use tandem_lab::progress::Progress;
use tandem_lab::{plot, questions};
use tandem_router::policy::Predicts;

use crate::args::{Global, LabArgs, LabCalibrateArgs, LabCommand, LabEvalArgs, LabLinkArgs, LabelArg, ModeArg};
use crate::failure::{Code, Failure, OrFail as _};
use crate::logging;
use crate::ready::{print_json, print_line};

/// Runs an experiment.
pub(crate) async fn run(global: &Global, args: &LabArgs) -> Result<(), Failure> {
    match &args.command {
        LabCommand::Eval(args) => eval(global, args).await,
        LabCommand::Calibrate(args) => calibrated(global, args).await,
        LabCommand::Link(args) => link(global, args).await,
    }
}

async fn eval(global: &Global, args: &LabEvalArgs) -> Result<(), Failure> {
    let settings = nodes::settings(global, &args.models, args.policy.as_deref(), &nodes::EVAL)?;
    logging::start(&settings.log)?;
    let nodes = nodes::nodes(settings, args.policy.as_deref(), args.threads)?;
    let mut options = EvalOptions {
        splits: files::splits(args)?,
        read: files::read_options(&args.read)?,
        answer_tokens: args.read.answer_tokens as usize,
        limit: args.limit,
        at_once: args.at_once,
        ..EvalOptions::default()
    };
    if !args.mode.is_empty() {
        options.modes = args.mode.iter().map(|mode| mode_of(*mode)).collect();
    }
    if args.curve.is_empty() {
        options.curves = options.splits.iter().take(1).map(|split| split.name.clone()).collect();
    } else {
        options.curves = args.curve.iter().filter(|name| *name != "none").cloned().collect();
    }
    if args.plots.is_some() && options.curves.is_empty() {
        return Err(Failure::new(Code::Usage, "--plots draws curves, and there is none; name a split with --curve"));
    }
    let report = evaluate(&options, &nodes).await.or_fail(Code::Failed)?;
    if let Some(dir) = &args.plots {
        std::fs::create_dir_all(dir).or_fail(Code::State)?;
        for split in report.splits.iter().filter(|split| !split.curves.is_empty()) {
            plot::shares(split, &dir.join(format!("{}.svg", split.split))).or_fail(Code::Failed)?;
        }
    }
    print(global, &report, || report.markdown())
}

async fn calibrated(global: &Global, args: &LabCalibrateArgs) -> Result<(), Failure> {
    let settings = nodes::settings(global, &args.models, None, &nodes::CALIBRATE)?;
    logging::start(&settings.log)?;
    let models = nodes::models(&settings)?;
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
    options.answer_tokens = args.read.answer_tokens as usize;
    let read = files::read_options(&args.read)?;
    let mut data = args.data.clone();
    if data.is_empty() {
        data.push(Path::new(DATA).join("calibration.jsonl"));
    }
    let (out, threads) = (args.out.clone(), args.threads);
    let work = tokio::task::spawn_blocking(move || {
        let (mut rows, mut from) = (Vec::new(), Vec::new());
        for file in &data {
            let (more, report) = questions::read(file, &read).or_fail(Code::Failed)?;
            rows.extend(more);
            from.push(report);
        }
        let pair = Pair::load(&models, threads).or_fail(Code::Failed)?;
        let progress = Progress::new("calibrate", rows.len() as u64);
        let fitted = calibrate(&pair, (&rows, &from), &options, &progress).or_fail(Code::Failed);
        progress.finish();
        let (file, report) = fitted?;
        file.save(&out).or_fail(Code::Failed)?;
        Ok::<_, Failure>(report)
    });
    let report = work.await.or_fail(Code::Failed)??;
    print(global, &report, || report.markdown())
}

async fn link(global: &Global, args: &LabLinkArgs) -> Result<(), Failure> {
    let settings = nodes::settings(global, &args.models, args.policy.as_deref(), &nodes::LINK)?;
    logging::start(&settings.log)?;
    let nodes = nodes::nodes(settings, args.policy.as_deref(), args.threads)?;
    let mut options = LinkOptions { data: args.data.clone(), answers: args.answers, ..LinkOptions::default() };
    if !args.rtt.is_empty() {
        options.rtts_ms.clone_from(&args.rtt);
    }
    let report = measure(&options, &nodes).await.or_fail(Code::Failed)?;
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

fn print<T: Serialize>(global: &Global, report: &T, markdown: impl FnOnce() -> String) -> Result<(), Failure> {
    if global.json {
        print_json(&serde_json::to_value(report).or_fail(Code::Failed)?);
    } else {
        print_line(markdown().trim_end());
    }
    Ok(())
}
