"""Save and load DoRA adapters as Megatron distributed checkpoints, whatever the layout they were trained at.

A checkpoint is a directory in Megatron's torch_dist format with one more file, `dora_fx.json` (see
`checkpoint.manifest.py`). It holds the adapters, not the base. It is either whole or absent, and the last good one
can be loaded at every instant (see `checkpoint.directory.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
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
from dora_fx.checkpoint.checks import (
    check_base,
    check_files,
    check_finite,
    check_same_manifest,
    check_sites,
    check_stored,
    check_tensors,
)
from dora_fx.checkpoint.common import COMMON, check_common, read_common
from dora_fx.checkpoint.contents import ModelContents, all_shards, layout_of_world, model_contents
from dora_fx.checkpoint.directory import (
    check_visible,
    new_directory,
    open_checkpoint,
    put_in_place,
    read_unreplaced,
    was_replaced,
)
from dora_fx.checkpoint.manifest import Manifest, StoredFile, describe_file
from dora_fx.checkpoint.optimizer_state import OptimizerState
from dora_fx.checkpoint.rank_steps import CheckpointError, failing_together, from_first_rank, gather
from dora_fx.checkpoint.reader import CheckedReader
from dora_fx.checkpoint.strategy import SaveStrategy, read_state
from dora_fx.checkpoint.tensor_digests import add_digests, copy_digests, differing_copies, shard_digests
from dora_fx.megatron import Model, chunks_of, update_main_copies, world_at_hand
from dora_fx.modules import adapter_not_finite_maybe
from dora_fx.version import __version__

logger = logging.getLogger(__name__)


@world_at_hand()
def save_checkpoint(model: Model, path: str | os.PathLike[str], optimizer: Any = None, *, extra: Any = None) -> None:
    """Save a model's adapters as the directory `path`, replacing a checkpoint that is there. Every rank calls it.

    Parameters that are trained beside adapters are not kept, and named in a warning.

    Args:
        model: after `DoRA` ran on it; a list or a tuple of chunks with virtual pipeline stages. Bare or wrapped. A
            transformers model, or any module whose adapted layers each rank has whole, needs no process group.
        path: on a file system that all ranks see.
        optimizer: Megatron's or torch's, to save its state too. A torch optimizer's tensors have a parameter's shape
            or a single element; what it has of another kind is refused.
        extra: anything that the caller needs to go on, such as the step and the position in the data. Numbers,
            text, tensors, lists and dicts; rank 0's is saved.

    Raises:
        CheckpointError: on every rank, with the file or layer at fault; what was at `path` is still there.
        TypeError, ValueError: `model` is none, or its parameters are sharded (FSDP).
    """
    path, chunks = Path(os.path.abspath(path)), chunks_of(model)
    contents = model_contents(chunks)
    warn_of_other_trainables(chunks, "save_checkpoint")
    shards = _shards_to_save(chunks, contents, optimizer, path)
    with contextlib.ExitStack() as stack:
        with failing_together(_saving(path)):
            directory = stack.enter_context(new_directory(path)) if dist.get_rank() == 0 else None
        directory = from_first_rank(directory, _saving(path))
        with failing_together(_saving(path)):
            check_visible(directory)
        files = _write(shards.own, shards.common | {"extra": extra}, directory, _saving(path))
        with failing_together(_saving(path)):
            if dist.get_rank() == 0:
                manifest = Manifest(
                    save_id=uuid.uuid4().hex,
                    versions=_versions(),
                    layout=layout_of_world(chunks),
                    non_homogeneous_layers=contents.non_homogeneous_layers,
                    sites=contents.sites,
                    tensors=contents.stored_tensors(shards.of_ranks),
                    base=shards.base,
                    has_optimizer=optimizer is not None,
                    has_extra=extra is not None,
                    files=files,
                )
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
        optimizer: to load its state too; the checkpoint must have that of an optimizer of the same class and groups.
        any_base: load onto another base than the one that the adapters were trained on, with a warning.

    Returns:
        The `extra` that was saved, on every rank.

    Raises:
        CheckpointError: on every rank, with the file or layer at fault. Model and optimizer are as they were.
        TypeError, ValueError: `model` is none, or its parameters are sharded (FSDP).
    """
    path, chunks = Path(os.path.abspath(path)), chunks_of(model)
    contents, state = _read_until_unreplaced(chunks, optimizer, path, any_base)
    with failing_together(f"loading {path}: the optimizer"):
        OptimizerState(optimizer, chunks, contents.adapter).load(state)
    _copy_into_parameters(contents, state)
    return state.get("extra")


class _Shards(NamedTuple):
    """The content of a save.

    Attributes:
        own: this rank's shards.
        common: what is not sharded; rank 0's is saved.
        of_ranks: the shards of all ranks, without data.
        base: digests of the base weights.
    """

    own: dict[str, Any]
    common: dict[str, Any]
    of_ranks: Sequence[Sequence[ShardedBase]]
    base: dict[str, str]


def _shards_to_save(chunks: Sequence[nn.Module], contents: ModelContents, optimizer: Any, path: Path) -> _Shards:
    """Describe all state, and check that the ranks' shards make whole tensors."""
    with failing_together(_saving(path)):
        problem = adapter_not_finite_maybe((named.whole_path, named.module) for _, named in adapted_layers(chunks))
        if problem is not None:
            raise CheckpointError(f"{_saving(path)}: {problem}")
        of_optimizer = OptimizerState(optimizer, chunks, contents.adapter)
        state, description = of_optimizer.to_save()
        own, common = _split(contents.adapter | state)
        digests, copies = shard_digests(contents.base), copy_digests(all_shards(contents.adapter))
    everyone = gather((_without_data(own), digests, copies, description), _saving(path))
    of_ranks, digests_of_ranks, copies_of_ranks, descriptions = zip(*everyone, strict=True)
    with failing_together(_saving(path)):
        of_optimizer.add_of_all_ranks(common, descriptions)
    for key in differing_copies(copies_of_ranks) if dist.get_rank() == 0 else ():
        logger.warning("%s: ranks hold different copies of %s; saving the first one's", path, key)
    with failing_together(f"{_saving(path)}, the shards of the ranks do not make whole tensors"):
        validate_sharding_integrity(of_ranks)
    return _Shards(own, common, of_ranks, add_digests(digests_of_ranks))


def _read_until_unreplaced(
    chunks: Sequence[nn.Module], optimizer: Any, path: Path, any_base: bool
) -> tuple[ModelContents, dict[str, Any]]:
    """Check and read the checkpoint, anew if a save replaced it meanwhile."""

    def read(directory: Path, manifest: Manifest) -> tuple[ModelContents, dict[str, Any]]:
        return _read(chunks, optimizer, directory, manifest, any_base=any_base)

    return read_unreplaced(path, _find, read, _was_replaced)


def _find(path: Path) -> tuple[Path, Manifest]:
    """The directory to read and its manifest, the same on every rank."""
    found = None
    with failing_together(f"loading {path}"):
        if dist.get_rank() == 0:
            found = open_checkpoint(path)
    directory, manifest = from_first_rank(found, f"loading {path}")
    if directory != path and dist.get_rank() == 0:
        logger.warning("%s: a save was interrupted; loading the checkpoint that it was replacing", path)
    return directory, manifest


def _was_replaced(path: Path, manifest: Manifest) -> bool:
    """Return whether another save took the checkpoint's place; every rank calls it."""
    replaced = was_replaced(path, manifest) if dist.get_rank() == 0 else None
    return from_first_rank(replaced, f"loading {path}")


def _read(
    chunks: Sequence[nn.Module], optimizer: Any, directory: Path, manifest: Manifest, *, any_base: bool
) -> tuple[ModelContents, dict[str, Any]]:
    """Check a checkpoint against the model and read it into new tensors."""
    contents = model_contents(chunks, manifest.non_homogeneous_layers)
    digests = gather(shard_digests(contents.base), f"loading {directory}")
    with failing_together(f"loading {directory}"):
        check_same_manifest(directory, manifest)
        check_sites(directory, manifest, contents.sites)
        check_base(directory, manifest, add_digests(digests), any_base=any_base)
        check_files(directory, manifest)
        if optimizer is not None and not manifest.has_optimizer:
            raise CheckpointError(f"{directory}: has no optimizer state; load it without `optimizer`")
        of_optimizer = OptimizerState(optimizer, chunks, contents.adapter)
    with failing_together(f"loading {directory}"):
        state = contents.adapter | of_optimizer.to_load(manifest.tensors)
        wanted = _without_data(_split(state)[0])
    everyone = gather(wanted, f"loading {directory}")
    with failing_together(f"loading {directory}"):
        described = contents.stored_tensors(everyone)
        check_tensors(directory, manifest, described, with_optimizer=optimizer is not None)
    with failing_together(f"reading {directory}{_other_versions(manifest)}"):
        reader = CheckedReader(directory)
        check_stored(reader, described)
        loaded = read_state(state, reader, read_common(directory))
        of_optimizer.check(directory, loaded)
        check_finite(directory, _adapter_values(chunks, contents, loaded))
        return contents, loaded


def _adapter_values(
    chunks: Sequence[nn.Module], contents: ModelContents, state: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """What was read of this rank's adapters, by the parameters' paths in the whole model."""
    for chunk, (name, shards) in zip(chunks, contents.adapter.items(), strict=True):
        for _, (path, whole_path, _) in adapted_layers([chunk]):
            prefix = f"{path}.adapter."
            yield from (
                (whole_path + key.removeprefix(path), state[name][key]) for key in shards if key.startswith(prefix)
            )


def _split(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sharded part of a state dict, with factories applied, and the part that rank 0 saves."""
    copy, _ = extract_matching_values(state, lambda value: True)
    apply_factories(copy)
    _, persistent = extract_nonpersistent(copy)
    return extract_sharded_base(persistent)


def _without_data(sharded: dict[str, Any]) -> list[ShardedBase]:
    return [shard.without_data() for shard in nested_values(sharded)]


def _saving(path: Path) -> str:
    return f"saving {path} failed (what was there is unchanged)"


def _write(sharded: dict[str, Any], common: dict[str, Any], directory: Path, what: str) -> dict[str, StoredFile]:
    """Write everything but the manifest; returns the files with their checksums. Every rank calls it."""
    with failing_together(what):
        dist_checkpointing.save(
            sharded, str(directory), sharded_strategy=SaveStrategy(), validate_access_integrity=False
        )
        if dist.get_rank() == 0:
            torch.save(common, directory / COMMON)
            check_common(directory)
        own = os.listdir(directory)
    # Where one rank does not list a file that another wrote, it is missed there, and not left out of the manifest.
    names = sorted(set(chain.from_iterable(gather(own, what))))
    with failing_together(what):
        share = names[dist.get_rank() :: dist.get_world_size()]
        described = {name: describe_file(directory / name) for name in share}
    parts = gather(described, what)
    return {name: file for part in parts for name, file in part.items()}


@torch.no_grad()
def _copy_into_parameters(contents: ModelContents, state: dict[str, Any]) -> None:
    for chunk, shards in contents.adapter.items():
        for key, shard in shards.items():
            shard.data.copy_(state[chunk][key])
    update_main_copies(shard.data for shards in contents.adapter.values() for shard in shards.values())


def _other_versions(manifest: Manifest) -> str:
    """Return the packages whose versions differ from those that wrote; torch reads no checkpoint of a later torch."""
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
