"""Join the ranks' shards of adapter tensors to whole tensors.

A whole tensor does not depend on the tensor-parallel size: shards are joined as the layout table says, and the padding
that makes the base model's sizes divisible (see `ParallelLinearDoRAAdapter`) is cut off.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dora_fx.function import ParameterPlacement
from dora_fx.megatron import walk
from dora_fx.modules.adapter import ParallelLinearDoRAAdapter
from dora_fx.ranks import group_size, resolve_group


class AdapterShards:
    """Gathers a model's adapter parameters by name, and tensors that are sharded alike (gradients, moments).

    Args:
        model: after `DoRA` ran on it, bare or wrapped.

    Attributes:
        parameters: name in the model -> parameter, in model order.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[str, tuple[ParallelLinearDoRAAdapter, ParameterPlacement]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for path, _, module in walk(model):
            if isinstance(module, ParallelLinearDoRAAdapter):
                for name, parameter in module.named_parameters():
                    self._owners[f"{path}.{name}"] = (module, module.placements[name])
                    self.parameters[f"{path}.{name}"] = parameter

    def gather(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """Return the whole of a tensor that is sharded as the parameter `name`. Every rank of the group calls it."""
        adapter, placement = self._owners[name]
        return gather_whole(local, placement, adapter.tp_group)


def gather_whole(local: torch.Tensor, placement: ParameterPlacement, tp_group: str) -> torch.Tensor:
    """Return the whole of a tensor, without padding, on every rank of the group, all of which call it.

    Args:
        local: this rank's shard.
        placement: says how it is sharded.
        tp_group: name of the tensor-parallel group; "" where it has one rank.
    """
    local = local.detach().contiguous()
    parts = [local]
    if tp_group and placement.shard_dim is not None:
        parts = [torch.empty_like(local) for _ in range(group_size(tp_group))]
        dist.all_gather(parts, local, group=resolve_group(tp_group))
    return placement.unshard_and_cut(parts)
