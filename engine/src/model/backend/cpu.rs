//! The decoder's operators on own CPU kernels. Buffers are kept between steps.

use super::attend::{Heads, attend};
use super::latent::LATENT_ROWS;
use super::{Attend, Backend, LatentWeights, LayerKv, Mlp, Shared};
use crate::checkpoint::spec::{Activation, Attention, Gate};
use crate::container::{RawTensor, Stored};
use crate::error::EngineError;
use crate::kernels::arena::Arena;
use crate::kernels::matmul::{Input, Job, matmul};
use crate::kernels::packed::{Grain, Kind, Packed};
use crate::kernels::pool::Pool;
use crate::kernels::quantize::Quantized;
use crate::kernels::{Level, gates, lanes};
use crate::model::routing::Choice;

/// Bytes of weights from which the machine's caches are taken not to hold them.
const NARROW_BYTES_MIN: usize = 64 << 20;

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
pub(super) struct Inner {
    pub(super) x: Vec<f32>,
    pub(super) gate: Vec<f32>,
    pub(super) up: Vec<f32>,
    pub(super) down: Vec<f32>,
    /// Outputs of attention's tiles.
    pub(super) parts: Vec<f32>,
    /// Quantised inputs: of the routed experts, of everything else.
    routed: Quantized,
    pub(super) shared: Quantized,
}

/// Own kernels and their threads.
pub(crate) struct Cpu {
    pub(super) level: Level,
    pub(super) pool: Pool,
    arena: Arena,
    release: Box<dyn Fn(usize) + Send + Sync>,
    /// 16-bit floats are kept in 12 bits where they fit.
    narrows: bool,
    quantized: Quantized,
    pub(super) inner: Inner,
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
            narrows: false,
            quantized: Quantized::default(),
            inner: Inner::default(),
        })
    }

    /// Calls `release` with the number of bytes of a file that have been packed, again and again.
    pub(crate) fn call_while_packing(&mut self, release: impl Fn(usize) + Send + Sync + 'static) {
        self.release = Box::new(release);
    }

    /// Tells how many bytes the weights have. Those that no cache holds are read from memory for every
    /// token, so 16-bit floats among them are kept in 12 where that is exact and faster.
    pub(crate) fn expect_weights(&mut self, bytes: usize) {
        self.narrows = self.level.narrows() && bytes >= NARROW_BYTES_MIN;
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
        Stored::Fp4 => Kind::Fp4,
        Stored::Q2K => Kind::Q2K,
        Stored::Q3K => Kind::Q3K,
        Stored::Q4K => Kind::Q4K,
        Stored::Q5K => Kind::Q5K,
        Stored::Q6K => Kind::Q6K,
    }
}

/// Quantises rows as the matrices want them.
pub(super) fn quantized<'a, 'w>(
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
        let (threads, no_memory) =
            (self.pool.threads(), |source| EngineError::Io { path: format!("memory for {}", t.name).into(), source });
        if self.narrows && matches!(kind, Kind::F16 | Kind::Bf16) {
            let narrow = Packed::pack_narrow(&self.arena, kind, [n, k], &t.bytes, threads, &*self.release);
            if let Some(narrow) = narrow.map_err(no_memory)? {
                return Ok(narrow);
            }
        }
        Packed::pack(&self.arena, kind, [n, k], &t.bytes, threads, &*self.release).map_err(no_memory)
    }

    fn vector(&self, data: Vec<f32>) -> Result<Vec<f32>, EngineError> {
        Ok(data)
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

    fn take(&self, rows: Rows) -> Result<Vec<f32>, EngineError> {
        Ok(rows.data)
    }

    fn embed(&mut self, table: &Packed, tokens: &[u32], scale: f32, out: &mut Rows) -> Result<(), EngineError> {
        out.reshape(tokens.len(), table.k);
        for (&token, row) in tokens.iter().zip(out.data.chunks_exact_mut(table.k)) {
            table.unpack_row(token as usize, row);
            row.iter_mut().for_each(|v| *v *= scale);
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

    fn norm_pieces(&mut self, x: &mut Rows, w: &Vec<f32>, eps: f32) -> Result<(), EngineError> {
        let (level, n, copy) = (self.level, w.len(), &mut self.inner.x);
        copy.clear();
        copy.extend_from_slice(&x.data);
        let copy = &*copy;
        self.pool.for_pieces(&mut x.data, n, n, &|i, piece| {
            lanes::rms_norm(level, &copy[i * n..(i + 1) * n], w, eps, piece);
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

    fn add_bias(&mut self, x: &mut Rows, bias: &Vec<f32>) -> Result<(), EngineError> {
        add_bias(self.level, &mut x.data, bias);
        Ok(())
    }

    fn add(&mut self, x: &mut Rows, y: &Rows, scale: f32) -> Result<(), EngineError> {
        if scale.to_bits() == 1f32.to_bits() {
            lanes::add(self.level, &mut x.data, &y.data);
        } else {
            lanes::add_scaled(self.level, &mut x.data, scale, &y.data);
        }
        Ok(())
    }

    fn softcap(&mut self, x: &mut Rows, cap: f32) -> Result<(), EngineError> {
        let (level, width) = (self.level, x.width);
        self.pool.for_pieces(&mut x.data, width, width, &|_, row| gates::softcap(level, row, cap));
        Ok(())
    }

    fn mlp(&mut self, x: &Rows, w: &Mlp<Packed>, activation: Activation, out: &mut Rows) -> Result<(), EngineError> {
        let every: Vec<Vec<Choice>> = Vec::new();
        self.experts(x, &every, &[], Some(Shared { mlp: w, weights: None }), activation, out)
    }

    fn experts(
        &mut self,
        x: &Rows,
        choices: &[Vec<Choice>],
        experts: &[Mlp<Packed>],
        shared: Option<Shared<'_, Packed>>,
        activation: Activation,
        out: &mut Rows,
    ) -> Result<(), EngineError> {
        let (shared, shared_weights) = shared.map_or((None, None), |s| (Some(s.mlp), s.weights));
        let (rows, d, level) = (x.rows(), x.width, self.level);
        let plan = Plan::new(choices, experts);
        let Inner { x: gathered, gate, up, down, routed: routed_q, shared: common, .. } = &mut self.inner;
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
            let routed_in = quantized(level, &mut self.pool, chosen, gathered, routed_q);
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
        let routed = plan.rows.len() * plan.width;
        plan.for_biases(experts, plan.width, 0, &mut gate[..routed], |x, b| add_bias(level, x, b));
        plan.for_biases(experts, plan.width, 1, &mut up[..routed], |x, b| add_bias(level, x, b));
        if let Some([gate_bias, up_bias, _]) = shared.and_then(|s| s.bias.as_ref()) {
            add_bias(level, &mut gate[routed..], gate_bias);
            add_bias(level, &mut up[routed..], up_bias);
        }
        // gate ← activation(gate, up), in pieces that threads can share.
        let piece = if inner.is_multiple_of(64) { 64 } else { inner.max(1) };
        {
            let up = &*up;
            self.pool.for_pieces(gate, piece, piece * 8, &|i, g| {
                let u = &up[i * piece..(i + 1) * piece];
                match activation {
                    Activation::Silu => lanes::silu_mul(level, g, u),
                    Activation::GeluTanh => gates::gelu_mul(level, g, u),
                    Activation::ClampedSwiglu { alpha, limit } => gates::clamped_swiglu(level, g, u, alpha, limit),
                }
            });
        }
        let (routed_x, shared_x) = gate.split_at(routed);
        down.resize(plan.rows.len() * d, 0.0);
        out.reshape(rows, d);
        {
            let chosen = plan.groups.iter().map(|g| &experts[g.expert].down);
            let routed_in = quantized(level, &mut self.pool, chosen, routed_x, routed_q);
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
        plan.for_biases(experts, d, 2, down, |x, b| add_bias(level, x, b));
        if let Some([.., bias]) = shared.and_then(|s| s.bias.as_ref()) {
            add_bias(level, &mut out.data, bias);
        }
        if let Some(weights) = shared_weights {
            for (row, w) in out.data.chunks_exact_mut(d).zip(weights) {
                row.iter_mut().for_each(|v| *v *= w);
            }
        }
        // Experts ascending within a row, so that the sum has one order.
        for (slot, &row) in plan.rows.iter().enumerate() {
            let y = &down[slot * d..(slot + 1) * d];
            lanes::add_scaled(level, &mut out.data[row * d..(row + 1) * d], plan.weights[slot], y);
        }
        Ok(())
    }

    fn router_scores(
        &mut self,
        x: &Rows,
        w: &Packed,
        bias: Option<&Vec<f32>>,
        gate: Gate,
    ) -> Result<Vec<f32>, EngineError> {
        let mut scores = Rows::default();
        self.linear(x, [w], [&mut scores])?;
        if let Some(bias) = bias {
            add_bias(self.level, &mut scores.data, bias);
        }
        // Row by row, so that the lanes of a row do not depend on the batch.
        for row in scores.data.chunks_exact_mut(w.n) {
            match gate {
                Gate::Sigmoid => lanes::sigmoid(self.level, row),
                Gate::Softmax => gates::softmax(self.level, row),
                Gate::SoftmaxOfChosen => {}
            }
        }
        Ok(scores.data)
    }

    fn attend_grouped(
        &mut self,
        how: &Attend<'_>,
        qkv: [&mut Rows; 3],
        kv: &mut LayerKv<'_>,
        out: &mut Rows,
    ) -> Result<(), EngineError> {
        let Attention::Grouped { heads, kv_heads, head_dim } = *how.shape else {
            return Err(EngineError::Shape("grouped attention on latent weights".into()));
        };
        let rope = how.rope;
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
        let h =
            Heads { heads, group: heads / kv_heads, key_dim: head_dim, value_dim: head_dim, values_at: k_width, how };
        attend(level, &mut self.pool, &h, kv, &q.data, &mut self.inner.parts, &mut out.data);
        Ok(())
    }

    fn attend_latent(
        &mut self,
        how: &Attend<'_>,
        w: &LatentWeights<Self>,
        inputs: [&mut Rows; 2],
        kv: &mut LayerKv<'_>,
        out: &mut Rows,
    ) -> Result<(), EngineError> {
        let Attention::Latent { heads, kv_rank, nope_dim, rope_dim, v_dim, .. } = *how.shape else {
            return Err(EngineError::Shape("latent attention on grouped weights".into()));
        };
        let rope = how.rope;
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
        let h = Heads { heads, group: heads, key_dim: width, value_dim: kv_rank, values_at: 0, how };
        let chunks = q.data.chunks(LATENT_ROWS * heads * q_dim).zip(out.data.chunks_mut(LATENT_ROWS * heads * v_dim));
        for (places, (q, out)) in kv.places.chunks(LATENT_ROWS).zip(chunks) {
            let kv = LayerKv { pool: &mut *kv.pool, layer: kv.layer, tables: kv.tables, places };
            self.absorbed(w, &h, &kv, (q, q_dim), (out, v_dim));
        }
        Ok(())
    }
}

fn add_bias(level: Level, x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len().max(1)) {
        lanes::add(level, row, bias);
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

    /// Calls `f(rows, bias)` with the rows `[slots, width]` of every expert that has a bias `which`.
    fn for_biases(
        &self,
        experts: &[Mlp<Packed>],
        width: usize,
        which: usize,
        x: &mut [f32],
        f: impl Fn(&mut [f32], &[f32]),
    ) {
        for g in &self.groups {
            if let Some(bias) = &experts[g.expert].bias {
                f(&mut x[g.rows.start * width..g.rows.end * width], &bias[which]);
            }
        }
    }

    fn input<'a>(&self, g: &Group, x: &'a [f32], k: usize, q: Option<(&'a Quantized, usize)>) -> Input<'a> {
        Input { x: &x[g.rows.start * k..g.rows.end * k], quantized: q.map(|(q, _)| (q, g.rows.start)) }
    }
}
