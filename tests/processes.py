"""Processes for tests, forked from one that has imported everything and has started no thread of Python's.

A new interpreter imports torch and Megatron for seconds; a fork takes milliseconds, and finds nothing
that earlier tests left, since the process that it is forked from runs none.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.costs import watch

_METHOD = "forkserver"
# What is not found here, each process imports for itself.
PRELOADED = [
    "torch._dynamo.backends.distributed",
    "torch._inductor.compile_fx",
    "torch.export._trace",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "dora_fx.backend",
    "dora_fx.app.cli.finetune",
    "dora_fx.app.cli.main",
    "dora_fx.app.runs.loss_curve",
    "dora_fx.hf",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "tests.distributed.pipeline_gpt",
    "tests.distributed.training",
    "tests.distributed.oracle",
    "tests.warm_up",
]
multiprocessing.get_context(_METHOD).set_forkserver_preload(PRELOADED)


def collect_seldom() -> None:
    """Spare garbage collection, and searches among all objects, what was imported.

    Compilers make many objects and little garbage. By Python's settings a seventh of their time goes to looking for it.
    """
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def start_process(function: Callable[..., object], *args: Any) -> BaseProcess:
    """Start a process that calls a module-level function; its `exitcode` is 0, what `sys.exit` got, or -signal."""
    process = multiprocessing.get_context(_METHOD).Process(target=_enter, args=(*_surroundings(), function, args))
    process.start()
    return process


def run_processes(function: Callable[..., object], args: tuple[Any, ...], number: int) -> None:
    """Call a module-level function with 0, 1, ... and `args`, each in a process, and wait for all of them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: of the process that was seen to fail first; the others are ended.
    """
    mp.start_processes(_enter_numbered, (*_surroundings(), function, args), number, start_method=_METHOD)


def _surroundings() -> tuple[dict[str, str], int | None]:
    """What a fork does not have of this process: its environment, and how it compiles."""
    return dict(os.environ), torch._inductor.config.cpp.simdlen


def _enter_numbered(number: int, environment: Mapping[str, str], simdlen: int | None, *call: Any) -> None:
    function, args = call
    _enter(environment, simdlen, function, (number, *args))


def _enter(
    environment: Mapping[str, str], simdlen: int | None, function: Callable[..., object], args: tuple[Any, ...]
) -> None:
    collect_seldom()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    torch._inductor.config.cpp.simdlen = simdlen
    torch.set_num_threads(1)
    watch()
    function(*args)


def _end_with_parent() -> None:
    """End this process when the test run ends, which is not its parent, however it hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
