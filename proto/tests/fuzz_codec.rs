//! Mutational fuzzing of the frame codec, bounded in time, on stable Rust.
//!
//! Starts from `tests/corpus/` and fresh samples, mutates them, mends the checksum in half of the
//! cases (so that mutants reach the archive's validation) and decodes. What decodes must encode
//! again to a frame that decodes to the same. `TANDEM_FUZZ_SECONDS` (default 3) bounds the run,
//! `TANDEM_FUZZ_SEED` repeats one; the seed is printed.

mod reading;
mod samples;

use std::{
    env, fs,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use samples::Rng;
use tandem_proto::frame::{self, FrameType};

/// Inputs kept for further mutation.
const POOL_MAX: usize = 512;
/// Longest mutant, bytes.
const INPUT_BYTES_MAX: usize = 80 * 1024;

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().and_then(|text| text.parse().ok())
}

fn corpus() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn mutate(input: &mut Vec<u8>, pool: &[Vec<u8>], rng: &mut Rng) {
    let interesting = [0, 1, 0x7f, 0x80, 0xff];
    for _ in 0..=rng.below(6) {
        let at = rng.below(input.len());
        match rng.below(7) {
            0 if !input.is_empty() => input[at] ^= 1 << rng.below(8),
            1 if !input.is_empty() => input[at] = rng.u32() as u8,
            2 if !input.is_empty() => input[at] = interesting[rng.below(interesting.len())],
            3 => input.truncate(at),
            4 => input.extend_from_slice(&rng.bytes(1)),
            5 if at + 4 <= input.len() => {
                let word = [0, 1, u32::MAX, i32::MIN as u32, input.len() as u32][rng.below(5)];
                input[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            _ => {
                let other = &pool[rng.below(pool.len())];
                let from = rng.below(other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
}

fn try_one(input: &[u8]) -> bool {
    let Ok(first) = reading::read(input) else {
        return false;
    };
    let (head, payload) = frame::encode(&first).expect("what decodes encodes");
    let second = reading::read(&[&head[..], &payload[..]].concat()).expect("and decodes again");
    // NaN is not equal to itself; its text is.
    assert_eq!(format!("{first:?}"), format!("{second:?}"));
    true
}

#[test]
fn mutants_never_panic() {
    let from_clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = number("TANDEM_FUZZ_SEED").unwrap_or_else(from_clock);
    let seconds = number("TANDEM_FUZZ_SECONDS").unwrap_or(3);
    println!("fuzz_codec: TANDEM_FUZZ_SEED={seed} TANDEM_FUZZ_SECONDS={seconds}");
    let mut rng = Rng::new(seed);
    let mut pool = corpus();
    pool.iter().for_each(|input| {
        try_one(input);
    });
    for &frame_type in FrameType::ALL {
        pool.push(samples::wire(&samples::frame(frame_type, &mut rng)));
    }
    let start = Instant::now();
    let (mut runs, mut decoded) = (0u64, 0u64);
    while start.elapsed() < Duration::from_secs(seconds) {
        let mut input = pool[rng.below(pool.len())].clone();
        mutate(&mut input, &pool, &mut rng);
        if rng.bool() {
            reading::seal(&mut input);
        }
        runs += 1;
        let result = std::panic::catch_unwind(|| try_one(&input));
        let Ok(accepted) = result else {
            panic!("seed {seed}, run {runs}: panicked on {input:02x?}");
        };
        if accepted {
            decoded += 1;
            let slot = rng.below(POOL_MAX);
            if slot < pool.len() {
                pool[slot] = input;
            } else {
                pool.push(input);
            }
        }
    }
    println!("fuzz_codec: {runs} mutants, {decoded} decoded");
    assert!(decoded > 0, "seed {seed}: no mutant got past the checksum: the fuzzer does not reach");
}
