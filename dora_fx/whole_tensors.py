"""Whole adapter tensors out of the ranks' shards, and a rank's shards out of whole tensors.

A whole tensor does not depend on the tensor-parallel size: shards are joined as the layout table says, and what
pads the base model to a size that divides (see `ParallelLinearDoRAAdapter`) is cut off.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dora_fx.collectives import resolve_group
from dora_fx.layers import ParallelLinearDoRAAdapter
from dora_fx.placement import LAYOUTS, shard, unshard


class AdapterShards:
    """The adapter parameters of a model on this rank, by name, with anything of their shape (gradients, moments).

    Args:
        model: after `DoRA` ran on it.

    Attributes:
        parameters: name in the model -> parameter, in model order.
    """

    def __init__(self, model: nn.Module) -> None:
        self._adapters: dict[str, tuple[ParallelLinearDoRAAdapter, str]] = {}
        for path, module in model.named_modules():
            if isinstance(module, ParallelLinearDoRAAdapter):
                for name, _ in module.named_parameters():
                    self._adapters[f"{path}.{name}"] = (module, name)
        self.parameters = {name: adapter.get_parameter(own) for name, (adapter, own) in self._adapters.items()}

    def is_sharded(self, name: str) -> bool:
        """Whether the ranks hold different parts of a parameter; otherwise every rank holds it whole."""
        adapter, _ = self._adapters[name]
        return adapter.tp_size > 1 and self._sharding(name)[0] is not None

    def gather(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor that is sharded as parameter `name` is. Every rank of the group calls it."""
        adapter, _ = self._adapters[name]
        dim, blocks = self._sharding(name)
        whole = local.detach()
        if self.is_sharded(name):
            parts = [torch.empty_like(whole) for _ in range(adapter.tp_size)]
            dist.all_gather(parts, whole.contiguous(), group=resolve_group(adapter.tp_group))
            assert dim is not None
            whole = unshard(parts, dim, blocks)
        return whole[tuple(slice(size) for size in self._whole_shape(name))].clone()

    def scatter(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, for parameter `name`.

        Raises:
            ValueError: the tensor has another shape than the whole parameter.
        """
        adapter, _ = self._adapters[name]
        expected = self._whole_shape(name)
        if tuple(whole.shape) != expected:
            raise ValueError(f"{name}: found a tensor of shape {tuple(whole.shape)}, expected {expected}")
        padding = [
            amount
            for found, padded in zip(reversed(expected), reversed(self._padded_shape(name)), strict=True)
            for amount in (0, padded - found)
        ]
        dim, blocks = self._sharding(name)
        return shard(F.pad(whole, padding), dim, adapter.tp_rank, adapter.tp_size, blocks)

    def _sharding(self, name: str) -> tuple[int | None, int]:
        adapter, own = self._adapters[name]
        table = LAYOUTS[adapter.layout]
        return {
            "linear_in.weight": (table.lora_a_dim, 1),
            "linear_out.weight": (table.lora_b_dim, adapter.row_blocks),
            "weight_magnitude": (table.magnitude_dim, adapter.row_blocks),
        }[own]

    def _padded_shape(self, name: str) -> tuple[int, ...]:
        adapter, own = self._adapters[name]
        return _shapes(adapter.in_features, adapter.out_features, adapter.dim)[own]

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        adapter, own = self._adapters[name]
        in_features = adapter.in_features - adapter.padded_in_features
        out_features = adapter.out_features - adapter.padded_out_features
        return _shapes(in_features, out_features, adapter.dim)[own]


def _shapes(in_features: int, out_features: int, dim: int) -> dict[str, tuple[int, ...]]:
    return {
        "linear_in.weight": (dim, in_features),
        "linear_out.weight": (out_features, dim),
        "weight_magnitude": (out_features,),
    }
