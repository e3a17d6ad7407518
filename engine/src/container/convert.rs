//! Stored numbers to f32, for the small tensors and the reference backend.

use candle_core::quantized::{QTensor, ggml_file};
use candle_core::{Device, quantized::GgmlDType};
use half::{bf16, f16};

use super::{RawTensor, Stored};
use crate::error::EngineError;

impl RawTensor<'_> {
    /// Every `step`th column from `offset` on, as rows of a matrix; of a vector, those numbers. None if
    /// the numbers are stored in blocks or the columns do not come out even.
    pub(crate) fn columns(self, offset: usize, step: usize) -> Option<Self> {
        let each = match self.stored {
            Stored::F32 => 4,
            Stored::F16 | Stored::Bf16 => 2,
            _ => return None,
        };
        let (&width, rest) = self.shape.split_last()?;
        if step == 0 || !width.is_multiple_of(step) {
            return None;
        }
        let mut bytes = Vec::with_capacity(self.bytes.len() / step);
        for column in (offset..width).step_by(step) {
            for row in self.bytes.chunks_exact(width * each) {
                bytes.extend_from_slice(&row[column * each..(column + 1) * each]);
            }
        }
        let shape = [&[width / step], rest].concat();
        Some(Self { name: self.name, stored: self.stored, shape, bytes: bytes.into() })
    }

    /// Slab `i` along the first dimension; none if there is no such slab.
    pub(crate) fn slab(&self, i: usize) -> Option<RawTensor<'_>> {
        let (shape, bytes) = super::slab(&self.shape, &self.bytes, i)?;
        Some(RawTensor { name: self.name.clone(), stored: self.stored, shape: shape.to_vec(), bytes: bytes.into() })
    }

    /// The rows before and from `at` on; none if there are no rows, or fewer.
    pub(crate) fn split_rows(&self, at: usize) -> Option<[RawTensor<'_>; 2]> {
        let (&rows, rest) = self.shape.split_first()?;
        let (head, tail) = self.bytes.split_at_checked(self.bytes.len().checked_div(rows)? * at)?;
        Some([(at, head), (rows.checked_sub(at)?, tail)].map(|(rows, bytes)| RawTensor {
            name: self.name.clone(),
            stored: self.stored,
            shape: [&[rows], rest].concat(),
            bytes: bytes.into(),
        }))
    }

    /// The matrix with rows and columns exchanged. Numbers in blocks become f32.
    pub(crate) fn transposed(self) -> Result<Self, EngineError> {
        let in_blocks = !matches!(self.stored, Stored::F32 | Stored::F16 | Stored::Bf16);
        let plain = if in_blocks {
            let bytes: Vec<u8> = self.to_f32()?.into_iter().flat_map(f32::to_le_bytes).collect();
            Self { stored: Stored::F32, bytes: bytes.into(), ..self }
        } else {
            self
        };
        let (name, shape) = (plain.name.clone(), format!("{:?}", plain.shape));
        plain.columns(0, 1).ok_or_else(|| EngineError::tensor(name, format!("shape {shape} is no matrix")))
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
            Stored::Fp4 => super::mxfp4::to_f32(&self.bytes),
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
