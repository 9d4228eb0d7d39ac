"""The oracle: DoRA as its paper states it (arXiv 2402.09353), dense, in float64, differentiated by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def row_norms(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Norms of the rows of W0 + s B A; a constant for the gradient (section 4.3 of the paper)."""
    return torch.linalg.vector_norm(weight + scaling * (lora_b @ lora_a), dim=1).detach()


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    scaling: float,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """y = g (W0 x + s B A d) + (g - 1) W0 (d - x) + bias, with g = m / n, and 1 where n is zero.

    d is x with the elements outside the mask `keep` dropped and the others scaled by 1 / (1 - dropout_p).
    """
    norm = row_norms(weight, lora_a, lora_b, scaling)
    is_zero = norm == 0
    gain = torch.where(is_zero, 1.0, magnitude / torch.where(is_zero, 1.0, norm))
    dropped = x if keep is None else x * keep / (1.0 - dropout_p)
    base = x @ weight.T
    low_rank = scaling * (dropped @ lora_a.T @ lora_b.T)
    y = gain * (base + low_rank) + (gain - 1.0) * ((dropped - x) @ weight.T)
    return y if bias is None else y + bias


def normalised(
    x: torch.Tensor, name: str, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float, zero_centered: bool
) -> torch.Tensor:
    """x over its root mean square, for LayerNorm after its mean is taken off, times gamma or 1 + gamma, plus bias."""
    assert name in ("RMSNorm", "LayerNorm")
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1] if name == "LayerNorm" else x
    spread = torch.sqrt(centred.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps)
    y = centred / spread * (weight + 1.0 if zero_centered else weight)
    return y if bias is None else y + bias


class ReferenceLinear(nn.Module):
    """An adapted layer that computes with `dora_linear`, to take a layer's place in a whole model.

    Args:
        weight, bias, lora_a, lora_b, magnitude: whole tensors; the last three become parameters.
        returns: makes what the layer returns out of its output.
        draw_mask: gives the dropout mask for an input; None for no dropout.
        prepare: makes of the layer's input what it multiplies and drops.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        magnitude: torch.Tensor,
        *,
        scaling: float,
        dropout_p: float = 0.0,
        returns: Callable[[torch.Tensor], Any] = lambda output: output,
        draw_mask: Callable[[torch.Tensor], torch.Tensor] | None = None,
        prepare: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", _double(weight))
        self.register_buffer("bias", None if bias is None else _double(bias))
        self.lora_a, self.lora_b, self.magnitude = map(nn.Parameter, map(_double, (lora_a, lora_b, magnitude)))
        self.scaling, self.dropout_p = scaling, dropout_p
        self.returns, self.draw_mask, self.prepare = returns, draw_mask, prepare

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> Any:
        x = self.prepare(x)
        keep = self.draw_mask(x) if self.draw_mask is not None and self.training else None
        output = dora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_a,
            self.lora_b,
            self.magnitude,
            scaling=self.scaling,
            keep=keep,
            dropout_p=self.dropout_p,
        )
        return self.returns(output)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().double()
