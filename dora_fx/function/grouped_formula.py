"""The DoRA function of a layer that holds the linear layers of many experts, over the layer's own output.

    z[t] = z0[t] + s B[e] A[e] x[t]           z0[t] = W0[e] x[t], what the layer returned, e = e(t) the token's expert
    y[t] = z[t] + delta[e] z[t] + bias[e]     as in `formula.py`, with a delta for each expert's rows

and with dropout d(x), one mask for both terms, where the layer is called a second time for z0[t] = W0[e] d(x[t]),

    y[t] = W0[e] x[t] + bias[e] + (z[t] + delta[e] z[t] - z0[t])

A is `[experts, dim, in]`, B `[experts, out, dim]`, m and delta `[experts, out]`. The layer itself is called, since it
has neither a norm nor a collective that DoRA could share, and its product, in whatever precision, stays its own. What
is here is one graph for all experts: the numbers of tokens are data in it, and an expert may have none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dora_fx.function.dropout import DropoutFactors, draw_dropout_key, dropout
from dora_fx.function.grouped_products import aligned_size, experts_of, grouped_product, grouped_product_sums
from dora_fx.function.placement import Layout
from dora_fx.function.site_parameters import SiteOperands


def grouped_adapted_linear(
    x: torch.Tensor,
    base_output: torch.Tensor,
    bias: torch.Tensor | None,
    counts: torch.Tensor,
    operands: SiteOperands,
    scaling: torch.Tensor,
    dropped: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the output of one DoRA layer of many experts, `[tokens, out]`, in the dtype of `base_output`.

    Args:
        x: the layer's input `[tokens, in]`, sorted by experts, with the rows that pad each expert's tokens.
        base_output: what the layer returned for x, bias included, `[tokens, out]`.
        bias: `[experts, out]`, frozen, None if there is none in `base_output`.
        counts: int32 `[experts]`, how many tokens each expert has; together the number of tokens.
        operands: with A `[experts, dim, in]`, B `[experts, out, dim]`, m and the scales `[experts, out]`.
        scaling: s, `[1]`.
        dropped: what dropout leaves of x, and what the layer returned for that; None without dropout.
    """
    if dropped is not None:
        changed = grouped_adapted_linear(*dropped, bias, counts, operands, scaling)
        return base_output + (changed - dropped[1])
    ends = counts.cumsum(0, dtype=torch.int32)
    lora_a, lora_b = _aligned(operands.lora_a, operands.lora_b)
    hidden = grouped_product(x.to(lora_a.dtype), lora_a, ends) * scaling.view(())
    low_rank = grouped_product(hidden, lora_b, ends)
    z = (base_output + low_rank).to(base_output.dtype)
    return _ScaleRowsOfExperts.apply(z, bias, operands.magnitude, *operands.scale, ends)


def drop_tokens(x: torch.Tensor, factors: DropoutFactors, layout: Layout, tp_group: str) -> torch.Tensor:
    """Return what dropout leaves of a layer's input `[tokens, in]`.

    Masks go by a token's place among those of all experts of this rank, and are the same, or parts of the same, on the
    ranks of the expert-tensor-parallel group.
    """
    return dropout(x, draw_dropout_key(x, tp_group), *factors, sharded_features=layout.shards_input_features)


def _aligned(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the rank of the factors with zeros to what a grouped product takes; the product of both stays the same."""
    dim = lora_a.shape[1]
    missing = aligned_size(dim, lora_a.dtype) - dim
    return (F.pad(lora_a, (0, 0, 0, missing)), F.pad(lora_b, (0, missing))) if missing else (lora_a, lora_b)


class _ScaleRowsOfExperts(torch.autograd.Function):
    """As `row_scale.scale_rows`, with the rows of each token's expert; m's gradient sums over an expert's own tokens.

    `output` is `[tokens, out]`, `bias`, m and the scales `[experts, out]`, m and the scales float32 at least, `ends`
    int32 `[experts]`. Rows that were gathered before, as `mixture.rows_of` does for samples, would be kept for the
    backward pass as four tensors of the output's size; here they are gathered twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        bias: torch.Tensor | None,
        magnitude: torch.Tensor,
        delta: torch.Tensor,
        grad_gain: torch.Tensor,
        grad_scale: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(output, bias, grad_gain, grad_scale, ends)
        expert = experts_of(ends, output.shape[0])
        z = output if bias is None else output - bias[expert]
        return (output + z * delta[expert]).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, bias, grad_gain, grad_scale, ends = ctx.saved_tensors
        expert = experts_of(ends, output.shape[0])
        z = output if bias is None else output - bias[expert]
        dz = (grads[0] * grad_gain[expert]).to(output.dtype)
        sums = grouped_product_sums(dz, z, ends, grad_scale.dtype)
        return dz, None, sums * grad_scale, None, None, None, None
