//! MXFP4 weights, gpt-oss's experts: blocks of 32 four-bit floats (E2M1) with one power of two (E8M0); OCP
//! Microscaling Formats 1.0. They are kept with an f16 as their scale, of half the size: doubled, the values
//! are whole numbers from -12 to 12, which the products of quantised formats serve without loss.

use half::f16;

use super::{RawTensor, Stored};
use crate::error::EngineError;
use crate::kernels::packed::E2M1_DOUBLED;

/// Values of a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a GGUF block: the exponent, then values `j` (low nibble) and `j + 16` (high).
pub(super) const BLOCK_BYTES: usize = 17;
/// Bytes of a block as kept: the scale, then values as in GGUF.
const KEPT_BYTES: usize = 18;

/// E8M0 code of the largest scale that f16 has when halved (2¹⁵), and of the smallest (2⁻²⁴).
const EXPONENT_MAX: u8 = 143;
const EXPONENT_MIN: u8 = 104;

/// A GGUF tensor as it is kept.
pub(super) fn from_gguf<'a>(name: String, shape: Vec<usize>, bytes: &[u8]) -> Result<RawTensor<'a>, EngineError> {
    let mut out = Vec::with_capacity(bytes.len() / BLOCK_BYTES * KEPT_BYTES);
    for block in bytes.chunks_exact(BLOCK_BYTES) {
        let (low, high) = (block[1..].iter().map(|b| b & 15), block[1..].iter().map(|b| b >> 4));
        push(&mut out, block[0], low.chain(high)).ok_or_else(|| too_large(&name, block[0]))?;
    }
    Ok(RawTensor { name, stored: Stored::Fp4, shape, bytes: out.into() })
}

/// Rows `offset`, `offset + step`, … of one of gpt-oss's own expert matrices: `codes` is
/// `[rows, blocks, 16]` with values `2j` (low nibble) and `2j + 1` (high), `exponents` is `[rows, blocks]`.
pub(super) fn rows_of<'a>(
    name: String,
    [rows, blocks]: [usize; 2],
    codes: &[u8],
    exponents: &[u8],
    (offset, step): (usize, usize),
) -> Result<RawTensor<'a>, EngineError> {
    let mut out = Vec::with_capacity(exponents.len() / step.max(1) * KEPT_BYTES);
    let mut taken = 0;
    for row in (offset..rows).step_by(step.max(1)) {
        for block in row * blocks..(row + 1) * blocks {
            let values = codes[block * BLOCK / 2..][..BLOCK / 2].iter().flat_map(|b| [b & 15, b >> 4]);
            push(&mut out, exponents[block], values).ok_or_else(|| too_large(&name, exponents[block]))?;
        }
        taken += 1;
    }
    Ok(RawTensor { name, stored: Stored::Fp4, shape: vec![taken, blocks * BLOCK], bytes: out.into() })
}

/// The numbers of blocks as they are kept.
pub(super) fn to_f32(bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(bytes.len() / KEPT_BYTES * BLOCK);
    for block in bytes.chunks_exact(KEPT_BYTES) {
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        let number = |code: u8| scale * f32::from(E2M1_DOUBLED[usize::from(code)]);
        out.extend(block[2..].iter().map(|b| number(b & 15)));
        out.extend(block[2..].iter().map(|b| number(b >> 4)));
    }
    out
}

/// One block; none if its scale is beyond f16.
fn push(out: &mut Vec<u8>, exponent: u8, codes: impl Iterator<Item = u8>) -> Option<()> {
    let mut block = [0u8; BLOCK];
    block.iter_mut().zip(codes).for_each(|(to, code)| *to = code & 15);
    let mut exponent = exponent;
    if block.iter().all(|code| code & 7 == 0) {
        exponent = EXPONENT_MIN;
    }
    if exponent < EXPONENT_MIN {
        // Below what f16 has: multiples of its smallest number, off by at most 3·10⁻⁸.
        block.iter_mut().for_each(|code| *code = halved(*code, (EXPONENT_MIN - exponent).min(7)));
        exponent = EXPONENT_MIN;
    }
    if exponent > EXPONENT_MAX {
        return None;
    }
    out.extend(f16::from_f32(f32::from(exponent - EXPONENT_MIN).exp2() * 2f32.powi(-24)).to_le_bytes());
    out.extend((0..BLOCK / 2).map(|j| block[j] | block[j + BLOCK / 2] << 4));
    Some(())
}

/// The code of what comes nearest to a code's number divided by two some `times`: always a whole number that
/// E2M1 has, doubled.
fn halved(code: u8, times: u8) -> u8 {
    let size = f32::from(E2M1_DOUBLED[usize::from(code & 7)]) / f32::from(1u8 << times);
    let nearest = E2M1_DOUBLED.iter().position(|v| f32::from(*v) == size.round_ties_even());
    nearest.map_or(0, |at| at as u8) | code & 8
}

fn too_large(name: &str, exponent: u8) -> EngineError {
    let problem = format!("has an MXFP4 scale of 2^{}, more than 2^16", i32::from(exponent) - 127);
    EngineError::tensor(name, problem)
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, from_gguf, rows_of};

    /// Straight from the format: sign, two exponent bits, one fraction bit.
    fn e2m1(code: u8) -> f32 {
        let size = match code & 7 {
            c @ 0..=1 => f32::from(c) * 0.5,
            c => (1.0 + f32::from(c & 1) * 0.5) * 2f32.powi(i32::from(c >> 1) - 1),
        };
        if code & 8 == 0 { size } else { -size }
    }

    fn codes(seed: u8) -> [u8; BLOCK] {
        std::array::from_fn(|i| (i as u8).wrapping_mul(7).wrapping_add(seed) & 15)
    }

    #[test]
    fn values_are_exact_in_every_scale_of_f16() {
        for exponent in super::EXPONENT_MIN..=super::EXPONENT_MAX {
            let codes = codes(exponent);
            let mut block = vec![exponent];
            block.extend((0..16).map(|j| codes[j] | codes[j + 16] << 4));
            let t = from_gguf("w".into(), vec![1, BLOCK], &block).expect("fits");
            let wanted: Vec<f32> = codes.iter().map(|&c| e2m1(c) * 2f32.powi(i32::from(exponent) - 127)).collect();
            assert_eq!(t.to_f32().expect("known"), wanted, "2^({exponent} - 127)");
        }
    }

    #[test]
    fn smaller_scales_round_and_larger_ones_are_refused() {
        let tiny = from_gguf("w".into(), vec![1, BLOCK], &[&[103u8][..], &[0x77; 16]].concat()).expect("fits");
        assert_eq!(tiny.to_f32().expect("known"), [6.0 * 2f32.powi(-24); BLOCK]);
        let none = from_gguf("w".into(), vec![1, BLOCK], &[&[0u8][..], &[0x77; 16]].concat()).expect("fits");
        assert_eq!(none.to_f32().expect("known"), [0.0; BLOCK]);
        let zeros =
            from_gguf("w".into(), vec![1, BLOCK], &[&[255u8][..], &[0x80; 16]].concat()).expect("no value at all");
        assert_eq!(zeros.to_f32().expect("known"), [0.0; BLOCK]);
        let error =
            from_gguf("w".into(), vec![1, BLOCK], &[&[144u8][..], &[0x11; 16]].concat()).err().expect("too large");
        assert!(error.to_string().contains("2^17"), "{error}");
    }

    #[test]
    fn halves_are_numbers_of_the_format() {
        for code in 0..16 {
            for times in 0..8 {
                let number = |code: u8| f32::from(super::E2M1_DOUBLED[usize::from(code)]);
                let exact = number(code) / 2f32.powi(i32::from(times));
                let halved = number(super::halved(code, times));
                assert_eq!(halved, exact.round_ties_even(), "{code} {times}");
            }
        }
    }

    #[test]
    fn rows_are_picked_and_pairs_are_neighbours() {
        // Four rows of two blocks; row r has exponent 120 + r.
        let values: Vec<[u8; BLOCK]> = (0..8).map(codes).collect();
        let packed: Vec<u8> =
            values.iter().flat_map(|v| v.chunks(2).map(|p| p[0] | p[1] << 4).collect::<Vec<_>>()).collect();
        let exponents: Vec<u8> = (0..8).map(|b| 120 + b / 2).collect();
        let t = rows_of("w".into(), [4, 2], &packed, &exponents, (1, 2)).expect("fits");
        assert_eq!(t.shape, [2, 2 * BLOCK]);
        let wanted: Vec<f32> = [2usize, 3, 6, 7]
            .iter()
            .flat_map(|&b| values[b].map(|c| e2m1(c) * 2f32.powi(i32::from(exponents[b]) - 127)))
            .collect();
        assert_eq!(t.to_f32().expect("known"), wanted);
    }
}
