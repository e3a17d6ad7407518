//! The decoder's operators on own CPU kernels. Buffers are kept between steps.

use super::attend::{Heads, attend};
use super::{Backend, LatentWeights, LayerKv, Mlp};
use crate::error::EngineError;
use crate::kernels::arena::Arena;
use crate::kernels::matmul::{Input, Job, matmul};
use crate::kernels::packed::{Grain, Kind, Packed};
use crate::kernels::pool::Pool;
use crate::kernels::quantize::Quantized;
use crate::kernels::{Level, attention, lanes};
use crate::load::{RawTensor, Stored};
use crate::rope::RopeTable;
use crate::routing::Choice;
use crate::spec::Attention;

/// Rows of activations `[rows, width]`.
#[derive(Default)]
pub(crate) struct Rows {
    data: Vec<f32>,
    width: usize,
}

impl Rows {
    fn reshape(&mut self, rows: usize, width: usize) {
        self.data.resize(rows * width, 0.0);
        self.width = width;
    }

    fn rows(&self) -> usize {
        self.data.len().checked_div(self.width).unwrap_or(0)
    }
}

/// Inner buffers of MLPs and attention.
#[derive(Default)]
struct Inner {
    x: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    /// Outputs of attention's tiles.
    parts: Vec<f32>,
    /// Quantised inputs: of the routed experts, of everything else.
    routed: Quantized,
    shared: Quantized,
}

/// Own kernels and their threads.
pub(crate) struct Cpu {
    level: Level,
    pool: Pool,
    arena: Arena,
    release: Box<dyn Fn(usize) + Send + Sync>,
    quantized: Quantized,
    inner: Inner,
}

impl Cpu {
    pub(crate) fn new(threads: usize) -> Result<Self, EngineError> {
        let pool =
            Pool::new(threads).map_err(|source| EngineError::Io { path: "engine worker thread".into(), source })?;
        Ok(Self {
            level: Level::detect(),
            pool,
            arena: Arena::default(),
            release: Box::new(|_| ()),
            quantized: Quantized::default(),
            inner: Inner::default(),
        })
    }

    /// Calls `release` with the number of bytes of a file that have been packed, again and again.
    pub(crate) fn call_while_packing(&mut self, release: impl Fn(usize) + Send + Sync + 'static) {
        self.release = Box::new(release);
    }

    pub(crate) fn threads(&self) -> usize {
        self.pool.threads()
    }
}

/// The layout of a stored number format.
fn kind(stored: Stored) -> Kind {
    match stored {
        Stored::F32 => Kind::F32,
        Stored::F16 => Kind::F16,
        Stored::Bf16 => Kind::Bf16,
        Stored::Q8_0 => Kind::Q8_0,
        Stored::Q4_0 => Kind::Q4_0,
        Stored::Q4_1 => Kind::Q4_1,
        Stored::Q5_0 => Kind::Q5_0,
        Stored::Q5_1 => Kind::Q5_1,
        Stored::Q2K => Kind::Q2K,
        Stored::Q3K => Kind::Q3K,
        Stored::Q4K => Kind::Q4K,
        Stored::Q5K => Kind::Q5K,
        Stored::Q6K => Kind::Q6K,
    }
}

/// Quantises rows as the matrices want them.
fn quantized<'a, 'w>(
    level: Level,
    pool: &mut Pool,
    weights: impl Iterator<Item = &'w Packed>,
    x: &[f32],
    buffer: &'a mut Quantized,
) -> Option<(&'a Quantized, usize)> {
    let mut grains = [Grain::None; 2];
    let mut width = 0;
    for w in weights {
        match w.kind.grain() {
            Grain::None => continue,
            Grain::Fine => grains[0] = Grain::Fine,
            Grain::Coarse => grains[1] = Grain::Coarse,
        }
        width = w.k;
    }
    if width == 0 {
        return None;
    }
    buffer.fill(level, pool, x, width, &grains);
    Some((buffer, 0))
}

impl Backend for Cpu {
    type Matrix = Packed;
    type Vector = Vec<f32>;
    type Dense = Vec<f32>;
    type Rows = Rows;

    fn matrix(&self, t: &RawTensor<'_>) -> Result<Packed, EngineError> {
        let (n, k) = t.rows_columns()?;
        let kind = kind(t.stored);
        if kind.row_bytes(k).and_then(|b| b.checked_mul(n)) != Some(t.bytes.len()) {
            return Err(EngineError::tensor(
                t.name.clone(),
                format!("shape [{n}, {k}] does not fit its {} bytes", t.bytes.len()),
            ));
        }
        Packed::pack(&self.arena, kind, [n, k], t.bytes, self.pool.threads(), &*self.release)
            .map_err(|source| EngineError::Io { path: format!("memory for {}", t.name).into(), source })
    }

    fn vector(&self, t: &RawTensor<'_>) -> Result<Vec<f32>, EngineError> {
        t.to_f32()
    }

    fn dense(&self, t: &RawTensor<'_>) -> Result<Vec<f32>, EngineError> {
        t.to_f32()
    }

    fn begin_step(&mut self) {
        self.pool.begin_step();
    }

    fn end_step(&mut self) {
        self.pool.end_step();
    }

    fn upload(&mut self, data: &[f32], width: usize, out: &mut Rows) -> Result<(), EngineError> {
        out.data.clear();
        out.data.extend_from_slice(data);
        out.width = width;
        Ok(())
    }

    fn download(&self, rows: &Rows) -> Result<Vec<f32>, EngineError> {
        Ok(rows.data.clone())
    }

    fn embed(&mut self, table: &Packed, tokens: &[u32], out: &mut Rows) -> Result<(), EngineError> {
        out.reshape(tokens.len(), table.k);
        for (&token, row) in tokens.iter().zip(out.data.chunks_exact_mut(table.k)) {
            table.unpack_row(token as usize, row);
        }
        Ok(())
    }

    fn rms_norm(&mut self, x: &Rows, w: &Vec<f32>, eps: f32, out: &mut Rows) -> Result<(), EngineError> {
        out.reshape(x.rows(), x.width);
        let (level, width) = (self.level, x.width);
        self.pool.for_pieces(&mut out.data, width, width, &|i, o| {
            lanes::rms_norm(level, &x.data[i * width..(i + 1) * width], w, eps, o);
        });
        Ok(())
    }

    fn linear<const N: usize>(&mut self, x: &Rows, w: [&Packed; N], out: [&mut Rows; N]) -> Result<(), EngineError> {
        let input = quantized(self.level, &mut self.pool, w.iter().copied(), &x.data, &mut self.quantized);
        let rows = x.rows();
        let mut jobs: Vec<Job<'_>> = w
            .into_iter()
            .zip(out)
            .map(|(weights, out)| {
                out.reshape(rows, weights.n);
                Job { input: Input { x: &x.data, quantized: input }, weights, out: &mut out.data }
            })
            .collect();
        matmul(self.level, &mut self.pool, &mut jobs);
        Ok(())
    }

    fn add(&mut self, x: &mut Rows, y: &Rows) -> Result<(), EngineError> {
        lanes::add(self.level, &mut x.data, &y.data);
        Ok(())
    }

    fn mlp(&mut self, x: &Rows, w: &Mlp<Packed>, out: &mut Rows) -> Result<(), EngineError> {
        let every: Vec<Vec<Choice>> = Vec::new();
        self.experts(x, &every, &[], Some(w), out)
    }

    fn experts(
        &mut self,
        x: &Rows,
        choices: &[Vec<Choice>],
        experts: &[Mlp<Packed>],
        shared: Option<&Mlp<Packed>>,
        out: &mut Rows,
    ) -> Result<(), EngineError> {
        let (rows, d, level) = (x.rows(), x.width, self.level);
        let plan = Plan::new(choices, experts);
        let Inner { x: gathered, gate, up, down, routed, shared: common, .. } = &mut self.inner;
        gathered.clear();
        for &row in &plan.rows {
            gathered.extend_from_slice(&x.data[row * d..(row + 1) * d]);
        }
        let shared_width = shared.map_or(0, |s| s.gate.n);
        let inner = plan.rows.len() * plan.width + rows * shared_width;
        gate.resize(inner, 0.0);
        up.resize(inner, 0.0);
        {
            let chosen = plan.groups.iter().flat_map(|g| [&experts[g.expert].gate, &experts[g.expert].up]);
            let routed_in = quantized(level, &mut self.pool, chosen, gathered, routed);
            let common_in =
                quantized(level, &mut self.pool, shared.iter().flat_map(|s| [&s.gate, &s.up]), &x.data, common);
            let mut jobs = Vec::new();
            let (mut g_rest, mut u_rest) = (&mut gate[..], &mut up[..]);
            for g in &plan.groups {
                let input = plan.input(g, gathered, d, routed_in);
                for (weights, rest) in [(&experts[g.expert].gate, &mut g_rest), (&experts[g.expert].up, &mut u_rest)] {
                    let (out, tail) = std::mem::take(rest).split_at_mut(g.rows.len() * plan.width);
                    *rest = tail;
                    jobs.push(Job { input, weights, out });
                }
            }
            if let Some(s) = shared {
                let input = Input { x: &x.data, quantized: common_in };
                jobs.push(Job { input, weights: &s.gate, out: g_rest });
                jobs.push(Job { input, weights: &s.up, out: u_rest });
            }
            matmul(level, &mut self.pool, &mut jobs);
        }
        // gate ← silu(gate) · up, in pieces that threads can share.
        let piece = if inner.is_multiple_of(64) { 64 } else { inner.max(1) };
        {
            let up = &*up;
            self.pool.for_pieces(gate, piece, piece * 8, &|i, g| {
                lanes::silu_mul(level, g, &up[i * piece..(i + 1) * piece]);
            });
        }
        let (routed_x, shared_x) = gate.split_at(plan.rows.len() * plan.width);
        down.resize(plan.rows.len() * d, 0.0);
        out.reshape(rows, d);
        {
            let chosen = plan.groups.iter().map(|g| &experts[g.expert].down);
            let routed_in = quantized(level, &mut self.pool, chosen, routed_x, routed);
            let common_in = quantized(level, &mut self.pool, shared.iter().map(|s| &s.down), shared_x, common);
            let mut jobs = Vec::new();
            let mut rest = &mut down[..];
            for g in &plan.groups {
                let input = plan.input(g, routed_x, plan.width, routed_in);
                let (out, tail) = std::mem::take(&mut rest).split_at_mut(g.rows.len() * d);
                rest = tail;
                jobs.push(Job { input, weights: &experts[g.expert].down, out });
            }
            match shared {
                Some(s) => jobs.push(Job {
                    input: Input { x: shared_x, quantized: common_in },
                    weights: &s.down,
                    out: &mut out.data,
                }),
                None => out.data.fill(0.0),
            }
            matmul(level, &mut self.pool, &mut jobs);
        }
        // Experts ascending within a row, so that the sum has one order.
        for (slot, &row) in plan.rows.iter().enumerate() {
            let y = &down[slot * d..(slot + 1) * d];
            lanes::add_scaled(level, &mut out.data[row * d..(row + 1) * d], plan.weights[slot], y);
        }
        Ok(())
    }

    fn router_scores(&mut self, x: &Rows, w: &Packed) -> Result<Vec<f32>, EngineError> {
        let mut scores = Rows::default();
        self.linear(x, [w], [&mut scores])?;
        // Row by row, so that the lanes of a row do not depend on the batch.
        for row in scores.data.chunks_exact_mut(w.n) {
            lanes::sigmoid(self.level, row);
        }
        Ok(scores.data)
    }

    fn attend_grouped(
        &mut self,
        shape: &Attention,
        rope: &RopeTable,
        qkv: [&mut Rows; 3],
        kv: &mut LayerKv<'_>,
        out: &mut Rows,
    ) -> Result<(), EngineError> {
        let Attention::Grouped { heads, kv_heads, head_dim } = *shape else {
            return Err(EngineError::Shape("grouped attention on latent weights".into()));
        };
        let [q, k, v] = qkv;
        let level = self.level;
        let k_width = kv_heads * head_dim;
        for (j, place) in kv.places.iter().enumerate() {
            let (cos, sin) = rope.at(place.position);
            for head in q.data[j * heads * head_dim..(j + 1) * heads * head_dim].chunks_exact_mut(head_dim) {
                lanes::rotate(level, head, cos, sin, rope.interleaved);
            }
            for head in k.data[j * k_width..(j + 1) * k_width].chunks_exact_mut(head_dim) {
                lanes::rotate(level, head, cos, sin, rope.interleaved);
            }
            let at = kv.pool.row_at(&kv.tables[place.item], kv.layer, place.position);
            let row = &mut kv.pool.data_mut()[at..at + 2 * k_width];
            row[..k_width].copy_from_slice(&k.data[j * k_width..(j + 1) * k_width]);
            row[k_width..].copy_from_slice(&v.data[j * k_width..(j + 1) * k_width]);
        }
        out.reshape(kv.places.len(), heads * head_dim);
        let h = Heads {
            heads,
            group: heads / kv_heads,
            key_dim: head_dim,
            value_dim: head_dim,
            values_at: k_width,
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        attend(level, &mut self.pool, &h, kv, &q.data, &mut self.inner.parts, &mut out.data);
        Ok(())
    }

    fn attend_latent(
        &mut self,
        shape: &Attention,
        rope: &RopeTable,
        w: &LatentWeights<Self>,
        inputs: [&mut Rows; 2],
        kv: &mut LayerKv<'_>,
        out: &mut Rows,
    ) -> Result<(), EngineError> {
        let Attention::Latent { heads, kv_rank, nope_dim, rope_dim, v_dim, .. } = *shape else {
            return Err(EngineError::Shape("latent attention on grouped weights".into()));
        };
        let [q, latent] = inputs;
        let level = self.level;
        let (q_dim, width) = (nope_dim + rope_dim, kv_rank + rope_dim);
        for (j, place) in kv.places.iter().enumerate() {
            let (cos, sin) = rope.at(place.position);
            for head in q.data[j * heads * q_dim..(j + 1) * heads * q_dim].chunks_exact_mut(q_dim) {
                lanes::rotate(level, &mut head[nope_dim..], cos, sin, rope.interleaved);
            }
            let at = kv.pool.row_at(&kv.tables[place.item], kv.layer, place.position);
            let row = &mut kv.pool.data_mut()[at..at + width];
            let source = &latent.data[j * width..(j + 1) * width];
            lanes::rms_norm(level, &source[..kv_rank], &w.norm, w.eps, &mut row[..kv_rank]);
            row[kv_rank..].copy_from_slice(&source[kv_rank..]);
            lanes::rotate(level, &mut row[kv_rank..], cos, sin, rope.interleaved);
        }
        out.reshape(kv.places.len(), heads * v_dim);
        let (kv, q) = (&*kv, &q.data);
        // Absorbed form: the query goes into the latent space, scores and sums are taken on the
        // cached latents, and the value part brings the sum back. The same for prefill and decode.
        let per_head = (nope_dim + v_dim) * kv_rank;
        let up = |head: usize| w.up[head * per_head..(head + 1) * per_head].split_at(nope_dim * kv_rank);
        let Inner { x: queries, gate: sums, parts, .. } = &mut self.inner;
        queries.resize(kv.places.len() * heads * width, 0.0);
        self.pool.for_pieces(queries, width, nope_dim * kv_rank, &|i, query| {
            let (nope, rotated) = q[i * q_dim..(i + 1) * q_dim].split_at(nope_dim);
            let (latent, key) = query.split_at_mut(kv_rank);
            latent.fill(0.0);
            attention::add_weighted(level, [nope, up(i % heads).0], [nope_dim, kv_rank, nope_dim, kv_rank], latent);
            key.copy_from_slice(rotated);
        });
        sums.resize(kv.places.len() * heads * kv_rank, 0.0);
        let scale = 1.0 / (q_dim as f32).sqrt();
        let h = Heads { heads, group: heads, key_dim: width, value_dim: kv_rank, values_at: 0, scale };
        attend(level, &mut self.pool, &h, kv, queries, parts, sums);
        let sums = &*sums;
        self.pool.for_pieces(&mut out.data, v_dim, v_dim * kv_rank, &|i, out| {
            let latent = &sums[i * kv_rank..(i + 1) * kv_rank];
            attention::dot_rows(level, latent, up(i % heads).1, kv_rank, 1.0, out);
        });
        Ok(())
    }
}

/// Rows of one expert within the plan.
struct Group {
    expert: usize,
    rows: std::ops::Range<usize>,
}

/// Rows sorted by expert, so that each expert's weights are read once.
struct Plan {
    width: usize,
    groups: Vec<Group>,
    /// Row of the batch per slot.
    rows: Vec<usize>,
    /// Weight of the expert's output per slot.
    weights: Vec<f32>,
}

impl Plan {
    fn new(choices: &[Vec<Choice>], experts: &[Mlp<Packed>]) -> Self {
        let mut per_expert: Vec<Vec<(usize, f32)>> = vec![Vec::new(); experts.len()];
        for (row, chosen) in choices.iter().enumerate() {
            for c in chosen {
                per_expert[c.expert].push((row, c.weight));
            }
        }
        let mut plan = Self {
            width: experts.first().map_or(0, |e| e.gate.n),
            groups: Vec::new(),
            rows: Vec::new(),
            weights: Vec::new(),
        };
        for (expert, rows) in per_expert.into_iter().enumerate().filter(|(_, r)| !r.is_empty()) {
            let from = plan.rows.len();
            for (row, weight) in rows {
                plan.rows.push(row);
                plan.weights.push(weight);
            }
            plan.groups.push(Group { expert, rows: from..plan.rows.len() });
        }
        plan
    }

    fn input<'a>(&self, g: &Group, x: &'a [f32], k: usize, q: Option<(&'a Quantized, usize)>) -> Input<'a> {
        Input { x: &x[g.rows.start * k..g.rows.end * k], quantized: q.map(|(q, _)| (q, g.rows.start)) }
    }
}
