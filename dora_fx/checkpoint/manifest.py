"""`dora_fx.json`, the file of a checkpoint that says what the others hold and how to tell that they are whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_fx.checkpoint.failing_together import CheckpointError

MANIFEST = "dora_fx.json"
FORMAT = "dora_fx checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SiteSettings:
    """DoRA's settings of the layers that share a key; `scaling` is alpha / dim."""

    dim: int
    alpha: float
    scaling: float
    dropout: float


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of the checkpoint: its shape over all ranks, layers in front, and its dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

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
    layout: dict[str, Any]
    non_homogeneous_layers: bool
    sites: dict[str, SiteSettings]
    tensors: dict[str, StoredTensor]
    base: dict[str, str]
    has_optimizer: bool
    has_extra: bool
    files: dict[str, StoredFile]

    def write(self, directory: Path) -> None:
        """Write the file, with a checksum of its own contents."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint's directory.

    Raises:
        CheckpointError: it cannot be read, is damaged, or is of another format.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        found_format, version, checksum = (content.pop(key) for key in ("format", "format_version", "checksum"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); load another checkpoint") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the file is damaged or not dora_fx's ({error}); load another checkpoint"
        ) from error
    if found_format != FORMAT or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: found format {found_format!r} of version {version!r}, expected {FORMAT!r} of version "
            f"{FORMAT_VERSION}; load it with the version of dora_fx that wrote it"
        )
    if checksum != _checksum({"format": found_format, "format_version": version} | content):
        raise CheckpointError(f"{path}: the file is damaged, its checksum does not match; load another checkpoint")
    return Manifest(
        **content
        | {
            "sites": {key: SiteSettings(**value) for key, value in content["sites"].items()},
            "tensors": {
                key: StoredTensor(tuple(value["shape"]), value["dtype"]) for key, value in content["tensors"].items()
            },
            "files": {name: StoredFile(**value) for name, value in content["files"].items()},
        }
    )


def describe_file(path: Path) -> StoredFile:
    """Size and checksum of a file as it is."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return StoredFile(file.tell(), digest)


def check_file(directory: Path, name: str, expected: StoredFile) -> None:
    """Raise CheckpointError, naming the file, unless it is there with the size and checksum of the manifest."""
    path = directory / name
    try:
        found = describe_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; load another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); load another checkpoint") from error
    if found.size != expected.size:
        raise CheckpointError(
            f"{path}: found {found.size} bytes, expected {expected.size}; the file is damaged, load another checkpoint"
        )
    if found.sha256 != expected.sha256:
        raise CheckpointError(f"{path}: the file is damaged, its checksum does not match; load another checkpoint")


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
