"""Check that the tensors of an adapted layer have dtypes and devices that go with the base weight's.

Each call checks dtypes, devices and shapes alone. Compiled code guards on these anyway, so the checks cost nothing
there: a tensor that was replaced, or cast through `.data`, fails a guard, and the check raises when the call is traced
again.
"""

from __future__ import annotations

import torch

from dora_fx.function import BaseWeight, CachedParameters, StoredParameters, norm_dtype
from dora_fx.modules.adapter import ParallelLinearDoRAAdapter

_BUFFERS = (
    "base_norm_sq",
    *(f"adapter.{name}" for name in ("scaling_factor", "dropout_threshold", "dropout_rescale")),
    *(f"cached_{name}" for name in CachedParameters._fields),
)


def check_factors(path: str, adapter: ParallelLinearDoRAAdapter, weight: BaseWeight) -> None:
    """Raise ValueError, naming the factor, unless A and B have the base weight's dtype and device and their shapes.

    Args:
        path: of the adapted layer.
        adapter: its parameters on this rank.
        weight: W0 `[out, in]`, or this rank's shard of it.
    """
    for name, factor in (("linear_in", adapter.linear_in), ("linear_out", adapter.linear_out)):
        found = factor.weight
        if found.dtype != weight.dtype or found.device != weight.device:
            raise ValueError(
                f"{path}.adapter.{name}: found {found.dtype} on {found.device}, "
                f"expected the base weight's {weight.dtype} on {weight.device}"
            )
        if tuple(found.shape) != factor.shape:
            raise ValueError(
                f"{path}.adapter.{name}: found a shard of shape {tuple(found.shape)}, expected {factor.shape}"
            )


def check_magnitude(path: str, magnitude: torch.Tensor, weight: BaseWeight, norm: torch.Tensor) -> None:
    """Raise ValueError unless m has the dtype, device and shape of norms of the base weight.

    Args:
        path: of the adapted layer.
        magnitude: m `[out]`, or this rank's `[out/tp]`.
        weight: W0 `[out, in]`, or this rank's shard of it.
        norm: any tensor of the shape that m should have.
    """
    wide = norm_dtype(weight.dtype)
    if magnitude.device != weight.device or magnitude.shape != norm.shape:
        raise ValueError(
            f"{path}.adapter.weight_magnitude: found shape {tuple(magnitude.shape)} on {magnitude.device}, "
            f"expected {tuple(norm.shape)} on the base weight's {weight.device}"
        )
    if magnitude.dtype != wide:
        raise ValueError(
            f"{path}.adapter.weight_magnitude: found {magnitude.dtype}, expected {wide} beside a {weight.dtype} base "
            "weight, or rounding would undo its updates; cast models with .to(), which leaves it, not through .data"
        )


def check_buffers(path: str, stored: StoredParameters, cached: CachedParameters) -> None:
    """Raise ValueError, naming the buffer, unless every buffer has the dtype and device that the base weight asks for.

    Args:
        path: of the adapted layer.
        stored, cached: of one call of it.
    """
    weight, wide = stored.weight, norm_dtype(stored.dtype)
    device, narrow = weight.device, weight.dtype
    expected = (wide, wide, torch.int64, wide, wide, wide, wide, narrow, narrow)
    buffers = (stored.base_norm_sq, stored.scaling, stored.dropout_threshold, stored.dropout_rescale, *cached)
    for name, buffer, dtype in zip(_BUFFERS, buffers, expected, strict=True):
        if buffer is not None and (buffer.dtype != dtype or buffer.device != device):
            raise ValueError(
                f"{path}.{name}: found {buffer.dtype} on {buffer.device}, expected {dtype} on the base weight's "
                f"{device}; call dora_fx.invalidate_norms(model) after tensors were cast or moved one by one"
            )
