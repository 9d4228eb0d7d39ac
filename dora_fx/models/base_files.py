"""The files of a base model that are no weights, which travel with a model that is made of it.

Generation settings, chat templates, special tokens, the tokenizer's own files, licences and sub-folders are copied as
they are. Left out are weights in any format, also older copies in sub-folders such as `original/`, with their indices,
and names that start with a dot, which are of the tool that fetched the directory.
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

# .bin, .pt and .pth also hold the state of the training that made a base, which is not the new model's either.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".npz", ".distcp"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".index.json", ".ckpt.index"),
)


def companion_files(base: Path) -> list[Path]:
    """Paths, within a base directory, of the files that are no weights.

    Links may lead to regular files of the directory, or of the Hugging Face cache that it is part of.

    Raises:
        UnreadableFileError: a link leads elsewhere, or to no regular file.
    """
    roots, companions = _own_roots(base), []
    for path in sorted(_paths(base)):
        if path.is_symlink():
            _check_link(path, roots)
        if path.is_file():
            companions.append(path.relative_to(base))
    return companions


def copy_companions(base: Path, target: Path) -> None:
    """Copy the contents of `companion_files`, also of linked ones, but for config.json, into a folder.

    Raises:
        UnreadableFileError: from `companion_files`.
        OSError: a file cannot be read or written.
    """
    for name in companion_files(base):
        if name != Path(CONFIG):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / name, target / name)


def write_config(base: Path, config: Any, dtype: torch.dtype, target: Path) -> None:
    """Write the base's own config.json with the dtype of the new weights, and the tying that the base's tensors have.

    Everything else stays as the base's author wrote it, for readers that know other names than transformers' newest.
    """
    fields = read_json(base / CONFIG, follow_link=True)
    name = str(dtype).removeprefix("torch.")
    fields |= {key: name for key in ("torch_dtype", "dtype") if key in fields} or {"dtype": name}
    fields["tie_word_embeddings"] = config.tie_word_embeddings
    (target / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _paths(folder: Path) -> Iterator[Path]:
    """Everything in a folder but weights and names that start with a dot."""
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A link to a folder is among the folders, and is not followed.
        for name in (*names, *folders):
            if not name.startswith(".") and not name.lower().endswith(_WEIGHTS):
                yield Path(parent, name)


def _raise(error: OSError) -> None:
    raise error


def _own_roots(folder: Path) -> list[Path]:
    """The folder itself and, of a snapshot in the Hugging Face cache, the folder of the blobs that it links to."""
    real = Path(os.path.realpath(folder))
    if real.parent.name != "snapshots":
        return [real]
    return [real, Path(os.path.realpath(real.parents[1] / "blobs"))]


def _check_link(path: Path, roots: list[Path]) -> None:
    real = Path(os.path.realpath(path))
    if not (real.is_file() and any(real.is_relative_to(root) for root in roots)):
        raise UnreadableFileError(
            f"{path}: found a link to {real}, expected a file of the base itself; remove it, or give --base a copy of "
            "the base with the files in place of the links (cp -rL)"
        )
