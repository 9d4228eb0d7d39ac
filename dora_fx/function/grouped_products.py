"""Products of many experts' tokens with the experts' own matrices, as one differentiable op.

    y[t] = x[t] weight[e(t)]^T          e(t) is the expert of token t: tokens are sorted by experts, `ends` bounds them

How many tokens each expert gets is data of the graph, so that other routings compile nothing anew. The op hides what
the library's grouped product does not take: on a CPU no float64, under Inductor no float32, and everywhere no matrix
whose rows are no multiple of 16 bytes. Those products are made one by one, in plain ops.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_ALIGNMENT = 16


@torch.library.custom_op("dora_fx::grouped_product", mutates_args=())
def _grouped_product(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if _takes_grouped_mm(x, matrices):
        return F.grouped_mm(x, matrices, offs=ends)
    return products_one_by_one(x, matrices, ends)


@_grouped_product.register_fake
def _(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], matrices.shape[2])


@torch.library.custom_op("dora_fx::grouped_outer_product", mutates_args=())
def _grouped_outer_product(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if _takes_grouped_mm(x, y):
        return F.grouped_mm(x.t(), y, offs=ends)
    return outer_products_one_by_one(x, y, ends)


@_grouped_outer_product.register_fake
def _(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


@torch.library.custom_op("dora_fx::grouped_product_sums", mutates_args=())
def _grouped_product_sums(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    sums = x.new_empty(ends.shape[0], x.shape[1], dtype=dtype)
    for own, others, target in zip(_parts(x, ends), _parts(y, ends), sums, strict=True):
        torch.sum(own.to(dtype) * others, 0, out=target)
    return sums


@_grouped_product_sums.register_fake
def _(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], dtype=dtype)


def grouped_product_sums(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sums of x y over the tokens of each expert, `[experts, features]` in `dtype`, without a gradient.

    On a CPU Inductor would add element by element, atomically, which takes several times as long; on a GPU that is the
    fast way, and takes no look at `ends`.

    Args:
        x, y: `[tokens, features]`, sorted by experts.
        ends: as in `grouped_product`.
        dtype: of the products and their sums.
    """
    if x.device.type == "cpu":
        return _grouped_product_sums(x, y, ends, dtype)
    products = x.to(dtype) * y
    return products.new_zeros(ends.shape[0], x.shape[1]).index_add(0, experts_of(ends, x.shape[0]), products)


def experts_of(ends: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the number of each token's expert, int64 `[tokens]`."""
    places = torch.arange(tokens, dtype=torch.int32, device=ends.device)
    return torch.searchsorted(ends, places, right=True)


def _save_operands(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    x, matrices, ends = inputs
    needs_x, needs_matrices = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_matrices else None, matrices if needs_x else None, ends)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, matrices, ends = ctx.saved_tensors
    grad = grad.contiguous()
    dx = None if matrices is None else _grouped_product(grad, matrices.transpose(1, 2), ends)
    d_matrices = None if x is None else _grouped_outer_product(x, grad, ends)
    return dx, d_matrices, None


_grouped_product.register_autograd(_differentiate, setup_context=_save_operands)


def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the product of each token with the matrix of its expert, `[tokens, out]`, in x's dtype.

    Args:
        x: `[tokens, in]`, sorted by experts.
        weight: `[experts, out, in]`, of x's dtype.
        ends: int32 `[experts]`, where each expert's tokens end: its first is where those of the one before end. An
            expert may have none. The last is the number of tokens.
    """
    return _grouped_product(x.contiguous(), weight.transpose(1, 2), ends)


@torch.no_grad()
def products_one_by_one(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return x[e] matrices[e] of all experts e, `[tokens, out]`, as plain products; matrices are `[experts, in, out]`.

    On an accelerator it waits for the device, to read `ends`.
    """
    y = x.new_empty(x.shape[0], matrices.shape[2])
    for own, matrix, target in zip(_parts(x, ends), matrices, _parts(y, ends), strict=True):
        torch.mm(own, matrix, out=target)
    return y


@torch.no_grad()
def outer_products_one_by_one(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return x[e]^T y[e] of all experts e, `[experts, in, out]`, as plain products; zero for an expert without tokens.

    On an accelerator it waits for the device, to read `ends`.
    """
    products = x.new_empty(ends.shape[0], x.shape[1], y.shape[1])
    for own, others, target in zip(_parts(x, ends), _parts(y, ends), products, strict=True):
        torch.mm(own.t(), others, out=target)
    return products


def aligned_size(size: int, dtype: torch.dtype) -> int:
    """Return the least size of rows, at least `size`, that the library's grouped product takes; only 16 bits has one.

    Products of other dtypes are made one by one, whatever their size.
    """
    multiple = _ALIGNMENT // dtype.itemsize
    return -(-size // multiple) * multiple if dtype is torch.bfloat16 else size


def _parts(x: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
    bounds = ends.tolist()
    return x.split([end - start for start, end in zip([0, *bounds[:-1]], bounds, strict=True)])


def _takes_grouped_mm(*operands: torch.Tensor) -> bool:
    """Return whether the library's product takes the operands; strides have to be multiples of 16 bytes."""
    return all(
        operand.dtype is torch.bfloat16
        and operand.shape[0] > 0
        # Of a matrix of tokens one size is a stride, of an expert's matrix either may be.
        and all(size == aligned_size(size, operand.dtype) for size in operand.shape[1:])
        for operand in operands
    )
