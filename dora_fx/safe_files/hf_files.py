"""Base models of somebody else, looked at before transformers opens them by their paths."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dora_fx.safe_files.gguf_header import check_gguf_file
from dora_fx.safe_files.json_file import read_json
from dora_fx.safe_files.model_sizes import MOST_LAYERS, check_sizes
from dora_fx.safe_files.regular_file import UnsafeFileError, plain_name, shortened
from dora_fx.safe_files.torch_file import check_torch_file

_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"


def check_base_files(path: Path) -> None:
    """Check a Hugging Face directory or a GGUF file.

    safetensors files are left to their own reader, which compares every length and offset with the file's size.

    Raises:
        UnsafeFileError: reading it could run code, open other files, take all memory or never end.
        OSError: a file cannot be read.
    """
    if path.is_dir():
        _check_directory(path)
    else:
        check_gguf_file(path)


def _check_directory(path: Path) -> None:
    for entry in path.iterdir():
        # Links are followed, since the caches of models are made of them.
        mode = entry.stat().st_mode if entry.exists() else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UnsafeFileError(f"{entry}: found no regular file, expected the files of a model alone")
    if (path / "adapter_config.json").exists():
        raise UnsafeFileError(
            f"{path}: has an adapter_config.json, with which transformers would change the model; "
            "give the directory of the base alone"
        )
    weights = list(_weight_files(path))
    for file in weights:
        if file.suffix != ".safetensors":
            check_torch_file(file)
    if (path / "config.json").exists():
        # A directory without weights may still be asked for its configuration.
        elements = 8 * sum(os.stat(file).st_size for file in weights) if weights else 1 << 62
        _check_config(path / "config.json", read_json(path / "config.json", follow_link=True), elements)


def _weight_files(path: Path) -> Iterator[Path]:
    """The files that transformers would read the weights from, in its order of preference."""
    for name in (_SAFETENSORS, _PICKLED):
        if (path / name).exists():
            yield path / name
            return
        index = path / f"{name}.index.json"
        if index.exists():
            yield from _files_of_index(index)
            return


def _files_of_index(path: Path) -> Iterator[Path]:
    index = read_json(path, follow_link=True)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise UnsafeFileError(f"{path}: found no object weight_map, expected the index of a model's files")
    for name in _distinct(path, names.values()):
        file = plain_name(path.parent, name)
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file, although {path.name} names it")
        yield file


def _distinct(path: Path, names: Iterable[object]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str):
            raise UnsafeFileError(f"{path}: found {shortened(name)} in weight_map, expected names of files")
        found[name] = None
    return list(found)


def _check_config(path: Path, config: Any, elements: int) -> None:
    if not isinstance(config, dict):
        raise UnsafeFileError(f"{path}: found a {type(config).__name__}, expected an object")
    check_sizes(path, config, elements)
    # Configurations of other kinds of model, and of parts of a model, are made before they are refused.
    parts = [config]
    while parts:
        part = parts.pop()
        for name, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            elif "layer" in name and isinstance(value, int) and value > MOST_LAYERS:
                raise UnsafeFileError(f"{path}: found {shortened(value)} as {name}, expected at most {MOST_LAYERS:,}")
