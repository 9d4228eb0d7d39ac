"""Finds numbers in an adapter's files that the model's dtype cannot hold, before anything is attached."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_fx.function import norm_dtype
from dora_fx.hf.join import Part
from dora_fx.modules import not_finite_maybe


def check_numbers(where: str, part: Part, dtype: torch.dtype | None) -> None:
    """Check that tensors, scaling and low-rank product of an adapter stay finite in a layer, and do not vanish.

    Args:
        where: the folder and the layer, for messages.
        part: the adapter.
        dtype: of the layer's weight, which A and B take; None where the layer has none of its own.

    Raises:
        ValueError: naming what is not finite, or is too large or too small.
    """
    own = part.lora_a.dtype if dtype is None else dtype
    of_norms = norm_dtype(own)
    largest = {}
    for name, tensor, held_in in (
        ("lora_a", part.lora_a, own),
        ("lora_b", part.lora_b, own),
        ("magnitude", part.magnitude, of_norms),
    ):
        largest[name] = _largest(where, name, tensor, held_in)
    scaling, limits = float(part.scaling), torch.finfo(own)
    if not limits.tiny <= scaling <= limits.max:
        raise ValueError(
            f"{where}: lora_alpha {part.alpha:g} gives a scaling of {scaling:g}, expected one that {own} holds"
        )
    # No element of s B A is larger; norms add up the squares of a row's.
    product = largest["lora_a"] * largest["lora_b"] * part.lora_a.shape[0] * scaling
    bound = (torch.finfo(of_norms).max / part.lora_a.shape[1]) ** 0.5
    if product > bound:
        raise ValueError(
            f"{where}: lora_alpha {part.alpha:g} times B A may be as large as {product:.1e}, expected less than "
            f"{bound:.1e}, of which {of_norms} holds the norm"
        )


def _largest(where: str, name: str, tensor: Tensor, dtype: torch.dtype) -> float:
    if (problem := not_finite_maybe([(f"{where}: {name}", tensor)])) is not None:
        raise ValueError(problem)
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if not torch.isfinite(tensor.to(dtype)).all():
        raise ValueError(f"{where}: {name} has values up to {largest:.1e}, which the model's {dtype} does not hold")
    return largest
