"""Adapters of several Hugging Face layers as the adapter of the one Megatron layer that fuses them, exactly.

Layers that share A keep it. Otherwise ranks are stacked, which changes no product:

    A = [A_q]      B = [B_q         ]      s B A = [s B_q A_q]
        [A_k]          [    B_k     ]              [s B_k A_k]
        [A_v]          [         B_v]              [s B_v A_v]

with the rows of B in the fused layer's order. A layer that has no adapter has rows of zero in B, and its magnitude
is the norm of the base weight's rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from dora_fx.modules import low_rank_scaling


@dataclass(frozen=True)
class Part:
    """One Hugging Face layer's adapter: A `[r, in]`, B `[rows, r]`, m `[rows]`, and what scales B A."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    alpha: float
    use_rslora: bool

    @property
    def scaling(self) -> Fraction:
        """The factor of B A, exactly; under rsLoRA the float that PEFT computes."""
        dim = self.lora_a.shape[0]
        return Fraction(low_rank_scaling(self.alpha, dim, True)) if self.use_rslora else Fraction(self.alpha) / dim


@dataclass(frozen=True)
class JoinedAdapter:
    """The adapter of a whole Megatron layer, without padding.

    Attributes:
        lora_a, lora_b, magnitude: `[dim, in]`, `[out, dim]` and `[out]`; zero where `has_magnitude` is not set.
        has_magnitude: `[out]`, whether a row is adapted.
        alpha, use_rslora: see `low_rank_scaling`. rsLoRA's scaling goes into alpha where the rank is that of no part.
    """

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    has_magnitude: Tensor
    alpha: float
    use_rslora: bool

    @property
    def dim(self) -> int:
        return self.lora_a.shape[0]

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return low_rank_scaling(self.alpha, self.dim, self.use_rslora)


def join_parts(
    path: str, parts: Mapping[str, Part], rows: Mapping[str, Tensor], out_features: int, dim_multiple: int
) -> JoinedAdapter:
    """Join the adapters of the layers that a Megatron layer is made of.

    Args:
        path: of the Megatron layer, for messages.
        parts: by the paths of the Hugging Face layers; some may be missing, not all.
        rows: from `hf_parts.HFParts.rows`.
        out_features: of the Megatron layer; rows of no Hugging Face layer, which pad a vocabulary, have no adapter.
        dim_multiple: the joined rank is filled up with zeros to a multiple of it.

    Raises:
        ValueError: scalings differ by a factor that B cannot take over exactly, most others than powers of two.
    """
    first = next(iter(parts.values()))
    share_a = all(_same(part.lora_a, first.lora_a) and part.scaling == first.scaling for part in parts.values())
    dim = first.lora_a.shape[0] if share_a else sum(part.lora_a.shape[0] for part in parts.values())
    padded_dim = dim + -dim % dim_multiple
    lora_a = torch.zeros(padded_dim, first.lora_a.shape[1], dtype=_dtype([part.lora_a for part in parts.values()]))
    lora_b = torch.zeros(out_features, padded_dim, dtype=_dtype([part.lora_b for part in parts.values()]))
    magnitude = torch.zeros(out_features, dtype=_dtype([part.magnitude for part in parts.values()]))
    has_magnitude = torch.zeros(out_features, dtype=torch.bool)
    begin = 0
    for name, part in parts.items():
        end = begin + part.lora_a.shape[0]
        lora_a[begin:end] = part.lora_a
        scaled = _scaled(path, name, part.lora_b, part.scaling / first.scaling)
        lora_b[rows[name], begin:end] = scaled.to(lora_b)
        magnitude[rows[name]] = part.magnitude.to(magnitude)
        has_magnitude[rows[name]] = True
        begin = 0 if share_a else end
    use_rslora = first.use_rslora and padded_dim == first.lora_a.shape[0]
    alpha = first.alpha if use_rslora else float(first.scaling * padded_dim)
    return JoinedAdapter(lora_a, lora_b, magnitude, has_magnitude, alpha, use_rslora)


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """A dtype that holds the values of all tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _scaled(path: str, name: str, lora_b: Tensor, ratio: Fraction) -> Tensor:
    factor = _factor(path, name, ratio)
    scaled = lora_b * factor
    if not torch.equal(scaled / factor, lora_b):
        raise ValueError(
            f"{path}: B of {name} has values that {lora_b.dtype} does not hold times {factor:g}, expected some that it "
            "holds: the layer has one scaling for all of its parts"
        )
    return scaled


def _factor(path: str, name: str, ratio: Fraction) -> float:
    if not _is_power_of_two(ratio.numerator) or not _is_power_of_two(ratio.denominator):
        raise ValueError(
            f"{path}: the adapter of {name} is scaled by {float(ratio):g} times what its other layers are, "
            "expected a power of two, which B takes over exactly; train them with one lora_alpha / r"
        )
    return float(ratio)


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
