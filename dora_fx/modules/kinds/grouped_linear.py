"""Megatron's layers over Transformer Engine that hold the linear layers of several experts, and multiply them at once.

Such a layer has neither a norm nor a collective of its own: the dispatcher of tokens gathers inputs and sums outputs.
So it is called, its product stays its own, in FP8 too, and DoRA is added to what it returns (`grouped_formula.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from dora_fx.function import LAYOUTS, BaseWeight
from dora_fx.megatron import TE_MODULE
from dora_fx.modules.kinds.linear_kind import (
    A_PARAMETER_EACH,
    LinearKind,
    LinearSpec,
    LocalExperts,
    refused_setting_of_experts_maybe,
)
from dora_fx.modules.kinds.megatron_linear import row_blocks


@dataclass(frozen=True, kw_only=True)
class GroupedExperts(LocalExperts):
    """The experts of a grouped layer.

    Attributes:
        ep_rank, ep_size: this rank's place in the group of ranks that hold other experts, and how many these are.
        dp_rank: this rank's place in the group of ranks that hold the same experts.
    """

    ep_rank: int
    ep_size: int
    dp_rank: int

    @classmethod
    def of_layer(cls, linear: Any, group: dist.ProcessGroup) -> GroupedExperts:
        """Describe the experts of a layer; they have consecutive numbers, and each rank as many."""
        groups, is_dense = linear._pg_collection, group.size() == linear.config.tensor_model_parallel_size
        return cls(
            tp_group=group.group_name,
            tp_rank=group.rank(),
            allreduce=groups.ep.size() == 1 and is_dense,
            first=groups.ep.rank() * linear.num_gemms,
            count=linear.num_gemms,
            ep_rank=groups.ep.rank(),
            ep_size=groups.ep.size(),
            dp_rank=groups.expt_dp.rank(),
        )


class _TEGroupedLinear(LinearKind):
    class_module = TE_MODULE

    @classmethod
    def describe(cls, path: str, linear: Any) -> LinearSpec:
        _check_settings(path, linear)
        group = cast(dist.ProcessGroup, linear._tp_group)
        weights = expert_weights(linear)
        for name, weight in zip(cls.weight_names(linear), weights, strict=True):
            _check_weight(f"{path}.{name}", weight)
        layout = LAYOUTS[cls.layout_name(linear)]
        out_parts, in_parts = (group.size() if layout.weight_shard_dim == dim else 1 for dim in (0, 1))
        return LinearSpec(
            kind=cls,
            layout=layout,
            # Transformer Engine's own numbers are those of the shard.
            in_features=linear.in_features * in_parts,
            out_features=linear.out_features * out_parts,
            padded_in_features=0,
            padded_out_features=0,
            row_blocks=row_blocks(path, linear),
            tp_group=group,
            weight=weights[0],
            bias=None,
            experts=GroupedExperts.of_layer(linear, group),
            expert_weights=weights,
            expert_biases=expert_biases(linear),
        )

    @classmethod
    def stored_weight(cls, linear: Any) -> BaseWeight | None:
        return expert_weights(linear)[0]

    @staticmethod
    def weight_names(linear: Any) -> tuple[str, ...]:
        return tuple(f"weight{number}" for number in range(linear.num_gemms))

    @staticmethod
    def added_bias(linear: Any) -> torch.Tensor | None:
        biases = None if linear.te_return_bias else expert_biases(linear)
        return None if biases is None else torch.stack(biases).detach()

    @classmethod
    def calls_base(cls, linear: Any) -> bool:
        return True

    @staticmethod
    def call_problem_maybe(linear: Any) -> str | None:
        if torch.is_autocast_enabled(linear.weight0.device.type):
            name, dtype = type(linear).__name__, linear.weight0.dtype
            return f"found torch.autocast around a {name}, expected none: adapters compute in its weights' {dtype}"
        return None


class TEColumnParallelGrouped(_TEGroupedLinear):
    """Output rows of each expert are sharded."""

    class_name = "TEColumnParallelGroupedLinear"

    @staticmethod
    def layout_name(linear: Any, *call: Any) -> str:
        return "column_expert"


class TERowParallelGrouped(_TEGroupedLinear):
    """Input columns of each expert are sharded."""

    class_name = "TERowParallelGroupedLinear"

    @staticmethod
    def layout_name(linear: Any, *call: Any) -> str:
        return "row_expert"


def is_grouped_linear(module: nn.Module) -> bool:
    """Return whether a module is a grouped layer of one of these kinds."""
    return TEColumnParallelGrouped.matches(module) or TERowParallelGrouped.matches(module)


def is_grouped_mlp(module: nn.Module) -> bool:
    """Return whether a module holds the weights of several experts and no linear layers, as Megatron's GroupedMLP."""
    return type(module).__name__ == "GroupedMLP"


def expert_weights(linear: Any) -> tuple[nn.Parameter, ...]:
    """Return W0 `[out, in]` of each of a grouped layer's experts, or this rank's shards."""
    return tuple(linear.get_parameter(name) for name in _TEGroupedLinear.weight_names(linear))


def expert_biases(linear: Any) -> tuple[nn.Parameter, ...] | None:
    """Return the bias `[out]` of each of a grouped layer's experts, or this rank's `[out/tp]`; None without any."""
    names = (f"bias{number}" for number in range(linear.num_gemms))
    return tuple(map(linear.get_parameter, names)) if linear.use_bias else None


def _check_settings(path: str, linear: Any) -> None:
    """Raise ValueError, naming the layer and the setting, if the layer would be passed by or holds no plain weights."""
    name = type(linear).__name__
    if (problem := refused_setting_of_experts_maybe(linear.config)) is not None:
        raise ValueError(f"{path}: found a {name} with {problem}")
    for setting in ("single_grouped_weight", "single_grouped_bias"):
        # Of the layer, whatever its configuration says.
        if getattr(linear, setting, False):
            raise ValueError(f"{path}: found a {name} with {setting} = True, expected False: {A_PARAMETER_EACH}")
    if linear._tp_group is None:
        raise ValueError(
            f"{path}: found a {name} without an expert-tensor-parallel group, expected one that was built after "
            "megatron.core.parallel_state.initialize_model_parallel()"
        )


def _check_weight(name: str, weight: torch.Tensor) -> None:
    if getattr(weight, "gtp_remat_size", None) is not None:
        raise ValueError(
            f"{name}: found a shard of generalised tensor parallelism (GTP), expected the whole weight or a "
            "tensor-parallel shard of it"
        )
    if type(weight) is not nn.Parameter:
        raise ValueError(
            f"{name}: found a {type(weight).__name__}, expected a plain parameter; experts whose weights are quantised "
            "are not supported"
        )
