//! Products of brain floats in 12 bits (see `narrow`) with AVX-512: eight numbers along `k` of a panel are
//! unpacked into registers, then multiplied as any floats are.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm512_and_si512, _mm512_broadcast_i32x4,
    _mm512_castsi512_ps, _mm512_fmadd_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_set1_epi8, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_epi8, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_storeu_ps,
    _mm512_unpackhi_epi8, _mm512_unpacklo_epi8,
};

use super::avx512::{PREFETCH, store};
use super::layout::{PANEL, PLANE};
use super::matmul::Task;
use super::narrow::{BLOCK_BYTES, Cursor, HALF, Narrow, OCTET};

/// Half of a block (`H` 0 or 1) as its codes have it: four lines of sixteen numbers.
///
/// # Safety
/// The machine has AVX-512 F and BW; `at` is a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn half<const H: usize>(at: *const u8, highs: __m512i) -> [__m512; HALF] {
    // SAFETY: the block's three planes, 64-byte aligned.
    unsafe {
        let codes = _mm512_load_si512(at.add(2 * PLANE).cast());
        let code = if H == 0 { codes } else { _mm512_srli_epi16::<4>(codes) };
        let high = _mm512_shuffle_epi8(highs, _mm512_and_si512(code, _mm512_set1_epi8(15)));
        let low = _mm512_load_si512(at.add(H * PLANE).cast());
        // Words of two values of a row: the first in the low half, the second in the high one.
        let (first, second) = (_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high));
        let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        [
            _mm512_slli_epi32::<16>(first),
            _mm512_and_si512(first, upper),
            _mm512_slli_epi32::<16>(second),
            _mm512_and_si512(second, upper),
        ]
        .map(|v| _mm512_castsi512_ps(v))
    }
}

/// The block that the cursor has reached, with the lines beside its codes, into `out`: `[8][16]`.
///
/// # Safety
/// As [`half`]; the cursor is at a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn whole(cursor: &mut Cursor<'_>, highs: __m512i, out: &mut [[f32; PANEL]; OCTET]) {
    // SAFETY: the contract is this function's own; a line is sixteen numbers.
    unsafe {
        let lines = [half::<0>(cursor.at(), highs), half::<1>(cursor.at(), highs)];
        for (out, line) in out.iter_mut().zip(lines.as_flattened()) {
            _mm512_storeu_ps(out.as_mut_ptr(), *line);
        }
    }
    cursor.put_lines(out);
}

/// What the codes stand for, for every 128 bits.
#[target_feature(enable = "avx512f")]
fn highs(narrow: &Narrow) -> __m512i {
    // SAFETY: the table is sixteen bytes.
    unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(narrow.highs.as_ptr().cast())) }
}

/// Panels `p..p+P` as f32, one behind the other.
///
/// # Safety
/// As [`row_tiles`]; `out` holds `P · k · 16` numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn widen<const P: usize>(task: &Task<'_>, p: usize, out: &mut [f32]) {
    let Some(narrow) = &task.w.narrow else { return };
    let highs = highs(narrow);
    for (q, out) in out.chunks_exact_mut(task.w.k * PANEL).enumerate() {
        let mut cursor = Cursor::new(task.w, narrow, p + q);
        for out in out.as_chunks_mut::<PANEL>().0.as_chunks_mut::<OCTET>().0 {
            // SAFETY: the panels hold k/8 blocks each.
            unsafe { whole(&mut cursor, highs, out) };
            cursor.skip(1);
        }
    }
}

/// Panels `p..p+P` for all rows.
///
/// # Safety
/// As `avx512::run_panels`; the panels lie inside the task, whose matrix is in 12 bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn row_tiles<const P: usize>(task: &Task<'_>, p: usize) {
    // SAFETY: rows stay inside the task.
    unsafe {
        tiles!(task.rows, [8 4 2 1], |MR, r| tile::<MR, P>(task, p, r));
    }
}

/// Rows `r..r+MR` by panels `p..p+P`.
///
/// # Safety
/// As [`row_tiles`]; the rows lie inside the task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tile<const MR: usize, const P: usize>(task: &Task<'_>, p: usize, r: usize) {
    let Some(narrow) = &task.w.narrow else { return };
    let k = task.w.k;
    let highs = highs(narrow);
    let mut cursors: [Cursor<'_>; P] = std::array::from_fn(|q| Cursor::new(task.w, narrow, p + q));
    let mut acc = [[_mm512_setzero_ps(); P]; MR];
    // SAFETY: panels p..p+P hold k/8 blocks each, rows r..r+MR hold k numbers each. Prefetching past the
    // end of a buffer has no effect but a lost slot.
    unsafe {
        let mut xp = task.x.as_ptr().add(r * k);
        // Four values along k of every row by as many lines of every panel.
        macro_rules! multiply {
            ($lines:ident, $from:expr) => {
                for i in 0..HALF {
                    for j in 0..MR {
                        let x = _mm512_set1_ps(*xp.add(j * k + $from + i));
                        for q in 0..P {
                            acc[j][q] = _mm512_fmadd_ps(x, $lines[q][i], acc[j][q]);
                        }
                    }
                }
            };
        }
        let mut left = k / OCTET;
        loop {
            // Blocks that the codes have whole. (No branch among them: the compiler would load the inputs
            // before it, and spill them.)
            let run = cursors.iter().fold(left, |run, cursor| run.min(cursor.run()));
            for _ in 0..run {
                if MR > 1 && r == 0 {
                    for i in 0..P * BLOCK_BYTES / PLANE {
                        _mm_prefetch::<_MM_HINT_T0>(cursors[0].at().wrapping_add(PREFETCH + i * PLANE).cast());
                    }
                }
                let lines: [[__m512; HALF]; P] = std::array::from_fn(|q| half::<0>(cursors[q].at(), highs));
                multiply!(lines, 0);
                let lines: [[__m512; HALF]; P] = std::array::from_fn(|q| half::<1>(cursors[q].at(), highs));
                multiply!(lines, HALF);
                cursors.iter_mut().for_each(|cursor| cursor.skip(1));
                xp = xp.add(OCTET);
            }
            left -= run;
            if left == 0 {
                break;
            }
            let mut wide = [[[0.0; PANEL]; OCTET]; P];
            for q in 0..P {
                whole(&mut cursors[q], highs, &mut wide[q]);
                cursors[q].skip(1);
            }
            for h in [0, HALF] {
                let lines: [[__m512; HALF]; P] =
                    std::array::from_fn(|q| std::array::from_fn(|i| _mm512_loadu_ps(wide[q][h + i].as_ptr())));
                multiply!(lines, h);
            }
            xp = xp.add(OCTET);
            left -= 1;
        }
        for j in 0..MR {
            for q in 0..P {
                store(task, r + j, p + q, acc[j][q]);
            }
        }
    }
}
