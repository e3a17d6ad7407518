//! CPU kernels. The only module with `unsafe` (beside the weights' memory map).
//!
//! **One order of arithmetic.** Every output element is one dot product with a fixed accumulation
//! order that depends neither on the rows around it nor on the instruction set:
//! - matrix products: one chain of fused multiply-adds along `k` (floats), or exact integer sums per
//!   block of 32 or 256 and one chain of fused multiply-adds over the blocks (quantised weights);
//! - attention: one chain of fused multiply-adds per score along the head, and per output along the
//!   tokens in order;
//! - sums over a vector: eight lanes, folded as `((0+1)+(2+3)) + ((4+5)+(6+7))`;
//! - exp: the same polynomial everywhere.
//!
//! So a row has the same bits alone and in any batch, with any number of threads, and the portable, the
//! AVX2, the AVX-512 and the NEON code agree bit for bit (tests pin both, and the bits themselves).

#![allow(unsafe_code)]
// Indices stand for registers and lanes here; iterators would hide which.
#![allow(clippy::needless_range_loop, clippy::manual_memcpy)]

/// Runs `$tile` over `$n` rows with the largest tiles of the list that fit: `$mr` is a tile's constant number of
/// rows, `$r` its first.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! tiles {
    ($n:expr, [$($rows:tt)*], |$mr:ident, $r:ident| $tile:expr) => {
        let mut $r = 0;
        $({
            const $mr: usize = $rows;
            while $r + $mr <= $n {
                $tile;
                $r += $mr;
            }
        })*
        let _ = $r;
    };
}

pub(crate) mod arena;
pub(crate) mod attention;
#[cfg(target_arch = "aarch64")]
mod attention_neon;
#[cfg(target_arch = "x86_64")]
mod attention_x86;
pub(crate) mod gates;
pub(crate) mod lanes;
mod layout;
pub(crate) mod matmul;
mod narrow;
pub(crate) mod packed;
pub(crate) mod pool;
mod portable;
pub(crate) mod quantize;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_narrow;
#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(test)]
mod tests;

/// Revision of the order of arithmetic above. Bump it when any bit of any kernel changes, which
/// `tests::these_are_the_bits_of_this_revision` notices.
const NUMERICS_REVISION: u32 = 4;

/// Instruction set a kernel call runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Plain Rust; `mul_add` may be a library call, so this is a reference, not a fast path.
    Portable,
    /// AVX2 + FMA + F16C. Made only by [`Level::all`].
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The same and AVX-512 F, BW, VL and VNNI. Made only by [`Level::all`].
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// NEON, which every aarch64 machine has.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// The same and the 8-bit dot products. Made only by [`Level::all`].
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Level {
    /// The levels this machine has, the best last.
    pub(crate) fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            levels.push(Self::Avx2);
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                levels.push(Self::Avx512);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            levels.push(Self::Neon);
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                levels.push(Self::NeonDot);
            }
        }
        levels
    }

    /// The best level of this machine.
    pub(crate) fn detect() -> Self {
        Self::all().last().copied().unwrap_or(Self::Portable)
    }

    /// Whether brain floats in 12 bits are read faster than in 16 where memory is the limit. The other
    /// levels have no such kernel: unpacking would take as long as the reading that it saves.
    pub(crate) fn narrows(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => true,
            _ => false,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512vnni",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => "neon-dotprod",
        }
    }
}

/// Names the arithmetic of the CPU kernels, the same on every machine: hidden states and KV of two
/// peers have equal bits if this and the weights are equal, whatever their instruction sets.
#[must_use]
pub fn numerics() -> String {
    format!("tandem-cpu-{NUMERICS_REVISION}")
}

/// The instruction set that the CPU kernels use on this machine; it changes their speed, not their bits.
#[must_use]
pub fn instruction_set() -> &'static str {
    Level::detect().name()
}
