"""Process groups for timings of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from dora_fx.megatron.cpu_runtime import cuda_current_device_is_cpu
from dora_fx.megatron.world import megatron_world


@contextlib.contextmanager
def quiet_world(device: str) -> Iterator[None]:
    """Megatron's groups of this process alone, which send nothing, for timings.

    Of gloo each of them has a thread that wakes a hundred times a second, which together take a part of a core.
    """
    if device != "cpu":
        with megatron_world(device):
            yield
        return
    with cuda_current_device_is_cpu():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
            torch.manual_seed(1234)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
