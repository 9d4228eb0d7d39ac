"""Checks that run before a checkpoint is loaded. Each error says what was found, what was expected and what to do."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Mapping
from operator import le
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from dora_fx.checkpoint.checked_reader import CheckedReader
from dora_fx.checkpoint.manifest import (
    MANIFEST,
    NORM_OF_INPUT,
    Manifest,
    SiteSettings,
    StoredTensor,
    check_file,
    dtype_of,
    read_manifest,
)
from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.files import listed
from dora_fx.modules import not_finite_maybe

logger = logging.getLogger(__name__)

_OPTIMIZER_PREFIX = "optimizer."


def check_sites(directory: Path, manifest: Manifest, found: Mapping[str, SiteSettings]) -> None:
    """Raise CheckpointError unless the model's adapted layers are the checkpoint's, with its dim and scaling."""
    missing = manifest.sites.keys() - found.keys()
    if missing:
        raise CheckpointError(
            f"{directory}: found adapters for {listed(missing)}, which the model has not adapted; attach DoRA to them "
            "too"
        )
    unexpected = found.keys() - manifest.sites.keys()
    if unexpected:
        raise CheckpointError(
            f"{directory}: found no adapters for {listed(unexpected)}, which the model has adapted; leave them out of "
            "DoRA.target_modules"
        )
    for key, settings in manifest.sites.items():
        for name in ("dim", "alpha", "use_rslora"):
            saved, own = (_shown(getattr(site, name)) for site in (settings, found[key]))
            if saved != own:
                raise CheckpointError(
                    f"{directory}: {key} was trained with {name}={saved}, the model has {name}={own}; "
                    f"attach DoRA with {name}={saved}"
                )
        # Dropout changes how training goes on, not what was trained.
        if settings.dropout != found[key].dropout and dist.get_rank() == 0:
            logger.warning(
                "%s: the checkpoint has dropout %g, training goes on with %g", key, settings.dropout, found[key].dropout
            )


def check_base(directory: Path, manifest: Manifest, found: Mapping[str, str], *, any_base: bool) -> None:
    """Raise CheckpointError unless the base has the digests of the checkpoint's; with `any_base`, warn."""
    # Of the keys that the manifest lacks, those of norms count: one of the models may have a bias in a norm. The
    # manifest of an earlier version has no digests of norms at all.
    norms = {key.split(NORM_OF_INPUT)[0] for key in manifest.base if NORM_OF_INPUT in key}
    unexpected = {key for key in found if NORM_OF_INPUT in key and key.split(NORM_OF_INPUT)[0] in norms}
    differing = {key for key in manifest.base.keys() | unexpected if found.get(key) != manifest.base.get(key)}
    if not differing:
        return
    message = f"{directory}: was trained on another base model than this one: {listed(differing)} differ"
    if not any_base:
        raise CheckpointError(f"{message}; load the base that it was trained on")
    if dist.get_rank() == 0:
        logger.warning("%s", message)


def check_same_manifest(directory: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless this rank reads the same manifest as rank 0."""
    try:
        found = read_manifest(directory)
        problem = None if found == manifest else f"{directory} is another checkpoint"
    except CheckpointError as error:
        problem = str(error)
    if problem is not None:
        raise CheckpointError(
            f"{socket.gethostname()} does not see the checkpoint that rank 0 sees: {problem}; expected a folder on a "
            "file system that all ranks share"
        )


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise CheckpointError if a file is missing or damaged. Each rank checks a share of the files."""
    names = sorted(manifest.files)
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        check_file(directory, name, manifest.files[name])


def check_tensors(
    directory: Path, manifest: Manifest, wanted: Mapping[str, StoredTensor], *, with_optimizer: bool
) -> None:
    """Raise CheckpointError unless the checkpoint's tensors are the ones that the ranks ask for."""
    saved = {
        key: tensor
        for key, tensor in manifest.tensors.items()
        if with_optimizer or not key.startswith(_OPTIMIZER_PREFIX)
    }
    missing, unexpected = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"{directory}: its tensors are not the model's: {listed(missing)} missing, "
            f"{listed(unexpected)} unexpected" + "; expected the optimizer it was saved with" * with_optimizer
        )
    for key, tensor in saved.items():
        if wanted[key] != tensor:
            raise CheckpointError(
                f"{directory}: {key} is a {tensor.dtype} tensor of shape {tensor.shape}, the model's is "
                f"{wanted[key].dtype} of shape {wanted[key].shape}; load it into a model of the same sizes and dtype"
            )


def check_stored(reader: CheckedReader, expected: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError unless the files hold tensors of the expected dtypes and, apart from padding, shapes."""
    for key, stored in reader.check(expected).items():
        shape, dtype = tuple(stored.size), dtype_of(expected[key].dtype)
        # Padding makes the stored shape larger, never smaller.
        is_inside = len(shape) == len(expected[key].shape) and all(map(le, expected[key].shape, shape))
        if not is_inside or stored.properties.dtype != dtype:
            raise CheckpointError(
                f"{reader.directory}: {key} is a {stored.properties.dtype} tensor of shape {shape} in its files, "
                f"expected {dtype} of shape {expected[key].shape} as in {MANIFEST}; load another checkpoint"
            )


def check_finite(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CheckpointError, naming the tensor, if a tensor that was read has NaN or inf."""
    problem = not_finite_maybe(tensors)
    if problem is not None:
        raise CheckpointError(f"{directory}: {problem}; load another checkpoint")


def _shown(value: float) -> str:
    return str(value) if isinstance(value, bool) or value != round(value) else str(round(value))
