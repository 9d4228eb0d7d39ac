"""The norm that a layer applies to its own input, as Transformer Engine's LayerNormLinear does.

    RMSNorm      y = x / sqrt(mean(x^2) + eps) * gain                     gain = gamma, or 1 + gamma where zero-centred
    LayerNorm    y = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias

All of it is computed in float32 at least, the gain too, and rounded to the input's dtype once, as Transformer Engine's
kernels do. It comes before a sequence-parallel gather: each rank normalises the tokens that it holds.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

NormName = Literal["RMSNorm", "LayerNorm"]


class InputNorm(NamedTuple):
    """A norm of the last dimension.

    Attributes:
        weight: gamma `[in]`, whole on every rank.
        bias: `[in]`, None without one.
        name: of the norm.
        eps: added to the mean square.
        zero_centered: the gain is 1 + gamma.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    name: NormName
    eps: float
    zero_centered: bool


def normalise(x: torch.Tensor, norm: InputNorm) -> torch.Tensor:
    """Normalise `[..., in]`; the result has x's dtype."""
    if norm.name == "RMSNorm":
        return rms_norm(x, norm.weight, norm.eps, norm.zero_centered)
    return layer_norm(x, norm.weight, norm.bias, norm.eps, norm.zero_centered)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> torch.Tensor:
    """See `InputNorm`."""
    if has_torch_function_unary(x):
        return handle_torch_function(rms_norm, (x,), x, weight, eps, zero_centered)
    wide = _wide(x)
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normalised * _gain(weight, zero_centered, wide.dtype)).to(x.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, zero_centered: bool
) -> torch.Tensor:
    """See `InputNorm`."""
    if has_torch_function_unary(x):
        return handle_torch_function(layer_norm, (x,), x, weight, bias, eps, zero_centered)
    wide = _wide(x)
    gain = _gain(weight, zero_centered, wide.dtype)
    wide_bias = None if bias is None else bias.to(wide.dtype)
    return F.layer_norm(wide, wide.shape[-1:], gain, wide_bias, eps).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gain(weight: torch.Tensor, zero_centered: bool, dtype: torch.dtype) -> torch.Tensor:
    """Gamma or 1 + gamma in a wider dtype than gamma's own, in which the sum would be rounded."""
    gain = weight.to(dtype)
    return gain + 1.0 if zero_centered else gain
