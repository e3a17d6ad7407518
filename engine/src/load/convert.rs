//! Stored numbers to f32, for the small tensors and the reference backend.

use std::borrow::Cow;

use candle_core::quantized::{QTensor, ggml_file};
use candle_core::{Device, quantized::GgmlDType};
use half::{bf16, f16};

use super::{RawTensor, Stored};
use crate::error::EngineError;

impl RawTensor<'_> {
    /// Slab `i` along the first dimension; none if there is no such slab.
    pub(crate) fn slab(self, i: usize) -> Option<Self> {
        let (&count, rest) = self.shape.split_first()?;
        let each = self.bytes.len().checked_div(count)?;
        let range = each.checked_mul(i)?..each.checked_mul(i + 1)?;
        let bytes = match self.bytes {
            Cow::Borrowed(b) => Cow::Borrowed(b.get(range)?),
            Cow::Owned(b) => Cow::Owned(b.get(range)?.to_vec()),
        };
        Some(Self { name: self.name, stored: self.stored, shape: rest.to_vec(), bytes })
    }

    /// All numbers as f32, in storage order.
    pub(crate) fn to_f32(&self) -> Result<Vec<f32>, EngineError> {
        Ok(match self.stored {
            Stored::F32 => self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Stored::F16 => self.bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Stored::Bf16 => self.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Stored::Q8_0 => self.dequantize(GgmlDType::Q8_0)?,
            Stored::Q4_0 => self.dequantize(GgmlDType::Q4_0)?,
            Stored::Q4_1 => self.dequantize(GgmlDType::Q4_1)?,
            Stored::Q5_0 => self.dequantize(GgmlDType::Q5_0)?,
            Stored::Q5_1 => self.dequantize(GgmlDType::Q5_1)?,
            Stored::Q2K => self.dequantize(GgmlDType::Q2K)?,
            Stored::Q3K => self.dequantize(GgmlDType::Q3K)?,
            Stored::Q4K => self.dequantize(GgmlDType::Q4K)?,
            Stored::Q5K => self.dequantize(GgmlDType::Q5K)?,
            Stored::Q6K => self.dequantize(GgmlDType::Q6K)?,
        })
    }

    fn dequantize(&self, dtype: GgmlDType) -> Result<Vec<f32>, EngineError> {
        let tensor: QTensor = ggml_file::qtensor_from_ggml(dtype, &self.bytes, self.shape.clone(), &Device::Cpu)?;
        Ok(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
    }

    /// Rows and columns of a matrix.
    pub(crate) fn rows_columns(&self) -> Result<(usize, usize), EngineError> {
        match self.shape[..] {
            [n, k] => Ok((n, k)),
            _ => Err(EngineError::tensor(self.name.clone(), format!("has shape {:?}, a matrix is needed", self.shape))),
        }
    }
}
