"""Read a base model: a directory of transformers' own format, or one GGUF file."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.files import UnreadableFileError, reading, reason_of
from dora_fx.models.architecture import architecture_of
from dora_fx.models.gguf_config import gguf_config
from dora_fx.models.gguf_tensors import gguf_state_dict, open_gguf
from dora_fx.models.hf_architectures import EMBEDDING_WEIGHT, OUTPUT_WEIGHT
from dora_fx.models.hf_config import UPGRADE, make_config, read_fields
from dora_fx.models.weight_files import (
    StoredWeight,
    has_weights,
    is_tied,
    read_headers,
    read_weights,
    weights_by_name,
)


@dataclass(frozen=True)
class HFCheckpoint:
    """A base model.

    Attributes:
        path: the directory or file that it was read from.
        config: transformers' config, with `tie_word_embeddings` as the tensors say.
        state_dict: the tensors as the transformers model names them; one that is tied has both of its names.
        tokenizer: transformers'.
    """

    path: Path
    config: Any
    state_dict: dict[str, Tensor]
    tokenizer: Any


def load_hf_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> HFCheckpoint:
    """Load a checkpoint from local files; nothing is downloaded.

    Args:
        path: a directory with config.json, weights and a tokenizer, or a .gguf file.
        dtype: the tensors are converted to it; quantised GGUF tensors are dequantised.

    Raises:
        FileNotFoundError: there is no such file or directory.
        UnsafeFileError: reading the files could run code, take all memory or never end.
        UnsupportedModelError: the checkpoint has something that `build_gpt_model` would compute differently.
        ValueError: a file cannot be read, or the tensors are not those of the config's model; found before the
            weights are read.
    """
    _check_exists(path)
    if path.is_dir():
        config, stored = _read_directory(path)
        tokenizer = _directory_tokenizer(path)
        tensors = read_weights(stored, dtype)
    else:
        opened = open_gguf(path)
        config = gguf_config(opened)
        architecture_of(config)
        tokenizer = _gguf_tokenizer(path)
        tensors = gguf_state_dict(opened, config, dtype)
    return HFCheckpoint(path, config, _with_tied_names(config, tensors), tokenizer)


def load_hf_config(path: Path) -> Any:
    """The transformers config of a checkpoint that `load_hf_checkpoint` loads; its weights are not read.

    A directory may have a config alone, which is then taken at its word.

    Raises:
        FileNotFoundError, UnsafeFileError, UnsupportedModelError, ValueError: as `load_hf_checkpoint`.
    """
    _check_exists(path)
    if not path.is_dir():
        return gguf_config(open_gguf(path))
    return _read_directory(path)[0] if has_weights(path) else make_config(path, read_fields(path), None)


def _check_exists(path: Path) -> None:
    with reading(path, "check the permissions of the folders above it"):
        exists = path.exists()
    if not exists:
        raise FileNotFoundError(f"{path}: no such file or directory")


def _read_directory(folder: Path) -> tuple[Any, Mapping[str, StoredWeight]]:
    """Config and headers of a directory, checked against each other."""
    fields = read_fields(folder)
    headers = read_headers(folder)
    config = make_config(folder, fields, sum(math.prod(weight.shape) for weight in headers))
    stored = weights_by_name(folder, config, headers)
    config.tie_word_embeddings = is_tied(config, stored)
    return config, stored


def _directory_tokenizer(folder: Path) -> Any:
    return _tokenizer(next(iter(sorted(folder.glob("tokenizer*"))), folder), folder)


def _gguf_tokenizer(path: Path) -> Any:
    # transformers prefers the files of a tokenizer that lie beside a GGUF file, whose ever they are.
    with tempfile.TemporaryDirectory() as alone:
        Path(alone, path.name).symlink_to(path.absolute())
        return _tokenizer(path, Path(alone), gguf_file=path.name)


def _tokenizer(file: Path, folder: Path, **source: str) -> Any:
    """transformers' tokenizer of a folder; `file` is for messages."""
    from transformers import AutoTokenizer

    with reading(file, UPGRADE):
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
        except ImportError as error:
            raise UnreadableFileError(f"{file}: a package is missing ({reason_of(error)}); install it") from error


def _with_tied_names(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both names of a tied weight, of which files hold either or both."""
    if not config.tie_word_embeddings:
        return tensors
    weight = tensors[EMBEDDING_WEIGHT if EMBEDDING_WEIGHT in tensors else OUTPUT_WEIGHT]
    return tensors | {EMBEDDING_WEIGHT: weight, OUTPUT_WEIGHT: weight}
