"""Saves and loads DoRA adapters as Megatron distributed checkpoints, at any parallel layout.

A checkpoint is a directory in Megatron's torch_dist format with one more file, `dora_fx.json` (see `manifest.py`). It
holds the adapters and not the base. A save is atomic: the checkpoint before it can be loaded until it is complete (see
`directory.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factories
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch import Tensor, nn

from dora_fx.attach import adapted_layers, warn_of_other_trainables
from dora_fx.checkpoint.checked_reader import CheckedReader
from dora_fx.checkpoint.common_state import COMMON, check_common, read_common
from dora_fx.checkpoint.directory import (
    check_visible,
    new_directory,
    open_checkpoint,
    put_in_place,
    read_unreplaced,
    was_replaced,
)
from dora_fx.checkpoint.load_checks import (
    check_base,
    check_files,
    check_finite,
    check_same_manifest,
    check_sites,
    check_stored,
    check_tensors,
)
from dora_fx.checkpoint.manifest import Manifest, StoredFile
from dora_fx.checkpoint.optimizer_state import OptimizerState
from dora_fx.checkpoint.rank_steps import CheckpointError, collective_step, from_first_rank, gather
from dora_fx.checkpoint.sharded_model import Keys, ShardedModel, all_shards, layout_of_world, sharded_model_of
from dora_fx.checkpoint.tensor_digests import add_digests, copy_digests, differing_copies, shard_digests
from dora_fx.checkpoint.torch_dist import SaveStrategy, read_state
from dora_fx.megatron import Model, chunks_of, update_main_copies, world_at_hand
from dora_fx.modules import adapter_not_finite_maybe
from dora_fx.version import __version__

logger = logging.getLogger(__name__)


@world_at_hand()
def save_checkpoint(model: Model, path: str | os.PathLike[str], optimizer: Any = None, *, extra: Any = None) -> None:
    """Save a model's adapters as the directory `path`, replacing a checkpoint that is there. Every rank calls it.

    A warning names trainable parameters other than adapters; they are not saved.

    Args:
        model: a model that `DoRA` was called on, bare or wrapped; with virtual pipeline stages a list or a tuple of
            chunks. A transformers model, or any module whose adapted layers are whole on each rank, needs no process
            group.
        path: on a file system that all ranks share.
        optimizer: Megatron's or torch's, to save its state too. The state of a torch optimizer may hold tensors of the
            parameter's shape and single numbers; other state is refused.
        extra: whatever the caller needs to go on, such as the step and the position in the data: numbers, text,
            tensors, lists and dicts. Rank 0's is saved.

    Raises:
        CheckpointError: on every rank, naming the file or layer at fault; what was at `path` is still there.
        TypeError, ValueError: `model` is not a model, or its parameters are sharded (FSDP).
    """
    path, chunks = Path(os.path.abspath(path)), chunks_of(model)
    sharded = sharded_model_of(chunks)
    warn_of_other_trainables(chunks, "save_checkpoint")
    shards = _shards_to_save(chunks, sharded, optimizer, path)
    # Each step ends with an exchange: a rank that failed alone would leave the others in the next collective.
    with contextlib.ExitStack() as stack:
        with collective_step(_saving(path)):
            directory = stack.enter_context(new_directory(path)) if dist.get_rank() == 0 else None
        directory = from_first_rank(directory, _saving(path))
        with collective_step(_saving(path)):
            check_visible(directory)
        files = _write(shards.own, shards.common | {"extra": extra}, directory, _saving(path))
        with collective_step(_saving(path)):
            if dist.get_rank() == 0:
                manifest = Manifest(
                    save_id=uuid.uuid4().hex,
                    versions=_versions(),
                    layout=layout_of_world(chunks),
                    non_homogeneous_layers=sharded.keys.non_homogeneous_layers,
                    numbered_experts=sharded.keys.numbered_experts,
                    sites=sharded.sites,
                    tensors=sharded.stored_tensors(shards.of_ranks),
                    base=shards.base,
                    has_optimizer=optimizer is not None,
                    has_extra=extra is not None,
                    files=files,
                )
                # Last, so that a directory with a manifest is always complete.
                manifest.write(directory)
                put_in_place(directory, path)


@world_at_hand()
def load_checkpoint(
    model: Model, path: str | os.PathLike[str], optimizer: Any = None, *, any_base: bool = False
) -> Any:
    """Load the adapters that `save_checkpoint` wrote, at any layout. Every rank calls it.

    Everything is checked and read before the first tensor is changed.

    Args:
        model: the base that the adapters were trained on, after `DoRA` with the same dim, alpha and targets.
        path: the checkpoint.
        optimizer: to load its state too; an optimizer of the same class and parameter groups as the saved one.
        any_base: load onto another base than the one that the adapters were trained on, with a warning.

    Returns:
        The `extra` that was saved, on every rank.

    Raises:
        CheckpointError: on every rank, naming the file or layer at fault. Model and optimizer are unchanged.
        TypeError, ValueError: `model` is not a model, or its parameters are sharded (FSDP).
    """
    path, chunks = Path(os.path.abspath(path)), chunks_of(model)
    read = partial(_read, chunks, optimizer, any_base=any_base)
    sharded, state = read_unreplaced(path, _find, read, _was_replaced)
    with collective_step(f"loading {path}: the optimizer"):
        OptimizerState(optimizer, chunks, sharded.adapter).load(state)
    # After the optimizer, which may refuse: a copy of tensors of known shapes does not fail.
    _copy_into_parameters(sharded, state)
    return state.get("extra")


class _Shards(NamedTuple):
    """The state that a save writes.

    Attributes:
        own: this rank's shards.
        common: state that is not sharded; rank 0's is saved.
        of_ranks: the shards of all ranks, without data.
        base: digests of the base weights.
    """

    own: dict[str, Any]
    common: dict[str, Any]
    of_ranks: Sequence[Sequence[ShardedBase]]
    base: dict[str, str]


def _shards_to_save(chunks: Sequence[nn.Module], sharded: ShardedModel, optimizer: Any, path: Path) -> _Shards:
    """Collect all state, and check that the ranks' shards add up to whole tensors."""
    with collective_step(_saving(path)):
        problem = adapter_not_finite_maybe((named.whole_path, named.module) for _, named in adapted_layers(chunks))
        if problem is not None:
            raise CheckpointError(f"{_saving(path)}: {problem}")
        of_optimizer = OptimizerState(optimizer, chunks, sharded.adapter)
        state, metadata = of_optimizer.to_save()
        own, common = _split(sharded.adapter | state)
        digests, copies = shard_digests(sharded.base), copy_digests(all_shards(sharded.adapter))
    everyone = gather((_without_data(own), digests, copies, metadata), _saving(path))
    of_ranks, digests_of_ranks, copies_of_ranks, metadata_of_ranks = zip(*everyone, strict=True)
    with collective_step(_saving(path)):
        of_optimizer.add_of_all_ranks(common, metadata_of_ranks)
    for key in differing_copies(copies_of_ranks) if dist.get_rank() == 0 else ():
        logger.warning(
            "%s: %s: found different values on ranks that should hold copies; saving the first rank's", path, key
        )
    with collective_step(f"{_saving(path)}, the shards of the ranks do not add up to whole tensors"):
        validate_sharding_integrity(of_ranks)
    return _Shards(own, common, of_ranks, add_digests(digests_of_ranks))


def _find(path: Path) -> tuple[Path, Manifest]:
    """Return the directory to read and its manifest, the same on every rank; every rank calls it."""
    located = None
    with collective_step(f"loading {path}"):
        if dist.get_rank() == 0:
            located = open_checkpoint(path)
    # Rank 0 alone searches: ranks that search by themselves may find different checkpoints while one is replaced.
    directory, manifest = from_first_rank(located, f"loading {path}")
    if directory != path and dist.get_rank() == 0:
        logger.warning("%s: a save was interrupted; loading the checkpoint that it was replacing", path)
    return directory, manifest


def _was_replaced(path: Path, manifest: Manifest) -> bool:
    """Return whether another save has replaced the checkpoint; every rank calls it."""
    replaced = was_replaced(path, manifest) if dist.get_rank() == 0 else None
    return from_first_rank(replaced, f"loading {path}")


def _read(
    chunks: Sequence[nn.Module], optimizer: Any, directory: Path, manifest: Manifest, *, any_base: bool
) -> tuple[ShardedModel, dict[str, Any]]:
    """Check a checkpoint against the model and read it into new tensors."""
    sharded = sharded_model_of(chunks, Keys(manifest.non_homogeneous_layers, manifest.numbered_experts))
    digests = gather(shard_digests(sharded.base), f"loading {directory}")
    with collective_step(f"loading {directory}"):
        check_same_manifest(directory, manifest)
        check_sites(directory, manifest, sharded.sites)
        check_base(directory, manifest, add_digests(digests), any_base=any_base)
        check_files(directory, manifest)
        if optimizer is not None and not manifest.has_optimizer:
            raise CheckpointError(f"{directory}: found no optimizer state in it; load it without `optimizer`")
        of_optimizer = OptimizerState(optimizer, chunks, sharded.adapter)
    with collective_step(f"loading {directory}"):
        state = sharded.adapter | of_optimizer.to_load(manifest.tensors)
        wanted = _without_data(_split(state)[0])
    everyone = gather(wanted, f"loading {directory}")
    with collective_step(f"loading {directory}"):
        expected = sharded.stored_tensors(everyone)
        check_tensors(directory, manifest, expected, with_optimizer=optimizer is not None)
    with collective_step(f"reading {directory}{_other_versions(manifest)}"):
        reader = CheckedReader(directory)
        check_stored(reader, expected)
        loaded = read_state(state, reader, of_optimizer.fit(read_common(directory)))
        of_optimizer.check(directory, loaded)
        check_finite(directory, _adapter_values(chunks, sharded, loaded))
        return sharded, loaded


def _adapter_values(
    chunks: Sequence[nn.Module], sharded: ShardedModel, state: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the values that were read for this rank's adapters, by the parameters' paths in the whole model."""
    for chunk, (name, shards) in zip(chunks, sharded.adapter.items(), strict=True):
        for _, (path, whole_path, _) in adapted_layers([chunk]):
            prefix = f"{path}.adapter."
            yield from (
                (whole_path + key.removeprefix(path), state[name][key]) for key in shards if key.startswith(prefix)
            )


def _split(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a state dict into its shards, with factories applied, and the part that rank 0 saves."""
    # A copy, since Megatron's functions work in place.
    copy, _ = extract_matching_values(state, lambda value: True)
    apply_factories(copy)
    _, persistent = extract_nonpersistent(copy)
    return extract_sharded_base(persistent)


def _without_data(sharded: dict[str, Any]) -> list[ShardedBase]:
    return [shard.without_data() for shard in nested_values(sharded)]


def _saving(path: Path) -> str:
    return f"saving {path} failed (what was there is unchanged)"


def _write(sharded: dict[str, Any], common: dict[str, Any], directory: Path, what: str) -> dict[str, StoredFile]:
    """Write everything except the manifest; return the files with their checksums. Every rank calls it."""
    with collective_step(what):
        dist_checkpointing.save(
            sharded, str(directory), sharded_strategy=SaveStrategy(), validate_access_integrity=False
        )
        if dist.get_rank() == 0:
            torch.save(common, directory / COMMON)
            check_common(directory)
        own = os.listdir(directory)
    # The union: a file that one rank does not see fails there with an error, and is not left out of the manifest.
    names = sorted(set(chain.from_iterable(gather(own, what))))
    with collective_step(what):
        share = names[dist.get_rank() :: dist.get_world_size()]
        measured = {name: StoredFile.of(directory / name) for name in share}
    parts = gather(measured, what)
    return {name: file for part in parts for name, file in part.items()}


@torch.no_grad()
def _copy_into_parameters(sharded: ShardedModel, state: dict[str, Any]) -> None:
    for chunk, shards in sharded.adapter.items():
        for key, shard in shards.items():
            shard.data.copy_(state[chunk][key])
    # The next step of a 16-bit optimizer would write its float32 copies back over the parameters.
    update_main_copies(shard.data for shards in sharded.adapter.values() for shard in shards.values())


def _other_versions(manifest: Manifest) -> str:
    """List the packages whose versions differ from those that wrote, for the message of a read that fails.

    torch may be unable to read what a later torch wrote.
    """
    own = _versions()
    others = [
        f"{name} {saved} (here {own.get(name, 'none')})"
        for name, saved in manifest.versions.items()
        if saved != own.get(name)
    ]
    return f", written with {', '.join(others)}" if others else ""


def _versions() -> dict[str, str]:
    import megatron.core

    return {"dora_fx": __version__, "torch": torch.__version__, "megatron-core": megatron.core.__version__}
