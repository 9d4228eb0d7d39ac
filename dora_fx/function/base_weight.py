"""The frozen weight of a layer as it is stored: a plain matrix, or a quantised one.

Both have `shape`, `dtype`, `device`, `is_meta` and `requires_grad` of the matrix W0 that they stand for. Its values are
read through the functions of this file alone: some rows, all of it, its product, and the tensors whose bits tell
whether it changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from dora_fx.function.weight_formats import FORMATS


class QuantisedWeight(NamedTuple):
    """A matrix in one of `weight_formats.FORMATS`.

    Attributes:
        tensors: that are stored; in a graph, nodes.
        format: name of the format.
        shape: of the matrix, `[out, in]`.
        dtype: that rows are dequantised to.
        settings: numbers and names that the format needs.
    """

    tensors: tuple[torch.Tensor, ...]
    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    settings: tuple[Any, ...]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def is_meta(self) -> bool:
        return self.tensors[0].is_meta

    @property
    def requires_grad(self) -> bool:
        return self.tensors[0].requires_grad


BaseWeight = torch.Tensor | QuantisedWeight


def tensors_of(weight: BaseWeight) -> tuple[torch.Tensor, ...]:
    """Return the tensors that a graph takes for a weight."""
    return weight.tensors if isinstance(weight, QuantisedWeight) else (weight,)


def sources_of(weight: BaseWeight) -> tuple[torch.Tensor, ...]:
    """Return the tensors whose bits are the weight, each with memory of its own and with rows.

    Where the bytes of a tensor divide by the number of rows, its rows are those of the matrix, so that a sample of them
    is one of the matrix.
    """
    if not isinstance(weight, QuantisedWeight):
        return (weight,)
    return tuple(
        found.detach().view(weight.shape[0], -1) if found.numel() % weight.shape[0] == 0 else found.detach()
        for found in FORMATS[weight.format].sources(weight.tensors)
    )


def weight_rows(weight: BaseWeight, rows: slice) -> torch.Tensor:
    """Return rows of W0, detached: a view of a plain matrix, or the dequantised rows `[rows, in]` in its dtype."""
    if not isinstance(weight, QuantisedWeight):
        return weight.detach()[rows]
    begin, end, _ = rows.indices(weight.shape[0])
    tensors = tuple(tensor.detach() for tensor in weight.tensors)
    return FORMATS[weight.format].rows(tensors, weight.settings, weight.shape, weight.dtype, begin, end)


def whole_of(weight: BaseWeight) -> torch.Tensor:
    """Return W0 `[out, in]`, detached; a plain matrix itself."""
    return weight_rows(weight, slice(None)) if isinstance(weight, QuantisedWeight) else weight.detach()


class _DequantisedProduct(torch.autograd.Function):
    """W0 x, which keeps what is stored for the backward pass, and not the dequantised matrix."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, described: QuantisedWeight, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.described = described._replace(tensors=())
        return F.linear(x, whole_of(described._replace(tensors=tensors)).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors: Sequence[torch.Tensor] = ctx.saved_tensors
        weight = whole_of(ctx.described._replace(tensors=tuple(tensors)))
        return grads[0] @ weight.to(grads[0].dtype), None, *(None for _ in tensors)


def frozen_product(x: torch.Tensor, weight: BaseWeight) -> torch.Tensor:
    """Return W0 x, `[..., out]`; the weight gets no gradient where it is quantised."""
    if not isinstance(weight, QuantisedWeight):
        return F.linear(x, weight)
    if has_torch_function_unary(x):
        return handle_torch_function(frozen_product, (x,), x, weight)
    output: torch.Tensor = _DequantisedProduct.apply(x, weight._replace(tensors=()), *weight.tensors)
    return output
