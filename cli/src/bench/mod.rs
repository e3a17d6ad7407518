//! `tandem bench`: measurements of one machine. Always prints JSON.

mod peer;
mod perplexity;

use std::path::PathBuf;

use serde::Serialize;
use tandem_engine::bench::{BenchOptions, BenchRound, ROUNDS_MAX, bench_round};
use tandem_engine::{BackendKind, LoadOptions, Model, ModelFiles, memory};

use crate::args::{BenchArgs, BenchCommand, BenchEngineArgs, OperatorsArg};
use crate::failure::{Code, Failure, OrFail as _};
use crate::pair;
use crate::ready::print_line;
use peer::Peer;

/// Measures and prints.
pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    match &args.command {
        BenchCommand::Engine(args) => engine(args),
        BenchCommand::Perplexity(args) => perplexity::run(args),
    }
}

/// What `bench engine` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: &'a str,
    /// The arithmetic in use.
    engine: &'a str,
    /// The instruction set that its kernels use here.
    instruction_set: &'static str,
    threads: usize,
    /// Most memory that the process ever held, bytes; absent where the system does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_bytes: Option<u64>,
    #[serde(flatten)]
    options: &'a BenchOptions,
    median: BenchRound,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<PeerReport>,
    rounds: Vec<BenchRound>,
}

/// Another engine's figures, and ours as multiples of them.
#[derive(Debug, Serialize)]
struct PeerReport {
    engine: String,
    median: BenchRound,
    ratio: Ratio,
    rounds: Vec<BenchRound>,
}

/// Our median over the peer's: above 1 we are faster.
#[derive(Debug, Serialize)]
struct Ratio {
    prefill: f64,
    decode: f64,
    verify: Vec<VerifyRatio>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    batch: Vec<BatchRatio>,
}

#[derive(Debug, Serialize)]
struct BatchRatio {
    sequences: usize,
    ratio: f64,
}

#[derive(Debug, Serialize)]
struct VerifyRatio {
    tokens: usize,
    ratio: f64,
}

impl Ratio {
    fn new(ours: &BenchRound, theirs: &BenchRound) -> Self {
        let verify = ours.verify.iter().zip(&theirs.verify);
        let batch = ours.batch.iter().zip(&theirs.batch);
        Self {
            prefill: ours.prefill_tokens_per_s / theirs.prefill_tokens_per_s,
            decode: ours.decode_tokens_per_s / theirs.decode_tokens_per_s,
            verify: verify
                .map(|(a, b)| VerifyRatio { tokens: a.tokens, ratio: a.tokens_per_s / b.tokens_per_s })
                .collect(),
            batch: batch
                .map(|(a, b)| BatchRatio { sequences: a.sequences, ratio: a.tokens_per_s / b.tokens_per_s })
                .collect(),
        }
    }
}

fn engine(args: &BenchEngineArgs) -> Result<(), Failure> {
    let files = pair::find(&args.model, Code::Usage)?.files();
    let backend = match args.operators {
        OperatorsArg::Own => BackendKind::Cpu,
        OperatorsArg::Candle => BackendKind::Candle,
    };
    let load = LoadOptions { threads: args.threads, backend };
    let model = Model::load(&files, &load)
        .map_err(|e| Failure::new(Code::Failed, format!("{} cannot be loaded: {e}", args.model)))?;
    let options = BenchOptions {
        prompt_tokens: args.prompt,
        decode_tokens: args.decode,
        verify_tokens: args.verify.clone(),
        batch_sequences: args.batch.clone(),
        rounds: args.rounds.clamp(1, ROUNDS_MAX),
    }
    .fitted(&model);
    let mut peers = start(&args.peer, &files, model.threads())?;
    // One round each to warm up; then rounds take turns, and so does who goes first.
    let mut ours = Vec::new();
    let mut theirs = vec![Vec::new(); peers.len()];
    for round in 0..=options.rounds {
        let ours_first = round % 2 == 0;
        if ours_first {
            ours.push(bench_round(&model, &options).or_fail(Code::Failed)?);
        }
        for (peer, rounds) in peers.iter_mut().zip(&mut theirs) {
            rounds.push(peer.round(&options)?);
        }
        if !ours_first {
            ours.push(bench_round(&model, &options).or_fail(Code::Failed)?);
        }
    }
    let measured = |mut rounds: Vec<BenchRound>| -> Result<(BenchRound, Vec<BenchRound>), Failure> {
        rounds.remove(0);
        let median = BenchRound::median(&rounds).ok_or_else(|| Failure::new(Code::Failed, "no round was measured"))?;
        Ok((median, rounds))
    };
    let (median, rounds) = measured(ours)?;
    let mut reports = Vec::with_capacity(peers.len());
    for (peer, theirs) in peers.iter().zip(theirs) {
        let (theirs, rounds) = measured(theirs)?;
        let ratio = Ratio::new(&median, &theirs);
        reports.push(PeerReport { engine: peer.engine.clone(), median: theirs, ratio, rounds });
    }
    let report = Report {
        model: &args.model,
        engine: model.numerics(),
        instruction_set: tandem_engine::instruction_set(),
        threads: model.threads(),
        peak_memory_bytes: memory::peak_bytes(),
        options: &options,
        median,
        peers: reports,
        rounds,
    };
    print_line(&serde_json::to_string_pretty(&report).or_fail(Code::Failed)?);
    Ok(())
}

/// Starts the peers on a GGUF file.
fn start(programs: &[PathBuf], files: &ModelFiles, threads: usize) -> Result<Vec<Peer>, Failure> {
    match (programs, files) {
        ([], _) => Ok(Vec::new()),
        (_, ModelFiles::Gguf(path)) => programs.iter().map(|program| Peer::start(program, path, threads)).collect(),
        (_, _) => Err(Failure::new(Code::Usage, "--peer needs a GGUF file as --model")),
    }
}
