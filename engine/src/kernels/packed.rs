//! Weight matrices in the layout the kernels read: panels of neighbouring output rows, interleaved
//! along `k`, so that one vector load serves all rows of a panel and no horizontal sum is needed.

use half::{bf16, f16};

/// Values per quantisation block.
pub(crate) const BLOCK: usize = 32;
/// Output rows of a panel of float weights.
pub(crate) const FLOAT_PANEL: usize = 16;
/// Output rows of a panel of quantised weights.
pub(crate) const QUANT_PANEL: usize = 8;

/// How the numbers of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
    /// GGUF Q8_0: 32 × i8, one f16 scale.
    Q8_0,
    /// GGUF Q4_0: 32 × 4 bit minus 8, one f16 scale.
    Q4_0,
    /// GGUF Q4_1: 32 × 4 bit, f16 scale and f16 minimum.
    Q4_1,
}

impl Kind {
    /// Whether products with it are taken on quantised activations.
    pub(crate) fn quantised(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0 | Self::Q4_1)
    }

    /// Output rows per panel.
    pub(crate) fn panel(self) -> usize {
        if self.quantised() { QUANT_PANEL } else { FLOAT_PANEL }
    }

    /// Bytes of `k` values of one row as stored in a file; `None` if `k` does not fit the blocks
    /// or the size overflows.
    pub(crate) fn row_bytes(self, k: usize) -> Option<usize> {
        match self {
            Self::F32 => k.checked_mul(4),
            Self::F16 | Self::Bf16 => k.checked_mul(2),
            _ if !k.is_multiple_of(BLOCK) => None,
            Self::Q8_0 => (k / BLOCK).checked_mul(34),
            Self::Q4_0 => (k / BLOCK).checked_mul(18),
            Self::Q4_1 => (k / BLOCK).checked_mul(20),
        }
    }

    /// Bytes of numbers per panel and step along `k` (a step is one value, or one block).
    pub(super) fn step_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * FLOAT_PANEL,
            Self::F16 | Self::Bf16 => 2 * FLOAT_PANEL,
            Self::Q8_0 => BLOCK * QUANT_PANEL,
            Self::Q4_0 | Self::Q4_1 => BLOCK / 2 * QUANT_PANEL,
        }
    }

    /// f16 scales (and minima) per panel and block.
    pub(super) fn step_scales(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 0,
            Self::Q8_0 | Self::Q4_0 => QUANT_PANEL,
            Self::Q4_1 => 2 * QUANT_PANEL,
        }
    }
}

/// One cache line; gives the buffers their alignment.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed bytes, 64-byte aligned.
pub(crate) struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBytes {
    fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `lines` owns at least `len` initialised bytes (`Line` has no padding).
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast::<u8>(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the exclusive borrow of `self` makes it unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<u8>(), self.len) }
    }
}

/// A matrix `[n, k]` (n outputs of k inputs), packed.
pub(crate) struct Packed {
    pub(crate) kind: Kind,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Floats: `[panel][k][16]`. Q8_0: `[panel][block][8 groups][8 rows][4]`.
    /// Q4: `[panel][block][4 groups][8 rows][4]`, low nibble = values 0..16, high = 16..32.
    pub(super) data: AlignedBytes,
    /// f16, `[panel][block][8 scales]`, for Q4_1 followed by 8 minima.
    pub(super) scales: AlignedBytes,
}

impl Packed {
    /// Packs `n` rows of `k` values from their file layout (row-major, little-endian, GGUF blocks).
    ///
    /// # Panics
    /// If `raw` is not `n · row_bytes(k)` long: callers have checked the file.
    pub(crate) fn pack(kind: Kind, n: usize, k: usize, raw: &[u8]) -> Self {
        let row_bytes = kind.row_bytes(k).unwrap_or(usize::MAX);
        assert_eq!(Some(raw.len()), row_bytes.checked_mul(n), "raw matrix has the wrong size");
        let panel = kind.panel();
        let panels = n.div_ceil(panel);
        let steps = if kind.quantised() { k / BLOCK } else { k };
        let mut data = AlignedBytes::zeroed(panels * steps * kind.step_bytes());
        let mut scales = AlignedBytes::zeroed(panels * steps * kind.step_scales() * 2);
        let (step, sc) = (kind.step_bytes(), kind.step_scales() * 2);
        for row in 0..n {
            let (p, r) = (row / panel, row % panel);
            let src = &raw[row * row_bytes..(row + 1) * row_bytes];
            let dst = &mut data.bytes_mut()[p * steps * step..(p + 1) * steps * step];
            match kind {
                Kind::F32 => scatter::<4>(src, dst, step, r),
                Kind::F16 | Kind::Bf16 => scatter::<2>(src, dst, step, r),
                Kind::Q8_0 | Kind::Q4_0 | Kind::Q4_1 => {
                    let head = if kind == Kind::Q4_1 { 4 } else { 2 };
                    let dst_scales = &mut scales.bytes_mut()[p * steps * sc..(p + 1) * steps * sc];
                    for (b, block) in src.chunks_exact(row_bytes / steps).enumerate() {
                        for (g, four) in block[head..].chunks_exact(4).enumerate() {
                            dst[b * step + (g * QUANT_PANEL + r) * 4..][..4].copy_from_slice(four);
                        }
                        for (i, half) in block[..head].chunks_exact(2).enumerate() {
                            dst_scales[b * sc + (i * QUANT_PANEL + r) * 2..][..2].copy_from_slice(half);
                        }
                    }
                }
            }
        }
        Self { kind, n, k, data, scales }
    }

    /// Number of panels; the last may hold fewer rows than the others.
    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(self.kind.panel())
    }

    /// Steps along `k` (values, or blocks of quantised weights).
    pub(super) fn steps(&self) -> usize {
        if self.kind.quantised() { self.k / BLOCK } else { self.k }
    }

    /// Row `row` as floats (embedding lookup).
    ///
    /// # Panics
    /// If `row ≥ n` or `out` is not `k` long.
    pub(crate) fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row outside the matrix");
        let panel = self.kind.panel();
        let (p, r) = (row / panel, row % panel);
        let (step, sc, steps) = (self.kind.step_bytes(), self.kind.step_scales() * 2, self.steps());
        let data = &self.data.bytes()[p * steps * step..(p + 1) * steps * step];
        let scales = &self.scales.bytes()[p * steps * sc..(p + 1) * steps * sc];
        match self.kind {
            Kind::F32 => gather::<4>(data, step, r, out, f32::from_le_bytes),
            Kind::F16 => gather::<2>(data, step, r, out, |b| f16::from_le_bytes(b).to_f32()),
            Kind::Bf16 => gather::<2>(data, step, r, out, |b| bf16::from_le_bytes(b).to_f32()),
            Kind::Q8_0 | Kind::Q4_0 | Kind::Q4_1 => {
                for (b, o) in out.chunks_exact_mut(BLOCK).enumerate() {
                    let q = &data[b * step..(b + 1) * step];
                    let scale = |i: usize| {
                        let at = b * sc + (i * QUANT_PANEL + r) * 2;
                        f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32()
                    };
                    let d = scale(0);
                    for (e, o) in o.iter_mut().enumerate() {
                        let byte = |e: usize| q[(e / 4 * QUANT_PANEL + r) * 4 + e % 4];
                        let nibble = |e: usize| {
                            let v = byte(e % 16);
                            f32::from(if e < 16 { v & 15 } else { v >> 4 })
                        };
                        *o = match self.kind {
                            Kind::Q8_0 => d * f32::from(byte(e).cast_signed()),
                            Kind::Q4_0 => d * (nibble(e) - 8.0),
                            _ => d.mul_add(nibble(e), scale(1)),
                        };
                    }
                }
            }
        }
    }
}

fn scatter<const W: usize>(src: &[u8], dst: &mut [u8], step: usize, r: usize) {
    for (v, d) in src.chunks_exact(W).zip(dst.chunks_exact_mut(step)) {
        d[r * W..(r + 1) * W].copy_from_slice(v);
    }
}

fn gather<const W: usize>(data: &[u8], step: usize, r: usize, out: &mut [f32], f: impl Fn([u8; W]) -> f32) {
    for (o, d) in out.iter_mut().zip(data.chunks_exact(step)) {
        let mut b = [0; W];
        b.copy_from_slice(&d[r * W..(r + 1) * W]);
        *o = f(b);
    }
}
