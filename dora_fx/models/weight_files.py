"""Reads the weight files of a Hugging Face directory, after a check of their headers against the config.

transformers ignores unexpected tensors, uses the later of two tensors with one name, initialises missing ones at
random, and lets other files of the directory redirect it to other weights. Here any difference from the config's model
is refused by name before the first weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.files import (
    UnreadableFileError,
    UnsafeFileError,
    check_elements,
    check_readable,
    check_torch_file,
    named_beside,
    read_json_object,
    reading,
    shortened,
)
from dora_fx.models.hf_architectures import DECODER_PREFIX, EMBEDDING_WEIGHT, OUTPUT_WEIGHT, ROTARY_FREQUENCIES
from dora_fx.models.model_tensors import check_names, check_shape, empty_model, expected_shapes

# In the order in which transformers looks for them.
_SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_DAMAGED = "the file is damaged or incomplete, download it again"
_DAMAGED_ARCHIVE = "download it again, or write it anew, as safetensors if you can"


@dataclass(frozen=True)
class StoredWeight:
    """A tensor in a file: the file, its key there, its shape, and its dtype as the file names it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def has_weights(folder: Path) -> bool:
    """Return whether a directory has weights, and not a config alone."""
    return any((folder / name).exists() for names in _SINGLE_AND_INDEX for name in names)


def read_headers(folder: Path) -> list[StoredWeight]:
    """List the tensors in the weight files of a directory; only headers are read.

    Raises:
        UnsafeFileError: reading a file could run code, open other files, or take more memory than the file's size.
        ValueError: there are no weight files, there are two sets of them, or a file cannot be read.
    """
    return [weight for file in _weight_files(folder) for weight in _header(file)]


def weights_by_name(folder: Path, config: Any, headers: Iterable[StoredWeight]) -> dict[str, StoredWeight]:
    """Check that the tensors are those of the config's model; return them by their names in it.

    Rotary frequencies of old checkpoints are compared with those that the config gives, and left out. Experts may have
    tensors of their own, or be fused as in transformers' model.

    Args:
        folder: the directory.
        config: of its model.
        headers: from `read_headers`.

    Raises:
        ValueError: a tensor is missing, duplicate, unexpected, of another shape, or of integers. The message names
            files and tensors.
    """
    headers = list(headers)
    with reading(folder / "config.json", "correct it, or download it again"):
        expected = expected_shapes(config, [weight.key for weight in headers])
    weights: dict[str, StoredWeight] = {}
    for weight in headers:
        name = _full_name(weight.key, expected)
        if name in weights:
            raise ValueError(
                f"{weight.file}: found {weight.key}, which {weights[name].file.name} has too; expected it once"
            )
        weights[name] = weight
    rotary = {name: weights.pop(name) for name in list(weights) if name.endswith(ROTARY_FREQUENCIES)}
    check_names(folder, config, weights, expected)
    for name, weight in weights.items():
        check_shape(weight.file, name, weight.shape, expected[name])
        if not weight.dtype.removeprefix("torch.").lower().startswith(("f", "bf")):
            raise ValueError(f"{weight.file}: {name} is of {weight.dtype}, expected a floating-point weight")
    for weight in rotary.values():
        _check_inverse_frequencies(config, weight)
    return weights


def read_weights(stored: Mapping[str, StoredWeight], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read tensors, each file once, and convert them to `dtype` if one is given.

    Raises:
        UnreadableFileError: a file cannot be read.
    """
    by_file: dict[Path, list[str]] = {}
    for name, weight in stored.items():
        by_file.setdefault(weight.file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, names in by_file.items():
        with reading(file, _cure(file)), _opened(file) as get:
            tensors |= {name: get(stored[name].key).to(dtype) for name in names}
    return tensors


def is_tied(config: Any, stored: Mapping[str, StoredWeight]) -> bool:
    """Return whether the output layer is tied: by the config and, if the files hold both tensors, by their values."""
    if not config.tie_word_embeddings or EMBEDDING_WEIGHT not in stored or OUTPUT_WEIGHT not in stored:
        return bool(config.tie_word_embeddings)
    both = read_weights({name: stored[name] for name in (EMBEDDING_WEIGHT, OUTPUT_WEIGHT)})
    return torch.equal(both[EMBEDDING_WEIGHT], both[OUTPUT_WEIGHT])


def _weight_files(folder: Path) -> list[Path]:
    for single, index in _SINGLE_AND_INDEX:
        is_single, is_sharded = (folder / single).exists(), (folder / index).exists()
        if is_single and is_sharded:
            raise ValueError(f"{folder}: found {single} and {index}, expected one of them; remove the older one")
        if is_single:
            return [folder / single]
        if is_sharded:
            return _shards(folder / index)
    names = ", ".join(name for pair in _SINGLE_AND_INDEX for name in pair)
    raise UnreadableFileError(f"{folder}: found no weights, expected one of {names}")


def _shards(index: Path) -> list[Path]:
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise UnreadableFileError(f"{index}: found no object weight_map, expected the index of a model; {_DAMAGED}")
    with reading(index, _DAMAGED):
        shards = sorted({named_beside(index, name) for name in names.values()})
    for file in shards:
        if not file.exists():
            raise UnreadableFileError(f"{file}: no such file, although {index.name} names it; download it")
    return shards


def _header(file: Path) -> list[StoredWeight]:
    """Check a file, and list its tensors. Later reads of the file do not check it again."""
    check_readable(file)
    with reading(file, _cure(file)):
        if _is_archive(file):
            check_torch_file(file)
            # On the meta device torch reads the pickle and no data.
            tensors = _tensors_of(file, torch.load(file, map_location="meta", weights_only=True))
            weights = [
                StoredWeight(file, key, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()
            ]
        else:
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  a file is no dict
                weights = [StoredWeight(file, key, tuple(p.get_shape()), p.get_dtype()) for key, p in parts.items()]
        # With strides of zero, a tensor of any shape in an archive can consist of one number.
        check_elements(file, sum(math.prod(weight.shape) for weight in weights), file.stat().st_size)
    return weights


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file; yield a function that reads a tensor by its key."""
    if _is_archive(file):
        yield torch.load(file, map_location="cpu", weights_only=True).__getitem__
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        yield opened.get_tensor


def _is_archive(file: Path) -> bool:
    return file.suffix != ".safetensors"


def _cure(file: Path) -> str:
    return _DAMAGED_ARCHIVE if _is_archive(file) else _DAMAGED


def _tensors_of(file: Path, found: object) -> dict[str, Tensor]:
    """Return the content of an archive; raise UnsafeFileError unless it is a dict of tensors by name."""
    if not isinstance(found, dict):
        raise UnsafeFileError(f"{file}: found a {type(found).__name__}, expected tensors by their names")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UnsafeFileError(f"{file}: found a {kind} as {shortened(name)}, expected tensors by their names")
    return found


def _full_name(key: str, expected: Mapping[str, Any]) -> str:
    """Return the name in the causal language model; a decoder that was saved by itself lacks the prefix."""
    return DECODER_PREFIX + key if key not in expected and DECODER_PREFIX + key in expected else key


def _check_inverse_frequencies(config: Any, weight: StoredWeight) -> None:
    """Raise ValueError unless the stored rotary frequencies are those that transformers computes from the config."""
    rotary = type(empty_model(config).base_model.rotary_emb)(config)
    found = read_weights({weight.key: weight}, torch.float32)[weight.key]
    # bfloat16 rounds by up to 2**-8 relatively, and float16 rounds small values by up to 2**-24.
    if found.shape != rotary.inv_freq.shape or not torch.allclose(found, rotary.inv_freq, rtol=2**-7, atol=2**-24):
        raise ValueError(f"{weight.file}: {weight.key} holds other frequencies than the config's rope_parameters give")
