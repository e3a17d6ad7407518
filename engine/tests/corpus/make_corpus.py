#!/usr/bin/env python3
"""Makes gguf/: small headers that are whole, absurd or contradictory, for `fuzz_gguf` to start from.

    make_corpus.py gguf"""
import struct, sys
from pathlib import Path

U32, F32, BOOL, STR, ARR, U64 = 4, 6, 7, 8, 9, 10
s = lambda t: struct.pack("<Q", len(t.encode())) + t.encode()
u32 = lambda n: struct.pack("<I", n)
entry = lambda key, ty, value: s(key) + u32(ty) + value
arr = lambda ty, items: u32(ty) + struct.pack("<Q", len(items)) + b"".join(items)
text = lambda key, value: entry(key, STR, s(value))


def header(entries, tensors=b"", count=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, count, len(entries)) + b"".join(entries) + tensors


SPM = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"] + [f"<0x{n:02X}>" for n in range(256)]
spm = [text("tokenizer.ggml.model", "llama"), entry("tokenizer.ggml.tokens", ARR, arr(STR, [s(t) for t in SPM])),
       entry("tokenizer.ggml.scores", ARR, arr(F32, [struct.pack("<f", -n) for n in range(len(SPM))])),
       entry("tokenizer.ggml.token_type", ARR, arr(5, [struct.pack("<i", 2 if n == 0 else 3 if n < 3 else 1 if n < 9 else 6) for n in range(len(SPM))])),
       entry("tokenizer.ggml.add_space_prefix", BOOL, b"\1"), entry("tokenizer.ggml.bos_token_id", U32, u32(1))]
bpe = [text("general.architecture", "llama"), text("tokenizer.ggml.model", "gpt2"), text("tokenizer.ggml.pre", "llama-bpe"),
       entry("tokenizer.ggml.tokens", ARR, arr(STR, [s(t) for t in ("a", "b", "ab", "<|eot_id|>")])),
       entry("tokenizer.ggml.merges", ARR, arr(STR, [s("a b")])), entry("tokenizer.ggml.token_type", ARR, arr(5, [u32(n) for n in (1, 1, 1, 3)])),
       text("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")]
deep = b"".join(u32(ARR) + struct.pack("<Q", 1) for _ in range(50))
files = {
    "empty": b"", "magic": b"GGUF", "nothing": header([]), "v2": header([text("general.architecture", "llama")], version=2),
    "pieces": header(spm), "merges": header(bpe), "split": header(bpe + [entry("split.count", 2, struct.pack("<H", 3)), entry("split.no", 2, struct.pack("<H", 0))]),
    "counts": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63), "array": header([entry("a", ARR, u32(U64) + struct.pack("<Q", 2**61))]),
    "nested": header([entry("a", ARR, deep)]), "alignment": header([entry("general.alignment", U32, u32(0))]),
    "tensor": header(bpe, s("token_embd.weight") + u32(2) + struct.pack("<QQIQ", 2**40, 2**40, 0, 0), 1),
    "scores": header(spm[:2] + spm[3:]),
}
for name, data in files.items():
    (Path(sys.argv[1]) / name).write_bytes(data)
