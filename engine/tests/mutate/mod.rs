//! Bounded, seeded mutation of inputs, shared by the fuzz targets. `TANDEM_FUZZ_SECONDS` (default 3) bounds a
//! run, `TANDEM_FUZZ_SEED` repeats one; the seed is printed.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Inputs kept for further mutation.
const POOL_MAX: usize = 256;
/// Virtual memory that a run may take beyond what it began with, KiB: far more than any honest input here
/// needs, far less than an absurd count asks for.
const GROWTH_KIB_MAX: u64 = 1 << 20;

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number under `n`; 0 for 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn mutate(input: &mut Vec<u8>, pool: &[Vec<u8>], r: &mut Random) {
    for _ in 0..=r.below(6) {
        // Headers come first and matter most.
        let limit = if r.below(4) == 0 { input.len() } else { input.len().min(8 << 10) };
        let at = r.below(limit);
        match r.below(8) {
            0 if at < input.len() => input[at] ^= 1 << r.below(8),
            1 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'9'][r.below(8)],
            2 => input.truncate(at),
            3 => {
                let extreme = [0, 1, u64::MAX, 1 << 32, 1 << 62, 1 << 63, 255, input.len() as u64][r.below(8)];
                let width = [1, 2, 4, 8][r.below(4)];
                let end = (at + width).min(input.len());
                let bytes = extreme.to_le_bytes();
                input[at..end].copy_from_slice(&bytes[..end - at]);
            }
            4 => {
                let n = r.below(64).min(input.len() - at);
                input.drain(at..at + n);
            }
            5 => {
                let from = r.below(limit);
                let n = r.below(64).min(input.len() - from);
                let piece = input[from..from + n].to_vec();
                input.splice(at..at, piece);
            }
            6 => {
                let other = &pool[r.below(pool.len())];
                let from = r.below(other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => input.extend(r.next().to_le_bytes()),
        }
    }
}

/// Peak of this process's virtual memory, KiB; none where that cannot be read.
fn peak_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"))?;
    line.trim().split(' ').next()?.parse().ok()
}

/// Feeds mutants of `pool` to `accepts` until the time is over. Fails if one panics, if memory grows past
/// what the inputs justify, or if none is ever accepted.
pub(crate) fn fuzz(name: &str, mut pool: Vec<Vec<u8>>, accepts: impl Fn(&[u8]) -> bool + std::panic::RefUnwindSafe) {
    let from_clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    let seed = number("TANDEM_FUZZ_SEED").unwrap_or_else(from_clock);
    let seconds = number("TANDEM_FUZZ_SECONDS").unwrap_or(3);
    println!("{name}: TANDEM_FUZZ_SEED={seed} TANDEM_FUZZ_SECONDS={seconds}");
    let mut r = Random(seed);
    for input in &pool {
        accepts(input);
    }
    let (before, start) = (peak_kib(), Instant::now());
    let (mut runs, mut accepted) = (0u64, 0u64);
    while start.elapsed() < Duration::from_secs(seconds) {
        let mut input = pool[r.below(pool.len())].clone();
        mutate(&mut input, &pool, &mut r);
        runs += 1;
        let Ok(taken) = std::panic::catch_unwind(|| accepts(&input)) else {
            let path = std::env::temp_dir().join(format!("{name}-{seed}-{runs}"));
            let _ = std::fs::write(&path, &input);
            panic!("{name}: seed {seed}, run {runs}: panicked on {} bytes, kept in {}", input.len(), path.display());
        };
        if taken {
            accepted += 1;
            let slot = r.below(POOL_MAX);
            if slot < pool.len() {
                pool[slot] = input;
            } else {
                pool.push(input);
            }
        }
    }
    println!("{name}: {runs} mutants, {accepted} accepted");
    assert!(accepted > 0, "{name}: seed {seed}: no mutant is accepted: the fuzzer does not reach");
    if let (Some(before), Some(after)) = (before, peak_kib()) {
        assert!(after - before < GROWTH_KIB_MAX, "{name}: seed {seed}: memory grew by {} KiB", after - before);
    }
}
