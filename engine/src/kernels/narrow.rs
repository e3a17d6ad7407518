//! Brain floats in 12 bits each, exactly. Of the two bytes of a brain float the high one, sign and most of
//! the exponent, takes few values in one matrix: sixteen of them cover all but about one number in some
//! thousand, so four bits say which. Decoding is memory-bound, so a quarter less to read is a quarter less
//! time. (On GPUs DFloat11 codes exponents with variable length: Zhang et al. 2025, arXiv:2504.11651.)
//!
//! F16 weights that were brain floats before (most published F16 files) are stored so too. A line of
//! sixteen numbers with one that does not fit is kept beside the codes as f32.
//!
//! Eight values of 16 rows are three 64-byte planes: low bytes of values 0–3 and of 4–7, and codes, value
//! `j` in the low and `j + 4` in the high four bits. Row `4a + b`, value `j` stands at byte
//! `16a + 8(j / 2) + 2b + j % 2`: interleaving low and high bytes then gives words of two neighbouring values
//! of a row. The blocks of two neighbouring panels take turns, so that a tile of both reads one stream.

use half::{bf16, f16};

use super::arena::Arena;
use super::layout::{Kind, PANEL, PLANE};
use super::packed::{Packed, PanelBytes, for_parts};

/// Values along `k` of a block.
pub(super) const OCTET: usize = 8;
/// Values along `k` whose codes share a byte with those of as many others; the vector levels unpack them at
/// once.
pub(super) const HALF: usize = OCTET / 2;
/// Bytes of a block of a panel.
pub(super) const BLOCK_BYTES: usize = 3 * PLANE;
/// High bytes that have a code.
const CODES: usize = 16;
/// Rows that are looked at to choose the exponents.
const SAMPLE_ROWS: usize = 64;
/// Numbers per number that may be without a code, so that a quarter is really saved.
const RARE: usize = 256;

/// What the codes of a matrix mean, and the lines that have none.
pub(crate) struct Narrow {
    /// The high byte that a code stands for.
    pub(super) highs: [u8; CODES],
    /// First entry of each panel in `steps`: `[panels]`.
    pub(super) starts: Vec<usize>,
    /// Position along `k` of each line kept beside the codes, ascending in a panel; each panel ends with
    /// [`NONE`].
    pub(super) steps: Vec<u32>,
    /// The lines, an entry for each of `steps` (zeros for the ends).
    pub(super) lines: Vec<[f32; PANEL]>,
}

/// Ends the steps of a panel.
const NONE: u32 = u32::MAX;

/// A number of the source as f32.
fn number(source: Kind, bits: u16) -> f32 {
    if source == Kind::F16 { f16::from_bits(bits).to_f32() } else { bf16::from_bits(bits).to_f32() }
}

/// High and low byte of the brain float that `bits`, of a number of the source, are exactly.
#[inline(always)]
pub(super) fn parts(source: Kind, bits: u16) -> Option<[u8; 2]> {
    if source != Kind::F16 {
        return Some(bits.to_be_bytes());
    }
    if (1..31).contains(&(bits >> 10 & 31)) {
        // The exponent's bias is 112 more, the mantissa 3 bits less.
        let rest = ((bits & 0x7fff) >> 3) + (112 << 7);
        return (bits & 7 == 0).then_some((bits & 0x8000 | rest).to_be_bytes());
    }
    let [high, low, rest @ ..] = number(source, bits).to_bits().to_be_bytes();
    (rest == [0, 0]).then_some([high, low])
}

/// Place of row `r`, value `j < 4` in a plane.
fn place(r: usize, j: usize) -> usize {
    16 * (r / 4) + 8 * (j / 2) + 2 * (r % 4) + j % 2
}

/// How often each high byte occurs in rows, and how many numbers are no brain floats.
struct Counts {
    of: [usize; 256],
    others: usize,
}

impl Counts {
    fn new(source: Kind, k: usize, rows: &[u8], every: usize) -> Self {
        let mut counts = Self { of: [0; 256], others: 0 };
        for row in rows.chunks_exact(2 * k).step_by(every) {
            for bits in row.as_chunks().0 {
                match parts(source, u16::from_le_bytes(*bits)) {
                    Some([high, _]) => counts.of[usize::from(high)] += 1,
                    None => counts.others += 1,
                }
            }
        }
        counts
    }

    fn add(&mut self, other: &Self) {
        self.of.iter_mut().zip(other.of).for_each(|(a, b)| *a += b);
        self.others += other.others;
    }

    /// The most frequent high bytes; nothing if they leave out too many numbers.
    fn choose(&self) -> Option<[u8; CODES]> {
        let mut by_count: Vec<u8> = (0..=u8::MAX).collect();
        by_count.sort_by_key(|&high| std::cmp::Reverse(self.of[usize::from(high)]));
        let highs: [u8; CODES] = std::array::from_fn(|i| by_count[i]);
        let coded: usize = highs.iter().map(|&high| self.of[usize::from(high)]).sum();
        let total = self.of.iter().sum::<usize>() + self.others;
        (total > 0 && (total - coded) * RARE <= total).then_some(highs)
    }
}

/// Packs a panel of up to 16 rows into every `panels`th block from block `panel` on; returns the lines beside
/// the codes.
fn pack_panel(
    source: Kind,
    k: usize,
    rows: &[u8],
    code_of: &[u8; 256],
    codes: &mut [u8],
    [panel, panels]: [usize; 2],
) -> (Vec<u32>, Vec<[f32; PANEL]>) {
    let mut steps = Vec::new();
    for (b, block) in codes.as_chunks_mut::<BLOCK_BYTES>().0.iter_mut().skip(panel).step_by(panels).enumerate() {
        let mut beside = [false; OCTET];
        for (r, row) in rows.chunks_exact(2 * k).enumerate() {
            let (octets, _) = row.as_chunks::<2>().0.as_chunks::<OCTET>();
            for (j, bits) in octets[b].iter().enumerate() {
                let coded =
                    parts(source, u16::from_le_bytes(*bits)).map(|[high, low]| [code_of[usize::from(high)], low]);
                let [code, low] = coded.filter(|[code, _]| usize::from(*code) < CODES).unwrap_or_else(|| {
                    beside[j] = true;
                    [0, 0]
                });
                let at = place(r, j % HALF);
                block[j / HALF * PLANE + at] = low;
                block[2 * PLANE + at] |= code << (j / HALF * 4);
            }
        }
        steps.extend((0..OCTET).filter(|j| beside[*j]).map(|j| (b * OCTET + j) as u32));
    }
    let line = |&step: &u32| {
        let mut line = [0.0; PANEL];
        for (v, row) in line.iter_mut().zip(rows.chunks_exact(2 * k)) {
            *v = number(source, u16::from_le_bytes(row.as_chunks().0[step as usize]));
        }
        line
    };
    let lines = steps.iter().map(line).collect();
    (steps, lines)
}

impl Packed {
    /// Packs a matrix of F16 or BF16 in 12 bits a number, as [`Packed::pack`] does it; nothing if its
    /// numbers do not fit.
    ///
    /// # Errors
    /// If the system has no memory for it.
    ///
    /// # Panics
    /// If `raw` is not `2 · n · k` long.
    pub(crate) fn pack_narrow(
        arena: &Arena,
        source: Kind,
        [n, k]: [usize; 2],
        raw: &[u8],
        threads: usize,
        done: &dyn Fn(usize),
    ) -> std::io::Result<Option<Self>> {
        assert_eq!(
            Some(raw.len()),
            source.row_bytes(k).and_then(|b| b.checked_mul(n)),
            "raw matrix has the wrong size"
        );
        let fits = matches!(source, Kind::F16 | Kind::Bf16) && k.is_multiple_of(OCTET);
        if !fits || raw.is_empty() {
            return Ok(None);
        }
        // Most matrices that do not fit are told by a few rows.
        if Counts::new(source, k, raw, (n / SAMPLE_ROWS).max(1)).choose().is_none() {
            return Ok(None);
        }
        let mut counts = Counts { of: [0; 256], others: 0 };
        let panel = PanelBytes { raw: PANEL * 2 * k, codes: 0, scales: 0 };
        let count = |raw: &[u8], _: &mut [u8], _: &mut [u8]| Counts::new(source, k, raw, 1);
        for_parts(raw, [&mut [], &mut []], panel, threads, done, count, |part| counts.add(&part));
        let Some(highs) = counts.choose() else { return Ok(None) };

        let mut code_of = [u8::MAX; 256];
        for (code, high) in highs.iter().enumerate() {
            code_of[usize::from(*high)] = code as u8;
        }
        let panel_bytes = k / OCTET * BLOCK_BYTES;
        let pair = PanelBytes { raw: 2 * panel.raw, codes: 2 * panel_bytes, scales: 0 };
        let mut codes = arena.take(n.div_ceil(PANEL) * panel_bytes)?;
        let mut narrow = Narrow { highs, starts: Vec::new(), steps: Vec::new(), lines: Vec::new() };
        let work = |raw: &[u8], codes: &mut [u8], _: &mut [u8]| {
            let mut packed = Vec::new();
            for (rows, codes) in raw.chunks(pair.raw).zip(codes.chunks_mut(pair.codes)) {
                let panels = codes.len() / panel_bytes;
                for (i, rows) in rows.chunks(panel.raw).enumerate() {
                    packed.push(pack_panel(source, k, rows, &code_of, codes, [i, panels]));
                }
            }
            packed
        };
        for_parts(raw, [codes.bytes_mut(), &mut []], pair, threads, done, work, |panels| {
            for (mut steps, mut lines) in panels {
                narrow.starts.push(narrow.steps.len());
                narrow.steps.append(&mut steps);
                narrow.lines.append(&mut lines);
                narrow.steps.push(NONE);
                narrow.lines.push([0.0; PANEL]);
            }
        });
        narrow.steps.shrink_to_fit();
        narrow.lines.shrink_to_fit();
        Ok(Some(Self { kind: Kind::Bf12, n, k, codes, scales: arena.take(0)?, narrow: Some(narrow) }))
    }

    /// Bytes before the first block of panel `p` of a matrix in 12 bits, and from block to block.
    fn narrow_blocks(&self, p: usize) -> [usize; 2] {
        let pair = p / 2 * 2;
        let panels = (self.panels() - pair).min(2);
        [pair * self.panel_codes() + (p - pair) * BLOCK_BYTES, panels * BLOCK_BYTES]
    }

    /// The sixteen numbers of panel `p` at `step`, of a matrix in 12 bits.
    pub(super) fn narrow_line(&self, p: usize, step: usize) -> [f32; PANEL] {
        let Some(narrow) = &self.narrow else { return [0.0; PANEL] };
        let beside = narrow.beside(p).find(|(at, _)| *at == step);
        beside.map_or_else(|| std::array::from_fn(|r| self.coded(narrow, p, step, r)), |(_, line)| *line)
    }

    /// Row `r` of panel `p`, of a matrix in 12 bits.
    pub(super) fn narrow_row(&self, p: usize, r: usize, out: &mut [f32]) {
        let Some(narrow) = &self.narrow else { return };
        for (step, o) in out.iter_mut().enumerate() {
            *o = self.coded(narrow, p, step, r);
        }
        for (step, line) in narrow.beside(p) {
            out[step] = line[r];
        }
    }

    /// What the codes say of row `r` of panel `p` at `step`; the truth may stand beside them.
    fn coded(&self, narrow: &Narrow, p: usize, step: usize, r: usize) -> f32 {
        let [first, stride] = self.narrow_blocks(p);
        let block = &self.codes.bytes()[first + step / OCTET * stride..][..BLOCK_BYTES];
        let (half, at) = (step % OCTET / HALF, place(r, step % HALF));
        let high = narrow.highs[usize::from(block[2 * PLANE + at] >> (4 * half) & 15)];
        f32::from_bits(u32::from(high) << 24 | u32::from(block[half * PLANE + at]) << 16)
    }
}

impl Narrow {
    /// The lines beside the codes of panel `p`, each with its position along `k`.
    fn beside(&self, p: usize) -> impl Iterator<Item = (usize, &[f32; PANEL])> {
        let from = self.starts[p];
        self.steps[from..].iter().take_while(|step| **step != NONE).map(|step| *step as usize).zip(&self.lines[from..])
    }
}

/// Reads a panel block by block.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Cursor<'a> {
    narrow: &'a Narrow,
    /// The block that is next, and bytes from one to the next.
    at: *const u8,
    stride: usize,
    /// Blocks behind it.
    block: usize,
    /// Next line beside the codes.
    next: usize,
}

#[cfg(target_arch = "x86_64")]
impl<'a> Cursor<'a> {
    /// # Panics
    /// If there is no such panel.
    pub(super) fn new(w: &Packed, narrow: &'a Narrow, panel: usize) -> Self {
        let [first, stride] = w.narrow_blocks(panel);
        Self { narrow, at: w.codes.bytes()[first..].as_ptr(), stride, block: 0, next: narrow.starts[panel] }
    }

    /// The next block, whose planes the vector levels unpack.
    #[inline(always)]
    pub(super) fn at(&self) -> *const u8 {
        self.at
    }

    /// How many blocks from the next one on have no line beside the codes.
    #[inline(always)]
    pub(super) fn run(&self) -> usize {
        self.narrow.steps[self.next] as usize / OCTET - self.block
    }

    /// Goes on by some blocks, whose lines were put or that have none.
    #[inline(always)]
    pub(super) fn skip(&mut self, blocks: usize) {
        self.at = self.at.wrapping_add(blocks * self.stride);
        self.block += blocks;
    }

    /// Puts the lines of the next block that stand beside the codes among the others.
    pub(super) fn put_lines(&mut self, lines: &mut [[f32; PANEL]; OCTET]) {
        while self.run() == 0 {
            lines[self.narrow.steps[self.next] as usize % OCTET] = self.narrow.lines[self.next];
            self.next += 1;
        }
    }
}
