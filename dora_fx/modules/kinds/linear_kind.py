"""`LinearSpec` describes a linear layer, and a `LinearKind` makes the spec and knows how such layers are called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules import module as module_hooks

from dora_fx.function import BaseWeight, InputNorm, Layout, ParameterPlacement
from dora_fx.megatron import expert_number_maybe

A_PARAMETER_EACH = "an adapted layer reads a parameter for each expert"
_REFUSED_FOR_EXPERTS = {
    "use_transformer_engine_op_fuser": "the op fuser computes with the layers' parameters and never calls them",
    "moe_single_grouped_weight": A_PARAMETER_EACH,
    "moe_single_grouped_bias": A_PARAMETER_EACH,
    "moe_paged_stash": "tokens that overflow a page are in none of the experts' counts",
    "overlap_dispatch_backward_with_experts_wgrad": "the layers' backward passes would be run in two parts",
}


def refused_setting_of_experts_maybe(config: Any) -> str | None:
    """Return the first of Megatron's settings under which adapted experts would compute or train something else."""
    for name, reason in _REFUSED_FOR_EXPERTS.items():
        if getattr(config, name, False):
            return f"{name} = {getattr(config, name)!r}, expected False: {reason}"
    return None


@dataclass(frozen=True)
class LocalExperts:
    """The experts of one linear layer on this rank.

    Attributes:
        tp_group: name of the expert-tensor-parallel group, even of one rank: where a state dict is given none, Megatron
            takes the dense layers' group.
        tp_rank: this rank's place in it.
        allreduce: gradients are reduced over the data-parallel group of dense layers, not over that of experts.
            Megatron reads it from parameters, and megatron-core 0.16 sets it wrong on weights.
        first: the number of the first expert among all of the whole model's layer; None where its path has none.
        count: how many experts the layer holds, with consecutive numbers.
    """

    tp_group: str
    tp_rank: int
    allreduce: bool
    first: int | None
    count: int = 1

    @classmethod
    def of(cls, path: str, linear: Any, group: dist.ProcessGroup) -> LocalExperts:
        """Describe the expert of a layer of Megatron's `SequentialMLP`."""
        config = linear.config
        is_as_dense = config.expert_model_parallel_size == 1 and group.size() == config.tensor_model_parallel_size
        return cls(group.group_name, group.rank(), allreduce=is_as_dense, first=expert_number_maybe(path))


@dataclass(frozen=True)
class LinearSpec:
    """The description of a linear layer that DoRA can adapt; everything outside the kinds reads the layer through it.

    Attributes:
        kind: of the layer; computes with it.
        layout: its row in the layout table, outside of any call.
        in_features: of the whole layer, padding included.
        out_features: of the whole layer, padding included.
        padded_in_features: how many of the last input features are padding, zero in the weight.
        padded_out_features: how many of the last output features are padding, zero in the weight.
        row_blocks: blocks of output rows that are sharded each on its own; 2 for the gate and up of a linear_fc1.
        tp_group: its tensor-parallel group, even of one rank; None for a layer that is not parallel.
        weight: W0, or this rank's shard, as it is stored, of a grouped layer its first expert's; None for a layer that
            multiplies by a borrowed weight.
        bias: `[out]` or this rank's `[out/tp]`; None without one.
        input_norm: the norm that the layer applies to its input, whole on every rank; None without one.
        experts: the experts that the layer is of, whose tensor-parallel group `tp_group` is then; None for any other.
        expert_weights: of a grouped layer, those of all its experts; None for any other.
        expert_biases: likewise; None without any.
    """

    kind: type[LinearKind]
    layout: Layout
    in_features: int
    out_features: int
    padded_in_features: int
    padded_out_features: int
    row_blocks: int
    tp_group: dist.ProcessGroup | None
    weight: BaseWeight | None
    bias: nn.Parameter | None
    input_norm: InputNorm | None = None
    experts: LocalExperts | None = None
    expert_weights: tuple[nn.Parameter, ...] | None = None
    expert_biases: tuple[nn.Parameter, ...] | None = None

    @property
    def tp_size(self) -> int:
        return 1 if self.tp_group is None else self.tp_group.size()

    @property
    def tp_group_name(self) -> str:
        """Return the name of the tensor-parallel group; "" where it has one rank, which needs no collectives."""
        return self.tp_group.group_name if self.tp_group is not None and self.tp_size > 1 else ""

    @property
    def dim_multiple(self) -> int:
        """Return the number that an adapter's rank must be a multiple of."""
        return self.tp_size if self.layout.gathers_lora_a else 1

    def of_matrix(self, index: int) -> LinearSpec:
        """Return the description of one of the layer's matrices: itself, or one expert of a grouped layer."""
        if self.expert_weights is None:
            return self
        assert self.experts is not None and self.experts.first is not None
        biases = self.expert_biases
        return replace(
            self,
            weight=self.expert_weights[index],
            bias=None if biases is None else biases[index],
            experts=replace(self.experts, first=self.experts.first + index, count=1),
            expert_weights=None,
            expert_biases=None,
        )

    @property
    def weight_placement(self) -> ParameterPlacement:
        """Return the placement of the weight on the ranks."""
        shape = (self.true_sizes[1], self.true_sizes[0])
        dim = self.layout.weight_shard_dim
        return ParameterPlacement(dim, self.row_blocks if dim == 0 else 1, shape, (self.out_features, self.in_features))

    @property
    def row_placement(self) -> ParameterPlacement:
        """Return the placement of a tensor of one value per output row, such as a bias."""
        dim = 0 if self.layout.weight_shard_dim == 0 else None
        return ParameterPlacement(dim, self.row_blocks, (self.true_sizes[1],), (self.out_features,))

    @property
    def true_sizes(self) -> tuple[int, int]:
        """Return the input and output features of the whole layer, without padding."""
        return self.in_features - self.padded_in_features, self.out_features - self.padded_out_features


class LinearKind(ABC):
    """One kind of linear layer: a class of modules, and how such a module is described and called.

    Kinds are classes without instances. Nothing else in the package reads attributes of a linear layer. Dynamo traces
    their methods as well, and callers may switch settings between two calls, so every call asks for them.

    Attributes:
        class_module: of the one class of layers that the kind is of. Names serve for classes of packages that need
            not be installed.
        class_name: of that class.
    """

    class_module: ClassVar[str]
    class_name: ClassVar[str]

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether a module is of this kind. No subclass is: it may compute anything."""
        found = type(module)
        return (found.__module__, found.__qualname__) == (cls.class_module, cls.class_name)

    @classmethod
    @abstractmethod
    def describe(cls, path: str, linear: Any) -> LinearSpec:
        """Describe a layer of this kind, or refuse it.

        Raises:
            ValueError, TypeError: naming the path, what was found and what was expected.
        """

    @staticmethod
    @abstractmethod
    def layout_name(linear: Any) -> str:
        """Return the name of a call's layout; the call's further arguments are passed to it."""

    @classmethod
    def stored_weight(cls, linear: Any) -> BaseWeight | None:
        """Return W0, or this rank's shard, as the layer stores it; None where it multiplies by a borrowed one."""
        return cast(torch.Tensor | None, linear.weight)

    @staticmethod
    def weight_names(linear: Any) -> tuple[str, ...]:
        """Return the names of the layer's parameters that are matrices to adapt: one, or that of each of its experts.

        Of a layer that multiplies by a borrowed weight it is the name of none.
        """
        return ("weight",)

    @classmethod
    def format_problem_maybe(cls, linear: Any) -> str | None:
        """Return what was found and expected where the weight is not in a format that can be read, else None."""
        return None

    @staticmethod
    def added_bias(linear: Any) -> torch.Tensor | None:
        """Return the bias that a call adds itself, `[out]` or this rank's `[out/tp]`."""
        return linear.bias

    @staticmethod
    def returned_beside_output(linear: Any) -> tuple[torch.Tensor | None, ...] | None:
        """Return what a call returns after its output; None where it returns the output alone."""
        return None

    @classmethod
    def is_product_alone(cls, linear: Any) -> bool:
        """Return whether calling the layer now would do nothing but its product, bias and collective.

        The formula then computes both in the layer's place, with the low-rank product through the same collective. A
        kind returns True only for its own class, of which the source is known, and not for the classes of kinds that
        derive from it.
        """
        return False

    @classmethod
    def calls_base(cls, linear: Any) -> bool:
        """Return whether a call of the adapted layer calls the layer itself; otherwise `formula.py` does its part.

        Under a compiler it is always called, so that the graph has everything that it does; the passes take the product
        out where it is known to be no more.
        """
        return torch.compiler.is_compiling() or not cls.is_product_alone(linear)

    @staticmethod
    def call_problem_maybe(linear: Any) -> str | None:
        """Return what was found and expected if the adapted layer would not compute what the layer does, else None."""
        return None

    @staticmethod
    def input_norm(linear: Any) -> InputNorm | None:
        """Return the norm that a call applies to its input."""
        return None

    @staticmethod
    def gradient_problem_maybe(linear: Any) -> str | None:
        """Return why calls of a layer, adapted or not, give no gradient for their input; None where they do."""
        return None

    @staticmethod  # noqa: B027
    def prepare(linear: Any) -> None:
        """Have a layer, adapted or not, keep its weight as it is stored; its calls compute the same as before."""

    @staticmethod
    def product_eps(linear: Any, x: torch.Tensor) -> float:
        """Return how coarsely a call rounds the operands of its product, where that is coarser than their dtype."""
        return 0.0

    @staticmethod
    def trial_problem_maybe(linear: Any) -> str | None:
        """Return why the layer cannot be called with a few rows when it is attached; None where it can be."""
        return None


def runs_its_class_alone(linear: Any) -> bool:
    """Return whether a call now would run the forward of the layer's class and nothing around it."""
    weight = cast(torch.Tensor | None, linear.weight)
    device_type = "cuda" if weight is None else weight.device.type
    changed = "forward" in vars(linear) or has_own_hooks(linear) or _has_global_hooks()
    return not changed and not torch.is_autocast_enabled(device_type)


def has_own_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks that its calls run; `nn.Module` keeps them privately (torch 2.11 to 2.15)."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(each) > 0 for each in hooks)


def _has_global_hooks() -> bool:
    return any(
        (
            *(module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks),
            *(module_hooks._global_backward_hooks, module_hooks._global_backward_pre_hooks),
        )
    )
