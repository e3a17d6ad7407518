#!/usr/bin/env python3
"""Measures GGUF files with `tandem bench engine` against peers and writes docs/bench.md.

    bench/table.py --tandem target/release/tandem --peer bench/llama-peer/llama-peer [--peer ..] FILE.gguf ..

Run it on a machine that does nothing else. Needs no package beyond Python's own."""
import argparse, datetime, json, os, subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine():
    names = [l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")]
    flags = next(l for l in open("/proc/cpuinfo") if l.startswith("flags")).split()
    best = next((f for f in ("avx512_vnni", "avx512f", "avx2") if f in flags), "no AVX2")
    return f"{len(names)} × {names[0]} ({best})"


def git(*args):
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main():
    a = argparse.ArgumentParser()
    a.add_argument("files", nargs="+")
    a.add_argument("--tandem", default="target/release/tandem")
    a.add_argument("--peer", action="append", default=[])
    a.add_argument("--threads", type=int, action="append", default=[])
    a.add_argument("--rounds", type=int, default=5)
    a.add_argument("--wrap", default="", help="program before each measurement, such as a lock")
    a.add_argument("--out", default=str(ROOT / "docs/bench.md"))
    a = a.parse_args()
    rows, peers, ours, load = [], [], set(), []
    for file in a.files:
        for threads in a.threads or [1, 2]:
            command = [*a.wrap.split(), a.tandem, "bench", "engine", "--model", file, "--threads", str(threads), "--rounds", str(a.rounds)]
            for peer in a.peer:
                command += ["--peer", peer]
            r = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            load.append(os.getloadavg()[0])
            ours.add(r["engine"])
            name = Path(file).stem
            figures = lambda m: [m["prefill_tokens_per_s"], m["decode_tokens_per_s"], *(v["tokens_per_s"] for v in m["verify"])]
            line = lambda who, values, digits: (
                f"| {name} | {threads} | {who} | " + " | ".join(f"{v:.{digits}f}" for v in values) + " |" + " – |" * (4 - len(values)))
            rows.append(line("tandem", figures(r["median"]), 1))
            for peer in r.get("peers", []):
                who = peer["engine"].split(" ")[0]
                if peer["engine"] not in peers:
                    peers.append(peer["engine"])
                ratio = peer["ratio"]
                rows.append(line(who, figures(peer["median"]), 1))
                rows.append(line(f"**tandem / {who}**", [ratio["prefill"], ratio["decode"], *(v["ratio"] for v in ratio["verify"])], 2))
            print(rows[-1], flush=True)
    wrap = "".join(f" --peer {p}" for p in a.peer)
    text = f"""# Speed against other engines

Tokens per second, medians of {a.rounds} rounds; the engines' rounds take turns on the same file, each
engine loaded once and warmed up. Prefill is a prompt of 512 tokens in one call, decode 64 single tokens
behind 32, verify passes of 4 and 8 tokens with logits for each. A ratio above 1: tandem is faster.

- machine: {machine()}, load average up to {max(load):.1f} during the runs
- date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, commit {git("rev-parse", "--short", "HEAD")}
- tandem: {", ".join(sorted(ours))}
- peers: {"; ".join(peers)}
- command: `bench/table.py{wrap} {" ".join(Path(f).name for f in a.files)}`

| file | threads | engine | prefill | decode | verify 4 | verify 8 |
|---|---|---|---|---|---|---|
""" + "\n".join(rows) + "\n"
    Path(a.out).write_text(text)


if __name__ == "__main__":
    main()
