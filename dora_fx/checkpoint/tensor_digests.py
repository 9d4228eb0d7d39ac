"""Digests of sharded tensors that do not depend on the parallel layout; they tell one base model from another.

The digest of a tensor is the sum over its elements of

    bits(element) * mix(row) * mix(column) * mix(layer) * mix(expert)      modulo 2^64

where row, column, layer and expert are the element's indices in the whole tensor, as far as it has these axes, and
bits(element) is an integer. Integer sums do not depend on their order, so each rank sums its shards and the sums are
added. A zero adds nothing, so the padding that makes a layer divisible by the number of ranks does not change a digest.

It protects from loading onto the wrong base by mistake, not from an attacker: collisions are easy to construct.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from dora_fx.cache import mix

# Elements that are widened to int64 at once, so that a digest takes some tens of MiB and no copy of the weight.
_ELEMENTS_AT_ONCE = 1 << 22


def shard_digests(shards: Iterable[ShardedTensor]) -> dict[str, int]:
    """Compute this rank's part of the digest of every key; `add_digests` adds the ranks' parts."""
    digests: dict[str, int] = {}
    for shard in shards:
        # Each element counts once, however many ranks hold a copy of it.
        if is_main_replica(shard.replica_id):
            digests[shard.key] = digests.get(shard.key, 0) + _digest(shard)
    return digests


def differing_copies(digests_of_ranks: Iterable[dict[tuple[str, tuple[int, ...]], int]]) -> list[str]:
    """Return the keys of tensors whose copies differ between ranks, from the `copy_digests` of all ranks."""
    seen: dict[tuple[str, tuple[int, ...]], int] = {}
    differing = set()
    for digests in digests_of_ranks:
        for place, value in digests.items():
            if seen.setdefault(place, value) != value:
                differing.add(place[0])
    return sorted(differing)


def copy_digests(shards: Iterable[ShardedTensor]) -> dict[tuple[str, tuple[int, ...]], int]:
    """Compute the digest of every shard that this rank holds, by key and offset."""
    return {(shard.key, tuple(shard.global_offset)): _digest(shard) % 2**64 for shard in shards}


def add_digests(parts: Iterable[dict[str, int]]) -> dict[str, str]:
    """Add the parts of all ranks; return the digest of every whole tensor by key, as hexadecimal text."""
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
    # A bias is hashed as a matrix of one column.
    matrix = tensor.reshape(tensor.shape[0], -1)
    column = mix(start_column[0] if start_column else 0, matrix.shape[1], tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = max(_ELEMENTS_AT_ONCE // max(matrix.shape[1], 1), 1)
    for first in range(0, matrix.shape[0], step):
        rows = matrix[first : first + step]
        row = mix(start_row + first, rows.shape[0], tensor.device)
        total += ((_bits(rows) * column).sum(1) * row).sum()
    for axis, index in enumerate(prepended):
        # Expert 1 of layer 2 has other numbers than expert 2 of layer 1.
        total *= mix(index + (axis << 32), 1, tensor.device)[0]
    return int(total)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements' bits as int64. 16-bit elements are widened to float32; minus zero counts as zero."""
    if tensor.dtype != torch.float64:
        return (tensor.float() + 0.0).view(torch.int32).to(torch.int64)
    return (tensor + 0.0).view(torch.int64)
