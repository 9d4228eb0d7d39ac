"""Sharded state dicts of adapters for `megatron.core.dist_checkpointing`, from the layout table alone.

Keys and global shapes are those of the reference (Megatron-Bridge). Two things differ, because the reference
loses data there: a row layer's magnitude is the one true value on every rank, and a gated linear_fc1's magnitude
is split into gate and up as its weight and B are, so that loading at another tensor-parallel size keeps the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from dora_fx.function import ParameterPlacement
from dora_fx.ranks import resolve_group


def adapter_sharded_state_dict(
    tensors: dict[str, torch.Tensor],
    placements: Mapping[str, ParameterPlacement],
    tp_group_name: str,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return A, B and m, or tensors that are sharded as they are, as Megatron's shards of global tensors.

    Args:
        tensors: of this rank, by the parameters' names in the adapter.
        placements: of the parameters, by the same names.
        tp_group_name: of the adapter's tensor-parallel group, "" for a layer that is not parallel.
        prefix: of the keys, ending in `adapter.`.
        sharded_offsets: offsets that Megatron prepends, such as the layer's place among all layers.
        metadata: Megatron's; its `dp_cp_group` is filled in where it is missing.

    Raises:
        ValueError: a tensor has more blocks of rows than two, which Megatron's factory would save as if it had one.
    """
    for name, placement in placements.items():
        if placement.blocks not in (1, 2):
            raise ValueError(f"{prefix}{name}: found {placement.blocks} blocks of rows, expected 1 or 2")
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    dp_cp_group = metadata["dp_cp_group"]
    tp_group = resolve_group(tp_group_name) if tp_group_name else parallel_state.get_tensor_model_parallel_group()
    sharded = make_sharded_tensors_for_checkpoint(
        tensors,
        prefix,
        {name: placement.shard_dim for name, placement in placements.items() if placement.shard_dim is not None},
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=dp_cp_group,
    )
    in_blocks = [name for name in tensors if placements[name].blocks == 2]
    if in_blocks:
        groups = {"tp_group": tp_group, "dp_group": dp_cp_group}
        # megatron-core 0.16 takes the groups from the sharded tensor.
        known = inspect.signature(apply_swiglu_sharded_factory).parameters
        groups = {name: group for name, group in groups.items() if name in known}
        for key in (prefix + name for name in in_blocks):
            sharded[key] = apply_swiglu_sharded_factory(
                sharded[key], sharded_offsets, metadata.get("singleton_local_shards", False), **groups
            )
    return sharded
