"""The weight that a merged layer has, and its dtype.

W' = g * (W0 + s B A)        g = 1 + delta = m / n, and 1 for a row of zeros
"""

from __future__ import annotations

import torch
from torch import nn

from dora_fx.function import QuantisedWeight, complete_parameters, norm_dtype, whole_of
from dora_fx.megatron import walk
from dora_fx.modules import DoRALinear, kind_of_maybe, quantised_weight_maybe


@torch.no_grad()
def merged_weight(site: DoRALinear, index: int = 0) -> torch.Tensor:
    """Return g * (W0 + s B A), `[out, in]` or this rank's shard; float32, or float64 in a float64 model.

    Every rank of the layer's tensor-parallel group calls it.

    Args:
        site: an adapted layer.
        index: which of its `base_weights`, of which a layer that holds several experts has one each.
    """
    stored = site.matrix_parameters(index)
    [operands] = complete_parameters([stored])
    weight = whole_of(stored.weight)
    return merge_tensors(weight, operands.lora_a, operands.lora_b, operands.scale.delta, site.scaling)


@torch.no_grad()
def merge_tensors(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, delta: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return (1 + delta) * (W0 + scaling * B A) in float32 at least.

    Args:
        weight: W0 `[out, in]`.
        lora_a, lora_b: A `[dim, in]` and B `[out, dim]`.
        delta: `[out]`, from `row_scale.magnitude_delta`.
    """
    wide = norm_dtype(weight.dtype)
    merged = torch.addmm(weight.to(wide), lora_b.to(wide), lora_a.to(wide), alpha=scaling)
    return merged.mul_(1.0 + delta.to(wide)[:, None])


def served_dtype(chunk: nn.Module, layer: nn.Module) -> torch.dtype:
    """Return the dtype of a layer's merged weight: its own, and that of activations where it is quantised.

    Activations have the dtype of a model's embeddings and norms; a quantised layer takes them in any.

    Args:
        chunk: that the layer is in.
        layer: a `DoRALinear`, or a quantised layer that is not adapted.
    """
    weight = layer.base_weight if isinstance(layer, DoRALinear) else quantised_weight_maybe(layer)
    assert weight is not None
    if not isinstance(weight, QuantisedWeight):
        return weight.dtype
    others = (named.module for named in walk(chunk, DoRALinear) if kind_of_maybe(named.module) is None)
    parameters = (
        parameter
        for module in others
        if not isinstance(module, DoRALinear)
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point()
    )
    first = next(parameters, None)
    return weight.dtype if first is None else first.dtype
