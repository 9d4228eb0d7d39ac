"""Loads a base model from a directory in transformers' format or from a GGUF file."""

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
from dora_fx.models.fused_experts import are_fused, per_expert
from dora_fx.models.gguf_config import gguf_config
from dora_fx.models.gguf_tensors import gguf_state_dict, open_gguf
from dora_fx.models.hf_architectures import EMBEDDING_WEIGHT, HF_ARCHITECTURES, OUTPUT_WEIGHT
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
        config: transformers' config; `tie_word_embeddings` says whether the tensors are tied.
        state_dict: the tensors under the names of checkpoints on the hub, which are the transformers model's but for
            experts; a tied tensor has both of its names.
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
        dtype: of the returned tensors; quantised GGUF tensors are dequantised.

    Raises:
        FileNotFoundError: there is no such file or directory.
        UnsafeFileError: reading the files could run code, exhaust the memory or never end.
        UnsupportedModelError: the checkpoint has a feature that `build_gpt_model` would compute differently.
        ValueError: a file cannot be read, or the tensors are not those of the config's model. Both are checked before
            the weights are read.
    """
    _check_exists(path)
    if path.is_dir():
        config, stored = _read_directory(path)
        tokenizer = _directory_tokenizer(path)
        tensors = _with_split_experts(config, read_weights(stored, dtype))
    else:
        opened = open_gguf(path)
        config = gguf_config(opened)
        # Raises for unsupported features before the tensors are dequantised, which takes long.
        architecture_of(config)
        tokenizer = _gguf_tokenizer(path)
        tensors = gguf_state_dict(opened, config, dtype)
    return HFCheckpoint(path, config, _with_tied_names(config, tensors), tokenizer)


def load_hf_config(path: Path) -> Any:
    """Load the transformers config of a checkpoint that `load_hf_checkpoint` accepts; the weights are not read.

    The sizes in the config of a directory without weights are not checked against anything.

    Raises:
        FileNotFoundError, UnsafeFileError, UnsupportedModelError, ValueError: as from `load_hf_checkpoint`.
    """
    _check_exists(path)
    if not path.is_dir():
        return gguf_config(open_gguf(path))
    return _read_directory(path)[0] if has_weights(path) else make_config(path, read_fields(path), None)


def load_hf_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a checkpoint whose config `load_hf_config` has checked; nothing else of it is read.

    Raises:
        FileNotFoundError, UnsafeFileError, ValueError: as from `load_hf_checkpoint`.
    """
    _check_exists(path)
    return _directory_tokenizer(path) if path.is_dir() else _gguf_tokenizer(path)


def _check_exists(path: Path) -> None:
    with reading(path, "check the permissions of the folders above it"):
        exists = path.exists()
    if not exists:
        raise FileNotFoundError(f"{path}: no such file or directory")


def _read_directory(folder: Path) -> tuple[Any, Mapping[str, StoredWeight]]:
    """Read config and headers of a directory, and check them against each other."""
    fields = read_fields(folder)
    headers = read_headers(folder)
    config = make_config(folder, fields, sum(math.prod(weight.shape) for weight in headers))
    stored = weights_by_name(folder, config, headers)
    config.tie_word_embeddings = is_tied(config, stored)
    return config, stored


def _directory_tokenizer(folder: Path) -> Any:
    # The first of the tokenizer's files stands for all in messages.
    return _tokenizer(next(iter(sorted(folder.glob("tokenizer*"))), folder), folder)


def _gguf_tokenizer(path: Path) -> Any:
    # In an empty folder, since transformers prefers tokenizer files beside a GGUF file, whichever model they belong to.
    with tempfile.TemporaryDirectory() as alone:
        Path(alone, path.name).symlink_to(path.absolute())
        return _tokenizer(path, Path(alone), gguf_file=path.name)


def _tokenizer(file: Path, folder: Path, **source: str) -> Any:
    """Load transformers' tokenizer from a folder; `file` is for messages."""
    from transformers import AutoTokenizer

    with reading(file, UPGRADE):
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
        except ImportError as error:
            raise UnreadableFileError(f"{file}: a package is missing ({reason_of(error)}); install it") from error


def _with_split_experts(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split fused experts, one tensor after another; each part is a tensor of its own, as writers of files need it."""
    if not are_fused(tensors):
        return tensors
    hf = HF_ARCHITECTURES[config.model_type]
    split: dict[str, Tensor] = {}
    for name in list(tensors):
        own = {name: tensors.pop(name)}
        is_split = are_fused(own)
        split |= {part: tensor.clone() if is_split else tensor for part, tensor in per_expert(hf, own).items()}
    return split


def _with_tied_names(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the second name of a tied weight; files hold either name or both."""
    if not config.tie_word_embeddings:
        return tensors
    weight = tensors[EMBEDDING_WEIGHT if EMBEDDING_WEIGHT in tensors else OUTPUT_WEIGHT]
    return tensors | {EMBEDDING_WEIGHT: weight, OUTPUT_WEIGHT: weight}
