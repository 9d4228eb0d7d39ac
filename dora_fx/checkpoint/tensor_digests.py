"""Digests of sharded tensors that are the same at every parallel layout, to tell one base model from another.

The digest of a tensor is the sum over its elements of

    bits(element) * mix(row) * mix(column) * mix(layer)      modulo 2^64

with the element's place in the whole tensor and its bits as an integer. Integer sums do not depend on their order,
so ranks add up what they hold. A zero counts nothing, so neither does the padding of a layer that is made larger to
divide by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from dora_fx.cache import mix

_ROWS_AT_ONCE = 1 << 22


def shard_digests(shards: Iterable[ShardedTensor]) -> dict[str, int]:
    """This rank's part of the digest of every key; `add_digests` joins the ranks' parts."""
    digests: dict[str, int] = {}
    for shard in shards:
        if is_main_replica(shard.replica_id):
            digests[shard.key] = digests.get(shard.key, 0) + _digest(shard)
    return digests


def differing_copies(digests_of_ranks: Iterable[dict[tuple[str, tuple[int, ...]], int]]) -> list[str]:
    """Keys of the tensors of which ranks hold different copies, from the `copy_digests` of all ranks."""
    seen: dict[tuple[str, tuple[int, ...]], int] = {}
    differing = set()
    for digests in digests_of_ranks:
        for place, value in digests.items():
            if seen.setdefault(place, value) != value:
                differing.add(place[0])
    return sorted(differing)


def copy_digests(shards: Iterable[ShardedTensor]) -> dict[tuple[str, tuple[int, ...]], int]:
    """Digest of every shard that this rank holds, by key and place."""
    return {(shard.key, tuple(shard.global_offset)): _digest(shard) % 2**64 for shard in shards}


def add_digests(parts: Iterable[dict[str, int]]) -> dict[str, str]:
    """Digests of whole weights by key, as hexadecimal text, from the parts of all ranks."""
    totals: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            totals[key] = totals.get(key, 0) + value
    return {key: f"{total % 2**64:016x}" for key, total in sorted(totals.items())}


def _digest(shard: ShardedTensor) -> int:
    tensor = shard.data.detach()
    offsets = shard.global_offset
    prepended = offsets[: shard.prepend_axis_num]
    start_row, *start_column = offsets[shard.prepend_axis_num :]
    # A bias counts as one column.
    matrix = tensor.reshape(tensor.shape[0], -1)
    column = mix(start_column[0] if start_column else 0, matrix.shape[1], tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = max(_ROWS_AT_ONCE // max(matrix.shape[1], 1), 1)
    for first in range(0, matrix.shape[0], step):
        rows = matrix[first : first + step]
        row = mix(start_row + first, rows.shape[0], tensor.device)
        total += ((_bits(rows) * column).sum(1) * row).sum()
    for layer in prepended:
        total *= mix(layer, 1, tensor.device)[0]
    return int(total)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bits as int64; those of float32 for 16-bit elements. Minus zero counts as zero."""
    if tensor.dtype != torch.float64:
        return (tensor.float() + 0.0).view(torch.int32).to(torch.int64)
    return (tensor + 0.0).view(torch.int64)
