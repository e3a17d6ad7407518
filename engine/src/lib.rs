//! Synchronous inference: one config-driven decoder, KV pool, kernels, tokenizer, sampling.
