//! The decoder: one forward pass for all families, written once over a [`Backend`].

use std::ops::Range;

use super::backend::{Attend, Backend, LatentWeights, LayerKv, Mlp, Place, Shared};
use super::pulse::Pulse;
use super::rope::RopeTable;
use super::routing::{self, Choice};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::Role;
use crate::checkpoint::spec::{Attention, DecoderSpec, ExpertsSpec, FeedForward, Gate, HeadNorm, Reach};
use crate::container::RawTensor;
use crate::error::EngineError;
use crate::kv::{KvPool, Sequence};

enum AttentionWeights<B: Backend> {
    Grouped {
        qkv: [B::Matrix; 3],
        bias: Option<[B::Vector; 3]>,
        /// Norms of queries and keys.
        norms: Option<[B::Vector; 2]>,
        sinks: Option<Vec<f32>>,
    },
    Latent {
        query: Query<B>,
        down: B::Matrix,
        latent: LatentWeights<B>,
    },
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
        bias: Option<B::Vector>,
        /// Empty if nothing corrects the choice.
        correction: Vec<f32>,
        experts: Vec<Mlp<B::Matrix>>,
        shared: Option<Mlp<B::Matrix>>,
        /// Scores the shared expert, `[1, hidden_size]`.
        shared_score: Option<B::Matrix>,
    },
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    attention: AttentionWeights<B>,
    output: B::Matrix,
    output_bias: Option<B::Vector>,
    feed_forward_norm: B::Vector,
    feed_forward: FeedForwardWeights<B>,
    /// Norms of what attention and feed-forward give.
    post_norms: Option<[B::Vector; 2]>,
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
    ropes: Vec<RopeTable>,
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
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) places: Vec<Place>,
    pub(crate) tables: Vec<Vec<u32>>,
}

impl Batch {
    /// Adds the next rows, at the positions `from..from + rows` of `seq`.
    pub(crate) fn push(&mut self, seq: &Sequence, from: usize, rows: usize) {
        let item = self.tables.len();
        self.places.extend((from..from + rows).map(|position| Place { item, position }));
        self.tables.push(seq.table().to_vec());
    }
}

impl<B: Backend> Scratch<B> {
    pub(crate) fn new(backend: B, spec: &DecoderSpec) -> Self {
        Self {
            backend,
            ropes: spec.ropes.iter().map(|r| RopeTable::new(r, spec.attention.rope_dim())).collect(),
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
    /// Loads and checks every tensor the spec asks for, and refuses a file that has others.
    pub(crate) fn load(backend: &B, file: &Checkpoint) -> Result<Self, EngineError> {
        let spec = &file.spec;
        let (d, vocab) = (spec.hidden_size, spec.vocab_size);
        let matrix = |role, n, k| backend.matrix(&file.tensor(0, role, &[n, k])?);
        let layers = (0..spec.layers).map(|i| Loader { backend, file, layer: i }.layer()).collect::<Result<_, _>>()?;
        // Scaling what the head reads scales the logits.
        let mut final_norm = norm_weights(file, 0, Role::FinalNorm, d)?;
        final_norm.iter_mut().for_each(|v| *v *= spec.scales.logits);
        let weights = Self {
            embedding: matrix(Role::Embedding, vocab, d)?,
            layers,
            norm: backend.vector(final_norm)?,
            head: if spec.tied_head { None } else { Some(matrix(Role::Head, vocab, d)?) },
        };
        file.check_all_used()?;
        Ok(weights)
    }

    pub(crate) fn embed(
        &self,
        s: &mut Scratch<B>,
        spec: &DecoderSpec,
        tokens: &[u32],
    ) -> Result<Vec<f32>, EngineError> {
        s.backend.embed(&self.embedding, tokens, spec.scales.embedding, &mut s.h)?;
        s.backend.download(&s.h)
    }

    /// Runs the layers `range` over `hidden` = `[rows, hidden_size]`, reading and writing `pool`. Each is a
    /// step of `pulse`.
    pub(crate) fn layers(
        &self,
        s: &mut Scratch<B>,
        (spec, pulse): (&DecoderSpec, &Pulse),
        range: Range<usize>,
        pool: &mut KvPool,
        batch: &Batch,
        hidden: &[f32],
    ) -> Result<Vec<f32>, EngineError> {
        let positions = batch.places.iter().map(|p| p.position + 1).max().unwrap_or(0);
        s.ropes.iter_mut().for_each(|r| r.cover(positions));
        s.backend.upload(hidden, spec.hidden_size, &mut s.h)?;
        let first = range.start;
        for (i, layer) in self.layers[range].iter().enumerate() {
            let reach = spec.reach[first + i];
            let layer_of_pool = first - pool.layers().start + i;
            let mut kv = LayerKv { pool, layer: layer_of_pool, tables: &batch.tables, places: &batch.places };
            layer.forward(s, spec, reach, &mut kv)?;
            pulse.beat();
        }
        s.backend.download(&s.h)
    }

    /// Hidden rows after the final norm.
    pub(crate) fn final_norm(
        &self,
        s: &mut Scratch<B>,
        spec: &DecoderSpec,
        hidden: &[f32],
    ) -> Result<Vec<f32>, EngineError> {
        s.backend.upload(hidden, spec.hidden_size, &mut s.h)?;
        s.backend.rms_norm(&s.h, &self.norm, spec.norms.eps, &mut s.x)?;
        s.backend.download(&s.x)
    }

    /// Logits `[rows, vocab]` of hidden rows.
    pub(crate) fn head(&self, s: &mut Scratch<B>, spec: &DecoderSpec, hidden: &[f32]) -> Result<Vec<f32>, EngineError> {
        s.backend.upload(hidden, spec.hidden_size, &mut s.h)?;
        s.backend.rms_norm(&s.h, &self.norm, spec.norms.eps, &mut s.x)?;
        // Given away whole, not kept as a buffer: a megabyte per row of a large vocabulary.
        let mut logits = B::Rows::default();
        s.backend.linear(&s.x, [self.head.as_ref().unwrap_or(&self.embedding)], [&mut logits])?;
        if let Some(cap) = spec.logit_softcap {
            s.backend.softcap(&mut logits, cap)?;
        }
        s.backend.take(logits)
    }
}

impl<B: Backend> Layer<B> {
    fn forward(
        &self,
        s: &mut Scratch<B>,
        spec: &DecoderSpec,
        reach: Reach,
        kv: &mut LayerKv<'_>,
    ) -> Result<(), EngineError> {
        let (b, eps) = (&mut s.backend, spec.norms.eps);
        let mut how = Attend {
            shape: &spec.attention,
            rope: &s.ropes[reach.rope],
            scale: spec.rules.scale,
            softcap: spec.rules.softcap,
            window: reach.window,
            sinks: None,
        };
        b.rms_norm(&s.h, &self.attention_norm, eps, &mut s.x)?;
        match &self.attention {
            AttentionWeights::Grouped { qkv: [q, k, v], bias, norms, sinks } => {
                b.linear(&s.x, [q, k, v], [&mut s.q, &mut s.k, &mut s.v])?;
                if let Some([q, k, v]) = bias {
                    b.add_bias(&mut s.q, q)?;
                    b.add_bias(&mut s.k, k)?;
                    b.add_bias(&mut s.v, v)?;
                }
                if let Some([q, k]) = norms {
                    b.norm_pieces(&mut s.q, q, eps)?;
                    b.norm_pieces(&mut s.k, k, eps)?;
                }
                how.sinks = sinks.as_deref();
                b.attend_grouped(&how, [&mut s.q, &mut s.k, &mut s.v], kv, &mut s.attended)?;
            }
            AttentionWeights::Latent { query, down, latent } => {
                match query {
                    Query::Direct(q) => b.linear(&s.x, [q, down], [&mut s.q, &mut s.k])?,
                    Query::LowRank { down: q_down, norm, up } => {
                        b.linear(&s.x, [q_down, down], [&mut s.v, &mut s.k])?;
                        b.rms_norm(&s.v, norm, latent.eps, &mut s.y)?;
                        b.linear(&s.y, [up], [&mut s.q])?;
                    }
                }
                b.attend_latent(&how, latent, [&mut s.q, &mut s.k], kv, &mut s.attended)?;
            }
        }
        b.linear(&s.attended, [&self.output], [&mut s.y])?;
        if let Some(bias) = &self.output_bias {
            b.add_bias(&mut s.y, bias)?;
        }
        if let Some([norm, _]) = &self.post_norms {
            b.norm_pieces(&mut s.y, norm, eps)?;
        }
        b.add(&mut s.h, &s.y, spec.scales.residual)?;
        b.rms_norm(&s.h, &self.feed_forward_norm, eps, &mut s.x)?;
        match &self.feed_forward {
            FeedForwardWeights::Dense(mlp) => b.mlp(&s.x, mlp, spec.activation, &mut s.y)?,
            FeedForwardWeights::Experts { spec: e, router, bias, correction, experts, shared, shared_score } => {
                let scores = b.router_scores(&s.x, router, bias.as_ref(), e.gate)?;
                let choices: Vec<Vec<Choice>> =
                    scores.chunks_exact(e.experts).map(|row| routing::choose(e, row, correction)).collect();
                let weights = match shared_score {
                    Some(w) => Some(b.router_scores(&s.x, w, None, Gate::Sigmoid)?),
                    None => None,
                };
                let shared = shared.as_ref().map(|mlp| Shared { mlp, weights });
                b.experts(&s.x, &choices, experts, shared, spec.activation, &mut s.y)?;
            }
        }
        if let Some([_, norm]) = &self.post_norms {
            b.norm_pieces(&mut s.y, norm, eps)?;
        }
        b.add(&mut s.h, &s.y, spec.scales.residual)
    }
}

/// Weights of a norm, as they multiply.
fn norm_weights(file: &Checkpoint, layer: usize, role: Role, n: usize) -> Result<Vec<f32>, EngineError> {
    let mut w = file.tensor(layer, role, &[n])?.to_f32()?;
    if file.spec.norms.minus_one {
        w.iter_mut().for_each(|v| *v += 1.0);
    }
    Ok(w)
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

    fn numbers(&self, role: Role, n: usize) -> Result<Vec<f32>, EngineError> {
        self.file.tensor(self.layer, role, &[n])?.to_f32()
    }

    fn vector(&self, role: Role, n: usize) -> Result<B::Vector, EngineError> {
        self.backend.vector(self.numbers(role, n)?)
    }

    fn norm(&self, role: Role, n: usize) -> Result<B::Vector, EngineError> {
        self.backend.vector(norm_weights(self.file, self.layer, role, n)?)
    }

    /// A gated MLP; `roles` are gate, up and down, `biases` theirs.
    fn mlp(&self, roles: [Role; 3], biases: [Role; 3], width: usize) -> Result<Mlp<B::Matrix>, EngineError> {
        let d = self.file.spec.hidden_size;
        let [gate, up, down] = roles;
        Ok(Mlp {
            gate: self.matrix(gate, width, d)?,
            up: self.matrix(up, width, d)?,
            down: self.matrix(down, d, width)?,
            bias: match self.file.spec.mlp_bias {
                true => {
                    let [gate, up, down] = biases;
                    Some([self.numbers(gate, width)?, self.numbers(up, width)?, self.numbers(down, d)?])
                }
                false => None,
            },
        })
    }

    fn layer(&self) -> Result<Layer<B>, EngineError> {
        let spec = &self.file.spec;
        let d = spec.hidden_size;
        let output_width = match spec.attention {
            Attention::Grouped { heads, head_dim, .. } => heads * head_dim,
            Attention::Latent { heads, v_dim, .. } => heads * v_dim,
        };
        Ok(Layer {
            attention_norm: self.norm(Role::AttentionNorm, d)?,
            attention: self.attention(&spec.attention, d)?,
            output: self.matrix(Role::Output, d, output_width)?,
            output_bias: if spec.rules.output_bias { Some(self.vector(Role::OutputBias, d)?) } else { None },
            feed_forward_norm: self.norm(Role::FeedForwardNorm, d)?,
            feed_forward: match spec.feed_forward[self.layer] {
                FeedForward::Dense { width } => {
                    let biases = [Role::GateBias, Role::UpBias, Role::DownBias];
                    FeedForwardWeights::Dense(self.mlp([Role::Gate, Role::Up, Role::Down], biases, width)?)
                }
                FeedForward::Experts(e) => self.experts(e, d)?,
            },
            post_norms: match spec.norms.sandwich {
                true => Some([self.norm(Role::AttentionPostNorm, d)?, self.norm(Role::FeedForwardPostNorm, d)?]),
                false => None,
            },
        })
    }

    fn attention(&self, shape: &Attention, d: usize) -> Result<AttentionWeights<B>, EngineError> {
        let rules = &self.file.spec.rules;
        Ok(match *shape {
            Attention::Grouped { heads, kv_heads, head_dim } => {
                let (q, kv) = (heads * head_dim, kv_heads * head_dim);
                let norm_widths = match rules.head_norm {
                    HeadNorm::No => None,
                    HeadNorm::PerHead => Some([head_dim, head_dim]),
                    HeadNorm::Whole => Some([q, kv]),
                };
                AttentionWeights::Grouped {
                    qkv: [
                        self.matrix(Role::Query, q, d)?,
                        self.matrix(Role::Key, kv, d)?,
                        self.matrix(Role::Value, kv, d)?,
                    ],
                    bias: match rules.qkv_bias {
                        true => Some([
                            self.vector(Role::QueryBias, q)?,
                            self.vector(Role::KeyBias, kv)?,
                            self.vector(Role::ValueBias, kv)?,
                        ]),
                        false => None,
                    },
                    norms: match norm_widths {
                        Some([q, k]) => Some([self.norm(Role::QueryNorm, q)?, self.norm(Role::KeyNorm, k)?]),
                        None => None,
                    },
                    sinks: if rules.sinks { Some(self.numbers(Role::Sinks, heads)?) } else { None },
                }
            }
            Attention::Latent { heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim, eps } => {
                let q_width = heads * (nope_dim + rope_dim);
                let [keys, values] = self.latent_up(heads, nope_dim, v_dim, kv_rank)?;
                AttentionWeights::Latent {
                    query: match q_rank {
                        None => Query::Direct(self.matrix(Role::Query, q_width, d)?),
                        Some(rank) => Query::LowRank {
                            down: self.matrix(Role::QueryDown, rank, d)?,
                            norm: self.norm(Role::QueryNorm, rank)?,
                            up: self.matrix(Role::QueryUp, q_width, rank)?,
                        },
                    },
                    down: self.matrix(Role::LatentDown, kv_rank + rope_dim, d)?,
                    latent: LatentWeights { norm: self.norm(Role::LatentNorm, kv_rank)?, eps, keys, values },
                }
            }
        })
    }

    /// Matrices of every head from latents up: of keys `[kv_rank, nope]`, of values `[v, kv_rank]`. Files have
    /// one tensor, keys the other way round, or split it as here (newer GGUF).
    fn latent_up(&self, heads: usize, nope: usize, v: usize, rank: usize) -> Result<[Vec<B::Matrix>; 2], EngineError> {
        if self.file.find(self.layer, Role::LatentKeyUp)?.is_some() {
            let keys = self.file.tensor(self.layer, Role::LatentKeyUp, &[heads, rank, nope])?;
            let values = self.file.tensor(self.layer, Role::LatentValueUp, &[heads, v, rank])?;
            let slabs = |t: &RawTensor<'_>| -> Result<Vec<_>, _> {
                (0..heads).filter_map(|head| t.slab(head)).map(|slab| self.backend.matrix(&slab)).collect()
            };
            return Ok([slabs(&keys)?, slabs(&values)?]);
        }
        let mut both = self.file.tensor(self.layer, Role::LatentUp, &[heads * (nope + v), rank])?;
        both.shape = vec![heads, nope + v, rank];
        let (mut keys, mut values) = (Vec::with_capacity(heads), Vec::with_capacity(heads));
        for slab in (0..heads).filter_map(|head| both.slab(head)) {
            if let Some([key, value]) = slab.split_rows(nope) {
                keys.push(self.backend.matrix(&key.transposed()?)?);
                values.push(self.backend.matrix(&value)?);
            }
        }
        Ok([keys, values])
    }

    fn experts(&self, e: ExpertsSpec, d: usize) -> Result<FeedForwardWeights<B>, EngineError> {
        let shared = [Role::SharedGate, Role::SharedUp, Role::SharedDown];
        let expert = |i| {
            let roles = [Role::ExpertGate(i), Role::ExpertUp(i), Role::ExpertDown(i)];
            self.mlp(roles, [Role::ExpertGateBias(i), Role::ExpertUpBias(i), Role::ExpertDownBias(i)], e.width)
        };
        Ok(FeedForwardWeights::Experts {
            spec: e,
            router: self.matrix(Role::Router, e.experts, d)?,
            bias: if e.router_bias { Some(self.vector(Role::RouterBias, e.experts)?) } else { None },
            correction: if e.correction { self.numbers(Role::RouterCorrection, e.experts)? } else { Vec::new() },
            experts: (0..e.experts).map(expert).collect::<Result<_, _>>()?,
            shared: if e.shared_width > 0 { Some(self.mlp(shared, shared, e.shared_width)?) } else { None },
            shared_score: if e.shared_gated { Some(self.matrix(Role::SharedScore, 1, d)?) } else { None },
        })
    }
}
