//! How much memory the machine has left, and how much KV state of a model fits into it.

use tandem_proto::limits::{KV_BLOCK_TOKENS, SESSION_TOKENS_MAX};

use crate::checkpoint::spec::DecoderSpec;
use crate::kv::{POOL_BLOCKS_MAX, POOL_NUMBERS_MAX};

/// Share of the free memory that KV state may take: the rest is for activations, the system and
/// other processes.
const KV_SHARE: f64 = 0.5;
/// Fewest blocks of a pool, whatever the memory: below this not even one short chat fits.
const BLOCKS_MIN: usize = 64;

/// Memory that can be had without swapping, bytes: what the system says, or what the process's
/// control group leaves of it. None where neither can be read.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let system = kilobytes("/proc/meminfo", "MemAvailable:")?;
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).unwrap_or_default();
    let group = group_available(&read("memory.max"), &read("memory.current"), &read("memory.stat"));
    Some(group.map_or(system, |group| system.min(group)))
}

/// Most memory that this process has held at a time, bytes. None where the system does not say.
#[must_use]
pub fn peak_bytes() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// The figure behind `name` in a file of the kernel, bytes.
fn kilobytes(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().split(' ').next()?.parse::<u64>().ok()?.saturating_mul(1024))
}

/// What a control group leaves, from its files `memory.max`, `memory.current` and `memory.stat`; none
/// without a bound. Of the memory it counts as used, pages of files that were not touched lately are
/// given up as soon as others need them.
fn group_available(max: &str, current: &str, stat: &str) -> Option<u64> {
    let max = max.trim().parse::<u64>().ok()?;
    let used = current.trim().parse::<u64>().unwrap_or(0);
    let cache = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok());
    Some(max.saturating_sub(used.saturating_sub(cache.unwrap_or(0))))
}

/// Blocks for `sequences` whole contexts, or as many as fit into the share of `available` bytes that
/// KV state may take.
#[must_use]
pub fn kv_blocks(spec: &DecoderSpec, sequences: usize, available: Option<u64>) -> usize {
    let context = spec.context_tokens.min(SESSION_TOKENS_MAX);
    let wanted = context.div_ceil(KV_BLOCK_TOKENS).saturating_mul(sequences.max(1));
    let block_bytes = spec.kv_token_bytes().max(1) * KV_BLOCK_TOKENS as u64;
    let fits = available.map_or(usize::MAX, |bytes| (bytes as f64 * KV_SHARE / block_bytes as f64) as usize);
    let largest = POOL_BLOCKS_MAX.min(POOL_NUMBERS_MAX / (block_bytes as usize / size_of::<f32>()).max(1));
    wanted.min(fits).max(BLOCKS_MIN).min(largest)
}

/// Blocks that take `mib` MiB.
#[must_use]
pub fn blocks_of_mib(spec: &DecoderSpec, mib: u64) -> usize {
    let block_bytes = spec.kv_token_bytes().max(1) * KV_BLOCK_TOKENS as u64;
    usize::try_from(mib.saturating_mul(1 << 20) / block_bytes).unwrap_or(usize::MAX)
}

/// Longest sequence of a model whose pool has `blocks` blocks, tokens.
#[must_use]
pub fn context_tokens(spec: &DecoderSpec, blocks: usize) -> usize {
    spec.context_tokens.min(SESSION_TOKENS_MAX).min(blocks.saturating_mul(KV_BLOCK_TOKENS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(context: usize) -> DecoderSpec {
        let config = format!(
            r#"{{"model_type":"llama","num_hidden_layers":2,"hidden_size":64,"num_attention_heads":4,
            "num_key_value_heads":2,"intermediate_size":64,"vocab_size":32,"rms_norm_eps":1e-5,
            "max_position_embeddings":{context}}}"#
        );
        DecoderSpec::from_hf(config.as_bytes()).expect("a spec")
    }

    #[test]
    fn pools_follow_the_context_until_memory_ends() {
        let spec = spec(4096);
        // 2 layers of 2 · 2 heads of 16 numbers: 512 bytes a token, 16 KiB a block.
        assert_eq!(spec.kv_token_bytes(), 512);
        assert_eq!(kv_blocks(&spec, 4, None), 4 * 4096 / 32);
        assert_eq!(kv_blocks(&spec, 4, Some(200 * 2 * 16 * 1024)), 200);
        assert_eq!(kv_blocks(&spec, 4, Some(0)), BLOCKS_MIN);
        assert_eq!([0, 1, 3].map(|mib| blocks_of_mib(&spec, mib)), [0, 64, 192]);
        assert_eq!(context_tokens(&spec, 64), 2048);
        assert_eq!(context_tokens(&spec, 1024), 4096);
        assert_eq!(context_tokens(&self::spec(1 << 20), usize::MAX), SESSION_TOKENS_MAX);
        assert!(kv_blocks(&self::spec(1 << 20), usize::MAX, None) <= POOL_BLOCKS_MAX);
    }

    #[test]
    fn files_in_the_cache_do_not_count_as_used() {
        let stat = "anon 4096\nfile 9000\ninactive_anon 7\nactive_file 1000\ninactive_file 8000\nslab 5\n";
        let table = [
            (("max\n", "10000\n", stat), None),
            (("", "", ""), None),
            (("20000\n", "10000\n", stat), Some(18_000)),
            // Files of older kernels, or none.
            (("20000\n", "10000\n", "anon 4096\n"), Some(10_000)),
            (("20000\n", "10000\n", "inactive_file many\n"), Some(10_000)),
            (("20000\n", "", ""), Some(20_000)),
            // Read at different moments, the numbers need not fit together.
            (("20000\n", "5000\n", stat), Some(20_000)),
            (("20000\n", "30000\n", "inactive_file 0\n"), Some(0)),
        ];
        for ((max, current, stat), left) in table {
            assert_eq!(group_available(max, current, stat), left, "{max:?} {current:?} {stat:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_memory() {
        assert!(available_bytes().is_some_and(|bytes| bytes > 1 << 20));
        assert!(peak_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
