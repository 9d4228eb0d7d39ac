"""Whole tensors of a model's adapters, whichever rank holds what of them."""

from __future__ import annotations

import torch
from torch import nn

from dora_fx.function import ParameterPlacement
from dora_fx.megatron import walk
from dora_fx.modules import ParallelLinearDoRAAdapter, gather_whole


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
