"""The kinds of linear layers that DoRA adapts. Adding one is a file here and a line in `KINDS`."""

from __future__ import annotations

from torch import nn

from dora_fx.function import QuantisedWeight
from dora_fx.modules.kinds.bitsandbytes_linear import BitsAndBytes4bit, BitsAndBytes8bit
from dora_fx.modules.kinds.grouped_linear import (
    GroupedExperts,
    TEColumnParallelGrouped,
    TERowParallelGrouped,
    expert_weights,
    is_grouped_linear,
    is_grouped_mlp,
)
from dora_fx.modules.kinds.hqq_linear import HQQLinear
from dora_fx.modules.kinds.linear_kind import (
    LinearKind,
    LinearSpec,
    LocalExperts,
    refused_setting_of_experts_maybe,
)
from dora_fx.modules.kinds.megatron_linear import ColumnParallel, RowParallel
from dora_fx.modules.kinds.refused import refused_package_maybe
from dora_fx.modules.kinds.torch_linear import TorchLinear
from dora_fx.modules.kinds.torchao_linear import TorchAOLinear
from dora_fx.modules.kinds.transformer_engine import (
    TEColumnParallel,
    TEDuplicated,
    TELayerNormColumnParallel,
    TERowParallel,
    bypasses_its_linears,
)

KINDS: tuple[type[LinearKind], ...] = (
    ColumnParallel,
    RowParallel,
    TELayerNormColumnParallel,
    TEColumnParallel,
    TERowParallel,
    TEDuplicated,
    TEColumnParallelGrouped,
    TERowParallelGrouped,
    BitsAndBytes4bit,
    BitsAndBytes8bit,
    HQQLinear,
    # Its layers are of the class of the last one.
    TorchAOLinear,
    TorchLinear,
)


def describe_linear(path: str, module: nn.Module) -> LinearSpec:
    """Describe a linear layer, or refuse one that cannot be adapted.

    Args:
        path: of the module in its model; kinds go by its last name where Megatron does.
        module: the layer itself, not an adapted one.

    Raises:
        TypeError: of a class that is no kind.
        ValueError: as the kind's `describe`.
    """
    if (kind := kind_of_maybe(module)) is not None:
        return kind.describe(path, module)
    if (reason := refused_package_maybe(module)) is not None:
        raise TypeError(f"{path}: {reason}")
    supported = ", ".join(dict.fromkeys(kind.class_name for kind in KINDS))
    found = f"{type(module).__module__}.{type(module).__qualname__}"
    raise TypeError(f"{path}: {found} has no DoRA layout; supported are {supported}")


def kind_of_maybe(module: nn.Module) -> type[LinearKind] | None:
    """Return the kind of a module; None for one that cannot be adapted."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def weights_of(linear: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return the parameters of a layer of a known kind that are its matrices: one, or one of each of its experts."""
    kind = kind_of_maybe(linear)
    assert kind is not None, type(linear)
    return tuple(map(linear.get_parameter, kind.weight_names(linear)))


def quantised_weight_maybe(module: nn.Module) -> QuantisedWeight | None:
    """Return the weight of a layer, adapted or not, that stores it quantised.

    None for any other module, and for a format that cannot be read, see `format_problem_maybe`.
    """
    kind = kind_of_maybe(module)
    weight = None if kind is None or kind.format_problem_maybe(module) is not None else kind.stored_weight(module)
    return weight if isinstance(weight, QuantisedWeight) else None


def format_problem_maybe(module: nn.Module) -> str | None:
    """Return what was found and expected where a layer stores its weight in a format that cannot be read."""
    kind = kind_of_maybe(module)
    return None if kind is None else kind.format_problem_maybe(module)


def looks_like_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by a weight matrix, of whatever class, so that a pattern may mean it.

    Conv1D is what transformers calls the linear layers of GPT-2, and other libraries a convolution.
    """
    name = type(module).__name__
    is_linear = isinstance(module, nn.Linear) or "linear" in name.lower() or name == "Conv1D"
    return is_linear and not isinstance(module, nn.Embedding)


__all__ = [
    "GroupedExperts",
    "LinearKind",
    "LinearSpec",
    "LocalExperts",
    "TorchLinear",
    "bypasses_its_linears",
    "describe_linear",
    "expert_weights",
    "format_problem_maybe",
    "is_grouped_linear",
    "is_grouped_mlp",
    "kind_of_maybe",
    "looks_like_linear",
    "quantised_weight_maybe",
    "refused_setting_of_experts_maybe",
    "weights_of",
]
