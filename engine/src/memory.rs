//! How much memory the machine has left, and how much KV state of a model fits into it.

use tandem_proto::limits::{KV_BLOCK_TOKENS, SESSION_TOKENS_MAX};

use crate::kv::{POOL_BLOCKS_MAX, POOL_NUMBERS_MAX};
use crate::spec::DecoderSpec;

/// Share of the free memory that KV state may take: the rest is for activations, the system and
/// whoever else runs here.
const KV_SHARE: f64 = 0.5;
/// Fewest blocks of a pool, whatever the memory: below this not even one short chat fits.
const BLOCKS_MIN: usize = 64;

/// Memory that can be had without swapping, bytes: what the system says, or what the process's
/// control group leaves of it. None where neither can be read.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let system = line.trim().split(' ').next()?.parse::<u64>().ok()?.saturating_mul(1024);
    let number = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse().ok()
    };
    let group = number("memory.max").map(|max| max.saturating_sub(number("memory.current").unwrap_or(0)));
    Some(group.map_or(system, |group| system.min(group)))
}

/// KV state of one token over all layers, bytes.
#[must_use]
pub fn kv_token_bytes(spec: &DecoderSpec) -> u64 {
    (spec.kv_width() * spec.layers * size_of::<f32>()) as u64
}

/// Blocks for `sequences` whole contexts, or as many as fit into the share of `available` bytes that
/// KV state may take.
#[must_use]
pub fn kv_blocks(spec: &DecoderSpec, sequences: usize, available: Option<u64>) -> usize {
    let context = spec.context_tokens.min(SESSION_TOKENS_MAX);
    let wanted = context.div_ceil(KV_BLOCK_TOKENS).saturating_mul(sequences.max(1));
    let block_bytes = kv_token_bytes(spec).max(1) * KV_BLOCK_TOKENS as u64;
    let fits = available.map_or(usize::MAX, |bytes| (bytes as f64 * KV_SHARE / block_bytes as f64) as usize);
    let largest = POOL_BLOCKS_MAX.min(POOL_NUMBERS_MAX / (block_bytes as usize / size_of::<f32>()).max(1));
    wanted.min(fits).max(BLOCKS_MIN).min(largest)
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
        assert_eq!(kv_token_bytes(&spec), 512);
        assert_eq!(kv_blocks(&spec, 4, None), 4 * 4096 / 32);
        assert_eq!(kv_blocks(&spec, 4, Some(200 * 2 * 16 * 1024)), 200);
        assert_eq!(kv_blocks(&spec, 4, Some(0)), BLOCKS_MIN);
        assert_eq!(context_tokens(&spec, 64), 2048);
        assert_eq!(context_tokens(&spec, 1024), 4096);
        assert_eq!(context_tokens(&self::spec(1 << 20), usize::MAX), SESSION_TOKENS_MAX);
        assert!(kv_blocks(&self::spec(1 << 20), usize::MAX, None) <= POOL_BLOCKS_MAX);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_memory() {
        assert!(available_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
