//! Layouts of the number formats: how many bits of a code lie where. A quantised weight is a small
//! unsigned code; its value is `scale · (code − offset)`, or `scale · code + minimum`.
//!
//! A block of 32 values of 16 rows is a few 64-byte planes. Values come in eight groups of four along
//! `k`, so that one plane of bytes is `[16 rows][4 values]`, what a 4-way byte dot product takes:
//! - bytes (Q8_0): plane `g` holds group `g`;
//! - nibbles: plane `g` holds group `g` (low) and group `g + 4` (high);
//! - pairs of bits: plane `h` holds group `4h + i` at bits `2i..2i+2`;
//! - single bits: one plane, group `g` at bit `g`.

/// Values per quantisation block.
pub(crate) const BLOCK: usize = 32;
/// Values per superblock of the k-quants.
pub(crate) const SUPER: usize = 256;
/// Output rows of a panel.
pub(crate) const PANEL: usize = 16;
/// Bytes of a plane.
pub(super) const PLANE: usize = 4 * PANEL;

/// What E2M1 codes mean, doubled (OCP Microscaling Formats 1.0).
pub(crate) const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The same as codes of the kernels, which have no sign.
pub(super) const FP4_CODES: [u8; 16] = {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < 16 {
        codes[i] = (E2M1_DOUBLED[i] + Kind::Fp4.offset() as i8) as u8;
        i += 1;
    }
    codes
};

/// How the numbers of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
    /// Brain float in 12 bits, see `narrow`. Made from the other two of 16 bits only.
    Bf12,
    /// GGUF Q8_0: 32 × i8, one f16 scale.
    Q8_0,
    /// GGUF Q4_0: 32 × 4 bit minus 8, one f16 scale.
    Q4_0,
    /// GGUF Q4_1: 32 × 4 bit, f16 scale and f16 minimum.
    Q4_1,
    /// GGUF Q5_0: 32 × 5 bit minus 16, one f16 scale.
    Q5_0,
    /// GGUF Q5_1: 32 × 5 bit, f16 scale and f16 minimum.
    Q5_1,
    /// 32 × E2M1, one f16 scale, laid out as Q4_0. What MXFP4 becomes.
    Fp4,
    /// GGUF Q2_K: 16 × (16 × 2 bit, 4-bit scale and minimum), f16 scales of both.
    Q2K,
    /// GGUF Q3_K: 16 × (16 × 3 bit minus 4, 6-bit scale), one f16 scale.
    Q3K,
    /// GGUF Q4_K: 8 × (32 × 4 bit, 6-bit scale and minimum), f16 scales of both.
    Q4K,
    /// GGUF Q5_K: 8 × (32 × 5 bit, 6-bit scale and minimum), f16 scales of both.
    Q5K,
    /// GGUF Q6_K: 16 × (16 × 6 bit minus 32, 8-bit scale), one f16 scale.
    Q6K,
}

/// Which quantised activations a product takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    /// The floats themselves.
    None,
    /// One scale per 32 values.
    Fine,
    /// One scale per 256 values.
    Coarse,
}

impl Kind {
    /// What products with it are taken on.
    pub(crate) const fn grain(self) -> Grain {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Bf12 => Grain::None,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Fp4 => Grain::Fine,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => Grain::Coarse,
        }
    }

    /// Values of a row that one set of scales serves.
    pub(crate) const fn block(self) -> usize {
        match self.grain() {
            Grain::None => 1,
            Grain::Fine => BLOCK,
            Grain::Coarse => SUPER,
        }
    }

    /// Bytes of one such block of a row in a file.
    pub(crate) const fn file_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 | Self::Bf12 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 | Self::Fp4 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of `k` values of one row as stored in a file; `None` if `k` does not fit the blocks
    /// or the size overflows.
    pub(crate) fn row_bytes(self, k: usize) -> Option<usize> {
        k.is_multiple_of(self.block()).then(|| k / self.block())?.checked_mul(self.file_bytes())
    }

    /// Bytes of codes of a panel: per 32 values, or per value of floats.
    pub(super) const fn code_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * PANEL,
            Self::F16 | Self::Bf16 => 2 * PANEL,
            Self::Bf12 => 12 * PANEL / 8,
            Self::Q8_0 => 8 * PLANE,
            Self::Q4_0 | Self::Q4_1 | Self::Q4K | Self::Fp4 => 4 * PLANE,
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => 5 * PLANE,
            Self::Q6K => 6 * PLANE,
            Self::Q3K => 3 * PLANE,
            Self::Q2K => 2 * PLANE,
        }
    }

    /// Bytes of scales of a panel per block (see [`Kind::block`]): f16 `[16]` scales, f16 `[16]`
    /// minima or their scales if there are any, then bytes `[pair of sub-blocks][16 rows][2]` of
    /// sub-scales and of sub-minima (Q2_K has both in one byte).
    pub(super) const fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Bf12 => 0,
            Self::Q8_0 | Self::Q4_0 | Self::Q5_0 | Self::Fp4 => 2 * PANEL,
            Self::Q4_1 | Self::Q5_1 => 4 * PANEL,
            Self::Q4K | Self::Q5K => 4 * PANEL + 8 * PANEL + 8 * PANEL,
            Self::Q2K => 4 * PANEL + 16 * PANEL,
            Self::Q3K | Self::Q6K => 2 * PANEL + 16 * PANEL,
        }
    }

    /// Whether values have a minimum instead of an offset.
    pub(super) const fn minimum(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q2K | Self::Q4K | Self::Q5K)
    }

    /// What is subtracted from a code.
    pub(super) const fn offset(self) -> i32 {
        match self {
            Self::Q8_0 => 128,
            Self::Q4_0 => 8,
            Self::Q5_0 | Self::Fp4 => 16,
            Self::Q3K => 4,
            Self::Q6K => 32,
            _ => 0,
        }
    }

    /// Values per sub-scale of a k-quant.
    pub(super) const fn sub_block(self) -> usize {
        match self {
            Self::Q4K | Self::Q5K => 32,
            _ => 16,
        }
    }
}

/// Writes the codes of row `r` into the planes of a block.
pub(super) fn put(kind: Kind, planes: &mut [u8], r: usize, codes: &[u8; BLOCK]) {
    let nibbles = |planes: &mut [u8]| {
        for e in 0..16 {
            planes[e / 4 * PLANE + 4 * r + e % 4] = (codes[e] & 15) | (codes[e + 16] & 15) << 4;
        }
    };
    let pairs = |planes: &mut [u8], shift: u32| {
        for (e, c) in codes.iter().enumerate() {
            planes[e / 16 * PLANE + 4 * r + e % 4] |= (c >> shift & 3) << (2 * (e / 4 % 4));
        }
    };
    let bits = |plane: &mut [u8], shift: u32| {
        for (e, c) in codes.iter().enumerate() {
            plane[4 * r + e % 4] |= (c >> shift & 1) << (e / 4);
        }
    };
    match kind {
        Kind::F32 | Kind::F16 | Kind::Bf16 | Kind::Bf12 => {}
        Kind::Q8_0 => {
            for (g, four) in codes.chunks_exact(4).enumerate() {
                planes[g * PLANE + 4 * r..][..4].copy_from_slice(four);
            }
        }
        Kind::Q4_0 | Kind::Q4_1 | Kind::Q4K | Kind::Fp4 => nibbles(planes),
        Kind::Q5_0 | Kind::Q5_1 | Kind::Q5K => {
            nibbles(planes);
            bits(&mut planes[4 * PLANE..], 4);
        }
        Kind::Q6K => {
            nibbles(planes);
            pairs(&mut planes[4 * PLANE..], 4);
        }
        Kind::Q2K => pairs(planes, 0),
        Kind::Q3K => {
            pairs(planes, 0);
            bits(&mut planes[2 * PLANE..], 2);
        }
    }
}

/// All codes of a block, `[8 groups][16 rows][4]`.
#[inline(always)]
pub(super) fn unpack(kind: Kind, planes: &[u8], out: &mut [u8; 8 * PLANE]) {
    let pairs = |out: &mut [u8; 8 * PLANE], planes: &[u8], shift: u32| {
        for g in 0..8 {
            for i in 0..PLANE {
                out[g * PLANE + i] |= (planes[g / 4 * PLANE + i] >> (2 * (g % 4)) & 3) << shift;
            }
        }
    };
    let bits = |out: &mut [u8; 8 * PLANE], plane: &[u8], shift: u32| {
        for g in 0..8 {
            for i in 0..PLANE {
                out[g * PLANE + i] |= (plane[i] >> g & 1) << shift;
            }
        }
    };
    out.fill(0);
    match kind {
        Kind::F32 | Kind::F16 | Kind::Bf16 | Kind::Bf12 => return,
        Kind::Q8_0 => out.copy_from_slice(&planes[..8 * PLANE]),
        Kind::Q2K | Kind::Q3K => pairs(out, planes, 0),
        _ => {
            for i in 0..4 * PLANE {
                out[i] = planes[i] & 15;
                out[4 * PLANE + i] = planes[i] >> 4;
            }
        }
    }
    match kind {
        Kind::Q5_0 | Kind::Q5_1 | Kind::Q5K => bits(out, &planes[4 * PLANE..], 4),
        Kind::Q6K => pairs(out, &planes[4 * PLANE..], 4),
        Kind::Q3K => bits(out, &planes[2 * PLANE..], 2),
        Kind::Fp4 => out.iter_mut().for_each(|code| *code = FP4_CODES[usize::from(*code)]),
        _ => {}
    }
}

/// A kind as a type, so that kernels are compiled per kind.
pub(super) trait Format {
    const KIND: Kind;
}

/// Runs `$body` with the type `$format` of a [`Kind`].
macro_rules! with_format {
    ($kind:expr, $format:ident => $body:expr) => {
        with_format!(@ $kind, $format => $body,
            F32 F16 Bf16 Bf12 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Fp4 Q2K Q3K Q4K Q5K Q6K)
    };
    (@ $kind:expr, $format:ident => $body:expr, $($name:ident)*) => {
        match $kind {
            $(Kind::$name => {
                struct $format;
                impl Format for $format {
                    const KIND: Kind = Kind::$name;
                }
                $body
            })*
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use with_format;
