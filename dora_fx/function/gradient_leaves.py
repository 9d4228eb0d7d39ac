"""Send the gradients of values to other tensors, leaves, in which autograd adds them up.

A factor that every rank needs whole is gathered from shards, and each rank's gradient of it is a partial sum. Where
those sums are completed once per optimizer step, each rank's gradient goes to a leaf of the whole factor's shape, and
the backward pass has no collective for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function


class _LeadGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_values: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value.view_as(value) for value in tensors[:num_values])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *[None] * len(grads), *grads


def lead_gradients(values: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return the values; the gradient of each goes to the leaf of its shape, whose own values are never read."""
    if not leaves:
        return values
    if has_torch_function((*values, *leaves)):
        return handle_torch_function(lead_gradients, (*values, *leaves), values, leaves)
    return _LeadGradients.apply(len(values), *values, *leaves)
