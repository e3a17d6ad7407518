#!/usr/bin/env python3
"""Makes tiny-llama-f16.gguf, the same model in two parts, and tiny-llama.json: what llama.cpp says with it.

    pip install llama-cpp-python gguf numpy tokenizers
    make_tiny_llama.py FOLDER                  # this folder

The weights are seeded noise, so the text is noise too; it is the same noise in every engine that reads
the file rightly. Vocabulary: the 256 bytes, merges of one English sentence, three control tokens."""
import json, sys
from pathlib import Path
import numpy as np
import gguf

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LAYERS, WIDTH, HEADS, KV_HEADS, INNER, CONTEXT, TOKENS = 2, 32, 4, 2, 64, 256, 16
MARGIN = 0.06  # engines round differently; closer choices would tell nothing
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPTS = ["What is the capital of Peru?", "Grüße, 東京 🙂 12345", "a"]
TEXT = "the edge writes most tokens and the cloud decides the hard ones; when the cloud is away the edge answers alone."


def vocabulary():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=300, initial_alphabet=sorted(alphabet), show_progress=False))
    model = json.loads(t.to_str())["model"]
    tokens = [w for w, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return tokens, [" ".join(pair) for pair in model["merges"]]


def write(path, seed, split_max_tensors=0):
    rng = np.random.default_rng(seed)
    tokens, merges = vocabulary()
    tokens += CONTROL
    w = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    w.add_name("tiny-llama")
    w.add_license("Apache-2.0")
    w.add_block_count(LAYERS); w.add_context_length(CONTEXT); w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(INNER); w.add_head_count(HEADS); w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5); w.add_rope_freq_base(10000.0); w.add_rope_dimension_count(WIDTH // HEADS)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens); w.add_token_merges(merges)
    w.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    w.add_bos_token_id(len(tokens) - 2); w.add_eos_token_id(len(tokens) - 1)
    w.add_add_bos_token(False)
    w.add_chat_template(TEMPLATE)

    def matrix(name, rows, columns, scale):
        m = (rng.standard_normal((rows, columns)) * scale).astype(np.float32)
        w.add_tensor(name, m.astype(np.float16))

    def norm(name):
        w.add_tensor(name, (1 + 0.1 * rng.standard_normal(WIDTH)).astype(np.float32))

    head = WIDTH // HEADS
    matrix("token_embd.weight", len(tokens), WIDTH, 1.0)
    for layer in range(LAYERS):
        p = f"blk.{layer}."
        norm(p + "attn_norm.weight")
        matrix(p + "attn_q.weight", WIDTH, WIDTH, 0.35)
        matrix(p + "attn_k.weight", head * KV_HEADS, WIDTH, 0.35)
        matrix(p + "attn_v.weight", head * KV_HEADS, WIDTH, 0.35)
        matrix(p + "attn_output.weight", WIDTH, WIDTH, 0.35)
        norm(p + "ffn_norm.weight")
        matrix(p + "ffn_gate.weight", INNER, WIDTH, 0.35)
        matrix(p + "ffn_up.weight", INNER, WIDTH, 0.35)
        matrix(p + "ffn_down.weight", WIDTH, INNER, 0.2)
    norm("output_norm.weight")
    matrix("output.weight", len(tokens), WIDTH, 0.4)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def answers(path):
    from llama_cpp import Llama
    llama = Llama(str(path), n_ctx=CONTEXT, logits_all=True, verbose=False, n_threads=1)
    rows = []
    for prompt in PROMPTS:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        llama.reset()
        llama.eval(ids)
        greedy, margins = [], []
        for _ in range(TOKENS):
            logits = np.array(llama.scores[llama.n_tokens - 1])
            first, second = np.argsort(-logits)[:2]
            greedy.append(int(first)); margins.append(round(float(logits[first] - logits[second]), 4))
            llama.eval([int(first)])
        rows.append({"prompt": prompt, "ids": ids, "greedy": greedy, "margin": min(margins)})
    return {"end": llama.token_eos(), "prompts": rows}


def main(folder):
    path = folder / "tiny-llama-f16.gguf"
    for seed in range(1000):
        write(path, seed)
        golden = answers(path)
        ended = any(golden["end"] in row["greedy"] for row in golden["prompts"])
        if not ended and all(row["margin"] > MARGIN for row in golden["prompts"]):
            break
    for old in folder.glob("tiny-llama-split-*.gguf"):
        old.unlink()
    write(folder / "tiny-llama-split.gguf", seed, split_max_tensors=12)
    golden["seed"] = seed
    (folder / "tiny-llama.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


main(Path(sys.argv[1]))
