"""Builds one pipeline stage of a base on fake tensors, in a world whose other ranks do not exist.

Parameters under FakeTensorMode have shapes and no memory, and torch's "fake" backend answers collectives without
sending anything, so one process is a rank of any world.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

from dora_fx.attach import DoRA
from dora_fx.explanation.even_experts import spread_evenly
from dora_fx.explanation.planned_run import Attention, PlannedRun
from dora_fx.megatron import megatron_world, replace_modules
from dora_fx.models import GPTArchitecture, empty_gpt_model, with_query_groups
from dora_fx.modules import sites_of


@dataclass(frozen=True)
class FakeStage:
    """One pipeline stage of a run on one rank.

    Attributes:
        model: the GPTModel of the stage, with adapters; nothing of it has values.
        wrapper: Megatron's DistributedDataParallel around it, which owns the gradient buffers.
    """

    model: Any
    wrapper: Any


class FlashAttention(nn.Module):
    """Causal attention that keeps no scores; takes and returns what Megatron's core attention does.

    Shapes: query `[s, b, heads/tp, d]`, key and value `[s, b, groups/tp, d]`; returns `[s, b, heads/tp * d]`.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        return output.permute(2, 0, 1, 3).flatten(2)


@contextlib.contextmanager
def fake_stage(architecture: GPTArchitecture, run: PlannedRun, stage: int) -> Iterator[FakeStage]:
    """Build the stage with adapters on the first rank that has it, and take the world down on exit.

    Raises:
        ValueError: torch.distributed has a default process group already.
    """
    if dist.is_initialized():
        raise ValueError("torch.distributed: found a default process group, expected none: a fake world is made here")
    # The generators of the process stay as they are, though a world seeds them.
    with torch.random.fork_rng(devices=[]), _world(run, stage), FakeTensorMode():
        model = empty_gpt_model(_as_built(architecture, run), run.torch_dtype, sequence_parallel=run.sequence_parallel)
        if run.attention == "flash":
            replace_attention(model)
        attach_adapters(model, run)
        replace_modules(model, spread_evenly(model))
        yield FakeStage(model, _data_parallel(model))


@contextlib.contextmanager
def stage_of_model(model: Any, run: PlannedRun) -> Iterator[FakeStage]:
    """Take a user's own Megatron model of one stage, which was built under FakeTensorMode, with adapters or without.

    One without adapters has them until the exit. Megatron's DistributedDataParallel is put around either.

    Raises:
        TypeError: it has no `decoder.layers`.
        ValueError: it has real parameters or grouped experts, Megatron's groups are missing, or the run does not match
            it.
    """
    if not hasattr(getattr(model, "decoder", None), "layers"):
        raise TypeError(f"base: found a {type(model).__name__} without decoder.layers, expected a Megatron GPTModel")
    parameter = next(model.parameters())
    if not isinstance(parameter, FakeTensor):
        raise ValueError("base: found a model with real parameters, expected one that was built under FakeTensorMode")
    _check_same_run(model, run)
    is_adapted, replaced = bool(sites_of(model)), spread_evenly(model)
    try:
        with parameter.fake_mode:
            if not is_adapted:
                attach_adapters(model, run)
            replace_modules(model, replaced)
            yield FakeStage(model, _data_parallel(model))
    finally:
        replace_modules(model, {even: layer for layer, even in replaced.items()})
        if not is_adapted:
            replace_modules(model, {site: site.to_wrap for site in sites_of(model)})
        # Its tensors are fake now; a real model allocates them anew.
        parallel_state.destroy_global_memory_buffer()
        parallel_state._set_global_memory_buffer()


def _check_same_run(model: Any, run: PlannedRun) -> None:
    """Raise ValueError, naming the option, where a model or the groups that it was built in do not match the run."""
    if not parallel_state.model_parallel_is_initialized():
        raise ValueError("base: found a model and none of Megatron's groups, expected those that it was built in")
    expected = {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel": parallel_state.get_expert_tensor_parallel_world_size(),
        "sequence_parallel": model.config.sequence_parallel,
        "torch_dtype": model.config.params_dtype,
        "attention": attention_of(model),
    }
    if dims := {site.adapter.dim for site in sites_of(model)}:
        expected["dim"] = run.dim if run.dim in dims else min(dims)
    for name, value in expected.items():
        if getattr(run, name) != value:
            option = {"torch_dtype": "dtype", "expert_tensor_parallel": "etp"}.get(name, name)
            raise ValueError(f"{option}: found {getattr(run, name)}, expected {value}, as the model was built")
    for what, size in (
        ("virtual pipeline", parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1),
        ("context", parallel_state.get_context_parallel_world_size()),
    ):
        if size > 1:
            raise ValueError(f"base: found a {what} parallel size of {size}, expected 1, which alone is counted")


def attention_of(model: nn.Module) -> Attention:
    """Return which attention a model has: Megatron's own, or one that keeps no scores."""
    is_local = any(isinstance(module, DotProductAttention) for module in model.modules())
    return "local" if is_local else "flash"


def replace_attention(model: nn.Module) -> None:
    """Put attention that keeps no scores in the place of Megatron's own."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DotProductAttention):
                setattr(module, name, FlashAttention())


def attach_adapters(model: nn.Module, run: PlannedRun) -> None:
    """Attach the run's adapters; raises ValueError or TypeError as `DoRA` does."""
    DoRA(
        target_modules=list(run.target_modules),
        exclude_modules=list(run.exclude_modules),
        dim=run.dim,
        alpha=2 * run.dim,
    )(model)


def _world(run: PlannedRun, stage: int) -> contextlib.AbstractContextManager[None]:
    return megatron_world(
        "cpu",
        backend="fake",
        # No rank reads it, but several ranks need a store.
        store=dist.HashStore(),
        world_size=run.num_ranks,
        # Megatron numbers the ranks of a stage one after another.
        global_rank=stage * run.tp * run.dp,
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        expert_model_parallel_size=run.ep,
        expert_tensor_parallel_size=run.expert_tensor_parallel,
    )


def _as_built(architecture: GPTArchitecture, run: PlannedRun) -> GPTArchitecture:
    """Pad query groups until the ranks share them, and untie an output layer of another stage than the embedding's.

    `build_gpt_model` does both.
    """
    num_query_groups = math.ceil(architecture.num_query_groups / run.tp) * run.tp
    padded = with_query_groups(architecture, num_query_groups)
    return dataclasses.replace(padded, tied_embeddings=architecture.tied_embeddings and run.pp == 1)


def _data_parallel(model: Any) -> Any:
    """Wrap the model as `dora-fx finetune` does: gradients add up in float32, and a step reduces them once."""
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
