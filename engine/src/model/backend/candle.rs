//! The decoder's operators as candle tensors in f32: a reference that shares no arithmetic with the
//! own kernels (attention in expanded form, products by candle), and the way to candle's devices.

use std::ops::Range;

use candle_core::{D, Device, Tensor};

use super::{Attend, Backend, LatentWeights, LayerKv, Mlp, Place, Shared};
use crate::checkpoint::spec::{Activation, Attention, Gate};
use crate::container::RawTensor;
use crate::error::EngineError;
use crate::model::rope::RopeTable;
use crate::model::routing::Choice;

/// Candle on one device.
pub(crate) struct Candle {
    device: Device,
}

/// Rows `[rows, width]`.
#[derive(Default)]
pub(crate) struct CandleRows(Option<Tensor>);

impl CandleRows {
    fn get(&self) -> Result<&Tensor, EngineError> {
        self.0.as_ref().ok_or_else(|| EngineError::Shape("rows were read before they were written".into()))
    }
}

impl Candle {
    pub(crate) fn new() -> Self {
        Self { device: Device::Cpu }
    }

    pub(crate) fn numerics() -> String {
        "candle-0.11-cpu".into()
    }

    /// Threads of candle's own, whatever the options say.
    pub(crate) fn threads() -> usize {
        candle_core::utils::get_num_threads()
    }

    fn tensor(&self, t: &RawTensor<'_>) -> Result<Tensor, EngineError> {
        Ok(Tensor::from_vec(t.to_f32()?, t.shape.clone(), &self.device)?)
    }

    fn host(&self, data: &[f32]) -> Result<Tensor, EngineError> {
        Ok(Tensor::from_slice(data, data.len(), &self.device)?)
    }

    fn apply(&self, x: &Tensor, w: &Mlp<Tensor>, activation: Activation) -> Result<Tensor, EngineError> {
        let product = |x: &Tensor, m: &Tensor, which: usize| -> Result<Tensor, EngineError> {
            let y = x.matmul(&m.t()?)?;
            match &w.bias {
                Some(bias) => Ok(y.broadcast_add(&self.host(&bias[which])?)?),
                None => Ok(y),
            }
        };
        let (gate, up) = (product(x, &w.gate, 0)?, product(x, &w.up, 1)?);
        let inner = match activation {
            Activation::Silu => (gate.silu()? * up)?,
            Activation::GeluTanh => (gate.gelu()? * up)?,
            Activation::ClampedSwiglu { alpha, limit } => {
                let gate = gate.minimum(limit)?;
                let steep = (&gate * f64::from(alpha))?;
                let logistic = ((steep.neg()?.exp()? + 1.0)?).recip()?;
                ((gate * logistic)? * (up.clamp(-limit, limit)? + 1.0)?)?
            }
        };
        product(&inner, &w.down, 2)
    }

    /// Cosines and sines of the rows' positions, `[rows, dim / 2]`.
    fn angles(&self, rope: &RopeTable, places: &[Place]) -> Result<(Tensor, Tensor), EngineError> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for place in places {
            let (c, s) = rope.at(place.position);
            cos.extend_from_slice(c);
            sin.extend_from_slice(s);
        }
        let shape = (places.len(), cos.len().checked_div(places.len()).unwrap_or(0));
        Ok((Tensor::from_vec(cos, shape, &self.device)?, Tensor::from_vec(sin, shape, &self.device)?))
    }

    /// Stores `rows` = `[rows, width]` in the pool.
    fn store(kv: &mut LayerKv<'_>, rows: &Tensor) -> Result<(), EngineError> {
        let width = kv.pool.width();
        for (place, row) in kv.places.iter().zip(rows.to_vec2::<f32>()?) {
            let at = kv.pool.row_at(&kv.tables[place.item], kv.layer, place.position);
            kv.pool.data_mut()[at..at + width].copy_from_slice(&row);
        }
        Ok(())
    }

    /// The cached rows of an item, `[tokens, width]`.
    fn cached(&self, kv: &LayerKv<'_>, item: usize, seen: Range<usize>) -> Result<Tensor, EngineError> {
        let width = kv.pool.width();
        let tokens = seen.len();
        let mut out = Vec::with_capacity(tokens * width);
        for t in seen {
            let at = kv.pool.row_at(&kv.tables[item], kv.layer, t);
            out.extend_from_slice(&kv.pool.data()[at..at + width]);
        }
        Ok(Tensor::from_vec(out, (tokens, width), &self.device)?)
    }

    /// Attention of one query row `[heads, 1, dim]` over `[heads, tokens, dim]`, to `[1, heads · v]`.
    fn attend(&self, how: &Attend<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, EngineError> {
        let mut scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * f64::from(how.scale))?;
        if let Some(cap) = how.softcap {
            scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
        }
        let (heads, _, tokens) = scores.dims3()?;
        if let Some(sinks) = how.sinks {
            scores = Tensor::cat(&[&scores, &self.host(sinks)?.reshape((heads, 1, 1))?], 2)?;
        }
        let top = scores.max_keepdim(D::Minus1)?;
        let e = scores.broadcast_sub(&top)?.exp()?;
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?.narrow(2, 0, tokens)?.contiguous()?;
        let out = p.matmul(&v.contiguous()?)?;
        let (heads, one, dim) = out.dims3()?;
        Ok(out.reshape((one, heads * dim))?)
    }
}

/// Rotates the last dimension of `x` = `[rows, heads, dim]`.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor, EngineError> {
    let (rows, heads, dim) = x.dims3()?;
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    if interleaved {
        let pairs = x.reshape((rows, heads, dim / 2, 2))?;
        let (a, b) = (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?);
        let lo = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let hi = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Ok(Tensor::stack(&[lo, hi], 3)?.reshape((rows, heads, dim))?)
    } else {
        let (a, b) = (x.narrow(2, 0, dim / 2)?, x.narrow(2, dim / 2, dim / 2)?);
        let lo = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let hi = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[lo, hi], 2)?)
    }
}

fn norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor, EngineError> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    Ok(x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(w)?)
}

impl Backend for Candle {
    type Matrix = Tensor;
    type Vector = Tensor;
    type Rows = CandleRows;

    fn matrix(&self, t: &RawTensor<'_>) -> Result<Tensor, EngineError> {
        t.rows_columns()?;
        self.tensor(t)
    }

    fn vector(&self, data: Vec<f32>) -> Result<Tensor, EngineError> {
        self.host(&data)
    }

    fn upload(&mut self, data: &[f32], width: usize, out: &mut CandleRows) -> Result<(), EngineError> {
        let rows = data.len().checked_div(width).unwrap_or(0);
        out.0 = Some(Tensor::from_slice(data, (rows, width), &self.device)?);
        Ok(())
    }

    fn download(&self, rows: &CandleRows) -> Result<Vec<f32>, EngineError> {
        Ok(rows.get()?.flatten_all()?.to_vec1()?)
    }

    fn take(&self, rows: CandleRows) -> Result<Vec<f32>, EngineError> {
        self.download(&rows)
    }

    fn embed(&mut self, table: &Tensor, tokens: &[u32], scale: f32, out: &mut CandleRows) -> Result<(), EngineError> {
        out.0 = Some((table.index_select(&Tensor::new(tokens, &self.device)?, 0)? * f64::from(scale))?);
        Ok(())
    }

    fn rms_norm(&mut self, x: &CandleRows, w: &Tensor, eps: f32, out: &mut CandleRows) -> Result<(), EngineError> {
        out.0 = Some(norm(x.get()?, w, eps)?);
        Ok(())
    }

    fn norm_pieces(&mut self, x: &mut CandleRows, w: &Tensor, eps: f32) -> Result<(), EngineError> {
        let (rows, width) = x.get()?.dims2()?;
        let piece = w.dims1()?;
        let pieces = x.get()?.reshape((rows, width / piece, piece))?;
        x.0 = Some(norm(&pieces, w, eps)?.reshape((rows, width))?);
        Ok(())
    }

    fn linear<const N: usize>(
        &mut self,
        x: &CandleRows,
        w: [&Tensor; N],
        out: [&mut CandleRows; N],
    ) -> Result<(), EngineError> {
        for (w, out) in w.into_iter().zip(out) {
            out.0 = Some(x.get()?.matmul(&w.t()?)?);
        }
        Ok(())
    }

    fn add_bias(&mut self, x: &mut CandleRows, bias: &Tensor) -> Result<(), EngineError> {
        x.0 = Some(x.get()?.broadcast_add(bias)?);
        Ok(())
    }

    fn add(&mut self, x: &mut CandleRows, y: &CandleRows, scale: f32) -> Result<(), EngineError> {
        x.0 = Some((x.get()? + (y.get()? * f64::from(scale))?)?);
        Ok(())
    }

    fn softcap(&mut self, x: &mut CandleRows, cap: f32) -> Result<(), EngineError> {
        x.0 = Some(((x.get()? / f64::from(cap))?.tanh()? * f64::from(cap))?);
        Ok(())
    }

    fn mlp(
        &mut self,
        x: &CandleRows,
        w: &Mlp<Tensor>,
        activation: Activation,
        out: &mut CandleRows,
    ) -> Result<(), EngineError> {
        out.0 = Some(self.apply(x.get()?, w, activation)?);
        Ok(())
    }

    fn experts(
        &mut self,
        x: &CandleRows,
        choices: &[Vec<Choice>],
        experts: &[Mlp<Tensor>],
        shared: Option<Shared<'_, Tensor>>,
        activation: Activation,
        out: &mut CandleRows,
    ) -> Result<(), EngineError> {
        let x = x.get()?;
        let mut rows = Vec::new();
        for (j, chosen) in choices.iter().enumerate() {
            let x = x.narrow(0, j, 1)?;
            let mut sum = match &shared {
                Some(s) => {
                    let y = self.apply(&x, s.mlp, activation)?;
                    s.weights.as_ref().map_or(Ok(y.clone()), |w| y * f64::from(w[j]))?
                }
                None => x.zeros_like()?,
            };
            for c in chosen {
                sum = (sum + (self.apply(&x, &experts[c.expert], activation)? * f64::from(c.weight))?)?;
            }
            rows.push(sum);
        }
        out.0 = Some(Tensor::cat(&rows, 0)?);
        Ok(())
    }

    fn router_scores(
        &mut self,
        x: &CandleRows,
        w: &Tensor,
        bias: Option<&Tensor>,
        gate: Gate,
    ) -> Result<Vec<f32>, EngineError> {
        let mut scores = x.get()?.matmul(&w.t()?)?;
        if let Some(bias) = bias {
            scores = scores.broadcast_add(bias)?;
        }
        let scores = match gate {
            Gate::Sigmoid => (scores.neg()?.exp()? + 1.0)?.recip()?,
            Gate::Softmax => {
                let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
                e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?
            }
            Gate::SoftmaxOfChosen => scores,
        };
        Ok(scores.flatten_all()?.to_vec1()?)
    }

    fn attend_grouped(
        &mut self,
        how: &Attend<'_>,
        qkv: [&mut CandleRows; 3],
        kv: &mut LayerKv<'_>,
        out: &mut CandleRows,
    ) -> Result<(), EngineError> {
        let Attention::Grouped { heads, kv_heads, head_dim } = *how.shape else {
            return Err(EngineError::Shape("grouped attention on latent weights".into()));
        };
        let rope = how.rope;
        let [q, k, v] = qkv;
        let rows = kv.places.len();
        let (cos, sin) = self.angles(rope, kv.places)?;
        let q = rotate(&q.get()?.reshape((rows, heads, head_dim))?, &cos, &sin, rope.interleaved)?;
        let k = rotate(&k.get()?.reshape((rows, kv_heads, head_dim))?, &cos, &sin, rope.interleaved)?;
        let k = k.reshape((rows, kv_heads * head_dim))?;
        Self::store(kv, &Tensor::cat(&[&k, v.get()?], 1)?)?;
        let group = heads / kv_heads;
        let mut attended = Vec::with_capacity(rows);
        for (j, place) in kv.places.iter().enumerate() {
            let seen = how.first(place.position)..place.position + 1;
            let tokens = seen.len();
            let cached = self.cached(kv, place.item, seen)?;
            let part = |from| -> Result<Tensor, EngineError> {
                let x = cached.narrow(1, from, kv_heads * head_dim)?.reshape((tokens, kv_heads, 1, head_dim))?;
                let x = x.broadcast_as((tokens, kv_heads, group, head_dim))?.reshape((tokens, heads, head_dim))?;
                Ok(x.transpose(0, 1)?.contiguous()?)
            };
            let q = q.narrow(0, j, 1)?.transpose(0, 1)?;
            attended.push(self.attend(how, &q, &part(0)?, &part(kv_heads * head_dim)?)?);
        }
        out.0 = Some(Tensor::cat(&attended, 0)?);
        Ok(())
    }

    fn attend_latent(
        &mut self,
        how: &Attend<'_>,
        w: &LatentWeights<Self>,
        inputs: [&mut CandleRows; 2],
        kv: &mut LayerKv<'_>,
        out: &mut CandleRows,
    ) -> Result<(), EngineError> {
        let Attention::Latent { heads, kv_rank, nope_dim, rope_dim, .. } = *how.shape else {
            return Err(EngineError::Shape("latent attention on grouped weights".into()));
        };
        let rope = how.rope;
        let [q, latent] = inputs;
        let rows = kv.places.len();
        let (cos, sin) = self.angles(rope, kv.places)?;
        let q = q.get()?.reshape((rows, heads, nope_dim + rope_dim))?;
        let rotated = rotate(&q.narrow(2, nope_dim, rope_dim)?.contiguous()?, &cos, &sin, rope.interleaved)?;
        let q = Tensor::cat(&[q.narrow(2, 0, nope_dim)?, rotated], 2)?;
        let latent = latent.get()?;
        let key = latent.narrow(1, kv_rank, rope_dim)?.contiguous()?.reshape((rows, 1, rope_dim))?;
        let key = rotate(&key, &cos, &sin, rope.interleaved)?.reshape((rows, rope_dim))?;
        let latent = norm(&latent.narrow(1, 0, kv_rank)?.contiguous()?, &w.norm, w.eps)?;
        Self::store(kv, &Tensor::cat(&[latent, key], 1)?)?;
        let mut attended = Vec::with_capacity(rows);
        for (j, place) in kv.places.iter().enumerate() {
            let tokens = place.position + 1;
            let cached = self.cached(kv, place.item, 0..tokens)?;
            // Expanded form: keys and values of every head from the latents.
            let latents = cached.narrow(1, 0, kv_rank)?.contiguous()?;
            let keys = w.keys.iter().map(|up| latents.matmul(up)).collect::<Result<Vec<_>, _>>()?;
            let values = w.values.iter().map(|up| latents.matmul(&up.t()?)).collect::<Result<Vec<_>, _>>()?;
            let shared = cached.narrow(1, kv_rank, rope_dim)?.reshape((1, tokens, rope_dim))?;
            let shared = shared.broadcast_as((heads, tokens, rope_dim))?;
            let k = Tensor::cat(&[Tensor::stack(&keys, 0)?, shared], 2)?;
            let v = Tensor::stack(&values, 0)?;
            let q = q.narrow(0, j, 1)?.transpose(0, 1)?;
            attended.push(self.attend(how, &q, &k.contiguous()?, &v)?);
        }
        out.0 = Some(Tensor::cat(&attended, 0)?);
        Ok(())
    }
}
