"""Measure what it takes to explain a run: seconds and the process's memory, imports included.

    python benchmarks/bench_explain.py

The goals are 60 seconds and 1.5 GiB on two cores, for Llama-3-70B on 1,024 ranks. It exits with 1 where one is missed.
"""

from __future__ import annotations

import resource
import sys
import time

SECONDS, MEBIBYTES = 60.0, 1536.0


def main() -> int:
    """Explain the run, print what it took, and return the exit code."""
    begin = time.perf_counter()
    import dora_fx

    found = dora_fx.explain("llama3-70b", tp=8, pp=4, dp=32, sequence_parallel=True, sequence_length=8192)
    seconds = time.perf_counter() - begin
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(found)
    print(f"{seconds:.1f} s, {time.process_time():.1f} s of CPU, {mebibytes:,.0f} MiB")
    return int(seconds > SECONDS or mebibytes > MEBIBYTES)


if __name__ == "__main__":
    sys.exit(main())
