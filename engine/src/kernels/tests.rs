//! Every kernel against the portable one, bit for bit, over random shapes; and rows alone against
//! the same rows in a batch.

use half::f16;
use proptest::prelude::*;

use super::arena::{Arena, Numbers};
use super::matmul::{Input, Job, matmul};
use super::narrow::parts;
use super::packed::{Grain, Kind, Packed};
use super::pool::Pool;
use super::quantize::Quantized;
use super::{Level, NUMERICS_REVISION, attention, gates, lanes};
use crate::container::{RawTensor, Stored};

const KINDS: [Kind; 15] = [
    Kind::F32,
    Kind::F16,
    Kind::Bf16,
    Kind::Bf12,
    Kind::Q8_0,
    Kind::Q4_0,
    Kind::Q4_1,
    Kind::Q5_0,
    Kind::Q5_1,
    Kind::Fp4,
    Kind::Q2K,
    Kind::Q3K,
    Kind::Q4K,
    Kind::Q5K,
    Kind::Q6K,
];

/// Reproducible numbers within ±1 (SplitMix64).
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64)
        .map(|i| {
            let mut z = (seed << 32).wrapping_add(i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Random file bytes of a matrix. Quantised blocks get plausible scales and any codes at all.
fn raw(kind: Kind, n: usize, k: usize, seed: u64) -> Vec<u8> {
    let values = numbers(seed, n * k);
    let half = |v: f32| f16::from_f32(v).to_le_bytes();
    match kind {
        Kind::F32 => return values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Kind::F16 => return values.iter().flat_map(|v| half(*v)).collect(),
        Kind::Bf16 | Kind::Bf12 => return values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => {}
    }
    let scales_at: &[usize] = match kind {
        Kind::Q4_1 | Kind::Q5_1 | Kind::Q4K | Kind::Q5K => &[0, 2],
        Kind::Q2K => &[80, 82],
        Kind::Q3K => &[108],
        Kind::Q6K => &[208],
        _ => &[0],
    };
    let size = if kind.grain() == Grain::Coarse { 0.001 } else { 0.02 };
    let mut out = Vec::new();
    for block in values.chunks_exact(kind.block()) {
        let from = out.len();
        out.extend((0..kind.file_bytes()).map(|i| (block[i % block.len()] * (1 << 23) as f32) as i32 as u8));
        for (at, v) in scales_at.iter().zip(block) {
            out[from + at..from + at + 2].copy_from_slice(&half(v * size));
        }
    }
    out
}

fn pack(kind: Kind, n: usize, k: usize, seed: u64, threads: usize) -> Packed {
    let (arena, raw) = (Arena::default(), raw(kind, n, k, seed));
    if kind == Kind::Bf12 {
        let narrow = Packed::pack_narrow(&arena, Kind::Bf16, [n, k], &raw, threads, &|_| ()).expect("memory");
        return narrow.expect("sixteen exponents are enough");
    }
    Packed::pack(&arena, kind, [n, k], &raw, threads, &|_| ()).expect("memory")
}

fn product(level: Level, threads: usize, w: &Packed, x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / w.k * w.n];
    let mut q = Quantized::default();
    let mut pool = Pool::new(threads).expect("threads");
    q.fill(level, &mut pool, x, w.k, &[w.kind.grain()]);
    let input = Input { x, quantized: Some((&q, 0)) };
    matmul(level, &mut pool, &mut [Job { input, weights: w, out: &mut out }]);
    out
}

/// A width that fits the kind, from about `32 · blocks`.
fn width(kind: Kind, blocks: usize, extra: usize) -> usize {
    match kind.grain() {
        // In 12 bits: a multiple of 8.
        Grain::None if kind == Kind::Bf12 => 32 * blocks - extra / 8 * 8,
        Grain::None => 32 * blocks - extra,
        Grain::Fine => 32 * blocks,
        Grain::Coarse => 256 * blocks.div_ceil(3),
    }
}

/// Σ of the largest code times the scale, plus the minimum, over a row: what rounding of the scales of
/// activations can move when code and minimum cancel.
fn magnitude(w: &Packed, row: usize) -> f64 {
    let mut lows = vec![0.0; w.k];
    w.unpack_row(row, &mut lows);
    let top = lows.iter().fold(0.0f32, |a, v| a.max(v.abs()));
    f64::from(top) * w.k as f64 * 4.0
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn products_agree_at_every_level_and_with_f64(
        kind in prop::sample::select(&KINDS), n in 1usize..70, blocks in 1usize..8, extra in 0usize..32,
        rows in 1usize..40, threads in 1usize..4, seed: u64,
    ) {
        let k = width(kind, blocks, extra);
        let w = pack(kind, n, k, seed, threads);
        let x = numbers(seed ^ 1, rows * k);
        let exact = product(Level::Portable, 1, &w, &x);
        for level in Level::all() {
            prop_assert_eq!(bits(&product(level, threads, &w, &x)), bits(&exact), "{:?} {:?}", level, kind);
        }
        let mut row = vec![0.0; k];
        for c in 0..n {
            w.unpack_row(c, &mut row);
            for r in 0..rows {
                let x = &x[r * k..(r + 1) * k];
                let sum: f64 = row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let size: f64 = row.iter().map(|a| f64::from(a.abs())).sum();
                // Quantised inputs carry half a step of 1/127 of the block's largest value; codes with a
                // minimum may cancel it, so the bound counts both.
                let tolerance = match kind.grain() {
                    Grain::None => size * 1e-5 + 1e-6,
                    _ => size / 127.0 + magnitude(&w, c) / 2048.0 + 1e-4,
                };
                prop_assert!((f64::from(exact[r * n + c]) - sum).abs() <= tolerance, "{kind:?} {r},{c}");
            }
        }
    }

    /// Numbers in 12 bits against the same in 16, with lines beside the codes: outliers of any exponent and,
    /// among F16, numbers that are no brain floats.
    #[test]
    fn twelve_bits_hold_what_sixteen_did(
        half in any::<bool>(), n in 1usize..70, octets in 1usize..60, rows in 1usize..40,
        rare in prop::collection::vec((any::<prop::sample::Index>(), any::<u16>()), 0..6), seed: u64,
    ) {
        let k = 8 * octets;
        let source = if half { Kind::F16 } else { Kind::Bf16 };
        let mut raw: Vec<u8> = numbers(seed, n * k)
            .into_iter()
            .map(half::bf16::from_f32)
            .flat_map(|v| if half { f16::from_f32(v.to_f32()).to_le_bytes() } else { v.to_le_bytes() })
            .collect();
        for (at, v) in &rare {
            // Finite ones: whether NaN reaches the output is for another test.
            let v = if half { v & 0xbfff } else { v & 0xbf7f };
            raw[at.index(n * k) * 2..][..2].copy_from_slice(&v.to_le_bytes());
        }
        let arena = Arena::default();
        let plain = Packed::pack(&arena, source, [n, k], &raw, 2, &|_| ()).expect("memory");
        let Some(narrow) = Packed::pack_narrow(&arena, source, [n, k], &raw, 2, &|_| ()).expect("memory") else {
            // Six of a few numbers are not rare.
            prop_assert!(n * k < 256 * (rare.len() + 1) + 4096);
            return Ok(());
        };
        let (mut a, mut b) = (vec![0.0; k], vec![0.0; k]);
        for row in 0..n {
            plain.unpack_row(row, &mut a);
            narrow.unpack_row(row, &mut b);
            prop_assert_eq!(bits(&a), bits(&b));
        }
        let x = numbers(seed ^ 1, rows * k);
        for level in Level::all() {
            prop_assert_eq!(bits(&product(level, 2, &narrow, &x)), bits(&product(level, 1, &plain, &x)), "{:?}", level);
        }
    }

    /// The file layouts against candle's reader, which shares no code with the own one.
    #[test]
    fn unpacked_rows_are_what_candle_reads(
        kind in prop::sample::select(&KINDS), n in 1usize..40, blocks in 1usize..8, seed: u64,
    ) {
        let k = width(kind, blocks, 0);
        let bytes = raw(kind, n, k, seed);
        let w = pack(kind, n, k, seed, 2);
        let stored = match kind {
            Kind::F32 => Stored::F32,
            Kind::F16 => Stored::F16,
            Kind::Bf16 | Kind::Bf12 => Stored::Bf16,
            Kind::Q8_0 => Stored::Q8_0,
            Kind::Q4_0 => Stored::Q4_0,
            Kind::Q4_1 => Stored::Q4_1,
            Kind::Q5_0 => Stored::Q5_0,
            Kind::Q5_1 => Stored::Q5_1,
            Kind::Q2K => Stored::Q2K,
            Kind::Q3K => Stored::Q3K,
            Kind::Q4K => Stored::Q4K,
            Kind::Q5K => Stored::Q5K,
            Kind::Fp4 => Stored::Fp4,
            Kind::Q6K => Stored::Q6K,
        };
        let t = RawTensor { name: "w".into(), stored, shape: vec![n, k], bytes: bytes.as_slice().into() };
        let theirs = t.to_f32().expect("candle reads it");
        let mut row = vec![0.0; k];
        for (r, theirs) in theirs.chunks_exact(k).enumerate() {
            w.unpack_row(r, &mut row);
            for (a, b) in row.iter().zip(theirs) {
                prop_assert!((a - b).abs() <= 1e-6 * (a.abs() + b.abs()) + 1e-7, "{kind:?} row {r}: {a} {b}");
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_a_batch(
        kind in prop::sample::select(&KINDS), n in 1usize..150, blocks in 1usize..6, rows in 2usize..40, seed: u64,
    ) {
        let k = width(kind, blocks, 0);
        let w = pack(kind, n, k, seed, 1);
        let x = numbers(seed ^ 2, rows * k);
        for level in Level::all() {
            let batch = product(level, 2, &w, &x);
            for r in 0..rows {
                let alone = product(level, 1, &w, &x[r * k..(r + 1) * k]);
                prop_assert_eq!(bits(&alone), bits(&batch[r * n..(r + 1) * n]), "{:?} row {}", level, r);
            }
        }
    }

    /// As experts use it: rows that begin anywhere in what was quantised for all of them.
    #[test]
    fn a_product_may_begin_at_any_quantised_row(
        kind in prop::sample::select(&KINDS), n in 1usize..70, blocks in 1usize..6, before in 1usize..12,
        rows in 1usize..20, after in 0usize..3, seed: u64,
    ) {
        let k = width(kind, blocks, 0);
        let w = pack(kind, n, k, seed, 1);
        let all = numbers(seed ^ 5, (before + rows + after) * k);
        let x = &all[before * k..(before + rows) * k];
        for level in Level::all() {
            let mut pool = Pool::new(2).expect("threads");
            let mut q = Quantized::default();
            q.fill(level, &mut pool, &all, k, &[kind.grain()]);
            let mut out = vec![f32::NAN; rows * n];
            let input = Input { x, quantized: Some((&q, before)) };
            matmul(level, &mut pool, &mut [Job { input, weights: &w, out: &mut out }]);
            prop_assert_eq!(bits(&out), bits(&product(level, 1, &w, x)), "{:?} {:?}", level, kind);
        }
    }

    #[test]
    fn lane_kernels_agree_with_the_portable_level(n in 1usize..200, scale in 0.01f32..30.0, seed: u64) {
        let fast = Level::detect();
        let x: Vec<f32> = numbers(seed, n).iter().map(|v| v * scale).collect();
        let w = numbers(seed ^ 3, n);
        let both = |f: &dyn Fn(Level) -> Vec<f32>| (bits(&f(fast)), bits(&f(Level::Portable)));
        let (a, b) = both(&|l| { let mut o = vec![0.0; n]; lanes::rms_norm(l, &x, &w, 1e-6, &mut o); o });
        prop_assert_eq!(a, b);
        let (a, b) = both(&|l| { let mut o = x.clone(); lanes::silu_mul(l, &mut o, &w); o });
        prop_assert_eq!(a, b);
        let (a, b) = both(&|l| { let mut o = x.clone(); lanes::sigmoid(l, &mut o); o });
        prop_assert_eq!(a, b);
        let (a, b) = both(&|l| { let mut o = x.clone(); lanes::add_scaled(l, &mut o, 0.3, &w); o });
        prop_assert_eq!(a, b);
        let (a, b) = both(&|l| { let mut o = x.clone(); let s = lanes::exp_scores(l, &mut o); o.push(s); o });
        prop_assert_eq!(a, b);
        let sums = |l| lanes::softmax_sums(l, &x, scale);
        prop_assert_eq!(sums(fast), sums(Level::Portable));
        for interleaved in [false, true] {
            let (a, b) = both(&|l| {
                let mut o = x[..n / 2 * 2].to_vec();
                lanes::rotate(l, &mut o, &w[..n / 2], &x[..n / 2], interleaved);
                o
            });
            prop_assert_eq!(a, b);
        }
    }

    /// Scores and weighted sums at every level, whole and cut at any token, alone and among other queries.
    #[test]
    fn attention_kernels_agree_and_do_not_see_neighbours(
        dim in 1usize..150, tokens in 1usize..=16, queries in 1usize..30, pad in 0usize..9, seed: u64,
    ) {
        let stride = dim + pad;
        let (q, rows) = (numbers(seed, queries * dim), numbers(seed ^ 4, tokens * stride));
        let scores = |level, q: &[f32], tokens: usize| {
            let mut keys = attention::KeyBlock::default();
            keys.fill(level, &rows, stride, tokens, dim);
            let mut out = vec![0.0; q.len() / dim * 20];
            attention::scores(level, q, &keys, 0.25, &mut out, 20);
            out
        };
        let all = scores(Level::Portable, &q, tokens);
        for (j, q) in q.chunks_exact(dim).enumerate() {
            for t in 0..tokens {
                let k = &rows[t * stride..];
                let exact: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                prop_assert!((f64::from(all[j * 20 + t]) - exact / 4.0).abs() < 1e-4);
            }
        }
        let sums = |level, j: std::ops::Range<usize>, cut: usize| {
            let mut out = vec![0.5; j.len() * dim];
            attention::add_weighted(level, [&all[j.start * 20..], &rows], [20, stride, cut, dim], &mut out);
            let rest = [&all[j.start * 20 + cut..], &rows[cut * stride..]];
            attention::add_weighted(level, rest, [20, stride, tokens - cut, dim], &mut out);
            out
        };
        let whole = sums(Level::Portable, 0..queries, 0);
        for level in Level::all() {
            prop_assert_eq!(bits(&scores(level, &q, tokens)), bits(&all), "{:?}", level);
            prop_assert_eq!(bits(&sums(level, 0..queries, tokens / 2)), bits(&whole), "{:?}", level);
            let j = queries / 2;
            let alone = scores(level, &q[j * dim..(j + 1) * dim], tokens.div_ceil(2));
            prop_assert_eq!(bits(&alone[..tokens.div_ceil(2)]), bits(&all[j * 20..j * 20 + tokens.div_ceil(2)]));
            prop_assert_eq!(bits(&sums(level, j..j + 1, 0)), bits(&whole[j * dim..(j + 1) * dim]));
        }
    }

    #[test]
    fn exp_is_close(x in -87.0f32..87.0) {
        let e = f64::from(lanes::exp_lanes([x; 8])[3]);
        let exact = f64::from(x).exp();
        prop_assert!((e - exact).abs() <= exact * 3e-7, "{x}: {e} {exact}");
    }
}

/// The bits themselves: peers that name one revision agree, whatever machines and commits they are of.
#[test]
fn these_are_the_bits_of_this_revision() {
    const DIM: usize = 72;
    for level in Level::all() {
        let mut hash = blake3::Hasher::new();
        let mut take = |x: &[f32]| {
            x.iter().for_each(|v| {
                hash.update(&v.to_bits().to_le_bytes());
            });
        };
        // (Brain floats in 12 bits have the bits of those in 16: `twelve_bits_hold_what_sixteen_did`.)
        for kind in KINDS.into_iter().filter(|kind| *kind != Kind::Bf12) {
            take(&product(level, 1, &pack(kind, 37, 256, 1, 1), &numbers(2, 5 * 256)));
        }
        let (x, w) = (numbers(3, 203).iter().map(|v| v * 9.0).collect::<Vec<_>>(), numbers(4, 203));
        let mut out = vec![0.0; x.len()];
        lanes::rms_norm(level, &x, &w, 1e-6, &mut out);
        take(&out);
        let mut in_place = |f: &dyn Fn(&mut [f32])| {
            let mut out = x.clone();
            f(&mut out);
            take(&out);
        };
        in_place(&|o| lanes::silu_mul(level, o, &w));
        in_place(&|o| lanes::sigmoid(level, o));
        in_place(&|o| lanes::add_scaled(level, o, 0.3, &w));
        in_place(&|o| o[0] = lanes::exp_scores(level, &mut o[1..]));
        in_place(&|o| lanes::rotate(level, &mut o[..200], &w[..100], &x[..100], false));
        in_place(&|o| lanes::rotate(level, &mut o[..200], &w[..100], &x[..100], true));
        in_place(&|o| gates::gelu_mul(level, o, &w));
        in_place(&|o| gates::clamped_swiglu(level, o, &w, 1.702, 7.0));
        in_place(&|o| gates::softcap(level, o, 5.0));
        in_place(&|o| {
            let mut keys = attention::KeyBlock::default();
            keys.fill(level, &w, DIM, 2, DIM);
            attention::scores(level, &x[..DIM], &keys, 0.25, o, attention::KEYS);
            attention::add_weighted(level, [&x, &w], [2, DIM, 2, DIM], &mut o[50..50 + DIM]);
        });
        let (sum, weighted) = lanes::softmax_sums(level, &x, 9.0);
        hash.update(&sum.to_bits().to_le_bytes());
        hash.update(&weighted.to_bits().to_le_bytes());
        let bits = hash.finalize().to_hex();
        assert_eq!(
            (NUMERICS_REVISION, &bits[..16]),
            (4, "9f10dbf0fe8b243f"),
            "{level:?}: a new order of arithmetic is a new revision"
        );
    }
}

#[test]
fn what_twelve_bits_do_not_hold_stays_in_sixteen() {
    let narrow = |source, n: usize, k: usize, raw: &[u8]| {
        Packed::pack_narrow(&Arena::default(), source, [n, k], raw, 2, &|_| ()).expect("memory").is_some()
    };
    let brain = raw(Kind::Bf16, 32, 64, 1);
    assert!(narrow(Kind::Bf16, 32, 64, &brain));
    assert!(!narrow(Kind::Bf16, 32 * 16, 4, &brain), "a width that is no multiple of 8");
    assert!(!narrow(Kind::F16, 32, 64, &raw(Kind::F16, 32, 64, 1)), "mantissas of ten bits");
    let spread: Vec<u8> = (0..2048u16).flat_map(|i| ((i % 200) << 7).to_le_bytes()).collect();
    assert!(!narrow(Kind::Bf16, 32, 64, &spread), "two hundred exponents");
    assert!(!narrow(Kind::Bf16, 0, 64, &[]));
}

/// Every number of sixteen bits, against its conversion to f32.
#[test]
fn parts_are_those_of_the_number_as_f32() {
    for bits in 0..=u16::MAX {
        for (source, v) in
            [(Kind::F16, f16::from_bits(bits).to_f32()), (Kind::Bf16, half::bf16::from_bits(bits).to_f32())]
        {
            let [high, low, rest @ ..] = v.to_bits().to_be_bytes();
            let expected = (rest == [0, 0]).then_some([high, low]);
            assert!(v.is_nan() || parts(source, bits) == expected, "{source:?} {bits:#x}");
        }
    }
}

/// NaN in an input must come out as NaN, not vanish in the quantisation.
#[test]
fn nan_is_not_swallowed() {
    for kind in KINDS {
        let w = pack(kind, 8, 256, 1, 1);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = numbers(9, 256);
            x[40] = bad;
            for level in Level::all() {
                assert!(product(level, 1, &w, &x).iter().all(|v| !v.is_finite()), "{kind:?} {level:?} {bad}");
            }
        }
    }
}

#[test]
fn the_pool_runs_every_chunk_once_and_survives_many_rounds() {
    use std::sync::atomic::{AtomicU32, Ordering};
    let mut pool = Pool::new(3).expect("threads");
    for round in 0..2000usize {
        let chunks = round % 23;
        let seen: Vec<AtomicU32> = (0..chunks).map(|_| AtomicU32::new(0)).collect();
        if round % 5 == 0 {
            pool.begin_step();
        }
        pool.run(chunks, &|i| {
            seen[i].fetch_add(1, Ordering::Relaxed);
        });
        if round % 7 == 0 {
            pool.end_step();
        }
        assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1), "round {round}");
    }
    let mut out = vec![0.0; 1003];
    pool.for_pieces(&mut out[..1000], 10, 1 << 20, &|i, piece| piece.fill(i as f32));
    assert!(out[..1000].iter().enumerate().all(|(i, v)| *v == (i / 10) as f32));
}

/// More than one slice and several threads: every row lands where it belongs, every byte is counted.
#[test]
fn large_matrices_are_packed_slice_by_slice() {
    use std::cell::Cell;
    for (kind, stored, n, k) in [(Kind::F32, Stored::F32, 2205, 512), (Kind::Q4_1, Stored::Q4_1, 8203, 1024)] {
        let bytes = raw(kind, n, k, 7);
        let (calls, read) = (Cell::new(0), Cell::new(0));
        let done = |b: usize| {
            calls.set(calls.get() + 1);
            read.set(read.get() + b);
        };
        let w = Packed::pack(&Arena::default(), kind, [n, k], &bytes, 3, &done).expect("memory");
        assert!(calls.get() > 1 && read.get() == bytes.len(), "{kind:?}");
        let theirs = RawTensor { name: "w".into(), stored, shape: vec![n, k], bytes: bytes.as_slice().into() }
            .to_f32()
            .expect("reads");
        let mut row = vec![0.0; k];
        for (r, theirs) in theirs.chunks_exact(k).enumerate() {
            w.unpack_row(r, &mut row);
            let close = row.iter().zip(theirs).all(|(a, b)| (a - b).abs() <= 1e-6 * (a.abs() + b.abs()) + 1e-7);
            assert!(close, "{kind:?} row {r}");
        }
    }
}

#[test]
fn arena_pieces_are_aligned_zeroed_and_apart() {
    let arena = Arena::default();
    let mut pieces = Vec::new();
    for (i, len) in [0, 1, 63, 64, 65, 5 << 20, 70 << 20, 4096].into_iter().enumerate() {
        let mut piece = arena.take(len).expect("memory");
        assert!(piece.bytes().len() == len && piece.bytes().iter().all(|b| *b == 0));
        assert!(len == 0 || piece.bytes().as_ptr().addr().is_multiple_of(64));
        piece.bytes_mut().fill(i as u8 + 1);
        pieces.push(piece);
    }
    for (i, piece) in pieces.iter().enumerate() {
        assert!(piece.bytes().iter().all(|b| usize::from(*b) == i + 1), "piece {i} was overwritten");
    }
    let mut numbers = Numbers::zeroed(1000).expect("memory");
    assert!(numbers.iter().all(|v| v.to_bits() == 0));
    numbers[999] = 2.0;
    assert!((numbers.len(), numbers[999].to_bits()) == (1000, 2f32.to_bits()));
    assert!(Numbers::zeroed(0).expect("nothing").is_empty() && Numbers::zeroed(usize::MAX).is_err());
}
