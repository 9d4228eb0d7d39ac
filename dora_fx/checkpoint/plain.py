"""The adapters of a checkpoint as whole tensors, read by one process without a model or process groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_fx.checkpoint.checks import check_finite, check_stored
from dora_fx.checkpoint.directory import open_checkpoint, read_unreplaced, was_replaced
from dora_fx.checkpoint.manifest import Manifest, SiteSettings, StoredTensor, check_file
from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.checkpoint.reader import CheckedReader, load_checked
from dora_fx.function import ADAPTER_TENSORS
from dora_fx.ranks import describe_error


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
        CheckpointError: there is no checkpoint, a file of it is damaged, or an adapter has NaN or inf.
    """
    return read_unreplaced(Path(os.path.abspath(path)), open_checkpoint, _read, was_replaced)


def _read(directory: Path, manifest: Manifest) -> dict[str, WholeAdapter]:
    for name, expected in manifest.files.items():
        check_file(directory, name, expected)
    described = _described(directory, manifest)
    try:
        reader = CheckedReader(directory)
        check_stored(reader, described)
        # Zeros, so that an element that no file has would not come from this process's memory.
        tensors = {
            key: torch.zeros(stored.size, dtype=stored.properties.dtype)
            for key, stored in reader.check(described).items()
        }
        load_checked(tensors, reader)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{directory}: cannot be read ({describe_error(error)})") from error
    adapters: dict[str, WholeAdapter] = {}
    for site, settings in manifest.sites.items():
        names = {name: f"{site}.adapter.{name}" for name in ADAPTER_TENSORS}
        whole = {name: _cut(tensors[key], described[key]) for name, key in names.items()}
        for path, parts in _layers(site, whole):
            check_finite(directory, ((f"{path}.adapter.{name}", tensor) for name, tensor in parts.items()))
            adapters[path] = WholeAdapter(parts, settings)
    return adapters


def _described(directory: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """The adapters' tensors by key, once the shapes of every site are known to belong together."""
    described: dict[str, StoredTensor] = {}
    for site, settings in manifest.sites.items():
        tensors = {name: manifest.tensors.get(f"{site}.adapter.{name}") for name in ADAPTER_TENSORS}
        shapes = {name: tensor.shape if tensor else None for name, tensor in tensors.items()}
        a, b, magnitude = (shapes[name] or () for name in ("linear_in.weight", "linear_out.weight", "weight_magnitude"))
        layers, dim = magnitude[:-1], settings.dim
        if len(magnitude) not in (1, 2) or a[:-1] != (*layers, dim) or b != (*magnitude, dim):
            found = ", ".join(f"{name} {shape or 'missing'}" for name, shape in shapes.items())
            raise CheckpointError(
                f"{directory}: the tensors of {site} do not belong together ({found}), expected [layers, {dim}, in], "
                f"[layers, out, {dim}] and [layers, out]; load another checkpoint"
            )
        described |= {f"{site}.adapter.{name}": tensor for name, tensor in tensors.items() if tensor}
    return described


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
