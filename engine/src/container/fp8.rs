//! Block-scaled FP8 weights of DeepSeek-V3 and R1: E4M3 codes and one f32 factor per 128 × 128 block.
//!
//! They are kept as f16: a code has 4 significant bits, so only the rounding of the factor's product is
//! lost, at most 2⁻¹¹ of a weight (and 3·10⁻⁸ where weights are below 6·10⁻⁵). A matrix with factors
//! too large for f16 is kept as bf16, at 2⁻⁸.

use half::{bf16, f16};

use super::{RawTensor, Stored};
use crate::error::EngineError;

/// Side of a block.
const BLOCK: usize = 128;
/// Largest E4M3 number.
const E4M3_MAX: f32 = 448.0;

/// Takes `codes` = `[n, k]` times its block factors; `scales` is `[⌈n/128⌉, ⌈k/128⌉]`.
pub(super) fn unpack<'a>(
    name: String,
    shape: &[usize],
    codes: &[u8],
    scales: &RawTensor<'_>,
) -> Result<RawTensor<'a>, EngineError> {
    let &[n, k] = shape else {
        return Err(EngineError::tensor(name, format!("is FP8 of shape {shape:?}, a matrix is needed")));
    };
    let blocks = [n.div_ceil(BLOCK), k.div_ceil(BLOCK)];
    if scales.shape != blocks {
        let problem = format!("has shape {:?}, FP8 weights of {shape:?} need {blocks:?}", scales.shape);
        return Err(EngineError::tensor(scales.name.clone(), problem));
    }
    let scales = scales.to_f32()?;
    let table: [f32; 256] = std::array::from_fn(|code| e4m3(code as u8));
    let largest = scales.iter().fold(0.0f32, |a, s| a.max(s.abs()));
    let fits = largest * E4M3_MAX <= f32::from(f16::MAX);
    let mut bytes = Vec::with_capacity(2 * codes.len());
    for (row, codes) in codes.chunks_exact(k.max(1)).enumerate() {
        let scales = &scales[row / BLOCK * blocks[1]..][..blocks[1]];
        for (codes, scale) in codes.chunks(BLOCK).zip(scales) {
            let values = codes.iter().map(|&c| table[usize::from(c)] * scale);
            if fits {
                bytes.extend(values.flat_map(|v| f16::from_f32(v).to_le_bytes()));
            } else {
                bytes.extend(values.flat_map(|v| bf16::from_f32(v).to_le_bytes()));
            }
        }
    }
    let stored = if fits { Stored::F16 } else { Stored::Bf16 };
    Ok(RawTensor { name, stored, shape: shape.to_vec(), bytes: bytes.into() })
}

/// A number of four exponent and three fraction bits; the format has no infinities.
fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2f32.powi(-6),
        _ => (1.0 + fraction) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::{E4M3_MAX, e4m3, unpack};
    use crate::container::{RawTensor, Stored};

    #[test]
    fn codes_are_what_the_format_says() {
        for (code, value) in
            [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x38, 1.0), (0xB8, -1.0), (0x7E, E4M3_MAX), (0x44, 3.0)]
        {
            assert_eq!(e4m3(code), value, "{code:#x}");
        }
        assert!(e4m3(0x7F).is_nan() && e4m3(0xFF).is_nan());
    }

    #[test]
    fn blocks_take_their_own_factor_and_wrong_shapes_are_refused() {
        let (n, k) = (130, 260);
        let codes = vec![0x38u8; n * k];
        let numbers: Vec<u8> = (1..=6).flat_map(|v| (v as f32).to_le_bytes()).collect();
        let scales = |shape: Vec<usize>, bytes: &[u8]| RawTensor {
            name: "w_scale_inv".into(),
            stored: Stored::F32,
            shape,
            bytes: bytes.to_vec().into(),
        };
        let t = unpack("w".into(), &[n, k], &codes, &scales(vec![2, 3], &numbers)).expect("fits");
        let x = t.to_f32().expect("numbers");
        for (row, column, value) in [(0, 0, 1.0), (127, 127, 1.0), (0, 128, 2.0), (129, 259, 6.0), (128, 0, 4.0)] {
            assert_eq!(x[row * k + column], value);
        }
        let e = unpack("w".into(), &[n, k], &codes, &scales(vec![3, 2], &numbers)).err().expect("refused").to_string();
        assert!(e.contains("w_scale_inv") && e.contains("[2, 3]"), "{e}");
        // Factors beyond f16 keep their size as bf16.
        let large: Vec<u8> = (0..6).flat_map(|_| 1e6f32.to_le_bytes()).collect();
        let t = unpack("w".into(), &[n, k], &codes, &scales(vec![2, 3], &large)).expect("fits");
        assert_eq!((t.stored, (t.to_f32().expect("numbers")[0] / 1e6 - 1.0).abs() < 4e-3), (Stored::Bf16, true));
    }
}
