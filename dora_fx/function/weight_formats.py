"""The formats of quantised weights: how rows of the matrix are computed from the tensors that are stored.

    bitsandbytes 4 bits    W0[i] = code[packed[i]] * absmax[i // blocksize]       elements in row-major order
    bitsandbytes 8 bits    W0[row] = int8[row] * scale[row] / 127
    HQQ                    W0[group] = (integers[group] - zero[group]) * scale[group]       several groups in a byte
    torchao                the tensor subclass's own `dequantize`

A format is known by its name, since a graph holds names and no functions of other packages. Those that own the formats
are not imported here: a weight in a format exists only where its package is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Tensors = tuple[torch.Tensor, ...]


class WeightFormat(NamedTuple):
    """One way to store a matrix.

    Attributes:
        rows: from the tensors, the format's settings, the matrix's shape and dtype, and the first and the last row, to
            these rows, `[rows, in]` in that dtype.
        sources: the tensors that hold the bits, each with memory of its own.
    """

    rows: Callable[[Tensors, tuple[Any, ...], tuple[int, int], torch.dtype, int, int], torch.Tensor]
    sources: Callable[[Tensors], Iterator[torch.Tensor]]


def _rows_of_4bit(
    tensors: Tensors, settings: tuple[Any, ...], shape: tuple[int, int], dtype: torch.dtype, begin: int, end: int
) -> torch.Tensor:
    """Dequantise the blocks that the rows lie in; a block may begin in one row and end in another."""
    packed, absmax, *nested = tensors
    blocksize, quant_type, nested_blocksize = settings
    columns = shape[1]
    if nested:
        offset, nested_absmax, code = nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, nested_absmax, code, nested_blocksize, torch.float32
        )
        absmax = absmax + offset
    first_block, last_block = begin * columns // blocksize, -(-end * columns // blocksize)
    first, last = first_block * blocksize, min(last_block * blocksize, shape[0] * columns)
    # Two elements lie in a byte, and blocks are even.
    own = packed.view(torch.uint8).view(-1)[first // 2 : (last + 1) // 2].view(-1, 1)
    found = torch.ops.bitsandbytes.dequantize_4bit(
        own, absmax[first_block:last_block].contiguous(), blocksize, quant_type, [1, last - first], dtype
    )
    return found.view(-1)[begin * columns - first : end * columns - first].view(end - begin, columns)


def _rows_of_8bit(
    tensors: Tensors, settings: tuple[Any, ...], shape: tuple[int, int], dtype: torch.dtype, begin: int, end: int
) -> torch.Tensor:
    integers, scales = tensors
    # In the order of operations of bitsandbytes, whose bits these are.
    return (integers[begin:end] * scales[begin:end, None] * (1.0 / 127.0)).to(dtype)


def _rows_of_hqq(
    tensors: Tensors, settings: tuple[Any, ...], shape: tuple[int, int], dtype: torch.dtype, begin: int, end: int
) -> torch.Tensor:
    """Dequantise the groups of the rows; the high bits of the bytes hold the first groups, the low bits the last."""
    packed, scale, zero = tensors
    nbits, group_size = settings
    first, last = (row * shape[1] // group_size for row in (begin, end))
    groups, at_once = [], packed.shape[0]
    for part in range(first // at_once, -(-last // at_once)):
        own = packed[max(first - part * at_once, 0) : last - part * at_once]
        groups.append((own >> (8 - nbits * (part + 1))) & (2**nbits - 1))
    integers = torch.cat(groups).to(dtype)
    return ((integers - zero[first:last]) * scale[first:last]).view(end - begin, shape[1])


def _rows_of_subclass(
    tensors: Tensors, settings: tuple[Any, ...], shape: tuple[int, int], dtype: torch.dtype, begin: int, end: int
) -> torch.Tensor:
    weight: Any = tensors[0].detach()
    rows: torch.Tensor = weight[begin:end].dequantize()
    return rows


def _themselves(tensors: Tensors) -> Iterator[torch.Tensor]:
    # A tensor without dimensions has no rows to take samples of.
    yield from (tensor if tensor.dim() else tensor.view(1) for tensor in tensors)


def _inner(tensors: Tensors) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from _inner(tuple(getattr(tensor, name) for name in names))
        else:
            yield from _themselves((tensor,))


BITSANDBYTES_4BIT, BITSANDBYTES_8BIT, HQQ, TORCHAO = "bitsandbytes_4bit", "bitsandbytes_8bit", "hqq", "torchao"
FORMATS = {
    BITSANDBYTES_4BIT: WeightFormat(_rows_of_4bit, _themselves),
    BITSANDBYTES_8BIT: WeightFormat(_rows_of_8bit, _themselves),
    HQQ: WeightFormat(_rows_of_hqq, _themselves),
    TORCHAO: WeightFormat(_rows_of_subclass, _inner),
}
