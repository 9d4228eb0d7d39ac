"""Start one process per rank, wait for all of them, and bring back what rank 0 returns."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from dora_fx.megatron.world import megatron_world
from tests.processes import run_processes


def enter_rank(
    rank: int, folder: str, function: Callable[..., Any], world_size: int, tp: int, args: tuple[Any, ...]
) -> None:
    """Be one rank of a Megatron world; rank 0 leaves what `function` returns in `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    with (
        _leaving_a_traceback(rank, folder),
        megatron_world(store=store, global_rank=rank, world_size=world_size, tensor_model_parallel_size=tp),
    ):
        result = function(*args)
    if rank == 0:
        torch.save(result, Path(folder) / "result")


def run_ranks(function: Callable[..., Any], world_size: int, tp: int, *args: Any) -> Any:
    """Run a module-level function on every rank of a Megatron world and return rank 0's result.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the rank that failed first.
    """
    return _result_of(world_size, enter_rank, function, world_size, tp, args)


def run_layout(function: Callable[..., Any], layout: Any, *args: Any) -> Any:
    """Run `function(layout, *args)` on every rank of a layout's world and return rank 0's result.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the rank that failed first.
    """
    return _result_of(layout.world_size, _enter_layout, function, layout, args)


def _enter_layout(rank: int, folder: str, function: Callable[..., Any], layout: Any, args: tuple[Any, ...]) -> None:
    with _leaving_a_traceback(rank, folder), layout.world(rank, Path(folder) / "store"):
        result = function(layout, *args)
    if rank == 0:
        torch.save(result, Path(folder) / "result")


def call_in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Run a module-level function in a process of its own, without any world, and return its result.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of what it raised.
    """
    return _result_of(1, _enter_alone, function, args)


def _enter_alone(rank: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with _leaving_a_traceback(rank, folder):
        torch.save(function(*args), Path(folder) / "result")


def visit_worlds(visits: Sequence[tuple[Callable[..., Any], Any]], *args: Any) -> None:
    """Run `function(layout, *args)` for (function, layout) after (function, layout), on every rank of its world.

    All in the same processes: rank 0 is in every world, so that each visit finds what the ones before it left.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that failed first.
    """
    with tempfile.TemporaryDirectory() as folder:
        _spawn(_visit, (visits, folder, args), max(layout.world_size for _, layout in visits), folder)


def _visit(rank: int, visits: Sequence[tuple[Callable[..., Any], Any]], folder: str, args: tuple[Any, ...]) -> None:
    for number, (function, layout) in enumerate(visits):
        if rank < layout.world_size:
            with _leaving_a_traceback(rank, folder), layout.world(rank, Path(folder) / str(number)):
                function(layout, *args)


def _result_of(nprocs: int, entry: Callable[..., None], *args: Any) -> Any:
    """Run `entry(rank, folder, *args)` in processes and return what one of them left in the folder as "result"."""
    with tempfile.TemporaryDirectory() as folder:
        _spawn(entry, (folder, *args), nprocs, folder)
        return torch.load(Path(folder) / "result", weights_only=False)


@contextmanager
def _leaving_a_traceback(rank: int, folder: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        (Path(folder) / f"failure {time.monotonic_ns():020} {rank}").write_text(traceback.format_exc())
        raise


def _spawn(function: Callable[..., None], args: tuple[Any, ...], nprocs: int, folder: str) -> None:
    """Run a function in processes, and raise what failed first.

    A process that fails lets the collectives of the others fail after it, and they may be seen to end before it.
    """
    try:
        run_processes(function, args, nprocs)
    except ProcessRaisedException as error:
        failures = sorted(Path(folder).glob("failure *"))
        if not failures:
            raise
        rank = int(failures[0].name.split()[-1])
        raise ProcessRaisedException(failures[0].read_text(), rank, error.error_pid) from None
