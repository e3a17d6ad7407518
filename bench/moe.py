#!/usr/bin/env python3
"""Makes a mixture of experts of OLMoE-1B-7B's shape with random weights in Q4_0, to measure speed on:
the text is noise, the work is the real model's (6.9 billion parameters, 1.3 active, 3.9 GB).

    bench/moe.py OUT.gguf [--layers 16] [--seed 1]

Shape: allenai/OLMoE-1B-7B-0924, config.json. Codes are uniform, scales such that a product keeps the size of
its input, so activations stay lively and routing spreads over the experts. Needs numpy and gguf
(bench/llama-peer/requirements.txt)."""
import argparse, math
import gguf, numpy as np

HIDDEN, HEADS, EXPERTS, USED, FF, VOCAB, CONTEXT = 2048, 16, 64, 8, 1024, 50304, 4096
BLOCK, BLOCK_BYTES = 32, 18
# Standard deviation of a code, uniform in -8..=7.
SPREAD = math.sqrt((16 * 16 - 1) / 12)


def q4_0(rng, shape):
    """Random blocks for a tensor of `shape` (outermost first): an f16 scale and 32 nibbles each."""
    *outer, k = shape
    blocks = math.prod(outer) * k // BLOCK
    data = rng.integers(0, 256, (blocks, BLOCK_BYTES), dtype=np.uint8)
    data[:, :2] = np.array([1 / (SPREAD * math.sqrt(k))], np.float16).view(np.uint8)
    return data.reshape(*outer, k // BLOCK * BLOCK_BYTES)


def main():
    a = argparse.ArgumentParser()
    a.add_argument("out")
    a.add_argument("--layers", type=int, default=16)
    a.add_argument("--seed", type=int, default=1)
    a = a.parse_args()
    rng = np.random.default_rng(a.seed)
    w = gguf.GGUFWriter(a.out, "olmoe")
    w.add_name(f"random OLMoE, {a.layers} layers, seed {a.seed}")
    w.add_block_count(a.layers)
    w.add_context_length(CONTEXT)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(USED)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("no_vocab")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def quantised(name, *shape):
        w.add_tensor(name, q4_0(rng, shape), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def ones(name, n=HIDDEN):
        w.add_tensor(name, np.ones(n, np.float32))

    quantised("token_embd.weight", VOCAB, HIDDEN)
    quantised("output.weight", VOCAB, HIDDEN)
    ones("output_norm.weight")
    for layer in range(a.layers):
        at = f"blk.{layer}."
        for norm in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            ones(f"{at}{norm}.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            quantised(f"{at}{part}.weight", HIDDEN, HIDDEN)
        gate = rng.standard_normal((EXPERTS, HIDDEN), np.float32) / math.sqrt(HIDDEN)
        w.add_tensor(f"{at}ffn_gate_inp.weight", gate.astype(np.float32))
        for part in ("ffn_gate_exps", "ffn_up_exps"):
            quantised(f"{at}{part}.weight", EXPERTS, FF, HIDDEN)
        quantised(f"{at}ffn_down_exps.weight", EXPERTS, HIDDEN, FF)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file(progress=True)
    w.close()


if __name__ == "__main__":
    main()
