"""Time variants in turn, round after round, and compare each with one of them within each round."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Table = dict[str, dict[str, float]]


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of one call, per variant and round, after a first round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(-1, rounds):
        for name, function in functions.items():
            _wait_for(device)
            begin = time.perf_counter()
            function()
            _wait_for(device)
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ratios(seconds: Mapping[str, Sequence[float]], reference: str) -> Table:
    """Medians, and medians and ranges of the ratios to the reference, taken round by round."""
    table = {}
    for name, times in seconds.items():
        each = [mine / theirs for mine, theirs in zip(times, seconds[reference], strict=True)]
        table[name] = {
            "median_ms": 1e3 * statistics.median(times),
            "ratio": statistics.median(each),
            "ratio_min": min(each),
            "ratio_max": max(each),
        }
    return table


def saved_bytes(function: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that one forward pass keeps for its backward pass, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    del kept
    return sum(saved.values())


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """The most memory that a call has allocated at once, beyond what was there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # The profiler notes what the allocator gives out and takes back, compiled code's requests included.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def show(table: Table, reference: str) -> None:
    """Print a table, a line per variant, with the columns that its rows have."""
    others = [name for name in next(iter(table.values())) if not name.startswith(("median_ms", "ratio"))]
    width = max(map(len, table))
    print(f"{'':{width}} {'median ms':>10} {'/ ' + reference:>18} {'range':>14}", *(f"{name:>14}" for name in others))
    for name, row in table.items():
        span = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"
        cells = [f"{row[other]:14.1f}" if row.get(other) is not None else f"{'-':>14}" for other in others]
        print(f"{name:{width}} {row['median_ms']:10.2f} {row['ratio']:18.3f} {span:>14}", *cells)


def save(path: Path, tables: Mapping[str, Table], **sizes: Any) -> None:
    """Write tables as JSON, with the date, the versions and the machine they were measured on."""
    import megatron.core

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    about = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps({**about, **sizes, "tables": tables}, indent=1) + "\n", encoding="utf-8")
