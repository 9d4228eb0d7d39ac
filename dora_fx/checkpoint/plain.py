"""The adapters of a checkpoint as whole tensors, read by one process without a model or process groups."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
from torch.distributed.checkpoint.api import CheckpointException

from dora_fx.checkpoint.directory import open_checkpoint, read_unreplaced, was_replaced
from dora_fx.checkpoint.failing_together import CheckpointError, describe_error
from dora_fx.checkpoint.manifest import Manifest, SiteSettings, StoredTensor, check_file
from dora_fx.placement import ADAPTER_TENSORS


@dataclass(frozen=True)
class WholeAdapter:
    """The adapter of one layer, at no parallel layout and without padding, on the CPU.

    Attributes:
        tensors: `linear_in.weight` `[dim, in]`, `linear_out.weight` `[out, dim]` and `weight_magnitude` `[out]`.
        settings: DoRA's.
    """

    tensors: dict[str, Tensor]
    settings: SiteSettings


def read_adapters(path: str | os.PathLike[str]) -> dict[str, WholeAdapter]:
    """Read the adapters that `save_checkpoint` wrote, by the layer's path, with its number in the whole model.

    Optimizer state is not read. The files are checked first.

    Raises:
        CheckpointError: there is no checkpoint, or a file of it is damaged.
    """
    return read_unreplaced(Path(os.path.abspath(path)), open_checkpoint, _read, was_replaced)


def _read(directory: Path, manifest: Manifest) -> dict[str, WholeAdapter]:
    for name, expected in manifest.files.items():
        check_file(directory, name, expected)
    keys = [f"{site}.adapter.{name}" for site in manifest.sites for name in ADAPTER_TENSORS]
    try:
        reader = FileSystemReader(directory)
        found = reader.read_metadata().state_dict_metadata
        tensors = {key: _empty(directory, key, found.get(key)) for key in keys}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{directory}: cannot be read ({describe_error(error)})") from error
    adapters: dict[str, WholeAdapter] = {}
    for site, settings in manifest.sites.items():
        names = {name: f"{site}.adapter.{name}" for name in ADAPTER_TENSORS}
        whole = {name: _cut(tensors[key], manifest.tensors[key]) for name, key in names.items()}
        adapters |= {path: WholeAdapter(parts, settings) for path, parts in _layers(site, whole)}
    return adapters


def _empty(directory: Path, key: str, stored: object) -> Tensor:
    if not isinstance(stored, TensorStorageMetadata):
        raise CheckpointError(f"{directory}: there is no tensor {key}, which its manifest has; load another checkpoint")
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def _cut(stored: Tensor, described: StoredTensor) -> Tensor:
    """Leave out what padded the layer at the layout that saved it: the manifest has the true shape."""
    return stored[tuple(slice(size) for size in described.shape)]


def _layers(site: str, whole: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each layer's path and tensors; a site whose tensors have no layer axis in front is a layer by itself."""
    if whole["weight_magnitude"].dim() == 1:
        yield site, {name: tensor.contiguous() for name, tensor in whole.items()}
        return
    before, layers, after = site.partition("layers.")
    parts = {name: tensor.unbind(0) for name, tensor in whole.items()}
    for index in range(len(parts["weight_magnitude"])):
        yield f"{before}{layers}{index}.{after}", {name: parts[name][index].clone() for name in ADAPTER_TENSORS}
