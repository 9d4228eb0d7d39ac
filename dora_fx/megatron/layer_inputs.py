"""Make the hidden states that a layer is called with need a gradient, whatever came before the layer, or need none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# The input by which the output of `_NeedGradient` needs a gradient. It gets none itself, and may be on any device.
_LEAF = torch.zeros((), requires_grad=True)


class _NeedGradient(torch.autograd.Function):
    """Return a value that needs a gradient.

    Dynamo does not trace `requires_grad_` where a result that depends on the value leaves the graph; it traces this.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        # A view would not do: Megatron's checkpoint may replace the memory of its input, and refuses views.
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        return None, None


def need_gradient(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same memory that needs a gradient; nothing keeps that gradient."""
    return _NeedGradient.apply(value, _LEAF)


def with_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Return a call's arguments with hidden states that need a gradient, None if they need one already."""
    return _with_hidden_states(args, kwargs, lambda states: None if states.requires_grad else need_gradient(states))


def without_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Return a call's arguments with hidden states that need no gradient, None if they need none already."""
    return _with_hidden_states(args, kwargs, lambda states: states.detach() if states.requires_grad else None)


def _with_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Arguments | None:
    """Return a call's arguments with what `change` makes of the hidden states, None where it makes nothing."""
    # Rotary embeddings are floats too, and come after the hidden states where nothing has a name.
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        changed = change(kwargs["hidden_states"])
        return None if changed is None else (args, {**kwargs, "hidden_states": changed})
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            changed = change(value)
            return None if changed is None else ((*args[:index], changed, *args[index + 1 :]), kwargs)
    return None
