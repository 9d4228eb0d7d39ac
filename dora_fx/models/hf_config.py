"""Reads the config of a Hugging Face directory, after a check of the files that transformers will read.

Fields of these files can lead transformers to other files and to code, and make it build lists of any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_fx.files import (
    UnsafeFileError,
    check_no_special_files,
    check_readable,
    check_sizes,
    read_json_object,
    reading,
    shortened,
)
from dora_fx.models.architecture import UnsupportedModelError, architecture_of
from dora_fx.models.base_files import CONFIG, GENERATION_CONFIG
from dora_fx.models.hf_architectures import SUPPORTED_MODEL_TYPES

UPGRADE = "if a newer version wrote it, upgrade transformers and tokenizers; otherwise download it again"

_TOKENIZER_CONFIG, _ADAPTER_CONFIG, _TOKENIZER = "tokenizer_config.json", "adapter_config.json", "tokenizer.json"
# Real normalizers replace a space by a mark. A few that each replace one character by ten make billions of one.
_LONGEST_REPLACEMENT, _MOST_NORMALIZERS = 100, 100
_WITHOUT_WEIGHTS = 1 << 62
# Files beside config and weights that transformers reads, or that are copied along with a merged model.
_TEXT_FILES = (
    *(_TOKENIZER, _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", GENERATION_CONFIG),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken", "*.jinja"),
    "additional_chat_templates/*.jinja",
)
# File -> fields in it that lead transformers to other files, in the directory or outside it.
_NAMES_OF_FILES = {
    CONFIG: ("configuration_files", "transformers_weights"),
    _TOKENIZER_CONFIG: ("fast_tokenizer_files",),
}


def read_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of config.json, after a check of every file that transformers reads beside the weights.

    Raises:
        UnsafeFileError: there is a pipe, a device or a socket in the folder.
        UnreadableFileError: a file is missing or damaged.
        UnsupportedModelError: a field leads to other files or code, or the model type is not supported.
        ValueError: there is a PEFT adapter beside the model.
    """
    with reading(folder, "take it out of the folder"):
        check_no_special_files(folder)
    contents = {CONFIG: read_json_object(folder / CONFIG)}
    for pattern in _TEXT_FILES:
        for file in sorted(folder.glob(pattern)):
            if file.suffix == ".json":
                contents[file.name] = read_json_object(file)
            else:
                check_readable(file)
    if (folder / _ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{folder}: found {_ADAPTER_CONFIG}, a PEFT adapter's, with which transformers would change the model; "
            "expected a model alone, merge it first"
        )
    for name, fields in contents.items():
        _check_nothing_elsewhere(folder / name, fields)
    _check_normalizers(folder / _TOKENIZER, contents.get(_TOKENIZER, {}).get("normalizer"))
    kind = contents[CONFIG].get("model_type")
    if kind not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"{folder / CONFIG}: found model_type = {shortened(kind)}, which is not supported; expected one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return contents[CONFIG]


def make_config(folder: Path, fields: Mapping[str, Any], elements: int | None) -> Any:
    """Make the transformers config of a directory.

    Args:
        folder: the directory.
        fields: from `read_fields`.
        elements: number of elements of all its weights; None for a directory without weights.

    Raises:
        UnsafeFileError: the fields need more weights than there are.
        UnreadableFileError: transformers cannot read them.
        UnsupportedModelError: `build_gpt_model` would compute differently.
    """
    from transformers import AutoConfig

    file = folder / CONFIG
    with reading(file, "the base is damaged or incomplete, download it again"):
        check_sizes(file, fields, _WITHOUT_WEIGHTS if elements is None else elements)
    with reading(file, UPGRADE):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        architecture_of(config)
    return config


def _check_nothing_elsewhere(file: Path, fields: Mapping[str, Any]) -> None:
    """Refuse fields that lead to other files or code than transformers' standard names and classes."""
    elsewhere = {name: fields.get(name) for name in _NAMES_OF_FILES.get(file.name, ())}
    code = fields.get("auto_map")
    if file.name == CONFIG and isinstance(code, dict):
        elsewhere |= {f"auto_map.{name}": value for name, value in code.items() if name.startswith("AutoModel")}
    for name, value in elsewhere.items():
        if value:
            raise UnsupportedModelError(
                f"{file}: found {name} = {shortened(value)}, which is not followed; expected files under transformers' "
                "own names and a model that transformers computes itself; take the field out if that is the same model"
            )


def _check_normalizers(file: Path, normalizer: Any) -> None:
    """Refuse normalizers that together expand a character far more than those of any real model."""
    pending, length, count = [normalizer], 1, 0
    while pending and count <= _MOST_NORMALIZERS and length <= _LONGEST_REPLACEMENT:
        current, count = pending.pop(), count + 1
        if isinstance(current, dict):
            inner, content = current.get("normalizers"), current.get("content")
            pending.extend(inner if isinstance(inner, list) else [])
            length *= max(1, len(content)) if current.get("type") == "Replace" and isinstance(content, str) else 1
    if count > _MOST_NORMALIZERS or length > _LONGEST_REPLACEMENT:
        raise UnsafeFileError(
            f"{file}: found {count} normalizers that expand one character to {length:,} or more, expected at most "
            f"{_MOST_NORMALIZERS} and {_LONGEST_REPLACEMENT}; download it again"
        )
