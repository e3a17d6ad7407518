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
//! So a row has the same bits alone and in any batch, with any number of threads, and the portable,
//! the AVX2 and the AVX-512 code agree bit for bit (tests pin both).

#![allow(unsafe_code)]
// Indices stand for registers and lanes here; iterators would hide which.
#![allow(clippy::needless_range_loop, clippy::manual_memcpy)]

pub(crate) mod arena;
pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod attention_x86;
pub(crate) mod gates;
pub(crate) mod lanes;
mod layout;
pub(crate) mod matmul;
pub(crate) mod packed;
pub(crate) mod pool;
mod portable;
pub(crate) mod quantize;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(test)]
mod tests;

/// Revision of the order of arithmetic above. Bump it when any bit of any kernel changes.
const NUMERICS_REVISION: u32 = 3;

/// Instruction set a kernel call runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Plain Rust; `mul_add` may be a library call, so this is a reference, not a fast path, on
    /// x86-64. On aarch64 the compiler vectorises it.
    Portable,
    /// AVX2 + FMA + F16C. Made only by [`Level::all`].
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The same and AVX-512 F, BW, VL and VNNI. Made only by [`Level::all`].
    #[cfg(target_arch = "x86_64")]
    Avx512,
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
        levels
    }

    /// The best level of this machine.
    pub(crate) fn detect() -> Self {
        Self::all().last().copied().unwrap_or(Self::Portable)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512vnni",
        }
    }
}

/// Names the arithmetic of the CPU kernels and the instruction set in use. Hidden states and KV of
/// two peers have equal bits only if this is equal. (The levels agree bit for bit by construction
/// and by test on x86-64; until other machines run those tests the name keeps them apart.)
#[must_use]
pub fn numerics() -> String {
    format!("tandem-cpu-{NUMERICS_REVISION}-{}", Level::detect().name())
}
