//! `tandem bench`: measurements of one machine. Always prints JSON.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tandem_engine::bench::{BenchOptions, BenchReport, BenchRound, ROUNDS_MAX, bench_round, report};
use tandem_engine::{LoadOptions, Model, ModelFiles};

use crate::args::{BenchArgs, BenchCommand, BenchEngineArgs};
use crate::failure::{Code, Failure, OrFail as _};
use crate::ready::print_line;

/// Measures and prints.
pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    match &args.command {
        BenchCommand::Engine(args) => engine(args),
    }
}

fn engine(args: &BenchEngineArgs) -> Result<(), Failure> {
    let files = files(&args.model)?;
    let options = LoadOptions { threads: args.threads, ..LoadOptions::default() };
    let model = Model::load(&files, &options)
        .map_err(|e| Failure::new(Code::Failed, format!("{} cannot be loaded: {e}", args.model)))?;
    let rounds = args.rounds.clamp(1, ROUNDS_MAX);
    let options =
        BenchOptions { prompt_tokens: args.prompt, decode_tokens: args.decode, verify_tokens: args.verify, rounds };
    let peer = match (&args.peer, &files) {
        (None, _) => None,
        (Some(program), ModelFiles::Gguf(path)) => Some(Peer { program, path, threads: model.threads() }),
        (Some(_), _) => return Err(Failure::new(Code::Usage, "--peer needs a GGUF file as --model")),
    };
    bench_round(&model, &options).or_fail(Code::Failed)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(bench_round(&model, &options).or_fail(Code::Failed)?);
        if let Some(peer) = &peer {
            theirs.push(peer.round(&options)?);
        }
    }
    let ours = report(&model, &options, ours);
    let mut value = serde_json::to_value(&ours).or_fail(Code::Failed)?;
    value["model"] = json!(args.model);
    if let Some(first) = theirs.first() {
        let (prefill, decode) = (
            median(theirs.iter().map(|r| r.median.prefill_tokens_per_s)),
            median(theirs.iter().map(|r| r.median.decode_tokens_per_s)),
        );
        value["peer"] = json!({
            "engine": first.engine,
            "median": BenchRound { prefill_tokens_per_s: prefill, decode_tokens_per_s: decode, verify_tokens_per_s: None },
        });
        value["ratio"] = json!({
            "prefill": ours.median.prefill_tokens_per_s / prefill,
            "decode": ours.median.decode_tokens_per_s / decode,
        });
    }
    print_line(&format!("{value:#}"));
    Ok(())
}

/// The model's files by the name or path that was typed.
fn files(model: &str) -> Result<ModelFiles, Failure> {
    if let Some(embedded) = tandem_models::find(model) {
        return Ok(ModelFiles::Embedded { config: embedded.config, weights: embedded.weights });
    }
    let path = PathBuf::from(model);
    if path.is_dir() {
        return Ok(ModelFiles::HfDir(path));
    }
    if path.is_file() {
        return Ok(ModelFiles::Gguf(path));
    }
    let known = tandem_models::ALL.map(|model| model.name).join(", ");
    let message = format!("model `{model}` is no file or folder, nor in this binary ({known}); check the path");
    Err(Failure::new(Code::Usage, message))
}

/// Another engine's program.
struct Peer<'a> {
    program: &'a Path,
    path: &'a Path,
    threads: usize,
}

impl Peer<'_> {
    /// One round of it, after one to warm up.
    fn round(&self, options: &BenchOptions) -> Result<BenchReport, Failure> {
        let failed = |what: String| Failure::new(Code::Failed, format!("the peer {}: {what}", self.program.display()));
        let number = |n: usize| n.to_string();
        let output = Command::new(self.program)
            .arg(self.path)
            .args(["--threads", &number(self.threads), "--rounds", "1"])
            .args(["--prompt", &number(options.prompt_tokens), "--decode", &number(options.decode_tokens)])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|e| failed(e.to_string()))?;
        if !output.status.success() {
            return Err(failed(format!("ended with {}", output.status)));
        }
        // Its `verify_tokens` may stand for nothing, like every field of a report but the figures.
        let value: Value = serde_json::from_slice(&output.stdout).map_err(|e| failed(format!("no JSON: {e}")))?;
        serde_json::from_value(value).map_err(|e| failed(format!("no report: {e}")))
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
