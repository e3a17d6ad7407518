//! `tandem bench perplexity`: how well a model predicts a text, also according to other engines on
//! the same file and the same token ids.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tandem_engine::perplexity::negative_log_likelihood;
use tandem_engine::tokenizer::{TEXT_BYTES_MAX, Tokenizer};
use tandem_engine::{LoadOptions, Model, ModelFiles, ROWS_MAX};

use super::start;
use crate::args::BenchPerplexityArgs;
use crate::failure::{Code, Failure, OrFail as _};
use crate::pair;
use crate::ready::print_line;

/// The line that asks a peer: pieces of a text, each scored from an empty cache.
#[derive(Debug, Serialize)]
struct Job {
    score: Vec<Vec<u32>>,
}

/// A peer's answer.
#[derive(Debug, Deserialize)]
struct Score {
    /// Sum over every token but the first of each piece, nats.
    negative_log_likelihood: f64,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: &'a str,
    engine: &'a str,
    /// The instruction set that its kernels use here.
    instruction_set: &'static str,
    threads: usize,
    text: &'a Path,
    /// Tokens of a piece.
    context_tokens: usize,
    /// Tokens predicted.
    tokens: usize,
    perplexity: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<PeerReport>,
}

#[derive(Debug, Serialize)]
struct PeerReport {
    engine: String,
    perplexity: f64,
    /// Ours over theirs, less one, per cent.
    difference_percent: f64,
}

pub(super) fn run(args: &BenchPerplexityArgs) -> Result<(), Failure> {
    let files = pair::find(&args.model, Code::Usage)?.files();
    let tokenizer = match &files {
        ModelFiles::Gguf(path) => Tokenizer::from_gguf(path),
        ModelFiles::HfDir(path) => Tokenizer::from_dir(path),
        ModelFiles::Embedded { .. } => {
            Tokenizer::from_json(tandem_models::find(&args.model).map_or(&[], |m| m.tokenizer))
        }
    };
    let tokenizer =
        tokenizer.map_err(|e| Failure::new(Code::Failed, format!("{} has no tokenizer: {e}", args.model)))?;
    let model = Model::load(&files, &LoadOptions { threads: args.threads, ..LoadOptions::default() })
        .map_err(|e| Failure::new(Code::Failed, format!("{} cannot be loaded: {e}", args.model)))?;
    let bos = match (args.bos, model.spec().bos_token) {
        (false, _) => None,
        (true, None) => return Err(Failure::new(Code::Usage, "--bos: the model names no such token")),
        (true, bos) => bos,
    };
    let tokens = tokenizer.encode(&text(&args.text)?).or_fail(Code::Failed)?;
    let longest = model.spec().context_tokens.min(ROWS_MAX);
    let piece = args.context.clamp(2, longest.max(2)) - usize::from(bos.is_some());
    let pieces: Vec<Vec<u32>> = tokens.chunks(piece).map(|p| bos.iter().chain(p).copied().collect()).collect();
    let predicted: usize = pieces.iter().map(|p| p.len() - 1).sum();
    if predicted == 0 {
        return Err(Failure::new(Code::Usage, format!("{} is too short to predict a token", args.text.display())));
    }
    let perplexity = |sum: f64| (sum / predicted as f64).exp();
    let mut sum = 0.0;
    for piece in &pieces {
        sum += negative_log_likelihood(&model, piece).or_fail(Code::Failed)?;
    }
    let ours = perplexity(sum);
    let job = Job { score: pieces };
    let mut peers = Vec::new();
    for peer in &mut start(&args.peer, &files, model.threads())? {
        let score: Score = peer.ask(&job)?;
        let theirs = perplexity(score.negative_log_likelihood);
        peers.push(PeerReport {
            engine: peer.engine.clone(),
            perplexity: theirs,
            difference_percent: (ours / theirs - 1.0) * 100.0,
        });
    }
    let report = Report {
        model: &args.model,
        engine: model.numerics(),
        instruction_set: tandem_engine::instruction_set(),
        threads: model.threads(),
        text: &args.text,
        context_tokens: piece + usize::from(bos.is_some()),
        tokens: predicted,
        perplexity: ours,
        peers,
    };
    print_line(&serde_json::to_string_pretty(&report).or_fail(Code::Failed)?);
    Ok(())
}

fn text(path: &Path) -> Result<String, Failure> {
    let failed =
        |what: String| Failure::new(Code::Usage, format!("the text {}: {what}; name one with --text", path.display()));
    let bytes = std::fs::metadata(path).map_err(|e| failed(e.to_string()))?.len();
    if bytes > TEXT_BYTES_MAX as u64 {
        return Err(failed(format!("{bytes} bytes; at most {TEXT_BYTES_MAX} are taken")));
    }
    std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))
}
