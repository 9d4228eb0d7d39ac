"""The kinds of linear layers that DoRA adapts. Adding one is a file here and a line in `KINDS`."""

from __future__ import annotations

from torch import nn

from dora_fx.modules.kinds.linear_kind import LinearKind, LinearSpec
from dora_fx.modules.kinds.megatron_linear import ColumnParallel, RowParallel
from dora_fx.modules.kinds.torch_linear import TorchLinear
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
    TorchLinear,
)


def describe_linear(path: str, module: nn.Module) -> LinearSpec:
    """Describe a linear layer, or refuse one that cannot be adapted.

    Args:
        path: of the module in its model; kinds go by its last name where Megatron does.
        module: the layer itself, not an adapted one.

    Raises:
        TypeError: of a class that is no kind, or an expert's.
        ValueError: as the kind's `describe`.
    """
    if getattr(module, "is_expert", False):
        raise TypeError(f"{path}: {type(module).__name__} of an expert is not supported")
    for kind in KINDS:
        if kind.matches(module):
            return kind.describe(path, module)
    supported = ", ".join(kind.class_name for kind in KINDS)
    found = f"{type(module).__module__}.{type(module).__qualname__}"
    raise TypeError(f"{path}: {found} has no DoRA layout; supported are {supported}")


def looks_like_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by a weight matrix, of whatever class, so that a pattern may mean it.

    Conv1D is what transformers calls the linear layers of GPT-2, and other libraries a convolution.
    """
    name = type(module).__name__
    is_linear = isinstance(module, nn.Linear) or "linear" in name.lower() or name == "Conv1D"
    return is_linear and not isinstance(module, nn.Embedding)


__all__ = ["LinearSpec", "TorchLinear", "bypasses_its_linears", "describe_linear", "looks_like_linear"]
