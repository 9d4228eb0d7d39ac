"""Row norms of W0 + s B A without ever making it.

    ||W0 + s B A||^2 = ||W0||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B (A A^T)) * B)

The first two terms and A A^T are sums over the input features. A rank that holds a slice of those features computes
its part of them and never needs another rank before the parts are added up, in `site_parameters.py`.

Rows are taken in blocks, so that temporaries take 32 MiB at most whatever the layer's size. Products and
sums accumulate in float32 (float64 in a float64 model): a float16 square overflows above 65504, and a bfloat16 cross
term would carry its rounding into the norm. The norm is a constant for the gradient (DoRA, arXiv 2402.09353,
section 4.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

from dora_fx.function.base_weight import BaseWeight, QuantisedWeight, weight_rows

_BLOCK_BYTES = 32 * 2**20
# Numbers for each element of a dequantised row: the element itself, and what a format or a cast makes on the way.
_DEQUANTISED = 2


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and magnitudes in a model of the given dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def base_norm_squared(weight: BaseWeight) -> torch.Tensor:
    """Squared row norms of the frozen weight, or this rank's part of them.

    Args:
        weight: W0 `[out, in]`, or this rank's shard of it.

    Returns:
        `[out]` (this rank's rows in a column layout), float32 or float64, summed over the input features that this
        rank holds.
    """
    if not isinstance(weight, QuantisedWeight):
        return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=norm_dtype(weight.dtype)).square()
    if any(isinstance(tensor, fx.Proxy) for tensor in weight.tensors):
        return handle_torch_function(base_norm_squared, weight.tensors, weight)
    dtype, (num_rows, columns) = norm_dtype(weight.dtype), weight.shape
    norms = [
        torch.linalg.vector_norm(weight_rows(weight, rows), dim=1, dtype=dtype)
        for rows in _row_blocks(num_rows, _DEQUANTISED * columns, dtype)
    ]
    return torch.cat(norms).square()


def norm_terms(
    base_norm_sq: torch.Tensor,
    weight: BaseWeight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scaling: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ||W0||^2 + 2 s rowsum((W0 A^T) * B) `[out]` and A A^T `[dim, dim]`, detached.

    Both are sums over the input features, so a rank that holds a slice of those gets partial sums.

    Args:
        base_norm_sq: from `base_norm_squared`.
        weight: W0 `[out, in]`, or this rank's shard.
        lora_a, lora_b: A `[dim, in]` and B `[out, dim]` as the products use them, see `site_parameters.py`.
        scaling: s, alpha / dim, `[1]`.
        dtype: accumulation dtype, `norm_dtype(weight.dtype)`.
    """
    operands = (base_norm_sq, lora_a, lora_b)
    if has_torch_function(operands):
        return handle_torch_function(
            norm_terms, operands, base_norm_sq, weight, lora_a, lora_b, scaling=scaling, dtype=dtype
        )
    lora_a, lora_b = lora_a.detach(), lora_b.detach()
    wide_a = lora_a.to(dtype)
    copies = int(weight.dtype != dtype and weight.device.type != "cuda")
    if isinstance(weight, QuantisedWeight):
        copies = _DEQUANTISED
    wide_per_row = 2 * lora_a.shape[0] + copies * weight.shape[1]
    cross = [
        (_wide_linear(weight_rows(weight, rows), lora_a, wide_a) * lora_b[rows]).sum(1)
        for rows in _row_blocks(weight.shape[0], wide_per_row, dtype)
    ]
    return torch.addcmul(base_norm_sq, _joined(cross), scaling, value=2.0), F.linear(wide_a, wide_a)


def norm_of_terms(
    linear_terms: torch.Tensor, gram: torch.Tensor, lora_b: torch.Tensor, *, scaling: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Row norms of W0 + scaling * B A, from terms that are sums over all input features.

    Args:
        linear_terms, gram: from `norm_terms`, summed over the ranks that hold slices of the input features.
        lora_b, scaling, dtype: as given to `norm_terms`.

    Returns:
        `[out]` in `dtype`: this rank's rows in a column layout, all rows on every rank otherwise.
    """
    operands = (linear_terms, gram, lora_b)
    if has_torch_function(operands):
        return handle_torch_function(norm_of_terms, operands, *operands, scaling=scaling, dtype=dtype)
    own = []
    for rows in _row_blocks(lora_b.shape[0], 3 * lora_b.shape[1], dtype):
        wide_b = lora_b.detach()[rows].to(dtype)
        own.append((F.linear(wide_b, gram) * wide_b).sum(1))
    squared = torch.addcmul(linear_terms, _joined(own), scaling.square())
    # Rounding can push a vanishing row below zero.
    return squared.clamp(min=0.0).sqrt()


def _wide_linear(weight: torch.Tensor, lora_a: torch.Tensor, wide_a: torch.Tensor) -> torch.Tensor:
    """W0 A^T `[rows, dim]` in the accumulation dtype."""
    if weight.dtype == wide_a.dtype:
        return F.linear(weight, wide_a)
    if weight.is_cuda:
        # The tensor cores read 16 bits and accumulate 32; this keeps what they accumulated.
        return torch.mm(weight, lora_a.t(), out_dtype=wide_a.dtype)
    return F.linear(weight.to(wide_a.dtype), wide_a)


def _joined(blocks_of_rows: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate blocks of rows; one alone is not copied, since a step has a few such small operations per layer."""
    return blocks_of_rows[0] if len(blocks_of_rows) == 1 else torch.cat(blocks_of_rows)


def _row_blocks(num_rows: int, wide_per_row: int, dtype: torch.dtype) -> list[slice]:
    """Slices of rows, whose temporaries hold `wide_per_row` numbers a row."""
    return blocks(num_rows, wide_per_row * dtype.itemsize)


def blocks(number: int, bytes_each: int) -> list[slice]:
    """Slices of rows or matrices, each with at most `_BLOCK_BYTES` of temporaries or of one of them."""
    step = max(1, _BLOCK_BYTES // bytes_each)
    return [slice(begin, begin + step) for begin in range(0, number, step)]
