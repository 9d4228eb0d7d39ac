"""Time variants in turn, round after round, and compare each with one of them within each round."""

from __future__ import annotations

import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Table = dict[str, dict[str, float]]


# The control is the reference built and compiled a second time, so that its ratio is 1 but for the machine.
CONTROL = "control"
CONTROL_WITHIN = 0.01


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of one call, per variant and round, after a first round that warms up.

    Every other round goes backwards, so that a machine which slows down or speeds up favours nobody.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(-1, rounds):
        for name in list(functions)[:: 1 if round_number % 2 else -1]:
            took = _seconds_of(functions[name], device)
            if round_number >= 0:
                seconds[name].append(took)
    return seconds


def _seconds_of(function: Callable[[], Any], device: str) -> float:
    """Seconds of a call: between two events of the CUDA stream that are before and after it, or by the clock."""
    if device != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin_event.record()
    function()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


@dataclass(frozen=True)
class Comparison:
    """Variants measured beside a reference and its control.

    Attributes:
        table: rows by variant, as `ratios` gives them.
        rounds: how many it took.
        held: whether the interval of the control's ratio is within 1 % of 1. If not, the machine was too noisy for
            the other ratios to mean anything.
    """

    table: Table
    rounds: int
    held: bool


def compare(
    functions: Mapping[str, Callable[[], Any]], reference: str, device: str, *, rounds: int, max_rounds: int
) -> Comparison:
    """Measure variants in turn, `rounds` at a time, until the control holds or there were `max_rounds`.

    Args:
        functions: one call of every variant; `reference` and `CONTROL` are among them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    while True:
        for name, more in interleaved(functions, rounds, device).items():
            seconds[name] += more
        table, done = ratios(seconds, reference), len(seconds[reference])
        low, high = (table[CONTROL][name] for name in ("ratio_low", "ratio_high"))
        held = 1 - CONTROL_WITHIN <= low <= high <= 1 + CONTROL_WITHIN
        if held or done >= max_rounds:
            return Comparison(table, done, held)


def ratios(seconds: Mapping[str, Sequence[float]], reference: str) -> Table:
    """Median times, and the median ratios to the reference, taken round by round, with their 95 % intervals."""
    table = {}
    for name, times in seconds.items():
        each = [mine / theirs for mine, theirs in zip(times, seconds[reference], strict=True)]
        low, high = median_interval(each)
        table[name] = {
            "median_ms": 1e3 * statistics.median(times),
            "ratio": statistics.median(each),
            "ratio_low": low,
            "ratio_high": high,
        }
    return table


def median_interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples))
    return medians[round(0.025 * resamples)], medians[round(0.975 * resamples) - 1]


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


def kernel_times(function: Callable[[], Any], device: str) -> dict[str, tuple[int, float]]:
    """Names of the kernels that a call runs, on a CPU of its operators, with their number and milliseconds."""
    is_cuda = device == "cuda"
    # With a CPU's activities the device's would hold ranges around its kernels too.
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        function()
        if is_cuda:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    clock = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    rows = [row for row in profiler.key_averages() if row.device_type == wanted]
    times = {row.key: (row.count, getattr(row, clock) / 1e3) for row in rows}
    return dict(sorted(times.items(), key=lambda item: -item[1][1]))


def show(comparison: Comparison, reference: str) -> None:
    """Print a comparison, a line per variant, with the columns that its rows have, and whether its control held."""
    table = comparison.table
    others = [name for name in next(iter(table.values())) if not name.startswith(("median_ms", "ratio"))]
    width = max(map(len, table))
    print(f"{'':{width}} {'median ms':>10} {'/ ' + reference:>18} {'95 %':>14}", *(f"{name:>14}" for name in others))
    for name, row in table.items():
        span = f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
        cells = [f"{row[other]:14.1f}" if row.get(other) is not None else f"{'-':>14}" for other in others]
        print(f"{name:{width}} {row['median_ms']:10.2f} {row['ratio']:18.3f} {span:>14}", *cells)
    verdict = "held" if comparison.held else "DID NOT HOLD: the machine is too noisy for these ratios"
    print(f"{comparison.rounds} rounds; the control, {reference} again, {verdict}")


def save(path: Path, comparisons: Mapping[str, Comparison], **sizes: Any) -> None:
    """Write comparisons as JSON, with the date, the versions and the machine they were measured on."""
    tables = {name: comparison.table for name, comparison in comparisons.items()}
    controls = {name: {"rounds": found.rounds, "held": found.held} for name, found in comparisons.items()}
    save_tables(path, tables, controls=controls, **sizes)


def save_tables(path: Path, tables: Mapping[str, Table], **more: Any) -> None:
    """Write tables that need no control as JSON, with the date, the versions and the machine."""
    text = json.dumps({**surroundings(), **more, "tables": tables}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def surroundings() -> dict[str, Any]:
    """The date, the versions and the machine."""
    import megatron.core

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "date": str(date.today()),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }
