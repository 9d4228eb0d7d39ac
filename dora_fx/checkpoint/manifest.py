"""`dora_fx.json`, a checkpoint's manifest: sites, tensors, digests of the base, and size and checksum of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch

from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.files import named_beside, open_regular, read_json, shortened, size_of
from dora_fx.modules import low_rank_scaling

MANIFEST = "dora_fx.json"
FORMAT = "dora_fx checkpoint"
FORMAT_VERSION = 1

# Between a layer's key and the name of a parameter of the norm of its input.
NORM_OF_INPUT = ".layer_norm_"
# In the keys of experts' layers, whose tensors have an axis of experts in front, or numbers behind it in their keys.
EXPERTS = ".experts.experts."
# Values of `layout["hybrid"]`, which only a HybridModel has: attention and MLP layers alternate, or there are others.
ATTENTION_AND_MLP, OTHER_HYBRID = 1, 2

# Far above the paths of modules; longer names would fill an error message.
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class SiteSettings:
    """DoRA's settings of the layers that share a key; `scaling` follows from alpha, dim and use_rslora."""

    dim: int
    alpha: float
    scaling: float
    dropout: float
    use_rslora: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor of the checkpoint, whole over all ranks; the axis of the layers comes first."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements; raises ValueError for a dtype that torch does not have."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        """Measure a regular file."""
        with open_regular(path) as file:
            return cls(size_of(file), hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The contents of `dora_fx.json`.

    Attributes:
        save_id: unique for every save.
        versions: of the packages that wrote the checkpoint.
        layout: parallel sizes of the run that wrote it. It loads at any other sizes.
        non_homogeneous_layers: Megatron's metadata flag: keys have layer numbers, and tensors have no layer axis.
        sites: adapted layers by key, without layer numbers unless `non_homogeneous_layers`.
        tensors: by key.
        base: digests of the adapted layers' base weights by key, see `tensor_digests.py`.
        has_optimizer, has_extra: whether it holds optimizer state and the caller's `extra`.
        files: by name.
        numbered_experts: keys have numbers of experts too, since some experts have no adapter.
    """

    save_id: str
    versions: dict[str, str]
    layout: dict[str, int]
    non_homogeneous_layers: bool
    sites: dict[str, SiteSettings]
    tensors: dict[str, StoredTensor]
    base: dict[str, str]
    has_optimizer: bool
    has_extra: bool
    files: dict[str, StoredFile]
    numbered_experts: bool = False

    def write(self, directory: Path) -> None:
        """Write the file, with a checksum of its own contents."""
        content: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        for site in content["sites"].values():
            # A reader refuses fields that it does not know, so a field of a later version is left out at its default.
            if not site["use_rslora"]:
                del site["use_rslora"]
        if not self.numbered_experts:
            del content["numbered_experts"]
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest in a checkpoint's directory.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or has another format.
    """
    path = directory / MANIFEST
    try:
        content = read_json(path)
        found_format, version, checksum = (content.pop(key) for key in ("format", "format_version", "checksum"))
        own_checksum = _checksum({"format": found_format, "format_version": version} | content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); load another checkpoint") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = _without_name(path, error)
        raise CheckpointError(
            f"{path}: the file is damaged or not dora_fx's ({reason}); load another checkpoint"
        ) from error
    if found_format != FORMAT or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: found format {shortened(found_format)} of version {shortened(version)}, expected {FORMAT!r} of "
            f"version {FORMAT_VERSION}; load it with the version of dora_fx that wrote it"
        )
    # After the version, since a later format may compute its checksum in another way.
    if checksum != own_checksum:
        raise CheckpointError(f"{path}: the file is damaged, its checksum does not match; load another checkpoint")
    try:
        # A matching checksum proves nothing of who wrote the file, so types and values are checked as well.
        manifest: Manifest = _typed(Manifest, content, "it")
        _check_values(directory, manifest)
    except ValueError as error:
        reason = _without_name(path, error)
        raise CheckpointError(f"{path}: {reason}; it is not what dora_fx writes, load another checkpoint") from error
    return manifest


def _without_name(path: Path, error: Exception) -> str:
    return str(error).removeprefix(f"{path}: ")


def check_file(directory: Path, name: str, expected: StoredFile) -> None:
    """Raise CheckpointError, naming the file, unless it has the size and checksum of the manifest.

    The checksum is computed only for a regular file of the right size.
    """
    path = directory / name
    try:
        with open_regular(named_beside(directory / MANIFEST, name)) as file:
            found = size_of(file)
            is_whole = found == expected.size and hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; load another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); load another checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"{error}; load another checkpoint") from error
    if found != expected.size:
        raise CheckpointError(
            f"{path}: found {found} bytes, expected {expected.size}; the file is damaged, load another checkpoint"
        )
    if not is_whole:
        raise CheckpointError(f"{path}: the file is damaged, its checksum does not match; load another checkpoint")


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of a name such as `bfloat16`; raise ValueError for other names."""
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"found dtype {shortened(name)}, expected one of torch's")
    return dtype


def _typed(kind: Any, value: Any, name: str) -> Any:
    """Convert a JSON value to the type of a manifest's field; raise ValueError if it does not fit."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        required = {own.name for own in dataclasses.fields(kind) if own.default is dataclasses.MISSING}
        if not isinstance(value, dict) or not required <= value.keys() <= hints.keys():
            raise ValueError(f"{name} is {shortened(value)}, expected an object of {', '.join(hints)}")
        return kind(**{field: _typed(hints[field], value[field], f"{name}.{field}") for field in value})
    if get_origin(kind) is dict:
        if not isinstance(value, dict) or not all(map(_is_name, value)):
            raise ValueError(f"{name} is {shortened(value)}, expected an object with printable names")
        return {key: _typed(get_args(kind)[1], part, f"{name}.{key}") for key, part in value.items()}
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} is {shortened(value)}, expected a list")
        return tuple(_typed(get_args(kind)[0], part, name) for part in value)
    if not _is_plain(kind, value):
        raise ValueError(f"{name} is {shortened(value)}, expected {_PLAIN[kind]}")
    return value


_PLAIN = {str: "printable text", bool: "true or false", int: "a number from 0", float: "a finite number"}


def _is_plain(kind: type, value: Any) -> bool:
    if kind is str:
        return isinstance(value, str) and _is_name(value)
    if kind is bool:
        return isinstance(value, bool)
    is_whole = isinstance(value, int) and 0 <= value < 2**63
    return is_whole if kind is int else is_whole or (isinstance(value, float) and math.isfinite(value))


def _is_name(text: str) -> bool:
    """Return whether a text is safe to print: terminals execute control sequences."""
    return text.isprintable() and len(text) <= _LONGEST_NAME


def _check_values(directory: Path, manifest: Manifest) -> None:
    """Raise ValueError for values of the right types that no save writes."""
    for name, file in manifest.files.items():
        named_beside(directory / MANIFEST, name)
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise ValueError(f"files.{name}.sha256 is {shortened(file.sha256)}, expected a SHA-256 in hexadecimal")
    for key, site in manifest.sites.items():
        if site.dim == 0 or site.scaling != low_rank_scaling(site.alpha, site.dim, site.use_rslora):
            raise ValueError(f"sites.{key}.scaling is {site.scaling:g}, which dim and alpha do not make")
    lacking = {"tp", "pp", "vpp", "cp", "dp", "sequence_parallel"} - manifest.layout.keys()
    if lacking:
        raise ValueError(f"layout has no {min(lacking)}")
    # Readers of the manifest alone, such as `inspect`, print these sizes.
    in_tensors = sum(tensor.num_bytes for tensor in manifest.tensors.values())
    in_files = sum(file.size for file in manifest.files.values())
    if in_tensors > in_files:
        raise ValueError(f"found {in_tensors:,} bytes in tensors, expected no more than the {in_files:,} in files")


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
