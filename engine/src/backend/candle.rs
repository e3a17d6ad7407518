//! The decoder's operators as candle tensors in f32: a reference that shares no arithmetic with the
//! own kernels (attention in expanded form, products by candle), and the way to candle's devices.

use candle_core::{D, Device, Tensor};

use super::{Backend, LatentWeights, LayerKv, Mlp, Place};
use crate::error::EngineError;
use crate::load::RawTensor;
use crate::rope::RopeTable;
use crate::routing::Choice;
use crate::spec::Attention;

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

    fn tensor(&self, t: &RawTensor<'_>) -> Result<Tensor, EngineError> {
        Ok(Tensor::from_vec(t.to_f32()?, t.shape.clone(), &self.device)?)
    }

    fn apply(x: &Tensor, w: &Mlp<Tensor>) -> Result<Tensor, EngineError> {
        let gate = x.matmul(&w.gate.t()?)?.silu()?;
        Ok((gate * x.matmul(&w.up.t()?)?)?.matmul(&w.down.t()?)?)
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
    fn cached(&self, kv: &LayerKv<'_>, item: usize, tokens: usize) -> Result<Tensor, EngineError> {
        let width = kv.pool.width();
        let mut out = Vec::with_capacity(tokens * width);
        for t in 0..tokens {
            let at = kv.pool.row_at(&kv.tables[item], kv.layer, t);
            out.extend_from_slice(&kv.pool.data()[at..at + width]);
        }
        Ok(Tensor::from_vec(out, (tokens, width), &self.device)?)
    }

    /// Attention of one query row `[heads, 1, dim]` over `[heads, tokens, dim]`, to `[1, heads · v]`.
    fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor, EngineError> {
        let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
        let top = scores.max_keepdim(D::Minus1)?;
        let e = scores.broadcast_sub(&top)?.exp()?;
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
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
    type Dense = Tensor;
    type Rows = CandleRows;

    fn matrix(&self, t: &RawTensor<'_>) -> Result<Tensor, EngineError> {
        t.rows_columns()?;
        self.tensor(t)
    }

    fn vector(&self, t: &RawTensor<'_>) -> Result<Tensor, EngineError> {
        self.tensor(t)
    }

    fn dense(&self, t: &RawTensor<'_>) -> Result<Tensor, EngineError> {
        self.tensor(t)
    }

    fn upload(&mut self, data: &[f32], width: usize, out: &mut CandleRows) -> Result<(), EngineError> {
        let rows = data.len().checked_div(width).unwrap_or(0);
        out.0 = Some(Tensor::from_slice(data, (rows, width), &self.device)?);
        Ok(())
    }

    fn download(&self, rows: &CandleRows) -> Result<Vec<f32>, EngineError> {
        Ok(rows.get()?.flatten_all()?.to_vec1()?)
    }

    fn embed(&mut self, table: &Tensor, tokens: &[u32], out: &mut CandleRows) -> Result<(), EngineError> {
        out.0 = Some(table.index_select(&Tensor::new(tokens, &self.device)?, 0)?);
        Ok(())
    }

    fn rms_norm(&mut self, x: &CandleRows, w: &Tensor, eps: f32, out: &mut CandleRows) -> Result<(), EngineError> {
        out.0 = Some(norm(x.get()?, w, eps)?);
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

    fn add(&mut self, x: &mut CandleRows, y: &CandleRows) -> Result<(), EngineError> {
        x.0 = Some((x.get()? + y.get()?)?);
        Ok(())
    }

    fn mlp(&mut self, x: &CandleRows, w: &Mlp<Tensor>, out: &mut CandleRows) -> Result<(), EngineError> {
        out.0 = Some(Self::apply(x.get()?, w)?);
        Ok(())
    }

    fn experts(
        &mut self,
        x: &CandleRows,
        choices: &[Vec<Choice>],
        experts: &[Mlp<Tensor>],
        shared: Option<&Mlp<Tensor>>,
        out: &mut CandleRows,
    ) -> Result<(), EngineError> {
        let x = x.get()?;
        let mut rows = Vec::new();
        for (j, chosen) in choices.iter().enumerate() {
            let x = x.narrow(0, j, 1)?;
            let mut sum = match shared {
                Some(w) => Self::apply(&x, w)?,
                None => x.zeros_like()?,
            };
            for c in chosen {
                sum = (sum + (Self::apply(&x, &experts[c.expert])? * f64::from(c.weight))?)?;
            }
            rows.push(sum);
        }
        out.0 = Some(Tensor::cat(&rows, 0)?);
        Ok(())
    }

    fn router_scores(&mut self, x: &CandleRows, w: &Tensor) -> Result<Vec<f32>, EngineError> {
        let scores: Vec<f32> = x.get()?.matmul(&w.t()?)?.flatten_all()?.to_vec1()?;
        Ok(scores.into_iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect())
    }

    fn attend_grouped(
        &mut self,
        shape: &Attention,
        rope: &RopeTable,
        qkv: [&mut CandleRows; 3],
        kv: &mut LayerKv<'_>,
        out: &mut CandleRows,
    ) -> Result<(), EngineError> {
        let Attention::Grouped { heads, kv_heads, head_dim } = *shape else {
            return Err(EngineError::Shape("grouped attention on latent weights".into()));
        };
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
            let tokens = place.position + 1;
            let cached = self.cached(kv, place.item, tokens)?;
            let part = |from| -> Result<Tensor, EngineError> {
                let x = cached.narrow(1, from, kv_heads * head_dim)?.reshape((tokens, kv_heads, 1, head_dim))?;
                let x = x.broadcast_as((tokens, kv_heads, group, head_dim))?.reshape((tokens, heads, head_dim))?;
                Ok(x.transpose(0, 1)?.contiguous()?)
            };
            let q = q.narrow(0, j, 1)?.transpose(0, 1)?;
            attended.push(Self::attend(&q, &part(0)?, &part(kv_heads * head_dim)?, (head_dim as f64).powf(-0.5))?);
        }
        out.0 = Some(Tensor::cat(&attended, 0)?);
        Ok(())
    }

    fn attend_latent(
        &mut self,
        shape: &Attention,
        rope: &RopeTable,
        w: &LatentWeights<Self>,
        inputs: [&mut CandleRows; 2],
        kv: &mut LayerKv<'_>,
        out: &mut CandleRows,
    ) -> Result<(), EngineError> {
        let Attention::Latent { heads, kv_rank, nope_dim, rope_dim, v_dim, .. } = *shape else {
            return Err(EngineError::Shape("latent attention on grouped weights".into()));
        };
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
            let cached = self.cached(kv, place.item, tokens)?;
            // Expanded form: keys and values of every head from the latents.
            let up = cached.narrow(1, 0, kv_rank)?.contiguous()?.matmul(&w.up.t()?)?;
            let up = up.reshape((tokens, heads, nope_dim + v_dim))?;
            let shared = cached.narrow(1, kv_rank, rope_dim)?.reshape((tokens, 1, rope_dim))?;
            let shared = shared.broadcast_as((tokens, heads, rope_dim))?;
            let k = Tensor::cat(&[up.narrow(2, 0, nope_dim)?, shared], 2)?.transpose(0, 1)?;
            let v = up.narrow(2, nope_dim, v_dim)?.transpose(0, 1)?;
            let q = q.narrow(0, j, 1)?.transpose(0, 1)?;
            let scale = ((nope_dim + rope_dim) as f64).powf(-0.5);
            attended.push(Self::attend(&q, &k.contiguous()?, &v, scale)?);
        }
        out.0 = Some(Tensor::cat(&attended, 0)?);
        Ok(())
    }
}
