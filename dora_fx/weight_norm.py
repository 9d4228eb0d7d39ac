"""Row norms of W0 + s B A without ever making it.

    ||W0 + s B A||^2 = ||W0||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B (A A^T)) * B)

The largest temporary is `[out, dim]`. GEMMs take the model's dtype; everything after them accumulates in
float32 (float64 in a float64 model). The norm is a constant for the gradient (DoRA, arXiv 2402.09353,
section 4.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dora_fx.collectives import reduce_from_group
from dora_fx.placement import LAYOUTS


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and magnitudes in a model of the given dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def base_norm_squared(weight: torch.Tensor, layout: str, tp_group: str) -> torch.Tensor:
    """Squared row norms of the frozen weight, complete on every rank.

    Args:
        weight: W0 `[out, in]`, or this rank's shard of it.

    Returns:
        `[out]` (this rank's rows in a column layout), float32 or float64.
    """
    dtype = norm_dtype(weight.dtype)
    squares = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=dtype).square()
    return reduce_from_group(squares, tp_group) if LAYOUTS[layout].shards_input_features else squares


def norm_terms(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rowsum((W0 A^T) * B) `[out]` and A A^T `[dim, dim]`, detached.

    Both are sums over the input features, so a rank that holds a slice of those gets partial sums.

    Args:
        weight: W0 `[out, in]`, or this rank's shard.
        lora_a, lora_b: A `[dim, in]` and B `[out, dim]` as the products use them, see `site_parameters.py`.
        dtype: accumulation dtype, `norm_dtype(weight.dtype)`.
    """
    weight, lora_a, lora_b = weight.detach(), lora_a.detach(), lora_b.detach()
    wide_a = lora_a.to(dtype)
    cross = (F.linear(weight, lora_a).to(dtype) * lora_b.to(dtype)).sum(1)
    return cross, F.linear(wide_a, wide_a)


def norm_of_terms(
    base_norm_sq: torch.Tensor,
    cross: torch.Tensor,
    gram: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Row norms of W0 + scaling * B A, from terms that are sums over all input features.

    Args:
        base_norm_sq: `[out]`, from `base_norm_squared`.
        cross, gram, dtype: from and of `norm_terms`.
        lora_b: as given to `norm_terms`.

    Returns:
        `[out]` in `dtype`: this rank's rows in a column layout, all rows on every rank otherwise.
    """
    wide_b = lora_b.detach().to(dtype)
    own = (F.linear(wide_b, gram) * wide_b).sum(1)
    squared = base_norm_sq + cross * (2.0 * scaling) + own * scaling**2
    # Rounding can push a vanishing row below zero.
    return squared.clamp(min=0.0).sqrt()
