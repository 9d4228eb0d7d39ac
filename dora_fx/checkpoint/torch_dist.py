"""Reads and writes shards in Megatron's torch_dist format, with consecutive layers or experts of a rank in one piece.

Megatron writes each layer of each rank as a tensor of its own, in forked processes that a spawned manager watches.
Adapters are small: a file header per layer would add more than one percent to their size, and starting the manager
takes longer than writing. So consecutive layers are joined along the layer axis that their global tensors have anyway,
and torch's writer writes them in this process, where its errors reach every rank. Keys, global shapes and files are
those of the format, so that any reader of it can load any part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemWriter

from dora_fx.checkpoint.checked_reader import CheckedReader, load_checked


class SaveStrategy(TorchDistSaveShardedStrategy):
    """Writes one file per rank, in this process and without forking."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        """Write this rank's shards. Every rank calls it; it raises on every rank or on none."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        joined = {key: [_join(run) for run in _runs_of_neighbours(shards)] for key, shards in by_key.items()}
        checkpoint.save(
            mcore_to_pyt_state_dict(joined, False),
            storage_writer=FileSystemWriter(str(checkpoint_dir)),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )


def read_state(state: dict[str, Any], reader: CheckedReader, common: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a sharded state dict as `dist_checkpointing.load` does, but through a reader that checks the files.

    Args:
        state: nested dicts and lists of shards, factories of shards and values that are not saved; it is not changed.
        reader: of the checkpoint.
        common: the state that is not sharded; the rest is merged into it.

    Raises:
        UnsafeFileError, OSError: the format does not allow a file, or it cannot be read.
    """
    loaded = {} if common is None else common
    sharded, own, factories = load_preprocess(state)
    merge(loaded, own)
    merge(loaded, read_shards(extract_sharded_base(sharded)[0], reader))
    return apply_factory_merges(loaded, factories)


def read_shards(sharded_state_dict: dict[str, Any], reader: CheckedReader) -> dict[str, Any]:
    """Read the shards of a nested state dict into new tensors on the CPU; return a copy with tensors in their places.

    A global shape may be larger or smaller than the stored one: padding for one number of ranks is cut off, or filled
    with zeros, for another. The caller checks the shapes without padding.
    """
    by_key: dict[str, list[ShardedBase]] = {}
    for shard in nested_values(sharded_state_dict):
        by_key.setdefault(shard.key, []).append(shard)
    # One request per run of layers, as they were written: a request per layer would read each piece once per layer.
    runs = [run for shards in by_key.values() for run in _runs_of_neighbours(shards)]
    loaded = _read_requests({str(index): _request(run) for index, run in enumerate(runs)}, reader)
    # By identity, since shards are dataclasses with tensors, which are neither hashable nor comparable.
    values: dict[int, Any] = {}
    for index, run in enumerate(runs):
        axis = _axis_in_front_maybe(run[0])
        parts = [loaded[str(index)]] if axis is None else loaded[str(index)].flatten(0, axis).unbind(0)
        values |= {id(shard): part for shard, part in zip(run, parts, strict=True)}
    copy, _ = extract_matching_values(sharded_state_dict, lambda shard: True)
    return dict_list_map_inplace(lambda shard: values[id(shard)], copy)


def _read_requests(requests: dict[str, ShardedBase], reader: CheckedReader) -> dict[str, Any]:
    """Read the requested shards: `TorchDistLoadShardedStrategy.load` with a reader that checks."""
    tensors = {shard.key: shard for shard in requests.values() if isinstance(shard, ShardedTensor)}
    reader.check(tensors)
    by_key, _, names = _replace_state_dict_keys_with_sharded_keys(requests)
    state = mcore_to_pyt_state_dict(by_key, True)
    planner = MCoreLoadPlanner(
        allow_shape_mismatch_sharded_tensors=tensors, flatten_state_dict=False, flatten_sharded_tensors=False
    )
    load_checked(state, reader, planner)
    values = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
    return {name: value for key in values for name, value in zip(names[key], values[key], strict=True)}


def _axis_in_front_maybe(shard: ShardedBase) -> int | None:
    """Return the last axis in front of a shard's own, that of layers or behind it that of experts; None without one."""
    return shard.prepend_axis_num - 1 if isinstance(shard, ShardedTensor) and shard.prepend_axis_num else None


def _runs_of_neighbours(shards: Sequence[ShardedBase]) -> list[list[ShardedBase]]:
    """Group the shards of one key into runs that differ in nothing but consecutive numbers of layers, or of experts."""
    axis, *several = {_axis_in_front_maybe(shard) for shard in shards}
    if several or axis is None:
        return [[shard] for shard in shards]
    # Replicas are grouped apart: joined shards have one replica_id, by which Megatron picks the rank that writes.
    by_place: dict[Any, list[list[ShardedBase]]] = {}
    for shard in sorted(shards, key=lambda shard: shard.global_offset[axis]):
        others = (*shard.global_offset[:axis], *shard.global_offset[axis + 1 :])
        runs = by_place.setdefault((others, shard.local_shape, shard.replica_id), [])
        if runs and runs[-1][-1].global_offset[axis] + 1 == shard.global_offset[axis]:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return [run for runs in by_place.values() for run in runs]


def _request(run: Sequence[ShardedBase]) -> ShardedBase:
    # Without data: torch allocates new tensors, and the parameters stay as they are until everything is checked.
    shard = _join([shard.without_data() for shard in run])
    return replace(shard, allow_shape_mismatch=True) if isinstance(shard, ShardedTensor) else shard


def _join(run: Sequence[ShardedBase]) -> ShardedBase:
    """Join a run of shards into one of several layers or experts; one without an axis for them is returned as it is."""
    first = run[0]
    axis = _axis_in_front_maybe(first)
    if axis is None:
        return first
    shape = (*[1] * axis, len(run), *first.local_shape)
    return replace(
        first,
        data=None if first.data is None else torch.stack([shard.data.detach() for shard in run]).view(shape),
        local_shape=shape,
        # A count of equal fragments per axis would be wrong, since ranks may hold different numbers of layers.
        axis_fragmentations=None,
        prepend_axis_num=0,
    )
