"""Sharded state dicts of the adapters of grouped layers, with the keys and global shapes of one adapter per expert.

    one adapter per expert     key ...experts.experts.linear_fc1.adapter.linear_in.weight, `[layers, experts, dim, in]`,
                               of which each entry is one expert's part
    here                       the same key and global shape, of which one entry is the part of all experts of a rank

So what one form saved the other loads, at any number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from dora_fx.function import ParameterPlacement
from dora_fx.modules.kinds import GroupedExperts

Offset = tuple[int, int, int]


def grouped_sharded_state_dict(
    tensors: Mapping[str, torch.Tensor],
    placements: Mapping[str, ParameterPlacement],
    experts: GroupedExperts,
    tp_size: int,
    prefix: str,
    sharded_offsets: tuple[Offset, ...],
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return A, B and m of this rank's experts, or tensors that are sharded as they are, as Megatron's shards.

    Args:
        tensors: `[experts, ...]`, or flat as m, of this rank, by the parameters' names in the adapter.
        placements: of the parameters, by the same names.
        experts: of the layer.
        tp_size: how many ranks share each expert.
        prefix: of the keys, ending in `adapter.`.
        sharded_offsets: offsets that Megatron prepends, such as the layer's place among all layers.
        metadata: Megatron's.

    Raises:
        ValueError: the checkpoint is to have a key for each expert (`singleton_local_shards`).
    """
    if (metadata or {}).get("singleton_local_shards", False):
        raise ValueError(
            f"{prefix}: found a checkpoint with singleton_local_shards, which has a key for each expert, expected one "
            "with a key for all, as an adapter of a grouped layer has one tensor for all of them"
        )
    return {
        prefix + name: _shard(tensor, placements[name], experts, tp_size, prefix + name, sharded_offsets)
        for name, tensor in tensors.items()
    }


def _shard(
    tensor: torch.Tensor,
    placement: ParameterPlacement,
    experts: GroupedExperts,
    tp_size: int,
    key: str,
    sharded_offsets: tuple[Offset, ...],
) -> ShardedTensor | ShardedTensorFactory:
    # Of ranks that hold the same, Megatron saves the part of the one whose numbers are all zero.
    replica_id = (0, 0 if placement.shard_dim is not None else experts.tp_rank, experts.dp_rank)
    build = functools.partial(_blocks, placement=placement, experts=experts, tp_size=tp_size, offsets=sharded_offsets)
    is_flat = tensor.dim() < len(placement.shape)
    if not is_flat and placement.blocks == 1:
        [whole] = build(key, tensor, replica_id)
        return whole
    join = functools.partial(_join, dim=placement.shard_dim, is_flat=is_flat)
    return ShardedTensorFactory(key, tensor, build, join, replica_id)


def _join(parts: list[torch.Tensor], *, dim: int | None, is_flat: bool) -> torch.Tensor:
    """Make the tensor of its blocks."""
    whole = parts[0] if dim is None else torch.cat(parts, dim)
    return whole.flatten() if is_flat else whole


def _blocks(
    key: str,
    tensor: torch.Tensor,
    replica_id: tuple[int, ...],
    flattened_range: slice | None = None,
    *,
    placement: ParameterPlacement,
    experts: GroupedExperts,
    tp_size: int,
    offsets: tuple[Offset, ...],
) -> list[ShardedTensor]:
    """Return the shards of a tensor: one for each block of rows that is sharded by itself, as gate and up are."""
    if flattened_range is not None:
        # An old format of the distributed optimizer's state, which Megatron's own shards refuse too (0.16 to 0.19).
        raise ValueError(f"{key}: found a part of a flat tensor, expected the whole tensor")
    first, dim = len(offsets), placement.shard_dim
    shards = []
    if tensor.dim() < len(placement.shape):
        tensor = tensor.detach().view(experts.count, -1)
    # One block is the parameter itself, by which optimizers find their state.
    parts = [tensor] if dim is None or placement.blocks == 1 else tensor.detach().chunk(placement.blocks, dim)
    for block, part in enumerate(parts):
        of_experts = (first, experts.ep_rank, experts.ep_size)
        of_rows = () if dim is None else ((first + dim, block * tp_size + experts.tp_rank, placement.blocks * tp_size),)
        shards.append(
            ShardedTensor.from_rank_offsets(
                key, part, *offsets, of_experts, *of_rows, replica_id=replica_id, prepend_axis_num=first
            )
        )
    return shards
