"""What the checks of a client share: its base URL, its list, its report."""

import argparse
import asyncio
import inspect
import os
import sys
import time
import traceback

checks = []


def check(function):
    """Adds a check; it takes the arguments and may be a coroutine."""
    checks.append(function)
    return function


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


def expect_equal(got, wanted, what):
    expect(got == wanted, f"{what}: got {got!r}, wanted {wanted!r}")


def main():
    """Runs every check, prints a line for each, and ends with status 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base_url", help="ends in /v1")
    parser.add_argument("--only", default="", help="names of checks contain this")
    args = parser.parse_args()
    args.key = os.environ.get("OPENAI_API_KEY", "x")
    failed = 0
    # One for all: some clients share connections between their objects.
    loop = asyncio.new_event_loop()
    wanted = [function for function in checks if args.only in function.__name__]
    for function in wanted:
        began = time.monotonic()
        try:
            outcome = function(args)
            if inspect.iscoroutine(outcome):
                loop.run_until_complete(outcome)
            print(f"ok      {function.__name__} ({time.monotonic() - began:.2f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {function.__name__}\n{traceback.format_exc()}", flush=True)
    print(f"{len(wanted) - failed} passed, {failed} failed")
    sys.exit(1 if failed or not wanted else 0)
