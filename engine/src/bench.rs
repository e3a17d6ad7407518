//! Measures a model: prefill, decode and verification speed. One round measures each once, so that a caller
//! can alternate rounds with a peer's.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::EngineError;
use crate::kv::{KvPool, Sequence};
use crate::model::{Logits, Model, ROWS_MAX, Rows};
use crate::sampling::argmax;
use tandem_proto::limits::KV_BLOCK_TOKENS;

/// Most rounds of one report.
pub const ROUNDS_MAX: usize = 1000;

/// What to measure. Also the line that asks a peer for a round.
#[derive(Clone, Debug, Serialize)]
pub struct BenchOptions {
    /// Tokens of the prompt, prefilled in one pass.
    pub prompt_tokens: usize,
    /// Tokens decoded one by one behind a prompt of 32 tokens.
    pub decode_tokens: usize,
    /// Tokens of the verification passes, logits for each token; one figure per entry.
    pub verify_tokens: Vec<usize>,
    /// Rounds; the report has their medians. One more runs before them to warm up.
    #[serde(skip)]
    pub rounds: usize,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self { prompt_tokens: 512, decode_tokens: 64, verify_tokens: vec![4, 8], rounds: 5 }
    }
}

impl BenchOptions {
    /// The same, cut to what the model's context and one call can hold.
    #[must_use]
    pub fn fitted(&self, model: &Model) -> Self {
        let room = model.spec().context_tokens.saturating_sub(DECODE_PROMPT_TOKENS).max(1);
        Self {
            prompt_tokens: self.prompt_tokens.clamp(1, model.spec().context_tokens.min(ROWS_MAX)),
            decode_tokens: self.decode_tokens.clamp(1, room),
            verify_tokens: self.verify_tokens.iter().map(|n| (*n).clamp(1, room.min(ROWS_MAX))).collect(),
            rounds: self.rounds.clamp(1, ROUNDS_MAX),
        }
    }
}

/// Speed of verification passes of one size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerifySpeed {
    /// Tokens of a pass.
    pub tokens: usize,
    /// Verified tokens per second.
    pub tokens_per_s: f64,
}

/// Figures of one round, tokens per second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchRound {
    /// Prompt tokens per second.
    pub prefill_tokens_per_s: f64,
    /// Decoded tokens per second, one sequence.
    pub decode_tokens_per_s: f64,
    /// Verification passes, in the order asked for; none from a peer that cannot give logits for each
    /// token.
    pub verify: Vec<VerifySpeed>,
}

impl BenchRound {
    /// Medians, figure by figure; `None` without rounds. Verification sizes are those of the first.
    #[must_use]
    pub fn median(rounds: &[Self]) -> Option<Self> {
        let median = |f: &dyn Fn(&Self) -> Option<f64>| {
            let mut v: Vec<f64> = rounds.iter().filter_map(f).collect();
            v.sort_by(f64::total_cmp);
            v.get(v.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let verify = rounds.first()?.verify.iter().enumerate().map(|(i, v)| VerifySpeed {
            tokens: v.tokens,
            tokens_per_s: median(&|r| r.verify.get(i).map(|v| v.tokens_per_s)),
        });
        Some(Self {
            prefill_tokens_per_s: median(&|r| Some(r.prefill_tokens_per_s)),
            decode_tokens_per_s: median(&|r| Some(r.decode_tokens_per_s)),
            verify: verify.collect(),
        })
    }
}

/// Tokens before the decoded ones.
const DECODE_PROMPT_TOKENS: usize = 32;

/// One sequence of a model in its own pool.
struct Lane<'a> {
    model: &'a Model,
    pool: KvPool,
    seq: Sequence,
}

impl<'a> Lane<'a> {
    fn new(model: &'a Model, tokens: usize) -> Result<Self, EngineError> {
        let pool = KvPool::new(model, 0..model.spec().layers, tokens.div_ceil(KV_BLOCK_TOKENS))?;
        let seq = pool.sequence();
        Ok(Self { model, pool, seq })
    }

    /// Logits of the last `rows` of `tokens`.
    fn pass(&mut self, tokens: &[u32], rows: usize) -> Result<Logits, EngineError> {
        let h = self.model.embed(tokens)?;
        let items = &mut [Rows { seq: &mut self.seq, rows: tokens.len() }];
        let h = self.model.layers(0..self.model.spec().layers, &mut self.pool, items, h)?;
        let rows: Vec<usize> = (tokens.len() - rows..tokens.len()).collect();
        self.model.head(&h, &rows)
    }
}

/// Measures one round.
///
/// # Errors
/// What the model says, for instance [`EngineError::ContextOverflow`].
pub fn bench_round(model: &Model, options: &BenchOptions) -> Result<BenchRound, EngineError> {
    let o = options.fitted(model);
    let vocab = model.spec().vocab_size.max(1);
    let tokens = |n: usize| -> Vec<u32> { (0..n).map(|i| (i * 7919 % vocab) as u32).collect() };
    let per_s = |tokens: usize, from: Instant| tokens as f64 / from.elapsed().as_secs_f64().max(1e-9);

    let mut lane = Lane::new(model, o.prompt_tokens)?;
    let prompt = tokens(o.prompt_tokens);
    let from = Instant::now();
    lane.pass(&prompt, 1)?;
    let prefill_tokens_per_s = per_s(prompt.len(), from);

    let mut lane = Lane::new(model, DECODE_PROMPT_TOKENS + o.decode_tokens)?;
    let mut logits = lane.pass(&tokens(DECODE_PROMPT_TOKENS), 1)?;
    let from = Instant::now();
    for _ in 0..o.decode_tokens {
        logits = lane.pass(&[argmax(&logits.data)], 1)?;
    }
    let decode_tokens_per_s = per_s(o.decode_tokens, from);

    let mut verify = Vec::with_capacity(o.verify_tokens.len());
    for n in o.verify_tokens {
        let mut lane = Lane::new(model, DECODE_PROMPT_TOKENS + n)?;
        lane.pass(&tokens(DECODE_PROMPT_TOKENS), 1)?;
        let drafts = tokens(n);
        let passes = o.decode_tokens.div_ceil(n);
        let from = Instant::now();
        for _ in 0..passes {
            lane.pass(&drafts, n)?;
            lane.seq.truncate(DECODE_PROMPT_TOKENS);
        }
        verify.push(VerifySpeed { tokens: n, tokens_per_s: per_s(passes * n, from) });
    }
    Ok(BenchRound { prefill_tokens_per_s, decode_tokens_per_s, verify })
}
