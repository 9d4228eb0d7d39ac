"""Adapters with NaN or inf: found by name before they are kept, loaded, merged or handed on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dora_fx.modules.linear_wrapper import DoRALinear


def not_finite_maybe(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return a message that names the first tensor with NaN or inf; None where all of them are finite."""
    for name, tensor in tensors:
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            return f"{name}: found NaN or inf, expected finite values"
    return None


def adapter_not_finite_maybe(sites: Iterable[tuple[str, DoRALinear]]) -> str | None:
    """Return a message that names the first A, B or magnitude with NaN or inf on this rank; None if there is none.

    Args:
        sites: adapted layers with their paths in the whole model.
    """
    return not_finite_maybe(
        (f"{path}.adapter.{name}", parameter.detach())
        for path, site in sites
        for name, parameter in site.adapter.named_parameters()
    )
