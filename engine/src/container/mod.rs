//! A model's files as tensors: the bytes of safetensors (embedded, one file or shards) and of GGUF become an
//! index of checked tensors by name. What a name means is not known here. Nothing is allocated by what a
//! file claims before the claim is checked against its size.

mod convert;
mod fp8;
pub(crate) mod gguf;
mod mxfp4;
mod safetensors;
pub(crate) mod split;
mod storage;
mod tensors;

pub use split::{SplitPart, split_part};
pub(crate) use storage::{JSON_BYTES_MAX, map_file, read_small};
pub(crate) use tensors::{Part, StoredBytes, Tensors};

use std::borrow::Cow;

/// Number format of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Fp4,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl Stored {
    /// The format's name, as llama.cpp spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Fp4 => "FP4",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }
}

/// One tensor as stored. Shape is outermost first; `bytes` fits type and shape.
#[derive(Clone)]
pub(crate) struct RawTensor<'a> {
    pub(crate) name: String,
    pub(crate) stored: Stored,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Cow<'a, [u8]>,
}

/// How the numbers of a file's tensor are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As they are.
    Plain(Stored),
    /// GGUF's blocks of four-bit floats, see `mxfp4`.
    Mxfp4,
    /// Codes and scales of gpt-oss's own experts (see `mxfp4`).
    Bytes,
    /// E4M3 codes whose block factors are in `NAME_scale_inv`.
    Fp8,
}

impl Encoding {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain(stored) => stored.name(),
            Self::Mxfp4 => "MXFP4",
            Self::Bytes => "U8",
            Self::Fp8 => "F8_E4M3",
        }
    }
}

/// Shape and bytes of slab `i` along the first dimension; none if there is no such slab.
fn slab<'a, 'b>(shape: &'a [usize], bytes: &'b [u8], i: usize) -> Option<(&'a [usize], &'b [u8])> {
    let (&count, rest) = shape.split_first()?;
    let each = bytes.len().checked_div(count)?;
    Some((rest, bytes.get(each.checked_mul(i)?..each.checked_mul(i + 1)?)?))
}
