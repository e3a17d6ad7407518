#!/usr/bin/env python3
"""Makes tokenizers.json: what llama.cpp makes of the same texts under every name of splitting rules, and with
SentencePiece vocabularies.

    pip install llama-cpp-python gguf tokenizers sentencepiece
    make_tokenizers.py tokenizers.json

U+3000 is left out: before letters, llama.cpp and the models' own tokenizer.json split it differently under the
DeepSeek-LLM and DeepSeek-Coder rules, and this engine follows the latter. So it does with combining marks under the
rules of GPT-4o and Tekken (their expressions have \\p{M}, llama.cpp's do not): texts with them have no ids there.

The vocabularies are trained here on the texts themselves, across word boundaries, so that every rule of
where a word may end shows in the ids."""
import json, sys, tempfile, unicodedata
from pathlib import Path
import gguf
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from llama_cpp import Llama

NAMES = [
    "default", "gpt-2", "smollm", "starcoder", "llama-bpe", "dbrx", "qwen2", "deepseek-r1-qwen", "qwen35", "gpt-4o", "tekken",
    "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "command-r", "olmo", "refact", "stablelm2", "llama4",
    "falcon3", "hunyuan", "exaone4", "mpt",
]
TEXTS = [
    "Hello world\n\n  12345 it's 3.14, naïve café — 東京 🙂\t end ",
    "don't STOP'S I'LL we'Ve 007 x2y\r\n\r\n\tdone",
    "    indented = {'a': [1, 22, 333, 4444], \"b\": a<b && c>=d || !e}\n",
    "Ünïcödé ½ ² ٣٤٥ \u00a0nbsp wide 한국어 ภาษาไทย ελληνικά Кириллица",
    "CamelCaseWORDSAndHTTPServer2go snake_case_42 $9.99 50% #tag @user ~/path/to/file.txt https://a.b/c?d=e&f=1",
    "<|im_start|>user\nspecial <|im_end|>tokens<|im_end|> in text  <|im_start|>",
    "कमल हिन्दी नमस्ते", "  leading and trailing   \n \n\n  x", "a", "", " ", "\n", "   ", "e\u0301 cafe\u0301 👩‍👩‍👧‍👦 🇩🇪 ｆｕｌｌ１２３ 、。「」",
]
MARKS_DIFFER = ["gpt-4o", "llama4", "tekken"]
CONTROL = ["<|im_start|>", "<|im_end|>"]


def gguf_with(fill):
    path = tempfile.mktemp(suffix=".gguf")
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(1); w.add_context_length(64); w.add_embedding_length(32); w.add_feed_forward_length(32)
    w.add_head_count(1); w.add_layer_norm_rms_eps(1e-5); w.add_rope_dimension_count(32)
    fill(w)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    llama = Llama(path, vocab_only=True, verbose=False)
    Path(path).unlink()
    return llama


def ids(llama):
    return [llama.tokenize(t.encode(), add_bos=False, special=True) for t in TEXTS], llama.tokenize(b"a b", add_bos=True, special=True)


def bpe():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), max_token_length=6, show_progress=False)
    t.train_from_iterator([c for t in TEXTS for c in (t, t[1:], t[:-2], t.replace(" ", "  "))], trainer)
    model = json.loads(t.to_str())["model"]
    tokens = [w for w, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return tokens + CONTROL, [" ".join(pair) for pair in model["merges"]]


def main(out):
    tokens, merges = bpe()
    golden = {"texts": TEXTS, "bpe": {"tokens": tokens, "merges": merges, "names": {}}, "spm": []}
    for name in NAMES:
        def fill(w):
            w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre(name)
            w.add_token_list(tokens); w.add_token_merges(merges)
            w.add_token_types([1] * (len(tokens) - 2) + [3, 3])
            w.add_bos_token_id(len(tokens) - 2); w.add_eos_token_id(len(tokens) - 1)
        rows, whole = ids(gguf_with(fill))
        if name in MARKS_DIFFER:
            rows = [None if any(unicodedata.category(c)[0] == "M" for c in t) else row for t, row in zip(TEXTS, rows)]
        golden["bpe"]["names"][name] = {"ids": rows, "whole": whole}

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(TEXTS * 4))
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{folder}/m", vocab_size=460, model_type="bpe", byte_fallback=True,
            character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=True, user_defined_symbols=["<user>", "\t\t"], control_symbols=CONTROL, minloglevel=2)
        sp = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")
        pieces = [sp.id_to_piece(i) for i in range(len(sp))]
        scores = [sp.get_score(i) for i in range(len(sp))]
        types = [2 if sp.is_unknown(i) else 6 if sp.is_byte(i) else 3 if sp.is_control(i) or pieces[i] in CONTROL else 4 if pieces[i] in ("<user>", "\t\t") else 1 for i in range(len(sp))]
    for prefix in (True, False):
        def fill(w):
            w.add_tokenizer_model("llama"); w.add_token_list(pieces); w.add_token_scores(scores); w.add_token_types(types)
            w.add_bos_token_id(sp.bos_id()); w.add_eos_token_id(sp.eos_id()); w.add_add_space_prefix(prefix)
        llama = gguf_with(fill)
        rows, whole = ids(llama)
        golden["spm"].append({"prefix": prefix, "ids": rows, "whole": whole})
    golden["pieces"] = {"tokens": pieces, "scores": scores, "types": types, "bos": sp.bos_id(), "eos": sp.eos_id()}
    Path(out).write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")


main(sys.argv[1])
