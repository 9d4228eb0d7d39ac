"""Fake process groups: any rank of a tensor-parallel world of any size, traced in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from dora_fx.megatron.cpu_runtime import cuda_current_device_is_cpu


@contextlib.contextmanager
def fake_world(tp_size: int, tp_rank: int = 0) -> Iterator[None]:
    """A world whose collectives return at once with meaningless values, for graphs and counts only."""
    with cuda_current_device_is_cpu():
        dist.init_process_group("fake", store=FakeStore(), rank=tp_rank, world_size=tp_size)
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp_size, create_gloo_process_groups=False
            )
            initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
            torch.manual_seed(0)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@pytest.fixture
def tensor_parallel() -> Iterator[Callable[[int], None]]:
    """Return a function that enters a fake world of a tensor-parallel size for the rest of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda tp_size: stack.enter_context(fake_world(tp_size))
