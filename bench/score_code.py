#!/usr/bin/env python3
"""Score command of `tandem lab eval` for HumanEval-like rows: 1 if the reply passes the row's test, else 0.

Runs what a model wrote: call it inside a sandbox."""
import json
import re
import subprocess
import sys

SECONDS_MAX = 10

asked = json.load(sys.stdin)
row, reply = asked["row"], asked["reply"]
block = re.search(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", reply, re.S)
code = block.group(1) if block else reply
if f"def {row['entry_point']}" not in code:
    # A completion: the body alone.
    code = row["prompt"] + code
program = f"{row['prompt']}\n    pass\n\n{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
try:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=SECONDS_MAX)
    print(1 if done.returncode == 0 else 0)
except subprocess.TimeoutExpired:
    print(0)
