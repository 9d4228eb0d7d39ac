"""Fake process groups: any rank of a tensor-parallel world of any size, traced in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from torch.testing._internal.distributed.fake_pg import FakeStore

from dora_fx.megatron.world import megatron_world


@contextlib.contextmanager
def fake_world(tp_size: int, tp_rank: int = 0) -> Iterator[None]:
    """A world whose collectives return at once with meaningless values, for graphs and counts only."""
    world = {"global_rank": tp_rank, "world_size": tp_size, "tensor_model_parallel_size": tp_size}
    with megatron_world(backend="fake", store=FakeStore(), seed=0, **world):
        yield


@pytest.fixture
def tensor_parallel() -> Iterator[Callable[[int], None]]:
    """Return a function that enters a fake world of a tensor-parallel size for the rest of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda tp_size: stack.enter_context(fake_world(tp_size))
