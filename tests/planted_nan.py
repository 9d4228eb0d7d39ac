"""NaN in the training of any model with adapters, from hooks of torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from dora_fx.modules.linear_wrapper import DoRALinear

Where = Literal["gradient", "output", "held-out output"]


@contextmanager
def planted_nan(where: Where, calls: Callable[[int], bool], input_size: int) -> Iterator[None]:
    """Plant NaN in an output of adapted layers, or in its gradient, while a model trains in eager mode.

    Args:
        where: in the gradients, in outputs while training, or in outputs while evaluating.
        calls: which calls of a layer, counted from 1; in training those with gradients count, others are as the last.
        input_size: of the layers.
    """
    counts: dict[DoRALinear, int] = {}

    def plant(module: Any, _: object, output: Any) -> Any:
        if not isinstance(module, DoRALinear) or module.base_weight.shape[1] != input_size:
            return None
        if module.training == (where == "held-out output"):
            return None
        if torch.is_grad_enabled() or where == "held-out output":
            counts[module] = counts.get(module, 0) + 1
        if not calls(counts.get(module, 0)):
            return None
        if where == "gradient":
            if output[0].requires_grad:
                output[0].register_hook(_to_nan)
            return None
        return output[0] * math.nan, *output[1:]

    handle = register_module_forward_hook(plant)
    try:
        yield
    finally:
        handle.remove()


def _to_nan(gradient: Tensor) -> Tensor:
    return gradient * math.nan
