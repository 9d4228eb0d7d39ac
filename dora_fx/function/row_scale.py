"""The scale of each output row, g = m / n, and how a product takes it.

    y = g z = z + delta z           delta = (m - n) / n
    dz = g dy                       dm = sum_t dy z / n = sum_t dz z / (g n)

delta is exactly zero where m = n, so a model with fresh adapters gives the base model's bits. It loses no precision
where g is near one, as it is in training. The gradient of m is computed of dz, which the products need anyway, so dy
need not be stored. That divides by g; a g near zero is moved away from it, by less than a rounding in the products'
dtype.

Between two steps of the optimizer a `RowScale` does not change, so it is cached with the norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._guards import TracingContext
from torch.overrides import handle_torch_function, has_torch_function_unary

_ROWS_AT_ONCE = 16


class RowScale(NamedTuple):
    """The scale of each output row, `[out]` or this rank's `[out/tp]`, float32 at least, detached.

    Attributes:
        delta: (m - n) / n, and zero (so g = 1) for a row of zeros.
        grad_gain: g, but no nearer to zero than a sixteenth of the products' rounding.
        grad_scale: 1 / (grad_gain n), and zero for a row of zeros.
    """

    delta: torch.Tensor
    grad_gain: torch.Tensor
    grad_scale: torch.Tensor


def magnitude_delta(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Return (m - n) / n per row, `[out]`, and zero (so g = 1) for a row of zeros."""
    is_zero = norm == 0
    safe_norm = torch.where(is_zero, 1.0, norm)
    return torch.where(is_zero, 0.0, (magnitude - norm) / safe_norm)


def row_scale(magnitude: torch.Tensor, norm: torch.Tensor, dtype: torch.dtype) -> RowScale:
    """Compute the scale of each row.

    Args:
        magnitude, norm: m and n, `[out]`.
        dtype: of the products.
    """
    magnitude = magnitude.detach()
    delta = magnitude_delta(magnitude, norm)
    gain, floor = delta + 1.0, torch.finfo(dtype).eps / 16
    gain = torch.where(gain.abs() < floor, torch.where(gain < 0, -floor, floor), gain)
    is_zero = norm == 0
    return RowScale(delta, gain, torch.where(is_zero, 0.0, 1.0 / (gain * torch.where(is_zero, 1.0, norm))))


# The forward functions below take a `RowScale` field by field: autograd saves no tensors out of a tuple.
class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        bias: torch.Tensor | None,
        magnitude: torch.Tensor,
        delta: torch.Tensor,
        grad_gain: torch.Tensor,
        grad_scale: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(output, bias, grad_gain, grad_scale)
        z = output if bias is None else output - bias
        # One pass: eager code would otherwise write and read a tensor of the output's size once more.
        return torch.addcmul(output, z, delta).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, bias, grad_gain, grad_scale = ctx.saved_tensors
        z = output if bias is None else output - bias
        dz = (grads[0] * grad_gain).to(output.dtype)
        # A sum over all tokens, in the dtype of magnitudes.
        products = dz.to(grad_scale.dtype) * z
        return dz, None, _sum_to_size(products, grad_scale.shape) * grad_scale, None, None, None


def _sum_to_size(products: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum over tokens: over all dimensions in front of those of `shape`, and those that a mixed batch broadcasts.

    Inductor's C++ goes down column after column, and so from row to row for every sixteen numbers. Sums of sixteen rows
    let it go along these rows; `benchmarks/README.md` has the times of the kernels before and after. torch's own sum
    does well by itself, and on a GPU the sums would be written and read once more.
    """
    if products.dim() == len(shape) or products.shape[products.dim() - len(shape) :] != shape:
        return products.sum_to_size(shape)
    rows = products.reshape(-1, *shape)
    # Private, read in torch 2.11 to 2.15: the context of a graph that torch.compile makes, its backward pass included.
    is_compiled = TracingContext.try_get() is not None
    if is_compiled and rows.is_cpu and isinstance(rows.shape[0], int) and rows.shape[0] % _ROWS_AT_ONCE == 0:
        rows = rows.view(-1, _ROWS_AT_ONCE, *shape).sum(1)
    return rows.sum(0)


def scale_rows(
    output: torch.Tensor, *, bias: torch.Tensor | None, magnitude: torch.Tensor, scale: RowScale
) -> torch.Tensor:
    """Scale the rows of a layer's output, but not the bias that is in it: y = g (output - bias) + bias.

    Args:
        output: `[..., out]`.
        bias: `[out]`, frozen, None if there is none in the output.
        magnitude: m, which takes the gradient; its values are not read. `[out]`, or one for each sample or token in a
            shape that broadcasts with the output's, as `mixture.rows_of` gathers them.
        scale: of each row, in the magnitude's shape.
    """
    if has_torch_function_unary(output):
        return handle_torch_function(scale_rows, (output,), output, bias=bias, magnitude=magnitude, scale=scale)
    return _ScaleRows.apply(output, bias, magnitude, *scale)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, magnitude: torch.Tensor, delta: torch.Tensor, grad_gain: torch.Tensor, grad_scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(grad_gain, grad_scale)
        return delta.view_as(delta)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_gain, grad_scale = ctx.saved_tensors
        return grads[0] * (grad_gain * grad_scale), None, None, None


def trained_delta(magnitude: torch.Tensor, scale: RowScale) -> torch.Tensor:
    """`scale.delta` `[out]`, whose gradient goes to the magnitude: d delta / dm = 1 / n."""
    if has_torch_function_unary(magnitude):
        return handle_torch_function(trained_delta, (magnitude,), magnitude, scale)
    return _WithGradient.apply(magnitude, *scale)
