#!/usr/bin/env python3
"""Makes a mixture of experts with random weights in Q4_0, to measure speed on: the text is noise, the work is
that of a real model's shape.

    bench/moe.py OUT.gguf [--shape olmoe|deepseek] [--layers N] [--experts N] [--seed 1]

olmoe: allenai/OLMoE-1B-7B-0924 (6.9 billion parameters, 1.3 active, 3.9 GB). deepseek: deepseek-ai/DeepSeek-V2-Lite,
latent attention and shared experts, with 16 of its 64 experts a layer by default, for memory (4.9 billion
parameters, 2.4 active, 2.8 GB). Shapes are those of config.json. Codes are uniform, scales such that a product
keeps the size of its input, so activations stay lively and routing spreads over the experts. Needs numpy and gguf
(bench/llama-peer/requirements.txt)."""
import argparse, math
import gguf, numpy as np

BLOCK, BLOCK_BYTES = 32, 18
# Standard deviation of a code, uniform in -8..=7.
SPREAD = math.sqrt((16 * 16 - 1) / 12)
HIDDEN = 2048


class Model:
    """A GGUF file of random tensors."""

    def __init__(self, path, arch, layers, seed):
        self.rng = np.random.default_rng(seed)
        self.gguf = gguf.GGUFWriter(path, arch)
        self.gguf.add_name(f"random {arch}, {layers} layers, seed {seed}")
        self.gguf.add_block_count(layers)
        self.gguf.add_context_length(4096)
        self.gguf.add_embedding_length(HIDDEN)
        self.gguf.add_rope_freq_base(10000.0)
        self.gguf.add_tokenizer_model("no_vocab")
        self.gguf.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def quantised(self, name, *shape):
        """Random blocks for a tensor of `shape` (outermost first): an f16 scale and 32 nibbles each."""
        *outer, k = shape
        data = self.rng.integers(0, 256, (math.prod(outer) * k // BLOCK, BLOCK_BYTES), dtype=np.uint8)
        data[:, :2] = np.array([1 / (SPREAD * math.sqrt(k))], np.float16).view(np.uint8)
        data = data.reshape(*outer, k // BLOCK * BLOCK_BYTES)
        self.gguf.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def ones(self, name, n=HIDDEN):
        self.gguf.add_tensor(f"{name}.weight", np.ones(n, np.float32))

    def router(self, name, experts):
        gate = self.rng.standard_normal((experts, HIDDEN), np.float32) / math.sqrt(HIDDEN)
        self.gguf.add_tensor(f"{name}.weight", gate.astype(np.float32))

    def mlp(self, at, suffix, ff, *experts):
        for part in ("gate", "up"):
            self.quantised(f"{at}ffn_{part}{suffix}", *experts, ff, HIDDEN)
        self.quantised(f"{at}ffn_down{suffix}", *experts, HIDDEN, ff)

    def vocabulary(self, size):
        self.gguf.add_vocab_size(size)
        self.quantised("token_embd", size, HIDDEN)
        self.quantised("output", size, HIDDEN)
        self.ones("output_norm")

    def write(self):
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file(progress=True)
        self.gguf.close()


def olmoe(a):
    heads, experts, ff = 16, a.experts or 64, 1024
    layers = a.layers or 16
    m = Model(a.out, "olmoe", layers, a.seed)
    m.gguf.add_feed_forward_length(ff)
    m.gguf.add_head_count(heads)
    m.gguf.add_head_count_kv(heads)
    m.gguf.add_layer_norm_rms_eps(1e-5)
    m.gguf.add_expert_count(experts)
    m.gguf.add_expert_used_count(8)
    m.vocabulary(50304)
    for layer in range(layers):
        at = f"blk.{layer}."
        for norm in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            m.ones(at + norm)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            m.quantised(at + part, HIDDEN, HIDDEN)
        m.router(f"{at}ffn_gate_inp", experts)
        m.mlp(at, "_exps", ff, experts)
    return m


def deepseek(a):
    heads, nope, rope, value, rank = 16, 128, 64, 128, 512
    experts, shared, ff, dense_ff = a.experts or 16, 2, 1408, 10944
    # Readers tell the form without a low-rank query by the number of layers.
    layers = a.layers or 27
    m = Model(a.out, "deepseek2", layers, a.seed)
    m.gguf.add_feed_forward_length(dense_ff)
    m.gguf.add_head_count(heads)
    # The latent is one head of keys.
    m.gguf.add_head_count_kv(1)
    m.gguf.add_layer_norm_rms_eps(1e-6)
    m.gguf.add_leading_dense_block_count(1)
    m.gguf.add_kv_lora_rank(rank)
    m.gguf.add_key_length(rank + rope)
    m.gguf.add_value_length(rank)
    m.gguf.add_key_length_mla(nope + rope)
    m.gguf.add_value_length_mla(value)
    m.gguf.add_rope_dimension_count(rope)
    m.gguf.add_expert_count(experts)
    m.gguf.add_expert_used_count(6)
    m.gguf.add_expert_shared_count(shared)
    m.gguf.add_expert_feed_forward_length(ff)
    m.gguf.add_expert_weights_scale(1.0)
    m.gguf.add_expert_weights_norm(False)
    m.gguf.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    m.vocabulary(102400)
    for layer in range(layers):
        at = f"blk.{layer}."
        m.ones(f"{at}attn_norm")
        m.ones(f"{at}ffn_norm")
        m.quantised(f"{at}attn_q", heads * (nope + rope), HIDDEN)
        m.quantised(f"{at}attn_kv_a_mqa", rank + rope, HIDDEN)
        m.ones(f"{at}attn_kv_a_norm", rank)
        m.quantised(f"{at}attn_k_b", heads, rank, nope)
        m.quantised(f"{at}attn_v_b", heads, value, rank)
        m.quantised(f"{at}attn_output", HIDDEN, heads * value)
        if layer == 0:
            m.mlp(at, "", dense_ff)
            continue
        m.router(f"{at}ffn_gate_inp", experts)
        m.mlp(at, "_exps", ff, experts)
        m.mlp(at, "_shexp", shared * ff)
    return m


SHAPES = {"olmoe": olmoe, "deepseek": deepseek}


def main():
    a = argparse.ArgumentParser()
    a.add_argument("out")
    a.add_argument("--shape", choices=SHAPES, default="olmoe")
    a.add_argument("--layers", type=int)
    a.add_argument("--experts", type=int)
    a.add_argument("--seed", type=int, default=1)
    a = a.parse_args()
    SHAPES[a.shape](a).write()


if __name__ == "__main__":
    main()
