//! The decoder: one forward pass for all families, written once over a [`Backend`].

use std::ops::Range;

use crate::backend::{Backend, LatentWeights, LayerKv, Mlp, Place};
use crate::error::EngineError;
use crate::kv::KvPool;
use crate::load::Checkpoint;
use crate::names::Role;
use crate::rope::RopeTable;
use crate::routing::{self, Choice};
use crate::spec::{Attention, DecoderSpec, ExpertsSpec, FeedForward};

enum AttentionWeights<B: Backend> {
    Grouped { q: B::Matrix, k: B::Matrix, v: B::Matrix, o: B::Matrix },
    Latent { query: Query<B>, down: B::Matrix, latent: LatentWeights<B>, o: B::Matrix },
}

enum Query<B: Backend> {
    Direct(B::Matrix),
    LowRank { down: B::Matrix, norm: B::Vector, up: B::Matrix },
}

enum FeedForwardWeights<B: Backend> {
    Dense(Mlp<B::Matrix>),
    Experts {
        spec: ExpertsSpec,
        router: B::Matrix,
        bias: Vec<f32>,
        experts: Vec<Mlp<B::Matrix>>,
        shared: Option<Mlp<B::Matrix>>,
    },
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    attention: AttentionWeights<B>,
    feed_forward_norm: B::Vector,
    feed_forward: FeedForwardWeights<B>,
}

/// Weights of a decoder, ready for a backend.
pub(crate) struct Weights<B: Backend> {
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    /// `None` if the embedding is the head.
    head: Option<B::Matrix>,
}

/// Buffers of a step, kept between steps.
pub(crate) struct Scratch<B: Backend> {
    pub(crate) backend: B,
    rope: RopeTable,
    /// Residual stream.
    h: B::Rows,
    x: B::Rows,
    y: B::Rows,
    q: B::Rows,
    k: B::Rows,
    v: B::Rows,
    attended: B::Rows,
}

/// Rows of the batch: where each belongs.
pub(crate) struct Batch {
    pub(crate) places: Vec<Place>,
    pub(crate) tables: Vec<Vec<u32>>,
}

impl<B: Backend> Scratch<B> {
    pub(crate) fn new(backend: B, spec: &DecoderSpec) -> Self {
        Self {
            backend,
            rope: RopeTable::new(&spec.rope, spec.attention.rope_dim()),
            h: B::Rows::default(),
            x: B::Rows::default(),
            y: B::Rows::default(),
            q: B::Rows::default(),
            k: B::Rows::default(),
            v: B::Rows::default(),
            attended: B::Rows::default(),
        }
    }
}

impl<B: Backend> Weights<B> {
    /// Loads and checks every tensor the spec asks for.
    pub(crate) fn load(backend: &B, file: &Checkpoint) -> Result<Self, EngineError> {
        let spec = &file.spec;
        let (d, vocab) = (spec.hidden_size, spec.vocab_size);
        let matrix = |role, n, k| backend.matrix(&file.tensor(0, role, &[n, k])?);
        let layers = (0..spec.layers).map(|i| Loader { backend, file, layer: i }.layer()).collect::<Result<_, _>>()?;
        Ok(Self {
            embedding: matrix(Role::Embedding, vocab, d)?,
            layers,
            norm: backend.vector(&file.tensor(0, Role::FinalNorm, &[d])?)?,
            head: if spec.tied_head { None } else { Some(matrix(Role::Head, vocab, d)?) },
        })
    }

    pub(crate) fn embed(&self, s: &mut Scratch<B>, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        s.backend.embed(&self.embedding, tokens, &mut s.h)?;
        s.backend.download(&s.h)
    }

    /// Runs the layers `range` over `hidden` = `[rows, hidden_size]`, reading and writing `pool`.
    pub(crate) fn layers(
        &self,
        s: &mut Scratch<B>,
        spec: &DecoderSpec,
        range: Range<usize>,
        pool: &mut KvPool,
        batch: &Batch,
        hidden: &[f32],
    ) -> Result<Vec<f32>, EngineError> {
        s.rope.cover(batch.places.iter().map(|p| p.position + 1).max().unwrap_or(0));
        s.backend.upload(hidden, spec.hidden_size, &mut s.h)?;
        let first = range.start;
        for (i, layer) in self.layers[range].iter().enumerate() {
            let mut kv = LayerKv { pool, layer: i, tables: &batch.tables, places: &batch.places };
            debug_assert_eq!(kv.pool.layers().start, first);
            layer.forward(s, spec, &mut kv)?;
        }
        s.backend.download(&s.h)
    }

    /// Logits `[rows, vocab]` of hidden rows.
    pub(crate) fn head(&self, s: &mut Scratch<B>, spec: &DecoderSpec, hidden: &[f32]) -> Result<Vec<f32>, EngineError> {
        s.backend.upload(hidden, spec.hidden_size, &mut s.h)?;
        s.backend.rms_norm(&s.h, &self.norm, spec.rms_eps, &mut s.x)?;
        s.backend.linear(&s.x, [self.head.as_ref().unwrap_or(&self.embedding)], [&mut s.y])?;
        s.backend.download(&s.y)
    }
}

impl<B: Backend> Layer<B> {
    fn forward(&self, s: &mut Scratch<B>, spec: &DecoderSpec, kv: &mut LayerKv<'_>) -> Result<(), EngineError> {
        let b = &mut s.backend;
        b.rms_norm(&s.h, &self.attention_norm, spec.rms_eps, &mut s.x)?;
        match &self.attention {
            AttentionWeights::Grouped { q, k, v, o } => {
                b.linear(&s.x, [q, k, v], [&mut s.q, &mut s.k, &mut s.v])?;
                b.attend_grouped(&spec.attention, &s.rope, [&mut s.q, &mut s.k, &mut s.v], kv, &mut s.attended)?;
                b.linear(&s.attended, [o], [&mut s.y])?;
            }
            AttentionWeights::Latent { query, down, latent, o } => {
                match query {
                    Query::Direct(q) => b.linear(&s.x, [q, down], [&mut s.q, &mut s.k])?,
                    Query::LowRank { down: q_down, norm, up } => {
                        b.linear(&s.x, [q_down, down], [&mut s.v, &mut s.k])?;
                        b.rms_norm(&s.v, norm, spec.rms_eps, &mut s.y)?;
                        b.linear(&s.y, [up], [&mut s.q])?;
                    }
                }
                let inputs = [&mut s.q, &mut s.k];
                b.attend_latent(&spec.attention, &s.rope, latent, inputs, kv, &mut s.attended)?;
                b.linear(&s.attended, [o], [&mut s.y])?;
            }
        }
        b.add(&mut s.h, &s.y)?;
        b.rms_norm(&s.h, &self.feed_forward_norm, spec.rms_eps, &mut s.x)?;
        match &self.feed_forward {
            FeedForwardWeights::Dense(mlp) => b.mlp(&s.x, mlp, &mut s.y)?,
            FeedForwardWeights::Experts { spec: e, router, bias, experts, shared } => {
                let scores = b.router_scores(&s.x, router)?;
                let choices: Vec<Vec<Choice>> =
                    scores.chunks_exact(e.experts).map(|row| routing::choose(e, row, bias)).collect();
                b.experts(&s.x, &choices, experts, shared.as_ref(), &mut s.y)?;
            }
        }
        b.add(&mut s.h, &s.y)
    }
}

/// Loads one layer.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    file: &'a Checkpoint,
    layer: usize,
}

impl<B: Backend> Loader<'_, B> {
    fn matrix(&self, role: Role, n: usize, k: usize) -> Result<B::Matrix, EngineError> {
        self.backend.matrix(&self.file.tensor(self.layer, role, &[n, k])?)
    }

    fn vector(&self, role: Role, n: usize) -> Result<B::Vector, EngineError> {
        self.backend.vector(&self.file.tensor(self.layer, role, &[n])?)
    }

    fn mlp(&self, roles: [Role; 3], width: usize) -> Result<Mlp<B::Matrix>, EngineError> {
        let d = self.file.spec.hidden_size;
        let [gate, up, down] = roles;
        Ok(Mlp {
            gate: self.matrix(gate, width, d)?,
            up: self.matrix(up, width, d)?,
            down: self.matrix(down, d, width)?,
        })
    }

    fn layer(&self) -> Result<Layer<B>, EngineError> {
        let spec = &self.file.spec;
        let d = spec.hidden_size;
        Ok(Layer {
            attention_norm: self.vector(Role::AttentionNorm, d)?,
            attention: self.attention(&spec.attention, d)?,
            feed_forward_norm: self.vector(Role::FeedForwardNorm, d)?,
            feed_forward: match spec.feed_forward[self.layer] {
                FeedForward::Dense { width } => {
                    FeedForwardWeights::Dense(self.mlp([Role::Gate, Role::Up, Role::Down], width)?)
                }
                FeedForward::Experts(e) => self.experts(e, d)?,
            },
        })
    }

    fn attention(&self, shape: &Attention, d: usize) -> Result<AttentionWeights<B>, EngineError> {
        Ok(match *shape {
            Attention::Grouped { heads, kv_heads, head_dim } => AttentionWeights::Grouped {
                q: self.matrix(Role::Query, heads * head_dim, d)?,
                k: self.matrix(Role::Key, kv_heads * head_dim, d)?,
                v: self.matrix(Role::Value, kv_heads * head_dim, d)?,
                o: self.matrix(Role::Output, d, heads * head_dim)?,
            },
            Attention::Latent { heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim } => {
                let q_width = heads * (nope_dim + rope_dim);
                let up = self.file.tensor(self.layer, Role::LatentUp, &[heads * (nope_dim + v_dim), kv_rank])?;
                AttentionWeights::Latent {
                    query: match q_rank {
                        None => Query::Direct(self.matrix(Role::Query, q_width, d)?),
                        Some(rank) => Query::LowRank {
                            down: self.matrix(Role::QueryDown, rank, d)?,
                            norm: self.vector(Role::QueryNorm, rank)?,
                            up: self.matrix(Role::QueryUp, q_width, rank)?,
                        },
                    },
                    down: self.matrix(Role::LatentDown, kv_rank + rope_dim, d)?,
                    latent: LatentWeights {
                        norm: self.vector(Role::LatentNorm, kv_rank)?,
                        eps: self.file.spec.rms_eps,
                        up: self.backend.dense(&up)?,
                    },
                    o: self.matrix(Role::Output, d, heads * v_dim)?,
                }
            }
        })
    }

    fn experts(&self, e: ExpertsSpec, d: usize) -> Result<FeedForwardWeights<B>, EngineError> {
        let bias = self.file.tensor(self.layer, Role::RouterBias, &[e.experts])?;
        let shared = [Role::SharedGate, Role::SharedUp, Role::SharedDown];
        Ok(FeedForwardWeights::Experts {
            spec: e,
            router: self.matrix(Role::Router, e.experts, d)?,
            bias: bias.to_f32()?,
            experts: (0..e.experts)
                .map(|i| self.mlp([Role::ExpertGate(i), Role::ExpertUp(i), Role::ExpertDown(i)], e.width))
                .collect::<Result<_, _>>()?,
            shared: if e.shared_width > 0 { Some(self.mlp(shared, e.shared_width)?) } else { None },
        })
    }
}
