"""Reads the adapters of a checkpoint as whole tensors, in one process and without a model or process groups."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_fx.checkpoint.checked_reader import CheckedReader, load_checked
from dora_fx.checkpoint.directory import open_checkpoint, read_unreplaced, was_replaced
from dora_fx.checkpoint.load_checks import check_finite, check_stored
from dora_fx.checkpoint.manifest import EXPERTS, Manifest, SiteSettings, StoredTensor, check_file
from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.function import ADAPTER_TENSORS
from dora_fx.ranks import error_text


@dataclass(frozen=True)
class WholeAdapter:
    """The adapter of one layer as whole tensors without padding, on the CPU.

    Attributes:
        tensors: `linear_in.weight` `[dim, in]`, `linear_out.weight` `[out, dim]` and `weight_magnitude` `[out]`.
        settings: DoRA's settings of the layer.
    """

    tensors: dict[str, Tensor]
    settings: SiteSettings


def read_adapters(path: str | os.PathLike[str]) -> dict[str, WholeAdapter]:
    """Read the adapters that `save_checkpoint` wrote, by the layers' paths in the whole model.

    The files are checked first. Optimizer state is not read.

    Raises:
        CheckpointError: there is no checkpoint, one of its files is damaged, or an adapter has NaN or inf.
    """
    return read_unreplaced(Path(os.path.abspath(path)), open_checkpoint, _read, was_replaced)


def _read(directory: Path, manifest: Manifest) -> dict[str, WholeAdapter]:
    for name, file in manifest.files.items():
        check_file(directory, name, file)
    expected = _expected_tensors(directory, manifest)
    try:
        reader = CheckedReader(directory)
        check_stored(reader, expected)
        # Zeros: chunks that overlap may leave a gap, which must not show what this process had in its memory.
        tensors = {
            key: torch.zeros(stored.size, dtype=stored.properties.dtype)
            for key, stored in reader.check(expected).items()
        }
        load_checked(tensors, reader)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{directory}: cannot be read ({error_text(error)})") from error
    adapters: dict[str, WholeAdapter] = {}
    for site, settings in manifest.sites.items():
        names = {name: f"{site}.adapter.{name}" for name in ADAPTER_TENSORS}
        whole = {name: _without_padding(tensors[key], expected[key]) for name, key in names.items()}
        for path, parts in _split_layers(site, whole):
            check_finite(directory, ((f"{path}.adapter.{name}", tensor) for name, tensor in parts.items()))
            adapters[path] = WholeAdapter(parts, settings)
    return adapters


def _expected_tensors(directory: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """Return the manifest's adapter tensors by key, after a check that the shapes of every site fit together."""
    expected: dict[str, StoredTensor] = {}
    for site, settings in manifest.sites.items():
        tensors = {name: manifest.tensors.get(f"{site}.adapter.{name}") for name in ADAPTER_TENSORS}
        shapes = {name: tensor.shape if tensor else None for name, tensor in tensors.items()}
        a, b, magnitude = (shapes[name] or () for name in ("linear_in.weight", "linear_out.weight", "weight_magnitude"))
        layers, dim = magnitude[:-1], settings.dim
        if len(layers) > len(_axes(site)) or a[:-1] != (*layers, dim) or b != (*magnitude, dim):
            shown = ", ".join(f"{name} {shape or 'missing'}" for name, shape in shapes.items())
            raise CheckpointError(
                f"{directory}: the tensors of {site} do not fit together ({shown}), expected {dim} rows of A, {dim} "
                "columns of B, and the same layers and rows in all; load another checkpoint"
            )
        expected |= {f"{site}.adapter.{name}": tensor for name, tensor in tensors.items() if tensor}
    return expected


def _without_padding(stored: Tensor, expected: StoredTensor) -> Tensor:
    """Cut off the padding of the layout that saved the tensor; the manifest has the shape without it."""
    return stored[tuple(slice(size) for size in expected.shape)]


# What a tensor's axes in front are counted over: the text in a key that its number follows in the layer's path.
_LAYERS, _EXPERTS = re.compile(r"\blayers\.(?!\d)"), re.compile(rf"{re.escape(EXPERTS)}(?!\d)")


def _axes(site: str) -> list[re.Pattern[str]]:
    """Return what the axes in front of a site's tensors may be counted over; a site with all numbers has none."""
    return [axis for axis in (_LAYERS, _EXPERTS) if axis.search(site)]


def _split_layers(site: str, whole: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each layer's path and tensors, of all layers and experts that the tensors have axes for."""
    sizes = whole["weight_magnitude"].shape[:-1]
    axes = _axes(site)[: len(sizes)]
    for numbers in itertools.product(*map(range, sizes)):
        path = site
        for axis, number in zip(axes, numbers, strict=True):
            path = axis.sub(rf"\g<0>{number}.", path, count=1)
        # Clones, so that one layer that is kept does not keep the memory of all.
        parts = {name: tensor[numbers].clone() for name, tensor in whole.items()}
        yield path.replace(EXPERTS, ".experts.local_experts."), parts
