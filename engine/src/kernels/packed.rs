//! Weight matrices in the layout the kernels read: panels of 16 neighbouring output rows, interleaved
//! along `k`, so that one vector load serves all rows of a panel and no horizontal sum is needed. The
//! bits per weight are those of the file (k-quants: sub-scales of 6 bit take 8; brain floats may take 12,
//! see `narrow`).

use half::{bf16, f16};

use super::arena::{Arena, Piece};
use super::layout::{self, BLOCK, PANEL, PLANE};
use super::narrow::Narrow;

pub(crate) use super::layout::{E2M1_DOUBLED, Grain, Kind};

/// Bytes of a file below which packing on several threads does not pay.
const PARALLEL_BYTES_MIN: usize = 1 << 18;
/// Bytes of a file that are packed at a time.
const SLICE_BYTES: usize = 4 << 20;

/// A matrix `[n, k]` (n outputs of k inputs), packed.
pub(crate) struct Packed {
    pub(crate) kind: Kind,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Floats: `[panel][k][16]`; codes: `[panel][k/32]` blocks of planes, see [`layout`].
    pub(super) codes: Piece,
    /// `[panel][k/block]`, see [`Kind::scale_bytes`].
    pub(super) scales: Piece,
    /// Of matrices in 12 bits only.
    pub(super) narrow: Option<Narrow>,
}

impl Packed {
    /// Packs `n` rows of `k` values from their file layout (row-major, little-endian, GGUF blocks) on
    /// up to `threads` threads. Calls `done` with the bytes read, every 4 MiB and
    /// at the end.
    ///
    /// # Errors
    /// If the system has no memory for it.
    ///
    /// # Panics
    /// If `raw` is not `n · row_bytes(k)` long: callers have checked the file.
    pub(crate) fn pack(
        arena: &Arena,
        kind: Kind,
        [n, k]: [usize; 2],
        raw: &[u8],
        threads: usize,
        done: &dyn Fn(usize),
    ) -> std::io::Result<Self> {
        let row_bytes = kind.row_bytes(k).unwrap_or(usize::MAX);
        assert_eq!(Some(raw.len()), row_bytes.checked_mul(n), "raw matrix has the wrong size");
        let panels = n.div_ceil(PANEL);
        let (code_bytes, scale_bytes) =
            (code_steps(kind, k) * kind.code_bytes(), k / kind.block() * kind.scale_bytes());
        let mut codes = arena.take(panels * code_bytes)?;
        let mut scales = arena.take(panels * scale_bytes)?;
        let panel = PanelBytes { raw: PANEL * row_bytes, codes: code_bytes, scales: scale_bytes };
        let work = |raw: &[u8], codes: &mut [u8], scales: &mut [u8]| {
            for (i, row) in raw.chunks_exact(row_bytes).enumerate() {
                let (p, r) = (i / PANEL, i % PANEL);
                let codes = &mut codes[p * code_bytes..(p + 1) * code_bytes];
                pack_row(kind, row, r, codes, &mut scales[p * scale_bytes..(p + 1) * scale_bytes]);
            }
        };
        for_parts(raw, [codes.bytes_mut(), scales.bytes_mut()], panel, threads, done, work, |()| ());
        Ok(Self { kind, n, k, codes, scales, narrow: None })
    }

    /// Number of panels; the last may hold fewer rows than the others.
    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Bytes of codes per panel.
    pub(super) fn panel_codes(&self) -> usize {
        code_steps(self.kind, self.k) * self.kind.code_bytes()
    }

    /// Bytes of scales per panel.
    pub(super) fn panel_scales(&self) -> usize {
        self.k / self.kind.block() * self.kind.scale_bytes()
    }

    /// Row `row` as floats (embedding lookup).
    ///
    /// # Panics
    /// If `row ≥ n` or `out` is not `k` long.
    pub(crate) fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row outside the matrix");
        let (p, r) = (row / PANEL, row % PANEL);
        let codes = &self.codes.bytes()[p * self.panel_codes()..(p + 1) * self.panel_codes()];
        let scales = &self.scales.bytes()[p * self.panel_scales()..(p + 1) * self.panel_scales()];
        let kind = self.kind;
        let step = kind.code_bytes();
        match kind {
            Kind::F32 => gather::<4>(codes, step, r, out, f32::from_le_bytes),
            Kind::F16 => gather::<2>(codes, step, r, out, |b| f16::from_le_bytes(b).to_f32()),
            Kind::Bf16 => gather::<2>(codes, step, r, out, |b| bf16::from_le_bytes(b).to_f32()),
            Kind::Bf12 => self.narrow_row(p, r, out),
            _ => {
                let per = kind.block() / BLOCK;
                let mut all = [0; 8 * PLANE];
                for (b, (o, planes)) in out.chunks_exact_mut(BLOCK).zip(codes.chunks_exact(step)).enumerate() {
                    layout::unpack(kind, planes, &mut all);
                    let scales = &scales[b / per * kind.scale_bytes()..][..kind.scale_bytes()];
                    for (e, o) in o.iter_mut().enumerate() {
                        let code = f32::from(all[e / 4 * PLANE + 4 * r + e % 4]) - kind.offset() as f32;
                        let sub = (b % per * BLOCK + e) / kind.sub_block();
                        let (scale, minimum) = scale_of(kind, scales, r, sub);
                        *o = if kind.minimum() { scale.mul_add(code, minimum) } else { scale * code };
                    }
                }
            }
        }
    }
}

/// Bytes of a panel in a file and packed.
#[derive(Clone, Copy)]
pub(super) struct PanelBytes {
    pub(super) raw: usize,
    pub(super) codes: usize,
    pub(super) scales: usize,
}

/// Runs `work` on parts of whole panels, of the file and of where they are packed, on up to `threads`
/// threads; hands what it gives to `take`, in order. Calls `done` with the bytes read, every 4 MiB and at
/// the end.
pub(super) fn for_parts<T: Send>(
    raw: &[u8],
    [codes, scales]: [&mut [u8]; 2],
    panel: PanelBytes,
    threads: usize,
    done: &dyn Fn(usize),
    work: impl Fn(&[u8], &mut [u8], &mut [u8]) -> T + Sync,
    mut take: impl FnMut(T),
) {
    let work = &work;
    // A slice of whole panels at a time; a thread takes every so many panels of it.
    let slice = (SLICE_BYTES / panel.raw.max(1)).max(1);
    let slices = raw.chunks((slice * panel.raw).max(1));
    let outputs = chunks(codes, slice * panel.codes).zip(chunks(scales, slice * panel.scales));
    for (raw, (codes, scales)) in slices.zip(outputs) {
        let threads = if raw.len() < PARALLEL_BYTES_MIN { 1 } else { threads.max(1) };
        let each = raw.len().div_ceil(panel.raw).div_ceil(threads);
        let parts = raw.chunks(each * panel.raw);
        let outputs = chunks(codes, each * panel.codes).zip(chunks(scales, each * panel.scales));
        let parts = parts.zip(outputs);
        if threads == 1 {
            parts.for_each(|(raw, (codes, scales))| take(work(raw, codes, scales)));
        } else {
            std::thread::scope(|scope| {
                let running: Vec<_> =
                    parts.map(|(raw, (codes, scales))| scope.spawn(move || work(raw, codes, scales))).collect();
                for part in running {
                    take(part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
                }
            });
        }
        done(raw.len());
    }
}

/// Chunks of `size` bytes; nothing, again and again, of an empty buffer.
fn chunks(bytes: &mut [u8], size: usize) -> impl Iterator<Item = &mut [u8]> {
    let mut left = bytes;
    std::iter::from_fn(move || {
        let size = size.min(left.len());
        let (now, rest) = std::mem::take(&mut left).split_at_mut(size);
        left = rest;
        Some(now)
    })
}

/// Steps along `k`: values of floats, blocks of 32 codes.
pub(super) fn code_steps(kind: Kind, k: usize) -> usize {
    if kind.grain() == Grain::None { k } else { k / BLOCK }
}

/// The f16 at index `i`.
#[inline(always)]
pub(super) fn half_at(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32()
}

/// Sub-scale and sub-minimum of a k-quant's row and sub-block, as integers.
#[inline(always)]
pub(super) fn sub_scales(kind: Kind, scales: &[u8], r: usize, sub: usize) -> (i32, i32) {
    let at = |from: usize| scales[from + sub / 2 * 2 * PANEL + 2 * r + sub % 2];
    match kind {
        Kind::Q4K | Kind::Q5K => (i32::from(at(4 * PANEL)), i32::from(at(12 * PANEL))),
        Kind::Q2K => (i32::from(at(4 * PANEL) & 15), i32::from(at(4 * PANEL) >> 4)),
        _ => (i32::from(at(2 * PANEL).cast_signed()), 0),
    }
}

/// Scale and minimum of a row's sub-block.
fn scale_of(kind: Kind, scales: &[u8], r: usize, sub: usize) -> (f32, f32) {
    let d = half_at(scales, r);
    let m = if kind.minimum() { half_at(scales, PANEL + r) } else { 0.0 };
    if kind.grain() == Grain::Coarse {
        let (sc, mn) = sub_scales(kind, scales, r, sub);
        (d * sc as f32, -(m * mn as f32))
    } else {
        (d, m)
    }
}

/// Writes one row into its panel.
fn pack_row(kind: Kind, row: &[u8], r: usize, codes: &mut [u8], scales: &mut [u8]) {
    let step = kind.code_bytes();
    match kind {
        Kind::F32 => return scatter::<4>(row, codes, step, r),
        // (Matrices in 12 bits are packed by panel.)
        Kind::F16 | Kind::Bf16 | Kind::Bf12 => return scatter::<2>(row, codes, step, r),
        _ => {}
    }
    let per = kind.block() / BLOCK;
    let mut block = FileBlock::default();
    for (b, raw) in row.chunks_exact(kind.file_bytes()).enumerate() {
        block.read(kind, raw);
        for (i, c) in block.codes[..per * BLOCK].as_chunks::<BLOCK>().0.iter().enumerate() {
            layout::put(kind, &mut codes[(b * per + i) * step..][..step], r, c);
        }
        let scales = &mut scales[b * kind.scale_bytes()..][..kind.scale_bytes()];
        scales[2 * r..2 * r + 2].copy_from_slice(&block.scale);
        if kind.minimum() {
            scales[2 * PANEL + 2 * r..][..2].copy_from_slice(&block.minimum);
        }
        let subs = if kind.grain() == Grain::Coarse { kind.block() / kind.sub_block() } else { 0 };
        let first = if kind.minimum() { 4 * PANEL } else { 2 * PANEL };
        for sub in 0..subs {
            let at = first + sub / 2 * 2 * PANEL + 2 * r + sub % 2;
            let (sc, mn) = (block.sub_scales[sub], block.sub_minima[sub]);
            match kind {
                Kind::Q2K => scales[at] = sc | mn << 4,
                Kind::Q4K | Kind::Q5K => {
                    scales[at] = sc;
                    scales[at + 8 * PANEL] = mn;
                }
                _ => scales[at] = sc,
            }
        }
    }
}

/// One block of a row, taken apart.
struct FileBlock {
    codes: [u8; layout::SUPER],
    scale: [u8; 2],
    minimum: [u8; 2],
    sub_scales: [u8; 16],
    sub_minima: [u8; 16],
}

impl Default for FileBlock {
    fn default() -> Self {
        Self { codes: [0; layout::SUPER], scale: [0; 2], minimum: [0; 2], sub_scales: [0; 16], sub_minima: [0; 16] }
    }
}

impl FileBlock {
    /// Reads a block of the GGUF formats, laid out as in ggml's `ggml-common.h`.
    fn read(&mut self, kind: Kind, raw: &[u8]) {
        let two = |at: usize| [raw[at], raw[at + 1]];
        self.scale = two(0);
        match kind {
            Kind::F32 | Kind::F16 | Kind::Bf16 | Kind::Bf12 => {}
            Kind::Q8_0 => {
                for (c, v) in self.codes.iter_mut().zip(&raw[2..]) {
                    *c = v ^ 0x80;
                }
            }
            Kind::Q4_0 | Kind::Fp4 => self.nibbles(&raw[2..]),
            Kind::Q4_1 => {
                self.minimum = two(2);
                self.nibbles(&raw[4..]);
            }
            Kind::Q5_0 => {
                self.nibbles(&raw[6..]);
                self.fifth_bits(&raw[2..6]);
            }
            Kind::Q5_1 => {
                self.minimum = two(2);
                self.nibbles(&raw[8..]);
                self.fifth_bits(&raw[4..8]);
            }
            Kind::Q4K | Kind::Q5K => {
                self.minimum = two(2);
                let s = &raw[4..16];
                for j in 0..4 {
                    self.sub_scales[j] = s[j] & 63;
                    self.sub_minima[j] = s[j + 4] & 63;
                    self.sub_scales[j + 4] = (s[j + 8] & 15) | s[j] >> 6 << 4;
                    self.sub_minima[j + 4] = s[j + 8] >> 4 | s[j + 4] >> 6 << 4;
                }
                let (high, low) = if kind == Kind::Q5K { raw[16..].split_at(32) } else { (&raw[..0], &raw[16..]) };
                for (c, bytes) in low.chunks_exact(32).enumerate() {
                    for (l, v) in bytes.iter().enumerate() {
                        let h = high.get(l).map_or(0, |h| h >> (2 * c));
                        self.codes[64 * c + l] = (v & 15) | (h & 1) << 4;
                        self.codes[64 * c + 32 + l] = v >> 4 | (h >> 1 & 1) << 4;
                    }
                }
            }
            Kind::Q6K => {
                self.scale = two(208);
                self.sub_scales.copy_from_slice(&raw[192..208]);
                for half in 0..2 {
                    let (low, high) = (&raw[64 * half..][..64], &raw[128 + 32 * half..][..32]);
                    for l in 0..32 {
                        for q in 0..4 {
                            let v = low[l + 32 * (q % 2)] >> (q / 2 * 4) & 15;
                            self.codes[128 * half + 32 * q + l] = v | (high[l] >> (2 * q) & 3) << 4;
                        }
                    }
                }
            }
            Kind::Q2K => {
                (self.scale, self.minimum) = (two(80), two(82));
                for j in 0..16 {
                    self.sub_scales[j] = raw[j] & 15;
                    self.sub_minima[j] = raw[j] >> 4;
                }
                self.pairs(&raw[16..80]);
            }
            Kind::Q3K => {
                self.scale = two(108);
                let s = &raw[96..108];
                for j in 0..16 {
                    let low = s[j % 8] >> (j / 8 * 4) & 15;
                    self.sub_scales[j] = (low | (s[8 + j % 4] >> (j / 4 * 2) & 3) << 4).wrapping_sub(32);
                }
                self.pairs(&raw[32..96]);
                for (e, c) in self.codes.iter_mut().enumerate() {
                    *c |= (raw[e % 32] >> (e / 32) & 1) << 2;
                }
            }
        }
    }

    fn nibbles(&mut self, bytes: &[u8]) {
        for (e, v) in bytes[..16].iter().enumerate() {
            self.codes[e] = v & 15;
            self.codes[e + 16] = v >> 4;
        }
    }

    fn fifth_bits(&mut self, bytes: &[u8]) {
        for (e, c) in self.codes[..BLOCK].iter_mut().enumerate() {
            *c |= (bytes[e / 8] >> (e % 8) & 1) << 4;
        }
    }

    fn pairs(&mut self, bytes: &[u8]) {
        for (e, c) in self.codes.iter_mut().enumerate() {
            *c = bytes[e / 128 * 32 + e % 32] >> (2 * (e / 32 % 4)) & 3;
        }
    }
}

fn scatter<const W: usize>(src: &[u8], dst: &mut [u8], step: usize, r: usize) {
    for (v, d) in src.chunks_exact(W).zip(dst.chunks_exact_mut(step)) {
        d[r * W..(r + 1) * W].copy_from_slice(v);
    }
}

fn gather<const W: usize>(codes: &[u8], step: usize, r: usize, out: &mut [f32], f: impl Fn([u8; W]) -> f32) {
    for (o, d) in out.iter_mut().zip(codes.chunks_exact(step)) {
        let mut b = [0; W];
        b.copy_from_slice(&d[r * W..(r + 1) * W]);
        *o = f(b);
    }
}
