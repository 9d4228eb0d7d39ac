"""Megatron's own checkpoint on a machine without CUDA, where it has no generators whose states it could keep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import random

UNIFORM: dict[str, Any] = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
BLOCK: dict[str, Any] = UNIFORM | dict(recompute_method="block")


def selective(*modules: str) -> dict[str, Any]:
    """The settings of Megatron that recompute parts of layers."""
    return dict(recompute_granularity="selective", recompute_modules=list(modules))


@contextlib.contextmanager
def without_cuda_generators() -> Iterator[None]:
    """Let `CheckpointFunction` keep and restore the state of the CPU's generator alone."""
    with (
        mock.patch.object(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0)),
        mock.patch.object(random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
    ):
        yield


@contextlib.contextmanager
def counted_checkpoints() -> Iterator[list[None]]:
    """A list with an entry for each time that Megatron's checkpoint ran its function again in a backward pass."""
    calls: list[None] = []
    original = random.CheckpointFunction.backward

    def backward(*args: Any) -> Any:
        calls.append(None)
        return original(*args)

    with mock.patch.object(random.CheckpointFunction, "backward", staticmethod(backward)):
        yield calls
