"""`dora_fx.json`, the file of a checkpoint that says what the others hold and how to tell that they are whole."""

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
# What `layout` has as `hybrid` of a HybridModel: layers of attention and MLP by turns, or others.
ATTENTION_AND_MLP, OTHER_HYBRID = 1, 2

_LONGEST_NAME = 1000


@dataclass(frozen=True)
class SiteSettings:
    """DoRA's settings of the layers that share a key; `scaling` is what they make of alpha and dim."""

    dim: int
    alpha: float
    scaling: float
    dropout: float
    use_rslora: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of the checkpoint: its shape over all ranks, layers in front, and its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements; raises ValueError for a dtype that torch has not."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The description of what a checkpoint holds.

    Attributes:
        save_id: differs between any two saves.
        versions: of the packages that wrote it.
        layout: sizes of the world that wrote it. It says nothing about who may load it.
        non_homogeneous_layers: Megatron's metadata flag: keys carry layer numbers, and tensors no layer axis.
        sites: adapted layers by key, without layer numbers unless `non_homogeneous_layers`.
        tensors: by key.
        base: digests of the adapted layers' base weights by key, see `tensor_digests.py`.
        has_optimizer, has_extra: whether optimizer state and the caller's `extra` are in it.
        files: by name.
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

    def write(self, directory: Path) -> None:
        """Write the file, with a checksum of its own contents."""
        content: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        for site in content["sites"].values():
            # A version that does not know rsLoRA refuses a field that it does not know, and loads what has none.
            if not site["use_rslora"]:
                del site["use_rslora"]
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint's directory.

    Raises:
        CheckpointError: it cannot be read, is damaged, or is of another format.
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
    if checksum != own_checksum:
        raise CheckpointError(f"{path}: the file is damaged, its checksum does not match; load another checkpoint")
    try:
        manifest: Manifest = _typed(Manifest, content, "it")
        _check_values(directory, manifest)
    except ValueError as error:
        reason = _without_name(path, error)
        raise CheckpointError(f"{path}: {reason}; it is not what dora_fx writes, load another checkpoint") from error
    return manifest


def _without_name(path: Path, error: Exception) -> str:
    return str(error).removeprefix(f"{path}: ")


def describe_file(path: Path) -> StoredFile:
    """Size and checksum of a regular file as it is."""
    with open_regular(path) as file:
        return StoredFile(size_of(file), hashlib.file_digest(file, "sha256").hexdigest())


def check_file(directory: Path, name: str, expected: StoredFile) -> None:
    """Raise CheckpointError, naming the file, unless it is there with the size and checksum of the manifest.

    Its bytes are looked at if it is a regular file of that size alone.
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
    """torch's dtype of a name such as `bfloat16`; raises ValueError for any other."""
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"found the dtype {shortened(name)}, expected one of torch's")
    return dtype


def _typed(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as the type of a field of the manifest; raises ValueError where it is none."""
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
    """True for a text that can be shown: a terminal obeys what is not printable."""
    return text.isprintable() and len(text) <= _LONGEST_NAME


def _check_values(directory: Path, manifest: Manifest) -> None:
    """Raise ValueError for values that no checkpoint has, although they are of the right types."""
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
    in_tensors = sum(tensor.num_bytes for tensor in manifest.tensors.values())
    in_files = sum(file.size for file in manifest.files.values())
    if in_tensors > in_files:
        raise ValueError(f"found {in_tensors:,} bytes in tensors, expected no more than the {in_files:,} in files")


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
