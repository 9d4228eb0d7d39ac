"""Row norms of W0 + s B A of all experts of one layer, as `weight_norm.py` computes those of one matrix.

On an accelerator the matrices of several experts are multiplied in one batch: those that together take 32 MiB at most,
since a batch is a copy of them. An expert whose matrix is larger is taken by itself, in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dora_fx.function.weight_norm import base_norm_squared, blocks, norm_terms


def grouped_base_norm_squared(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared row norms of the experts' frozen weights `[out, in]`, or of this rank's shards: `[experts, out]`."""
    return torch.stack([base_norm_squared(weight) for weight in weights])


def grouped_norm_terms(
    base_norm_sq: torch.Tensor,
    weights: Sequence[torch.Tensor],
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scaling: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the terms of `weight_norm.norm_terms` of every expert, `[experts, out]` and `[experts, dim, dim]`.

    Args:
        base_norm_sq: `[experts, out]`, from `grouped_base_norm_squared`.
        weights: W0 `[out, in]` of each expert, or this rank's shards.
        lora_a, lora_b: A `[experts, dim, in]` and B `[experts, out, dim]` as the products use them.
        scaling, dtype: as in `weight_norm.norm_terms`.
    """
    # A batch, and its copy in the accumulation dtype.
    bytes_per_expert = weights[0].numel() * (weights[0].dtype.itemsize + dtype.itemsize)
    terms = [
        _terms_of(base_norm_sq[block], weights[block], lora_a[block], lora_b[block], scaling, dtype)
        for block in blocks(len(weights), bytes_per_expert)
    ]
    linear_terms, grams = zip(*terms, strict=True)
    return torch.cat(linear_terms), torch.cat(grams)


def grouped_norm_of_terms(
    linear_terms: torch.Tensor, gram: torch.Tensor, lora_b: torch.Tensor, *, scaling: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Row norms `[experts, out]` in `dtype` from terms that are sums over all input features; see `weight_norm`."""
    experts, rows, dim = lora_b.shape
    squared = []
    for block in blocks(experts, 3 * rows * dim * dtype.itemsize):
        wide_b = lora_b[block].detach().to(dtype)
        squared.append((torch.bmm(wide_b, gram[block]) * wide_b).sum(-1))
    # Rounding can push a vanishing row below zero.
    return (linear_terms + torch.cat(squared) * scaling**2).clamp(min=0.0).sqrt()


def _terms_of(
    base_norm_sq: torch.Tensor,
    weights: Sequence[torch.Tensor],
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(weights) == 1:
        linear_terms, gram = norm_terms(base_norm_sq[0], weights[0], lora_a[0], lora_b[0], scaling=scaling, dtype=dtype)
        return linear_terms[None], gram[None]
    wide_a, wide_b = lora_a.detach().to(dtype), lora_b.detach().to(dtype)
    cross = (_wide_products(weights, lora_a.detach(), wide_a) * wide_b).sum(-1)
    return base_norm_sq + cross * (2.0 * scaling), torch.bmm(wide_a, wide_a.transpose(1, 2))


def _wide_products(weights: Sequence[torch.Tensor], lora_a: torch.Tensor, wide_a: torch.Tensor) -> torch.Tensor:
    """W0 A^T `[experts, rows, dim]` in the accumulation dtype, as `weight_norm` has it for one matrix.

    On a CPU one by one: there the copy that a batch is takes longer than the products.
    """
    if weights[0].device.type == "cpu":
        dtype = wide_a.dtype
        return torch.stack([weight.detach().to(dtype) @ a.t() for weight, a in zip(weights, wide_a, strict=True)])
    weight = torch.stack([each.detach() for each in weights])
    if weight.dtype != wide_a.dtype:
        return torch.bmm(weight, lora_a.transpose(1, 2), out_dtype=wide_a.dtype)
    return torch.bmm(weight, wide_a.transpose(1, 2))
