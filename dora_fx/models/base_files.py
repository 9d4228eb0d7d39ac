"""Copies the files of a base model other than its weights into the folder of a new model.

Generation settings, chat templates, special tokens, the tokenizer's own files, licences and sub-folders are copied as
they are. Weights in any format and their indices are left out, also in sub-folders such as `original/`, and so are
names that start with a dot, which belong to the tool that downloaded the directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dora_fx.files import UnreadableFileError, read_json

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

# Files with the endings .bin, .pt and .pth may also hold training state of the base, which the new model does not have.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".npz", ".distcp"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".index.json", ".ckpt.index"),
)


def companion_files(base: Path) -> list[Path]:
    """Return the paths, within a base directory, of all files other than weights.

    Links may lead to regular files in the directory or in the Hugging Face cache that it belongs to.

    Raises:
        UnreadableFileError: a link leads somewhere else, or not to a regular file.
    """
    roots, companions = _own_roots(base), []
    for path in sorted(_paths(base)):
        if path.is_symlink():
            _check_link(path, roots)
        if path.is_file():
            companions.append(path.relative_to(base))
    return companions


def copy_companions(base: Path, target: Path) -> None:
    """Copy the files that `companion_files` lists, except config.json, into a folder; links are followed.

    Raises:
        UnreadableFileError: from `companion_files`.
        OSError: a file cannot be read or written.
    """
    for name in companion_files(base):
        if name != Path(CONFIG):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / name, target / name)


def write_config(base: Path, config: Any, dtype: torch.dtype, target: Path) -> None:
    """Write the base's config.json with the dtype of the new weights and the tying of the base's tensors.

    Everything else stays as the base's author wrote it, since other readers know older names than transformers' newest.
    """
    fields = read_json(base / CONFIG, follow_link=True)
    name = str(dtype).removeprefix("torch.")
    fields |= {key: name for key in ("torch_dtype", "dtype") if key in fields} or {"dtype": name}
    fields["tie_word_embeddings"] = config.tie_word_embeddings
    (target / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _paths(folder: Path) -> Iterator[Path]:
    """Yield the paths in a folder, except weights and names that start with a dot."""
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # os.walk lists a link to a folder among the folders and does not follow it.
        for name in (*names, *folders):
            if not name.startswith(".") and not name.lower().endswith(_WEIGHTS):
                yield Path(parent, name)


def _raise(error: OSError) -> None:
    raise error


def _own_roots(folder: Path) -> list[Path]:
    """Return the folder, and for a snapshot in the Hugging Face cache also the folder of blobs that it links to."""
    real = Path(os.path.realpath(folder))
    if real.parent.name != "snapshots":
        return [real]
    return [real, Path(os.path.realpath(real.parents[1] / "blobs"))]


def _check_link(path: Path, roots: list[Path]) -> None:
    real = Path(os.path.realpath(path))
    if not (real.is_file() and any(real.is_relative_to(root) for root in roots)):
        raise UnreadableFileError(
            f"{path}: found a link to {real}, expected a file of the base itself; remove it, or give --base a copy of "
            "the base without links (cp -rL)"
        )
