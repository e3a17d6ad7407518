//! What the decoder needs from the machine. Two implementations: own CPU kernels over kept buffers
//! (`cpu`), and candle's operators (`candle`) as a cross-check and the way to other devices.

mod attend;
pub(crate) mod candle;
pub(crate) mod cpu;
mod latent;

use crate::checkpoint::spec::{Activation, Attention, Gate};
use crate::container::RawTensor;
use crate::error::EngineError;
use crate::kv::KvPool;
use crate::model::rope::RopeTable;
use crate::model::routing::Choice;

/// Which implementation runs the decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendKind {
    /// Own CPU kernels: fast, batch-invariant.
    #[default]
    Cpu,
    /// candle's operators on the CPU in f32: slow, a reference.
    Candle,
}

/// Place of one row of the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Index of its sequence in the batch.
    pub(crate) item: usize,
    /// Its position in that sequence.
    pub(crate) position: usize,
}

/// The KV state one layer reads and writes.
pub(crate) struct LayerKv<'a> {
    pub(crate) pool: &'a mut KvPool,
    /// Layer, counted from the pool's first.
    pub(crate) layer: usize,
    /// Block table per sequence of the batch.
    pub(crate) tables: &'a [Vec<u32>],
    /// One per row.
    pub(crate) places: &'a [Place],
}

/// A gated MLP: `down(activation(gate(x), up(x)))`.
pub(crate) struct Mlp<M> {
    pub(crate) gate: M,
    pub(crate) up: M,
    pub(crate) down: M,
    /// Biases of the three products.
    pub(crate) bias: Option<[Vec<f32>; 3]>,
}

/// The expert that every row passes.
pub(crate) struct Shared<'a, M> {
    pub(crate) mlp: &'a Mlp<M>,
    /// Factor on its output, one per row; 1 if none.
    pub(crate) weights: Option<Vec<f32>>,
}

/// How one layer's attention computes.
pub(crate) struct Attend<'a> {
    pub(crate) shape: &'a Attention,
    pub(crate) rope: &'a RopeTable,
    /// Factor on scores.
    pub(crate) scale: f32,
    /// Cap on scores.
    pub(crate) softcap: Option<f32>,
    /// Tokens seen, the row's own included.
    pub(crate) window: Option<usize>,
    /// A logit per query head that takes weight but gives no value.
    pub(crate) sinks: Option<&'a [f32]>,
}

impl Attend<'_> {
    /// First token that a row at `position` sees.
    pub(crate) fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }
}

/// Weights of latent attention beside the plain products.
pub(crate) struct LatentWeights<B: Backend + ?Sized> {
    pub(crate) norm: B::Vector,
    pub(crate) eps: f32,
    /// Per head the unrotated key part `[kv_rank, nope]`, and the value part `[v, kv_rank]`.
    pub(crate) keys: Vec<B::Matrix>,
    pub(crate) values: Vec<B::Matrix>,
}

/// The operators of a decoder step. Rows are tokens; a row of a result depends only on the same row
/// of the inputs (and on the row's own sequence).
pub(crate) trait Backend: Send {
    /// A weight matrix `[n, k]`.
    type Matrix: Send + Sync;
    /// A vector of f32 (norms, biases).
    type Vector: Send + Sync;
    /// Rows of activations; buffers are kept between steps.
    type Rows: Default + Send;

    fn matrix(&self, t: &RawTensor<'_>) -> Result<Self::Matrix, EngineError>;
    fn vector(&self, data: Vec<f32>) -> Result<Self::Vector, EngineError>;

    /// A step begins (threads wake up) or ends.
    fn begin_step(&mut self) {}
    fn end_step(&mut self) {}

    fn upload(&mut self, data: &[f32], width: usize, out: &mut Self::Rows) -> Result<(), EngineError>;
    fn download(&self, rows: &Self::Rows) -> Result<Vec<f32>, EngineError>;
    /// The numbers of rows that are no buffer, without a copy where that is possible.
    fn take(&self, rows: Self::Rows) -> Result<Vec<f32>, EngineError>;

    /// `out[i] = scale · table[tokens[i]]`; ids have been checked.
    fn embed(
        &mut self,
        table: &Self::Matrix,
        tokens: &[u32],
        scale: f32,
        out: &mut Self::Rows,
    ) -> Result<(), EngineError>;
    fn rms_norm(&mut self, x: &Self::Rows, w: &Self::Vector, eps: f32, out: &mut Self::Rows)
    -> Result<(), EngineError>;
    /// Norms every piece of as many numbers as `w` has, in place (heads, or whole rows).
    fn norm_pieces(&mut self, x: &mut Self::Rows, w: &Self::Vector, eps: f32) -> Result<(), EngineError>;
    /// Several products of one input.
    fn linear<const N: usize>(
        &mut self,
        x: &Self::Rows,
        w: [&Self::Matrix; N],
        out: [&mut Self::Rows; N],
    ) -> Result<(), EngineError>;
    /// Adds `bias` to every row.
    fn add_bias(&mut self, x: &mut Self::Rows, bias: &Self::Vector) -> Result<(), EngineError>;
    /// `x += scale · y`.
    fn add(&mut self, x: &mut Self::Rows, y: &Self::Rows, scale: f32) -> Result<(), EngineError>;
    /// `x = cap · tanh(x / cap)`.
    fn softcap(&mut self, x: &mut Self::Rows, cap: f32) -> Result<(), EngineError>;
    fn mlp(
        &mut self,
        x: &Self::Rows,
        w: &Mlp<Self::Matrix>,
        activation: Activation,
        out: &mut Self::Rows,
    ) -> Result<(), EngineError>;
    /// `out = Σ_chosen weight · expert(x) (+ weight · shared(x))`.
    fn experts(
        &mut self,
        x: &Self::Rows,
        choices: &[Vec<Choice>],
        experts: &[Mlp<Self::Matrix>],
        shared: Option<Shared<'_, Self::Matrix>>,
        activation: Activation,
        out: &mut Self::Rows,
    ) -> Result<(), EngineError>;
    /// The router's scores `[rows, experts]` as `gate` says, on the host: logistic, softmax, or as
    /// they are.
    fn router_scores(
        &mut self,
        x: &Self::Rows,
        w: &Self::Matrix,
        bias: Option<&Self::Vector>,
        gate: Gate,
    ) -> Result<Vec<f32>, EngineError>;

    /// Rotates `q` and `k`, stores keys and values, attends. `q` is scratch.
    fn attend_grouped(
        &mut self,
        how: &Attend<'_>,
        qkv: [&mut Self::Rows; 3],
        kv: &mut LayerKv<'_>,
        out: &mut Self::Rows,
    ) -> Result<(), EngineError>;
    /// Norms the latents, rotates, stores, attends over all tokens, without cap or sinks. `q` and
    /// `latent` are scratch.
    fn attend_latent(
        &mut self,
        how: &Attend<'_>,
        w: &LatentWeights<Self>,
        inputs: [&mut Self::Rows; 2],
        kv: &mut LayerKv<'_>,
        out: &mut Self::Rows,
    ) -> Result<(), EngineError>;
}
