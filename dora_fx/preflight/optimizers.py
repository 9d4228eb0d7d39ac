"""Uniform access to the parameters and states of torch's optimizers, Megatron's and accelerate's wrapper."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn

from dora_fx.megatron import MainCopy, main_copies


def is_megatron(optimizer: Any) -> bool:
    """Return whether an optimizer is one of Megatron's."""
    return isinstance(optimizer, MegatronOptimizer)


def single_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers within an optimizer: Megatron chains several, accelerate wraps one; none for None."""
    if is_megatron(optimizer):
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        # A rank without parameters has a stub, which holds no state.
        return [single for single in chained if not getattr(single, "is_stub_optimizer", False)]
    wrapped = getattr(optimizer, "optimizer", optimizer)
    return [] if optimizer is None else [wrapped]


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the torch optimizers that hold the state."""
    return [single.optimizer if is_megatron(single) else single for single in single_optimizers(optimizer)]


def trained_parameters(optimizer: Any) -> list[nn.Parameter]:
    """Return the model's parameters that an optimizer trains, on this rank if it is distributed."""
    parameters: list[nn.Parameter] = []
    for single in single_optimizers(optimizer):
        if isinstance(single, DistributedOptimizer):
            groups = [*single.model_float16_groups, *single.model_fp32_groups]
        elif isinstance(single, Float16OptimizerWithFloat16Params):
            groups = [*single.float16_groups, *single.fp32_from_fp32_groups]
        else:
            inner = single.optimizer if is_megatron(single) else single
            groups = [group["params"] for group in inner.param_groups]
        parameters += chain.from_iterable(groups)
    return parameters


def copies_of(optimizer: Any) -> list[MainCopy]:
    """Return the main copies, or this rank's parts of them, that Megatron's optimizers step."""
    singles = [single for single in single_optimizers(optimizer) if is_megatron(single)]
    return [copy for single in singles for copy in main_copies(single)]


def complete_parts(optimizer: Any, gradients: dict[int, torch.Tensor]) -> None:
    """Complete gradients in place, of which each rank of a distributed optimizer has a part. Every rank calls it.

    The optimizer's reduction leaves the other parts unreduced.

    Args:
        optimizer: any.
        gradients: by the ids of their parameters.
    """
    for single in single_optimizers(optimizer):
        if isinstance(single, DistributedOptimizer) and single.data_parallel_group.size() > 1:
            everywhere = [p for buffer in single.buffers for p in buffer.params if id(p) in gradients]
            own = {id(parameter) for parameter in trained_parameters(single)}
            for parameter in everywhere:
                flat, whole = gradients[id(parameter)].view(-1), torch.zeros_like(gradients[id(parameter)]).view(-1)
                if id(parameter) in own:
                    part = single._get_model_param_range_map(parameter)["param"]
                    whole[part.start : part.end] = flat[part.start : part.end]
                dist.all_reduce(whole, group=single.data_parallel_group)
                flat.copy_(whole)
