"""Read a base model: a directory of transformers' own format, or one GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.models.architecture import UnsupportedModelError, architecture_of
from dora_fx.models.gguf_config import gguf_config
from dora_fx.models.gguf_tensors import gguf_state_dict, open_gguf
from dora_fx.models.model_tensors import EMBEDDING_WEIGHT, OUTPUT_WEIGHT
from dora_fx.models.reading import UnreadableFileError, check_readable, reading, reason_of
from dora_fx.models.weight_files import StoredWeight, has_weights, is_tied, read_weights, stored_weights, weight_files
from dora_fx.safe_files.hf_files import check_config_sizes

# What transformers reads of a directory beside the weights.
_TEXT_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
)
_UPGRADE = "if a newer version wrote it, upgrade transformers and tokenizers; otherwise download it again"


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
        tokenizer = _tokenizer(path, path, {})
        tensors = read_weights(stored, dtype)
    else:
        opened = open_gguf(path)
        config = gguf_config(opened)
        architecture_of(config)
        tokenizer = _tokenizer(path, path.parent, {"gguf_file": path.name})
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
    return _read_directory(path)[0] if has_weights(path) else _read_config(path)


def _check_exists(path: Path) -> None:
    with reading(path, "check the permissions of the folders above it"):
        exists = path.exists()
    if not exists:
        raise FileNotFoundError(f"{path}: no such file or directory")


def _read_directory(folder: Path) -> tuple[Any, Mapping[str, StoredWeight]]:
    """Config and headers of a directory, checked against each other."""
    config = _read_config(folder)
    stored = stored_weights(folder, config)
    config.tie_word_embeddings = is_tied(config, stored)
    return config, stored


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    for pattern in _TEXT_FILES:
        for file in sorted(folder.glob(pattern)):
            check_readable(file)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder}: found adapter_config.json, a PEFT adapter's, with which transformers would change the model; "
            "expected a model alone, merge it first"
        )
    with reading(folder / "config.json", _UPGRADE):
        check_config_sizes(folder / "config.json", weight_files(folder) if has_weights(folder) else ())
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_nothing_elsewhere(folder / "config.json", config)
        architecture_of(config)
    return config


def _check_nothing_elsewhere(file: Path, config: Any) -> None:
    """Refuse a config that names other weights, or other code, than transformers' own names and classes."""
    code = getattr(config, "auto_map", None) or {}
    elsewhere = {"transformers_weights": getattr(config, "transformers_weights", None)}
    elsewhere |= {f"auto_map.{name}": value for name, value in code.items() if name.startswith("AutoModel")}
    for name, value in elsewhere.items():
        if value:
            raise UnsupportedModelError(
                f"{file}: found {name} = {value!r}, which is not followed; expected weights under transformers' own "
                "names and a model that transformers computes itself; take the field out if that is the same model"
            )


def _tokenizer(path: Path, folder: Path, source: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    file = path if path.is_file() else next(iter(sorted(folder.glob("tokenizer*"))), folder)
    with reading(file, _UPGRADE):
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
