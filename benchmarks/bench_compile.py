r"""What does compilation cost: 30 layers beside one, and a second start beside the first?

A Llama-shaped Megatron GPT, compiled layer by layer, in a new process for every figure. Seconds are those of the first
training step (and evaluation) less those of the quicker of the next two. The first start finds torch's caches empty,
the second what the first left. Ratios are to one layer at the first start.

    python benchmarks/bench_compile.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import save_tables
from torch._dynamo.utils import counters

STARTS = ("first start", "second start")
Row = dict[str, float]


def compile_in_new_process(options: argparse.Namespace, variant: str, layers: int, cache: str) -> Row:
    """Seconds of compilation and what the caches counted, in a process that knows nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_compile, (options, variant, layers, cache))


def _compile(options: argparse.Namespace, variant: str, layers: int, cache: str) -> Row:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    from bench_model import make_variants

    from dora_fx.megatron.world import megatron_world

    options = argparse.Namespace(
        **{**vars(options), "layers": layers, "micro_batches": 1, "recompute": False, "attention": "megatron"}
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with megatron_world(device):
        model = make_variants(options, device, [variant])[variant]
        model.allocate_buffers()
        row = {"training s": _compilation(model.train_step), "evaluation s": _compilation(model.evaluate)}
    row["graphs"] = counters["aot_autograd"]["total"]
    row["cached by AOTAutograd"] = counters["aot_autograd"]["autograd_cache_hit"]
    row["cached by Inductor"] = counters["inductor"]["fxgraph_cache_hit"]
    return row


def _compilation(function: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return seconds[0] - min(seconds[1:])


def measure(options: argparse.Namespace) -> dict[str, dict[str, Row]]:
    """Medians over the rounds, by variant."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for _ in range(options.rounds):
        for variant in ("LoRA", "dora_fx"):
            for layers in (1, options.layers):
                with tempfile.TemporaryDirectory() as cache:
                    for start in STARTS:
                        row = compile_in_new_process(options, variant, layers, cache)
                        rows.setdefault((variant, f"{layers} layers, {start}"), []).append(row)
    tables: dict[str, dict[str, Row]] = {}
    for (variant, name), found in rows.items():
        tables.setdefault(variant, {})[name] = {key: statistics.median(row[key] for row in found) for key in found[0]}
    for table in tables.values():
        one_layer = next(iter(table.values()))
        for row in table.values():
            row["ratio"] = row["training s"] / one_layer["training s"]
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 30, "hidden": 576, "ffn": 1536, "heads": 9, "groups": 3, "vocab": 1024, "dim": 16}
    sizes |= {"tokens": 64, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, help="write the tables here")
    options = parser.parse_args()
    tables = measure(options)
    for variant, table in tables.items():
        print(f"\n{variant}")
        print(f"{'':24}", *(f"{name:>22}" for name in next(iter(table.values()))))
        for name, row in table.items():
            print(f"{name:24}", *(f"{value:22.2f}" for value in row.values()))
    if options.json:
        save_tables(options.json, tables, **{k: v for k, v in vars(options).items() if k != "json"})


if __name__ == "__main__":
    main()
