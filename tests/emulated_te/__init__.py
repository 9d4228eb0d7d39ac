"""Transformer Engine's own Python on a CPU, with emulated kernels: its compiled module alone is replaced.

Everything above the compiled module is Transformer Engine's: modules, autograd functions, collectives, biases, state
dicts. So are Megatron's layers over it. The kernels are a few lines of plain torch, in `compiled_module.py`.

Megatron looks for Transformer Engine when it is imported, and an installed one without its libraries makes that import
fail. So it lies in a folder of its own, which only processes know that are forked from a server of theirs.
"""

from __future__ import annotations

import functools
import multiprocessing.forkserver
import multiprocessing.spawn
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.processes import PRELOADED


@contextmanager
def processes_with_emulated_te(folder: str) -> Iterator[None]:
    """Within the context, processes of `tests/processes.py` find Transformer Engine, installed, with emulated kernels.

    Args:
        folder: with the packages of `.ci/emulated_te.txt`.
    """
    with (
        mock.patch.object(multiprocessing.spawn, "get_preparation_data", functools.partial(_preparation_data, folder)),
        mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", _server(folder).connect_to_new_process),
    ):
        yield


_plain_preparation_data = multiprocessing.spawn.get_preparation_data


def _preparation_data(folder: str, name: str) -> dict[str, Any]:
    data = _plain_preparation_data(name)
    return data | {"sys_path": [*data["sys_path"], folder]}


@functools.cache
def _server(folder: str) -> multiprocessing.forkserver.ForkServer:
    """One per process; started here, since later starts would not know the folder."""
    server = multiprocessing.forkserver.ForkServer()
    server.set_forkserver_preload(["tests.emulated_te.installed", *PRELOADED])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])):
        server.ensure_running()
    return server
