#!/usr/bin/env python3
"""Makes a GGUF file of a known model's shape with random weights, to measure speed on: the text is noise, the
work is that of the real model.

    bench/shapes.py SHAPE OUT.gguf [--layers N] [--experts N] [--seed 1]

- olmoe: allenai/OLMoE-1B-7B-0924, Q4_0; 6.9 billion parameters, 3.9 GB
- deepseek: deepseek-ai/DeepSeek-V2-Lite, Q4_0: latent attention, shared experts; 16 of its 64 experts a layer
  unless told otherwise, for memory: 4.9 billion parameters, 2.8 GB
- minicpm3: openbmb/MiniCPM3-4B, Q4_0: latent attention; 4 billion parameters, 2.4 GB
- gpt-oss: openai/gpt-oss-20b, experts in MXFP4, the rest in Q8_0; 8 of its 32 experts a layer unless told
  otherwise: 6.5 billion parameters, 4.3 GB

Shapes are those of config.json. Codes are uniform, scales such that a product keeps the size of its input, so
activations stay lively and routing spreads over the experts. Needs numpy and gguf
(bench/llama-peer/requirements.txt)."""
import argparse, math
import gguf, numpy as np
from gguf import GGMLQuantizationType as Type

BLOCK = 32
# Deviation of a uniform code of four bits around zero, of one of eight, of E2M1.
SPREADS = {Type.Q4_0: math.sqrt((16 * 16 - 1) / 12), Type.Q8_0: math.sqrt((256 * 256 - 1) / 12), Type.MXFP4: 2.9}


class Model:
    """A GGUF file of random tensors."""

    def __init__(self, a, arch, layers, hidden, ff, heads, kv_heads, eps=1e-5, rope_base=10000.0):
        self.rng, self.layers, self.hidden = np.random.default_rng(a.seed), a.layers or layers, hidden
        self.gguf = gguf.GGUFWriter(a.out, arch)
        self.gguf.add_name(f"random {arch}, {self.layers} layers, seed {a.seed}")
        self.gguf.add_block_count(self.layers)
        self.gguf.add_context_length(4096)
        self.gguf.add_embedding_length(hidden)
        self.gguf.add_feed_forward_length(ff)
        self.gguf.add_head_count(heads)
        self.gguf.add_head_count_kv(kv_heads)
        self.gguf.add_layer_norm_rms_eps(eps)
        self.gguf.add_rope_freq_base(rope_base)
        self.gguf.add_tokenizer_model("no_vocab")

    def quantised(self, name, *shape, type=Type.Q4_0):
        """Random blocks for a tensor of `shape` (outermost first): a scale and 32 codes each."""
        *outer, k = shape
        block_bytes = gguf.GGML_QUANT_SIZES[type][1]
        data = self.rng.integers(0, 256, (math.prod(outer) * k // BLOCK, block_bytes), dtype=np.uint8)
        scale = 1 / (SPREADS[type] * math.sqrt(k))
        if type == Type.MXFP4:
            data[:, 0] = 127 + round(math.log2(scale))
        else:
            data[:, :2] = np.array([scale], np.float16).view(np.uint8)
        self.gguf.add_tensor(f"{name}.weight", data.reshape(*outer, k // BLOCK * block_bytes), raw_dtype=type)

    def norms(self, at, *names):
        for name in names:
            self.numbers(f"{at}{name}.weight", np.ones(self.hidden))

    def numbers(self, name, data):
        self.gguf.add_tensor(name, data.astype(np.float32))

    def router(self, at, experts):
        self.numbers(f"{at}ffn_gate_inp.weight", self.rng.standard_normal((experts, self.hidden)) / math.sqrt(self.hidden))

    def mlp(self, at, suffix, ff, *experts, **type):
        for part in ("gate", "up"):
            self.quantised(f"{at}ffn_{part}{suffix}", *experts, ff, self.hidden, **type)
        self.quantised(f"{at}ffn_down{suffix}", *experts, self.hidden, ff, **type)

    def vocabulary(self, size, tied=False, **type):
        self.gguf.add_vocab_size(size)
        self.quantised("token_embd", size, self.hidden, **type)
        if not tied:
            self.quantised("output", size, self.hidden, **type)
        self.norms("", "output_norm")

    def write(self):
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file(progress=True)
        self.gguf.close()


def olmoe(a):
    hidden, heads, experts, ff = 2048, 16, a.experts or 64, 1024
    m = Model(a, "olmoe", 16, hidden, ff, heads, heads)
    m.gguf.add_expert_count(experts)
    m.gguf.add_expert_used_count(8)
    m.vocabulary(50304)
    for layer in range(m.layers):
        at = f"blk.{layer}."
        m.norms(at, "attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            m.quantised(at + part, hidden, hidden)
        m.router(at, experts)
        m.mlp(at, "_exps", ff, experts)
    return m


def deepseek(a):
    hidden, heads, nope, rope, value, rank = 2048, 16, 128, 64, 128, 512
    experts, shared, ff, dense_ff = a.experts or 16, 2, 1408, 10944
    # Readers tell the form without a low-rank query by the number of layers. The latent is one head of keys.
    m = Model(a, "deepseek2", 27, hidden, dense_ff, heads, 1, eps=1e-6)
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
    for layer in range(m.layers):
        at = f"blk.{layer}."
        m.norms(at, "attn_norm", "ffn_norm")
        m.numbers(f"{at}attn_kv_a_norm.weight", np.ones(rank))
        m.quantised(f"{at}attn_q", heads * (nope + rope), hidden)
        m.quantised(f"{at}attn_kv_a_mqa", rank + rope, hidden)
        m.quantised(f"{at}attn_k_b", heads, rank, nope)
        m.quantised(f"{at}attn_v_b", heads, value, rank)
        m.quantised(f"{at}attn_output", hidden, heads * value)
        if layer == 0:
            m.mlp(at, "", dense_ff)
            continue
        m.router(at, experts)
        m.mlp(at, "_exps", ff, experts)
        m.mlp(at, "_shexp", shared * ff)
    return m


def minicpm3(a):
    hidden, heads, nope, rope, value, rank, q_rank, ff = 2560, 40, 64, 32, 64, 256, 768, 6400
    m = Model(a, "minicpm3", 62, hidden, ff, heads, heads)
    m.gguf.add_q_lora_rank(q_rank)
    m.gguf.add_kv_lora_rank(rank)
    m.gguf.add_key_length(nope + rope)
    m.gguf.add_rope_dimension_count(rope)
    m.vocabulary(73448, tied=True)
    for layer in range(m.layers):
        at = f"blk.{layer}."
        m.norms(at, "attn_norm", "ffn_norm")
        m.numbers(f"{at}attn_q_a_norm.weight", np.ones(q_rank))
        m.numbers(f"{at}attn_kv_a_norm.weight", np.ones(rank))
        m.quantised(f"{at}attn_q_a", q_rank, hidden)
        m.quantised(f"{at}attn_q_b", heads * (nope + rope), q_rank)
        m.quantised(f"{at}attn_kv_a_mqa", rank + rope, hidden)
        m.quantised(f"{at}attn_kv_b", heads * (nope + value), rank)
        m.quantised(f"{at}attn_output", hidden, heads * value)
        m.mlp(at, "", ff)
    return m


def gpt_oss(a):
    hidden, heads, kv_heads, width, experts, ff = 2880, 64, 8, 64, a.experts or 8, 2880
    m = Model(a, "gpt-oss", 24, hidden, ff, heads, kv_heads, rope_base=150000.0)
    m.gguf.add_key_length(width)
    m.gguf.add_value_length(width)
    m.gguf.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    m.gguf.add_rope_scaling_factor(32.0)
    m.gguf.add_rope_scaling_orig_ctx_len(4096)
    m.gguf.add_sliding_window(128)
    m.gguf.add_expert_count(experts)
    m.gguf.add_expert_used_count(4)
    m.gguf.add_expert_feed_forward_length(ff)
    m.vocabulary(201088, type=Type.Q8_0)
    for layer in range(m.layers):
        at = f"blk.{layer}."
        m.norms(at, "attn_norm", "post_attention_norm")
        for part, n in (("attn_q", heads * width), ("attn_k", kv_heads * width), ("attn_v", kv_heads * width)):
            m.quantised(at + part, n, hidden, type=Type.Q8_0)
            m.numbers(f"{at}{part}.bias", np.zeros(n))
        m.quantised(f"{at}attn_output", hidden, heads * width, type=Type.Q8_0)
        m.numbers(f"{at}attn_output.bias", np.zeros(hidden))
        m.numbers(f"{at}attn_sinks.weight", np.zeros(heads))
        m.router(at, experts)
        m.numbers(f"{at}ffn_gate_inp.bias", np.zeros(experts))
        m.mlp(at, "_exps", ff, experts, type=Type.MXFP4)
        for part, n in (("gate", ff), ("up", ff), ("down", hidden)):
            m.numbers(f"{at}ffn_{part}_exps.bias", np.zeros((experts, n)))
    return m


SHAPES = {"olmoe": olmoe, "deepseek": deepseek, "minicpm3": minicpm3, "gpt-oss": gpt_oss}


def main():
    a = argparse.ArgumentParser()
    a.add_argument("shape", choices=SHAPES)
    a.add_argument("out")
    a.add_argument("--layers", type=int)
    a.add_argument("--experts", type=int)
    a.add_argument("--seed", type=int, default=1)
    a = a.parse_args()
    SHAPES[a.shape](a).write()


if __name__ == "__main__":
    main()
