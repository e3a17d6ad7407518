//! A loaded model: spec, fingerprints, weights, and the buffers of its steps.

mod backend;
mod check;
mod decoder;
mod pulse;
mod rope;
mod routing;
#[cfg(test)]
mod tests;

pub use backend::BackendKind;
pub use check::{check_gguf, check_safetensors};
pub use pulse::{Pulse, STALL_MIN};

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tandem_proto::ids::Digest;

use backend::Backend;
use backend::candle::Candle;
use backend::cpu::Cpu;
pub(crate) use decoder::Batch;
use decoder::{Scratch, Weights};

use crate::checkpoint::spec::DecoderSpec;
use crate::checkpoint::{Checkpoint, ModelFiles, digest};
use crate::error::EngineError;
use crate::kernels;
use crate::kernels::pool::THREADS_MAX;
use crate::kv::{KvLayout, KvPool, Sequence};

/// Most rows of one call; a longer prompt is cut by the caller (bounds the buffers of a step).
pub const ROWS_MAX: usize = 8192;

/// Rows whose logits are held at a time: those of a whole pass over a large vocabulary take hundreds
/// of MiB.
pub(crate) const HEAD_ROWS_MAX: usize = 64;

/// How a model is loaded.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Threads of a step including the caller's; 0 for as many as there are cores. Not for
    /// candle, which asks `RAYON_NUM_THREADS`.
    pub threads: usize,
    /// Who runs the operators.
    pub backend: BackendKind,
}

/// Rows of the residual stream, f32 `[rows, width]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hidden {
    /// Number of rows.
    pub rows: usize,
    /// Numbers per row.
    pub width: usize,
    /// The numbers, row by row.
    pub data: Vec<f32>,
}

impl Hidden {
    /// The rows `range` as their own hidden state.
    ///
    /// # Errors
    /// [`EngineError::Shape`] if there are no such rows.
    pub fn slice(&self, range: Range<usize>) -> Result<Self, EngineError> {
        let data = range
            .start
            .checked_mul(self.width)
            .zip(range.end.checked_mul(self.width))
            .and_then(|(from, to)| self.data.get(from..to))
            .ok_or_else(|| EngineError::Shape(format!("no rows {range:?} in {} hidden rows", self.rows)))?;
        Ok(Self { rows: range.len(), width: self.width, data: data.to_vec() })
    }

    /// Row `row`.
    #[must_use]
    pub fn row(&self, row: usize) -> Option<&[f32]> {
        self.data.chunks_exact(self.width.max(1)).nth(row)
    }
}

/// Scores of every token of the vocabulary, f32 `[rows, vocab]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logits {
    /// Number of rows.
    pub rows: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// The numbers, row by row.
    pub data: Vec<f32>,
}

impl Logits {
    /// Row `row`.
    #[must_use]
    pub fn row(&self, row: usize) -> Option<&[f32]> {
        self.data.chunks_exact(self.vocab.max(1)).nth(row)
    }
}

/// The next rows of one sequence in a batch.
#[derive(Debug)]
pub struct Rows<'a> {
    /// The sequence they extend.
    pub seq: &'a mut Sequence,
    /// How many rows of the hidden state are its.
    pub rows: usize,
}

/// The weights on one backend.
struct Loaded<B: Backend> {
    weights: Weights<B>,
    scratch: Mutex<Scratch<B>>,
}

impl<B: Backend> Loaded<B> {
    fn load(backend: B, file: &Checkpoint) -> Result<Self, EngineError> {
        let weights = Weights::load(&backend, file)?;
        Ok(Self { weights, scratch: Mutex::new(Scratch::new(backend, &file.spec)) })
    }

    /// Runs one step with the workers awake.
    fn step<T>(&self, f: impl FnOnce(&Weights<B>, &mut Scratch<B>) -> T) -> T {
        // A panic leaves nothing in the buffers that a later step would read before writing it.
        let mut guard: MutexGuard<'_, Scratch<B>> = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let awake = Awake(&mut guard);
        awake.0.backend.begin_step();
        f(&self.weights, awake.0)
    }
}

/// Lets the workers sleep when a step ends, also by a panic.
struct Awake<'a, B: Backend>(&'a mut Scratch<B>);

impl<B: Backend> Drop for Awake<'_, B> {
    fn drop(&mut self) {
        self.0.backend.end_step();
    }
}

enum Engine {
    Cpu(Box<Loaded<Cpu>>),
    Candle(Box<Loaded<Candle>>),
}

/// Calls the same code on whichever backend the model has.
macro_rules! on_engine {
    ($engine:expr, $loaded:ident => $body:expr) => {
        match $engine {
            Engine::Cpu($loaded) => $body,
            Engine::Candle($loaded) => $body,
        }
    };
}

/// A decoder with its weights. Calls from several threads take turns; share it behind an `Arc`.
pub struct Model {
    spec: DecoderSpec,
    digest: Digest,
    layer_digests: Vec<Digest>,
    numerics: String,
    threads: usize,
    engine: Engine,
    pulse: Pulse,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("spec", &self.spec).field("digest", &self.digest).finish_non_exhaustive()
    }
}

impl Model {
    /// Loads a model.
    ///
    /// # Errors
    /// A typed error that names the file, field or tensor that is wrong.
    pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<Self, EngineError> {
        let file = Checkpoint::open(files)?;
        let (digest, layer_digests) = digest::of(&file);
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if options.threads == 0 { cores() } else { options.threads }.min(THREADS_MAX);
        let (engine, numerics, threads) = match options.backend {
            BackendKind::Cpu => {
                let mut cpu = Cpu::new(threads)?;
                cpu.call_while_packing(file.tensors().releaser());
                cpu.expect_weights(file.tensors().len_bytes());
                let threads = cpu.threads();
                let loaded = Loaded::load(cpu, &file)?;
                (Engine::Cpu(Box::new(loaded)), kernels::numerics(), threads)
            }
            BackendKind::Candle => {
                (Engine::Candle(Box::new(Loaded::load(Candle::new(), &file)?)), Candle::numerics(), Candle::threads())
            }
        };
        Ok(Self { spec: file.spec, digest, layer_digests, numerics, threads, engine, pulse: Pulse::default() })
    }

    /// What the decoder is made of.
    #[must_use]
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Shape of its KV state.
    #[must_use]
    pub fn kv_layout(&self) -> KvLayout {
        KvLayout { layers: self.spec.layers, width: self.spec.kv_width() }
    }

    /// Digest of configuration and weights.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Cumulative digests: entry `i` covers the embedding and the layers `0..=i` with the
    /// configuration that shapes them. See [`trunk_layers`].
    #[must_use]
    pub fn layer_digests(&self) -> &[Digest] {
        &self.layer_digests
    }

    /// Names the arithmetic this model runs on; hidden states and KV of two models that share a
    /// trunk have equal bits only if it is equal.
    #[must_use]
    pub fn numerics(&self) -> &str {
        &self.numerics
    }

    /// Threads a step runs on.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// When it last got somewhere.
    #[must_use]
    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// Embeds tokens: the hidden state below layer 0.
    ///
    /// # Errors
    /// [`EngineError::BadToken`], [`EngineError::Shape`] for more than [`ROWS_MAX`] tokens.
    pub fn embed(&self, tokens: &[u32]) -> Result<Hidden, EngineError> {
        let vocab = self.spec.vocab_size;
        check_rows(tokens.len())?;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(EngineError::BadToken { token, vocab });
        }
        let data = on_engine!(&self.engine, r => r.step(|w, s| w.embed(s, &self.spec, tokens)))?;
        Ok(Hidden { rows: tokens.len(), width: self.spec.hidden_size, data })
    }

    /// Runs the layers `range` over a ragged batch. The rows of `hidden` are those of the items one
    /// after the other; row `j` of an item is at position `seq.len() + j`. On success every sequence
    /// has grown by its rows; on an error none has.
    ///
    /// # Errors
    /// [`EngineError::WrongRange`] unless `range` is the pool's, [`EngineError::ContextOverflow`],
    /// [`EngineError::PoolExhausted`], [`EngineError::ForeignSequence`], [`EngineError::Shape`].
    pub fn layers(
        &self,
        range: Range<usize>,
        pool: &mut KvPool,
        items: &mut [Rows<'_>],
        hidden: Hidden,
    ) -> Result<Hidden, EngineError> {
        self.check_range(&range, pool)?;
        let rows: usize = items.iter().map(|i| i.rows).sum();
        check_rows(rows)?;
        let width = self.spec.hidden_size;
        if hidden.rows != rows || hidden.width != width || hidden.data.len() != rows * width {
            return Err(EngineError::Shape(format!(
                "the items have {rows} rows of {width} numbers, the hidden state {} of {} ({} numbers)",
                hidden.rows,
                hidden.width,
                hidden.data.len()
            )));
        }
        let batch = self.place(pool, items)?;
        let out = match self.run(range, pool, &batch, hidden) {
            Ok(out) => out,
            Err(e) => {
                give_back(items);
                return Err(e);
            }
        };
        for item in items {
            item.seq.grow(item.rows);
        }
        Ok(out)
    }

    /// Runs some of the pool's layers over rows for which there is room: of one sequence some layers may be computed
    /// before others.
    pub(crate) fn run(
        &self,
        range: Range<usize>,
        pool: &mut KvPool,
        batch: &Batch,
        hidden: Hidden,
    ) -> Result<Hidden, EngineError> {
        if range.is_empty() || hidden.rows == 0 {
            return Ok(hidden);
        }
        let spec = &self.spec;
        let data = on_engine!(&self.engine, r => r.step(|w, s| w.layers(s, (spec, &self.pulse), range, pool, batch, &hidden.data)))?;
        Ok(Hidden { data, ..hidden })
    }

    /// A hidden state above the last layer after the final norm: what the head sees of it, up to a factor.
    ///
    /// # Errors
    /// [`EngineError::Shape`] if it is not one row.
    pub fn final_norm(&self, hidden: &[f32]) -> Result<Vec<f32>, EngineError> {
        let width = self.spec.hidden_size;
        if hidden.len() != width {
            return Err(EngineError::Shape(format!("a hidden row has {} numbers, {width} are needed", hidden.len())));
        }
        let spec = &self.spec;
        on_engine!(&self.engine, r => r.step(|w, s| w.final_norm(s, spec, hidden)))
    }

    /// Final norm and head over the rows `rows` of `hidden`.
    ///
    /// # Errors
    /// [`EngineError::Shape`] if there is no such row.
    pub fn head(&self, hidden: &Hidden, rows: &[usize]) -> Result<Logits, EngineError> {
        let (width, vocab) = (self.spec.hidden_size, self.spec.vocab_size);
        check_rows(rows.len())?;
        if hidden.width != width || hidden.data.len() != hidden.rows.saturating_mul(width) {
            return Err(EngineError::Shape(format!("hidden rows have {} numbers, {width} are needed", hidden.width)));
        }
        let mut chosen = Vec::with_capacity(rows.len() * width);
        for &row in rows {
            let data = hidden.row(row).ok_or_else(|| EngineError::Shape(format!("no row {row} of {}", hidden.rows)))?;
            chosen.extend_from_slice(data);
        }
        let spec = &self.spec;
        let data = on_engine!(&self.engine, r => r.step(|w, s| w.head(s, spec, &chosen)))?;
        self.pulse.beat();
        Ok(Logits { rows: rows.len(), vocab, data })
    }

    fn check_range(&self, range: &Range<usize>, pool: &KvPool) -> Result<(), EngineError> {
        let problem = if range.start > range.end || range.end > self.spec.layers {
            format!("the model has {} layers", self.spec.layers)
        } else if pool.layers() != *range {
            format!("the KV pool holds layers {}..{}", pool.layers().start, pool.layers().end)
        } else if pool.width() != self.spec.kv_width() {
            format!("the KV pool is {} numbers wide, the model {}", pool.width(), self.spec.kv_width())
        } else {
            return Ok(());
        };
        Err(EngineError::WrongRange { range: range.clone(), problem })
    }

    /// Checks the context, reserves blocks and lays out the batch.
    fn place(&self, pool: &mut KvPool, items: &mut [Rows<'_>]) -> Result<Batch, EngineError> {
        for item in &*items {
            pool.own(item.seq)?;
            let wanted = item.seq.len().saturating_add(item.rows);
            if wanted > self.spec.context_tokens {
                return Err(EngineError::ContextOverflow { wanted, limit: self.spec.context_tokens });
            }
        }
        for i in 0..items.len() {
            let rows = items[i].rows;
            if let Err(e) = pool.reserve(items[i].seq, rows) {
                give_back(items);
                return Err(e);
            }
        }
        let mut batch = Batch::default();
        items.iter().for_each(|item| batch.push(item.seq, item.seq.len(), item.rows));
        Ok(batch)
    }
}

/// Returns blocks that were reserved for rows that will not come.
fn give_back(items: &mut [Rows<'_>]) {
    for item in items {
        let len = item.seq.len();
        item.seq.truncate(len);
    }
}

fn check_rows(rows: usize) -> Result<(), EngineError> {
    if rows > ROWS_MAX {
        return Err(EngineError::Shape(format!("{rows} rows in one call; at most {ROWS_MAX} are taken")));
    }
    Ok(())
}

/// Layers that two models share from the bottom: the longest common prefix of their
/// [`Model::layer_digests`].
#[must_use]
pub fn trunk_layers(a: &[Digest], b: &[Digest]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
