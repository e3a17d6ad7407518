#!/usr/bin/env python3
"""Measures GGUF files with `tandem bench engine` against peers and prints a report for docs/bench.md.

    bench/table.py --tandem target/release/tandem --peer bench/llama-peer/llama-peer [--peer ..] FILE.gguf ..

Run it on a machine that does nothing else. Needs no package beyond Python's own."""
import argparse, datetime, json, os, platform, shlex, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine():
    info = [line.split(":", 1) for line in open("/proc/cpuinfo") if ":" in line]
    values = lambda *names: [value.strip() for name, value in info if name.strip() in names]
    # Only x86 names its model; elsewhere the architecture must do.
    name = (values("model name") or [platform.machine()])[0]
    features = (values("flags", "Features") or [""])[0].split()
    best = next((f for f in ("avx512_vnni", "avx512f", "avx2", "i8mm", "asimddp", "asimd") if f in features), "no SIMD known here")
    return f"{len(values('processor'))} × {name} ({best})"


def commit():
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout.strip()


def main():
    a = argparse.ArgumentParser()
    a.add_argument("files", nargs="+")
    a.add_argument("--tandem", default="target/release/tandem")
    a.add_argument("--peer", action="append", default=[])
    a.add_argument("--threads", type=int, action="append", default=[])
    a.add_argument("--rounds", type=int, default=5)
    a.add_argument("--batch", default="", help="batches to decode, such as 1,4,16")
    a.add_argument("--wrap", default="", help="program before each measurement, such as a lock")
    a.add_argument("--out", help="file for the report; standard output if left out")
    a = a.parse_args()
    rows, peers, ours, load, options = [], [], set(), [], None
    for file in a.files:
        for threads in a.threads or [1, 2]:
            command = [*shlex.split(a.wrap), a.tandem, "bench", "engine", "--model", file, "--threads", str(threads), "--rounds", str(a.rounds)]
            if a.batch:
                command += ["--batch", a.batch]
            for peer in a.peer:
                command += ["--peer", peer]
            # Before the measurement, which is a load itself.
            load.append(os.getloadavg()[0])
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if ran.returncode != 0:
                sys.exit(f"table.py: {shlex.join(command)} ended with {ran.returncode}")
            r = json.loads(ran.stdout)
            ours.add(r["engine"])
            used = (r["prompt_tokens"], r["decode_tokens"], tuple(r["verify_tokens"]), tuple(r["batch_sequences"]))
            if options not in (None, used):
                sys.exit(f"table.py: {file} was measured with {used}, the files before with {options}; make a table for each")
            options = used
            name = Path(file).stem
            figures = lambda m: [m["prefill_tokens_per_s"], m["decode_tokens_per_s"], *(v["tokens_per_s"] for v in m["verify"] + m.get("batch", []))]
            columns = 2 + len(r["verify_tokens"]) + len(r["batch_sequences"])
            line = lambda who, values, digits: (
                f"| {name} | {threads} | {who} | " + " | ".join(f"{v:.{digits}f}" for v in values) + " |" + " – |" * (columns - len(values)))
            rows.append(line("tandem", figures(r["median"]), 1))
            for peer in r.get("peers", []):
                who = peer["engine"].split(" ")[0]
                if peer["engine"] not in peers:
                    peers.append(peer["engine"])
                ratio = peer["ratio"]
                rows.append(line(who, figures(peer["median"]), 1))
                rows.append(line(f"**tandem / {who}**", [ratio["prefill"], ratio["decode"], *(v["ratio"] for v in ratio["verify"] + ratio.get("batch", []))], 2))
            print(rows[-1], file=sys.stderr, flush=True)
    prompt, decode, verify, batch = options
    heads = [f"verify {n}" for n in verify] + [f"decode × {n}" for n in batch]
    text = f"""# Speed against other engines

Tokens per second, medians of {a.rounds} rounds; the engines' rounds take turns on the same file, each
engine loaded once and warmed up. Prefill is a prompt of {prompt} tokens in one call, decode {decode} single tokens
behind 32, verify passes of {" and ".join(map(str, verify))} tokens with logits for each. A ratio above 1: tandem is faster.

- machine: {machine()}, load average before the runs {min(load):.1f} to {max(load):.1f} (what ran before counts in it for a minute)
- date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, commit {commit()}
- tandem: {", ".join(sorted(ours))}
- peers: {"; ".join(peers)}
- command: `{shlex.join(sys.argv)}`

| file | threads | engine | prefill | decode | {" | ".join(heads)} |
|---|---|---|---|---|{"---|" * len(heads)}
""" + "\n".join(rows) + "\n"
    if a.out:
        Path(a.out).write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
