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

/// Most sequences of a batch.
pub const BATCH_MAX: usize = 64;

/// What to measure. Also the line that asks a peer for a round.
#[derive(Clone, Debug, Serialize)]
pub struct BenchOptions {
    /// Tokens of the prompt, prefilled in one pass.
    pub prompt_tokens: usize,
    /// Tokens decoded one by one behind a prompt of 32 tokens.
    pub decode_tokens: usize,
    /// Tokens of the verification passes, logits for each token; one figure per entry.
    pub verify_tokens: Vec<usize>,
    /// Sequences decoded side by side, one token of each per pass; one figure per entry.
    pub batch_sequences: Vec<usize>,
    /// Rounds; the report has their medians. One more runs before them to warm up.
    #[serde(skip)]
    pub rounds: usize,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self { prompt_tokens: 512, decode_tokens: 64, verify_tokens: vec![4, 8], batch_sequences: vec![], rounds: 5 }
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
            batch_sequences: self.batch_sequences.iter().map(|n| (*n).clamp(1, BATCH_MAX)).collect(),
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

/// Speed of decoding several sequences side by side.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchSpeed {
    /// Sequences of a pass.
    pub sequences: usize,
    /// Decoded tokens per second, of all sequences together.
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
    /// Batches, in the order asked for; none from a peer that runs one sequence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub batch: Vec<BatchSpeed>,
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
        let batch = rounds.first()?.batch.iter().enumerate().map(|(i, b)| BatchSpeed {
            sequences: b.sequences,
            tokens_per_s: median(&|r| r.batch.get(i).map(|b| b.tokens_per_s)),
        });
        Some(Self {
            prefill_tokens_per_s: median(&|r| Some(r.prefill_tokens_per_s)),
            decode_tokens_per_s: median(&|r| Some(r.decode_tokens_per_s)),
            verify: verify.collect(),
            batch: batch.collect(),
        })
    }
}

/// Passes of a batch, however large.
const BATCH_PASSES_MIN: usize = 8;
/// Tokens before the decoded ones.
const DECODE_PROMPT_TOKENS: usize = 32;

/// Sequences of a model in their own pool.
struct Lanes<'a> {
    model: &'a Model,
    pool: KvPool,
    seqs: Vec<Sequence>,
}

impl<'a> Lanes<'a> {
    /// `n` sequences of up to `tokens` tokens.
    fn new(model: &'a Model, n: usize, tokens: usize) -> Result<Self, EngineError> {
        let pool = KvPool::new(model.kv_layout(), 0..model.spec().layers, n * tokens.div_ceil(KV_BLOCK_TOKENS))?;
        let seqs = (0..n).map(|_| pool.sequence()).collect();
        Ok(Self { model, pool, seqs })
    }

    /// The same number of new `tokens` for each of `seqs`, one after the other; logits of the last
    /// `rows` of all.
    fn pass(&mut self, seqs: std::ops::Range<usize>, tokens: &[u32], rows: usize) -> Result<Logits, EngineError> {
        let h = self.model.embed(tokens)?;
        let each = tokens.len() / seqs.len().max(1);
        let items = &mut self.seqs[seqs].iter_mut().map(|seq| Rows { seq, rows: each }).collect::<Vec<_>>();
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

    // Each pool in a block of its own: a figure is not measured beside the KV state of the one before.
    let prefill_tokens_per_s = {
        let mut lane = Lanes::new(model, 1, o.prompt_tokens)?;
        let prompt = tokens(o.prompt_tokens);
        let from = Instant::now();
        lane.pass(0..1, &prompt, 1)?;
        per_s(prompt.len(), from)
    };

    let decode_tokens_per_s = {
        let mut lane = Lanes::new(model, 1, DECODE_PROMPT_TOKENS + o.decode_tokens)?;
        let mut logits = lane.pass(0..1, &tokens(DECODE_PROMPT_TOKENS), 1)?;
        let from = Instant::now();
        for _ in 0..o.decode_tokens {
            logits = lane.pass(0..1, &[argmax(&logits.data)], 1)?;
        }
        per_s(o.decode_tokens, from)
    };

    let mut verify = Vec::with_capacity(o.verify_tokens.len());
    for n in o.verify_tokens {
        let mut lane = Lanes::new(model, 1, DECODE_PROMPT_TOKENS + n)?;
        lane.pass(0..1, &tokens(DECODE_PROMPT_TOKENS), 1)?;
        let drafts = tokens(n);
        let passes = o.decode_tokens.div_ceil(n);
        let from = Instant::now();
        for _ in 0..passes {
            lane.pass(0..1, &drafts, n)?;
            lane.seqs[0].truncate(DECODE_PROMPT_TOKENS);
        }
        verify.push(VerifySpeed { tokens: n, tokens_per_s: per_s(passes * n, from) });
    }

    let mut batch = Vec::with_capacity(o.batch_sequences.len());
    for n in o.batch_sequences {
        let passes = o.decode_tokens.div_ceil(n).max(BATCH_PASSES_MIN);
        let mut lanes = Lanes::new(model, n, DECODE_PROMPT_TOKENS + passes)?;
        // Prompts that differ, so that experts do too.
        let prompts = tokens(DECODE_PROMPT_TOKENS + n);
        let mut next = Vec::with_capacity(n);
        for i in 0..n {
            let logits = lanes.pass(i..i + 1, &prompts[i..i + DECODE_PROMPT_TOKENS], 1)?;
            next.push(argmax(&logits.data));
        }
        let from = Instant::now();
        for _ in 0..passes {
            let logits = lanes.pass(0..n, &next, n)?;
            next.clear();
            next.extend(logits.data.chunks_exact(logits.vocab).map(argmax));
        }
        batch.push(BatchSpeed { sequences: n, tokens_per_s: per_s(passes * n, from) });
    }
    Ok(BenchRound { prefill_tokens_per_s, decode_tokens_per_s, verify, batch })
}
