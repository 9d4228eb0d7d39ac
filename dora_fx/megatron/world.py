"""Start and stop torch.distributed and Megatron's model-parallel groups for one process, on CPU or CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from dora_fx.megatron.cpu_runtime import cuda_current_device_is_cpu


@contextlib.contextmanager
def megatron_world(
    device: str = "cpu",
    *,
    backend: str | None = None,
    seed: int = 1234,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    store: dist.Store | None = None,
    global_rank: int = 0,
    world_size: int = 1,
) -> Iterator[None]:
    """Make the default process group, Megatron's groups and its RNG tracker; take them down on exit.

    Args:
        device: "cpu" or "cuda" (the current device).
        backend: of torch.distributed, for all groups; gloo on a CPU and NCCL on CUDA by default.
        seed: seeds torch and Megatron's tensor-parallel generators.
        tensor_model_parallel_size, pipeline_model_parallel_size: their product divides `world_size`.
        virtual_pipeline_model_parallel_size: model chunks of each pipeline rank; None without virtual stages.
        expert_model_parallel_size: ranks that hold other experts.
        expert_tensor_parallel_size: ranks that share each expert; None for `tensor_model_parallel_size`.
        store: meeting point of the processes. The default is an in-memory store, which needs neither port nor
            file and serves one process; several processes pass a `FileStore` or a `TCPStore`.
        global_rank: this process in the world.
        world_size: number of processes.

    Raises:
        ValueError: `device` is neither "cpu" nor "cuda", or several processes were given no store.
        RuntimeError: a default process group exists already.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected 'cpu' or 'cuda'")
    if store is None and world_size > 1:
        raise ValueError(f"world_size is {world_size}, so the processes need a store to meet in; got none")
    if dist.is_initialized():
        raise RuntimeError("torch.distributed has a default process group already; leave it before making another")
    on_cpu = device == "cpu"
    with cuda_current_device_is_cpu() if on_cpu else contextlib.nullcontext():
        dist.init_process_group(
            backend or ("gloo" if on_cpu else "nccl"),
            store=store if store is not None else dist.HashStore(),
            rank=global_rank,
            world_size=world_size,
        )
        try:
            _start_megatron(
                on_cpu,
                seed,
                create_gloo_process_groups=on_cpu and backend is None,
                tensor_model_parallel_size=tensor_model_parallel_size,
                pipeline_model_parallel_size=pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
                expert_model_parallel_size=expert_model_parallel_size,
                expert_tensor_parallel_size=expert_tensor_parallel_size,
            )
            yield
        finally:
            _stop_megatron()
            dist.destroy_process_group()


@contextlib.contextmanager
def world_at_hand() -> Iterator[None]:
    """Within the context there are a default process group and Megatron's groups, for code that asks for them.

    Those that are there stay as they are. What is missing is made and taken down on exit: a group of this process
    alone, and Megatron's groups without tensor or pipeline parallelism, which every rank of a default group makes.
    No generator is seeded.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    makes_group = not dist.is_initialized()
    if makes_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            _stop_megatron()
    finally:
        if makes_group:
            dist.destroy_process_group()


def _start_megatron(on_cpu: bool, seed: int, **settings: Any) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

    parallel_state.initialize_model_parallel(**settings)
    torch.manual_seed(seed)
    # The training tracker switches CUDA generator states; the inference one leaves the generator alone. The
    # tracker of an earlier world would carry its kind and its states over, hence the reset.
    megatron_random.initialize_rng_tracker(inference_rng_tracker=on_cpu, force_reset=True)
    megatron_random.model_parallel_cuda_manual_seed(seed)


def _stop_megatron() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
