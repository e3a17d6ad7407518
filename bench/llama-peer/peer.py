#!/usr/bin/env python3
"""llama.cpp as a peer of `tandem bench engine`: loads a GGUF once, then measures a round per line of stdin.

    peer.py FILE.gguf --threads N

Prints {"engine", "threads"} when it has loaded. Each line {"prompt_tokens", "decode_tokens",
"verify_tokens": [..], "batch_sequences": [..]} on stdin is answered by one line of JSON with the figures
of one round, the same as the engine's own (engine/src/bench.rs): a prompt in one call with the logits of
its last token; single tokens behind a prompt of 32; passes of n tokens with logits for each behind 32;
passes of one token of each of n sequences behind 32.

llama.cpp is used at its best: mmap and repacked weights, f16 KV, ubatch 512, every figure with
flash attention on or off, whichever the first two rounds (which are not reported) find faster. It is
spared the search for the largest logit, which the engine's own rounds do between decoded tokens.

A line {"score": [[ids], ..]} is answered by {"negative_log_likelihood"}: the sum over every token but
the first of each piece, in nats. This runs without flash attention and with the cache in f32, as the
engine has it."""
import argparse, ctypes, json, sys, time

import llama_cpp as ll
import numpy as np

BEHIND = 32
BATCH_PASSES_MIN = 8
F32, F16 = 0, 1


def session(model, context_tokens, threads, flash, kv_type, sequences):
    p = ll.llama_context_default_params()
    # Each sequence has its own part of the context.
    p.n_ctx = (context_tokens + 255) // 256 * 256 * sequences
    p.n_seq_max = sequences
    p.n_batch = p.n_ctx
    p.n_ubatch = 512
    p.n_threads = p.n_threads_batch = threads
    p.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.type_k = p.type_v = kv_type
    p.no_perf = True
    ctx = ll.llama_init_from_model(model, p)
    if not ctx:
        sys.exit("llama.cpp cannot make a context")
    return ctx


class Session:
    """A context and a batch that is filled anew for each call."""

    def __init__(self, model, context_tokens, threads, flash, kv_type=F16, sequences=1):
        self.ctx = session(model, context_tokens, threads, flash, kv_type, sequences)
        self.memory = ll.llama_get_memory(self.ctx)
        self.batch = ll.llama_batch_init(max(context_tokens, sequences), 0, 1)

    def fill(self, tokens, at, logits, sequence=0):
        b = self.batch
        b.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i] = token, at + i, 1
            b.seq_id[i][0] = sequence
            b.logits[i] = i + logits >= len(tokens)

    def run(self):
        if ll.llama_decode(self.ctx, self.batch) != 0:
            sys.exit("llama_decode failed")
        ll.llama_synchronize(self.ctx)
        ll.llama_get_logits(self.ctx)

    def cut(self, tokens):
        ll.llama_memory_seq_rm(self.memory, 0, tokens, -1)

    def prefill(self, tokens):
        self.cut(0)
        self.fill(tokens, 0, 1)
        start = time.perf_counter()
        self.run()
        return len(tokens) / (time.perf_counter() - start)

    def decode(self, tokens):
        self.prefill(tokens[:BEHIND])
        start = time.perf_counter()
        for i, token in enumerate(tokens[BEHIND:]):
            self.fill([token], BEHIND + i, 1)
            self.run()
        return (len(tokens) - BEHIND) / (time.perf_counter() - start)

    def verify(self, tokens, n, passes):
        self.prefill(tokens[:BEHIND])
        seconds = 0.0
        for _ in range(passes):
            self.fill(tokens[:n], BEHIND, n)
            start = time.perf_counter()
            self.run()
            seconds += time.perf_counter() - start
            self.cut(BEHIND)
        return passes * n / seconds

    def decode_batch(self, tokens, sequences, passes):
        b = self.batch
        for s in range(sequences):
            ll.llama_memory_seq_rm(self.memory, s, 0, -1)
            self.fill(tokens[s : s + BEHIND], 0, 1, s)
            self.run()
        seconds = 0.0
        for step in range(passes):
            b.n_tokens = sequences
            for s in range(sequences):
                b.token[s], b.pos[s], b.n_seq_id[s], b.logits[s] = tokens[s + step], BEHIND + step, 1, 1
                b.seq_id[s][0] = s
            start = time.perf_counter()
            self.run()
            seconds += time.perf_counter() - start
        return sequences * passes / seconds

    def score(self, tokens, vocab):
        self.cut(0)
        self.fill(tokens[:-1], 0, len(tokens) - 1)
        self.run()
        logits = np.ctypeslib.as_array(ll.llama_get_logits(self.ctx), shape=(len(tokens) - 1, vocab))
        total = 0.0
        for row, token in zip(logits, tokens[1:]):
            row = row.astype(np.float64)
            top = row.max()
            total += top + np.log(np.exp(row - top).sum()) - row[token]
        return total


    def threads(self):
        """Threads that the context really runs, for prompts and for single tokens."""
        counts = {ll.llama_n_threads(self.ctx), ll.llama_n_threads_batch(self.ctx)}
        if len(counts) > 1:
            sys.exit(f"llama.cpp runs different threads for prompts and tokens: {sorted(counts)}")
        return counts.pop()

    def close(self):
        ll.llama_batch_free(self.batch)
        ll.llama_free(self.ctx)


class Peer:
    def __init__(self, path, threads):
        p = ll.llama_model_default_params()
        p.n_gpu_layers = 0
        p.load_mode = ll.LLAMA_LOAD_MODE_MMAP
        self.model = ll.llama_model_load_from_file(path.encode(), p)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.threads = threads
        self.sessions, self.faster, self.batched = None, {}, {}

    @staticmethod
    def need(job):
        """Tokens of the longest sequence of a round."""
        return max(job["prompt_tokens"], BEHIND + max([job["decode_tokens"], *job["verify_tokens"]]))

    def measures(self, job):
        tokens = [i * 7919 % self.vocab for i in range(self.need(job))]
        yield "prefill", lambda s: s.prefill(tokens[: job["prompt_tokens"]])
        yield "decode", lambda s: s.decode(tokens[: BEHIND + job["decode_tokens"]])
        for n in job["verify_tokens"]:
            passes = -(-job["decode_tokens"] // n)
            yield f"verify_{n}", lambda s, n=n, passes=passes: s.verify(tokens, n, passes)

    def batches(self, job):
        """Sessions of their own: a context is divided among its sequences."""
        for n in job["batch_sequences"]:
            passes = max(-(-job["decode_tokens"] // n), BATCH_PASSES_MIN)
            tokens = [i * 7919 % self.vocab for i in range(BEHIND + n + passes)]
            if n not in self.batched:
                sessions = [Session(self.model, BEHIND + passes, self.threads, flash, sequences=n) for flash in (False, True)]
                speeds = [max(s.decode_batch(tokens, n, passes) for _ in range(2)) for s in sessions]
                best = speeds.index(max(speeds))
                sessions[1 - best].close()
                self.batched[n] = sessions[best]
            yield {"sequences": n, "tokens_per_s": self.batched[n].decode_batch(tokens, n, passes)}

    def round(self, job):
        if self.sessions is None:
            need = self.need(job)
            self.sessions = {flash: Session(self.model, need, self.threads, flash) for flash in (False, True)}
            for name, measure in self.measures(job):
                best = {flash: [measure(s) for s in (s, s)] for flash, s in self.sessions.items()}
                self.faster[name] = max(best, key=lambda flash: max(best[flash]))
        figures = {name: measure(self.sessions[self.faster[name]]) for name, measure in self.measures(job)}
        return {
            "prefill_tokens_per_s": figures["prefill"],
            "decode_tokens_per_s": figures["decode"],
            "verify": [{"tokens": n, "tokens_per_s": figures[f"verify_{n}"]} for n in job["verify_tokens"]],
            "batch": list(self.batches(job)),
        }

    def score(self, pieces):
        s = Session(self.model, max(map(len, pieces)), self.threads, False, F32)
        return {"negative_log_likelihood": float(sum(s.score(p, self.vocab) for p in pieces if len(p) > 1))}


def main():
    args = argparse.ArgumentParser()
    args.add_argument("file")
    args.add_argument("--threads", type=int, required=True)
    args = args.parse_args()
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    peer = Peer(args.file, args.threads)
    probe = Session(peer.model, BEHIND, args.threads, False)
    threads = probe.threads()
    probe.close()
    info = ll.llama_print_system_info().decode().split(":", 1)[-1]
    features = ", ".join(f.split("=")[0].strip() for f in info.split("|") if f.strip().endswith("= 1"))
    print(json.dumps({"engine": f"llama.cpp (llama-cpp-python {ll.__version__}; {features})", "threads": threads}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(peer.score(job["score"]) if "score" in job else peer.round(job)), flush=True)


if __name__ == "__main__":
    main()
