"""llama.cpp's server, as the package xllamacpp carries it: MODEL PORT SLOTS CONTEXT. Ends with its standard input."""

import sys
import threading

import xllamacpp


def main() -> None:
    model, port, slots, context = sys.argv[1], *map(int, sys.argv[2:5])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = context * slots
    # One thread: the same sums in the same order.
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    threading.stack_size(64 << 20)
    main()
