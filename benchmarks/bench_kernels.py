r"""Where does a training step spend what DoRA adds to LoRA: in which kernels, in norms, on the host?

The GPT of `bench_model.py`, compiled layer by layer, is profiled over some training steps, with LoRA and with DoRA.
Bytes are those that Inductor counts for the code it generates: of every tensor that a loop nest reads or writes, once
per nest. Times of a profile are longer than those of a step, most of all on the host; only `bench_model.py` compares
steps.

    python benchmarks/bench_kernels.py --layers 4 --micro-batches 4
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_model import ATTENTIONS, DORA, DTYPES, REFERENCE, make_variants
from measuring import save_tables
from quick_option import parse_with_quick
from quiet_world import quiet_world
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.utils import fresh_cache
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from dora_fx.cache import call_check

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
NORMS, STEP = "norms and factors of a step", "a training step"
# What `--quick` puts in place of the other options.
QUICK = {"layers": 1, "hidden": 64, "ffn": 128, "heads": 4, "groups": 2, "tokens": 16, "dim": 4, "steps": 1}


@dataclass(frozen=True)
class Row:
    """One kernel, or one kind of work.

    Attributes:
        calls, milliseconds: per step.
        megabytes: per call; None for what is not generated.
    """

    name: str
    calls: float
    milliseconds: float
    megabytes: float | None = None


@contextlib.contextmanager
def noting_bytes() -> Iterator[dict[str, float]]:
    """Within the context, the bytes of each kernel that Inductor generates are noted by its name in a profile."""
    found: dict[str, float] = {}
    compile_to_module = GraphLowering.compile_to_module

    def noting(graph: GraphLowering) -> Any:
        module = compile_to_module(graph)
        source = Path(module.__file__).read_text(encoding="utf-8")
        calls = re.findall(r"^\s+(cpp_fused\w*)\(", source[source.index("def call(") :], re.MULTILINE)
        each = list(_bytes_of_kernels(graph))
        assert len(each) == len(calls), f"found {len(calls)} kernels for {len(each)} runs of loop nests"
        for name, num_bytes in zip(calls, each, strict=True):
            # A kernel that is called twice has the same sizes each time.
            found[f"{'backward' if graph.is_backward else 'forward'} {name}"] = num_bytes
        return module

    with mock.patch.object(GraphLowering, "compile_to_module", noting):
        yield found


def _bytes_of_kernels(graph: GraphLowering) -> Iterator[float]:
    """Inductor puts the loop nests between two calls of libraries into one C++ function."""
    run: list[int] = []
    for node in [*graph.scheduler.nodes, None]:
        if node is not None and isinstance(node, NopKernelSchedulerNode):
            continue
        if node is not None and not node.is_extern():
            run.append(node.get_read_write_buffers_sizes())
        elif run:
            yield float(sum(run))
            run = []


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """Rows of one variant of `bench_model.py`, the longest first; a step's own range takes what Python does in it."""
    refresh = call_check.refresh

    def named_refresh(*args: Any) -> bool:
        with record_function(NORMS):
            return refresh(*args)

    settings = {"cpp.enable_kernel_profile": True}
    with inductor_config.patch(settings), fresh_cache(), noting_bytes() as num_bytes:
        variant = make_variants(options, "cpu", [name])[name]
        variant.allocate_buffers()
        for _ in range(3):
            variant.train_step()
        names_refreshes = mock.patch.object(call_check, "refresh", named_refresh)
        with names_refreshes, profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(options.steps):
                with record_function(STEP):
                    variant.train_step()
    return list(_rows(profiler.events(), num_bytes, options.steps))


def _rows(events: list[FunctionEvent], num_bytes: dict[str, float], steps: int) -> Iterator[Row]:
    calls: dict[str, int] = {}
    times: dict[str, float] = {}
    for event in events:
        name = _row_of(event)
        calls[name] = calls.get(name, 0) + 1
        times[name] = times.get(name, 0.0) + event.self_cpu_time_total / 1e3
    for name in sorted(times, key=lambda name: -times[name]):
        size = num_bytes.get(name)
        yield Row(name, calls[name] / steps, times[name] / steps, None if size is None else size / 1e6)


def _row_of(event: FunctionEvent) -> str:
    """The kernel that an event is, or the kind of work that it belongs to."""
    around = list(_callers(event))
    is_product = event.name in PRODUCTS
    if any(each.name == NORMS for each in around) or event.name == NORMS:
        return "norms: products" if is_product else "norms: all else, with the check of the parameters"
    if any(each.name.startswith("Optimizer.step") for each in around) or event.name.startswith("Optimizer.step"):
        return "optimizer"
    if is_product:
        return "matrix products"
    if kernel := re.fullmatch(r"graph_\d+_(cpp_fused\w*)", event.name):
        is_backward = any(each.name == "CompiledFunctionBackward" for each in around)
        return f"{'backward' if is_backward else 'forward'} {kernel[1]}"
    return "the host, and operators outside the layers"


def _callers(event: FunctionEvent) -> Iterator[FunctionEvent]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def show(name: str, rows: list[Row]) -> None:
    """Print the rows of a variant, and sums."""
    fused = [row for row in rows if row.megabytes is not None]
    sums = [sum(row.milliseconds for row in some) for some in (rows, fused)]
    moved = sum(row.calls * (row.megabytes or 0.0) for row in fused)
    print(f"\n{name}: {sums[0]:.1f} ms, of which fused kernels {sums[1]:.1f} ms, {moved:.0f} MB")
    print(f"{'ms':>9} {'calls':>6} {'MB each':>8}")
    for row in rows:
        size = "" if row.megabytes is None else f"{row.megabytes:.2f}"
        print(f"{row.milliseconds:9.2f} {row.calls:6.0f} {size:>8} {row.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "hidden": 576, "ffn": 1536, "heads": 9, "groups": 3, "vocab": 1024, "dim": 16}
    for size, default in (sizes | {"tokens": 256, "micro-batches": 4, "steps": 10}).items():
        parser.add_argument(f"--{size}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--attention", choices=ATTENTIONS, default="megatron", help="as in bench_model.py")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parse_with_quick(parser, QUICK)
    options.recompute = False
    found = {}
    with quiet_world("cpu"):
        for name in (REFERENCE, DORA):
            found[name] = measure(name, options)
            torch._dynamo.reset()
    for name, rows in found.items():
        show(name, rows)
    if options.json:
        tables = {name: {row.name: _numbers(row) for row in rows} for name, rows in found.items()}
        save_tables(options.json, tables, **{k: v for k, v in vars(options).items() if k not in ("json", "quick")})


def _numbers(row: Row) -> dict[str, float]:
    numbers = {"calls": row.calls, "ms": row.milliseconds}
    return numbers if row.megabytes is None else numbers | {"MB each": row.megabytes}


if __name__ == "__main__":
    main()
