"""Loads adapters from Megatron-Bridge's distributed checkpoints, which have the same keys and global shapes as ours.

Two magnitudes do not hold what their global shapes say when Bridge saves at a tensor-parallel size n above 1:

    gated linear_fc1    rows in the order of the ranks, [gate_0; up_0; gate_1; up_1; ...]; put back to [gate; up]
    row layers          rank 0's alone, trained against the partial norm ||W_0 + s B A_0|| of rank 0's input
                        features; each rank trained its own, and those of the other ranks are lost

The second kind cannot be recovered. Setting it to the norm of W + s B A keeps the trained direction with a gain of one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn
from torch.distributed.checkpoint import TensorStorageMetadata

from dora_fx.attach import adapted_layers
from dora_fx.checkpoint.checked_reader import METADATA, CheckedReader
from dora_fx.checkpoint.sharded_model import all_shards
from dora_fx.checkpoint.torch_dist import read_state
from dora_fx.megatron import ModelT, check_unsharded, chunks_of, unwrap, update_main_copies
from dora_fx.modules import DoRALinear, not_finite_maybe
from dora_fx.ranks import raise_on_every_rank, world_group

logger = logging.getLogger(__name__)

_MAGNITUDE = "weight_magnitude"


@dataclass(frozen=True)
class RequestedShard:
    """A parameter of an adapted layer, and the shards to read for it.

    Attributes:
        site: the layer.
        path: its path in its chunk.
        name: of the parameter within the adapter.
        request: a ShardedTensor, or a factory of several, whose data is new memory.
        shards: the ShardedTensors of the request.
    """

    site: DoRALinear
    path: str
    name: str
    request: ShardedTensor | ShardedTensorFactory
    shards: list[Any]

    @property
    def key(self) -> str:
        return str(self.shards[0].key)

    @property
    def in_order_of_ranks(self) -> bool:
        """Return whether Bridge stores the rows of this magnitude rank by rank, gate and up of each."""
        return self.name == _MAGNITUDE and self.site.adapter.row_blocks == 2

    @property
    def is_partial(self) -> bool:
        """Return whether Bridge stores rank 0's magnitude in place of the whole layer's."""
        return self.name == _MAGNITUDE and self.site.adapter.layout.shards_input_features


def load_bridge_checkpoint(
    model: ModelT,
    path: str | os.PathLike[str],
    *,
    tensor_parallel_size: int,
    rebuild_row_magnitudes: bool = False,
) -> ModelT:
    """Load adapters that Megatron-Bridge saved (torch_dist) into an adapted model at any layout; return the model.

    Every rank calls it. The checkpoint holds neither alpha nor dropout: attach adapters with those that it was trained
    with. A and B keep their values; magnitudes are float32 or wider. Everything is read and checked before anything is
    changed.

    Args:
        model: a model that `DoRA` was called on, or a list or a tuple of its chunks, bare or wrapped.
        path: the folder that holds `.metadata`, such as `iter_0000100`.
        tensor_parallel_size: of the run that saved the checkpoint.
        rebuild_row_magnitudes: set the magnitudes of row layers (linear_proj, linear_fc2) to the norm of W + s B A
            where Bridge lost them, that is at a `tensor_parallel_size` above 1.

    Raises:
        ValueError: on every rank: the model has no adapted layer, the folder is no such checkpoint, keys, shapes or the
            tensor-parallel size differ, values are not finite, or magnitudes were lost and are not to be rebuilt.
    """
    chunks = chunks_of(model)
    problem: str | None = None
    try:
        reader = CheckedReader(Path(path))
        stored = _adapter_tensors(reader)
        wanted = [shard for chunk in chunks for shard in _requests(chunk, stored)]
        _check_keys_and_shapes(Path(path), stored, wanted)
        _check_size(Path(path), stored, wanted, tensor_parallel_size)
        _check_row_magnitudes(wanted, tensor_parallel_size, rebuild_row_magnitudes)
        loaded = read_state({str(index): shard.request for index, shard in enumerate(wanted)}, reader)
        values = [loaded[str(index)] for index in range(len(wanted))]
        _check_finite(Path(path), wanted, values)
    except (ValueError, OSError) as error:
        problem = str(error)
    raise_on_every_rank(problem, world_group())
    _copy(wanted, values, tensor_parallel_size)
    logger.info("loaded %d adapters from %s", len(wanted) // 3, path)
    return model


def _adapter_tensors(reader: CheckedReader) -> dict[str, TensorStorageMetadata]:
    """Return the metadata of every adapter tensor: its size, and the chunks that it was saved in."""
    if not (reader.directory / METADATA).exists():
        raise ValueError(
            f"{reader.directory}: found no .metadata, expected a torch_dist checkpoint such as iter_0000100"
        )
    return {
        key: value
        for key, value in reader.metadata.state_dict_metadata.items()
        if ".adapter." in key and isinstance(value, TensorStorageMetadata)
    }


def _requests(chunk: nn.Module, stored: dict[str, Any]) -> Iterator[RequestedShard]:
    sites: dict[str, DoRALinear] = {}
    for _, (path, whole_path, site) in adapted_layers([chunk]):
        check_unsharded(whole_path, site)
        sites[path] = site
    # Where layers differ, Megatron puts their numbers into the keys.
    numbered = any(part.isdigit() for key in stored for part in key.split("."))
    inner: Any = unwrap(chunk)
    sharded = inner.sharded_state_dict(metadata={"non_homogeneous_layers": True} if numbered else None)
    for key, value in sharded.items():
        path, _, name = key.partition(".adapter.")
        if path in sites and name in sites[path].adapter.placements:
            # Memory of its own, since nothing may change before everything is checked.
            value = dataclasses.replace(value, data=torch.empty_like(value.data))
            yield _as_bridge_stores_it(RequestedShard(sites[path], path, name, value, all_shards(value)))


def _as_bridge_stores_it(shard: RequestedShard) -> RequestedShard:
    """Request all rows of a magnitude that Bridge orders in another way; each rank takes its own rows later."""
    if not shard.in_order_of_ranks:
        return shard
    first = shard.shards[0]
    prepended = first.prepend_axis_num
    offsets = [(axis, first.global_offset[axis], first.global_shape[axis]) for axis in range(prepended)]
    data_parallel_rank = int(parallel_state.get_data_parallel_rank(with_context_parallel=True))
    ranks = parallel_state.get_tensor_model_parallel_rank(), data_parallel_rank
    rows = torch.empty(first.global_shape[-1], dtype=first.dtype, device=first.data.device)
    whole = ShardedTensor.from_rank_offsets(
        first.key, rows, *offsets, replica_id=(0, *ranks), prepend_axis_num=prepended
    )
    return dataclasses.replace(shard, request=whole, shards=[whole])


def _check_keys_and_shapes(path: Path, stored: dict[str, Any], wanted: Sequence[RequestedShard]) -> None:
    if not wanted:
        raise ValueError("found no adapted layer, expected a model that DoRA was called on")
    for shard in wanted:
        found = tuple(stored[shard.key].size) if shard.key in stored else None
        expected = tuple(shard.shards[0].global_shape)
        if found != expected:
            raise ValueError(
                f"{path}: found {found or 'nothing'} for {shard.key}, expected {expected} as in {shard.path}"
            )
    # With several stages a rank does not know the keys of the others.
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        unknown = sorted(set(stored) - {shard.key for shard in wanted})
        if unknown:
            raise ValueError(
                f"{path}: found {unknown[0]} ({len(unknown)} such keys), expected keys of adapted layers alone"
            )


def _check_size(path: Path, stored: dict[str, Any], wanted: Sequence[RequestedShard], expected: int) -> None:
    """Compare the given tensor-parallel size with the number of pieces that A was saved in.

    A wrong size would put the rows of gated magnitudes in a wrong order without any other sign of it.
    """
    for shard in wanted:
        placement = shard.site.adapter.placements[shard.name]
        if shard.name != "linear_in.weight" or placement.shard_dim is None:
            continue
        axis = shard.shards[0].prepend_axis_num + placement.shard_dim
        found = len({chunk.offsets[axis] for chunk in stored[shard.key].chunks})
        if found != expected:
            raise ValueError(
                f"tensor_parallel_size: found {shard.key} saved by {found} tensor-parallel ranks in {path}, expected "
                f"{expected}, the size given"
            )


def _check_row_magnitudes(wanted: Sequence[RequestedShard], tensor_parallel_size: int, rebuild: bool) -> None:
    partial = [shard.path for shard in wanted if shard.is_partial]
    if partial and tensor_parallel_size > 1 and not rebuild:
        raise ValueError(
            f"{partial[0]} ({len(partial)} such layers): Megatron-Bridge saves the magnitude of a row layer from rank "
            f"0 alone, and with {tensor_parallel_size} ranks that magnitude belongs to the norm over rank 0's input "
            "features and not over the whole weight; the trained magnitudes are lost. Pass rebuild_row_magnitudes=True "
            "to set them to the norm of W + s B A"
        )


def _check_finite(path: Path, wanted: Sequence[RequestedShard], values: Sequence[Tensor]) -> None:
    problem = not_finite_maybe((shard.key, value) for shard, value in zip(wanted, values, strict=True))
    if problem is not None:
        raise ValueError(f"{path}: {problem}")


@torch.no_grad()
def _copy(wanted: Sequence[RequestedShard], values: Sequence[Tensor], tensor_parallel_size: int) -> None:
    for shard, value in zip(wanted, values, strict=True):
        adapter = shard.site.adapter
        if shard.in_order_of_ranks:
            gate_and_up = value.view(tensor_parallel_size, 2, -1).transpose(0, 1).reshape(-1)
            value = adapter.placements[shard.name].pad_and_shard(gate_and_up, adapter.tp_rank, adapter.tp_size)
        adapter.get_parameter(shard.name).copy_(value)
    # After all of A and B are in place, which the norm is computed from.
    if tensor_parallel_size > 1:
        for shard in wanted:
            if shard.is_partial:
                shard.site.adapter.weight_magnitude.copy_(shard.site._get_weight_norm())
    update_main_copies(shard.site.adapter.get_parameter(shard.name) for shard in wanted)
