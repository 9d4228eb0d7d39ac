"""The weight files of a Hugging Face directory: their headers, compared with the config, and their tensors.

transformers drops a tensor that its model has no place for, takes the later of two with one name, draws a missing one
at random, and follows other files of the directory to other weights. Here the files are read as they are, and whatever
is not the config's model is refused by name before the first weight is read.
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
    """A tensor in a file: where it lies and what it is called there, its shape, and its dtype as the file names it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def has_weights(folder: Path) -> bool:
    """Tell a directory with weights from one with a config alone."""
    return any((folder / name).exists() for names in _SINGLE_AND_INDEX for name in names)


def read_headers(folder: Path) -> list[StoredWeight]:
    """Find every tensor in the weight files of a directory; only headers are read.

    Raises:
        UnsafeFileError: reading a file could run code, open others, or take more memory than the file.
        ValueError: there are no weight files or two sets of them, or one cannot be read.
    """
    return [weight for file in _weight_files(folder) for weight in _header(file)]


def weights_by_name(folder: Path, config: Any, headers: Iterable[StoredWeight]) -> dict[str, StoredWeight]:
    """Tensors by their names in the config's model, once they are known to be that model's.

    Of old rotary frequencies the values are read, which the config must give too.

    Args:
        folder: the directory.
        config: of its model.
        headers: from `read_headers`.

    Raises:
        ValueError: a tensor is missing, there twice, without a place in the model, of another shape, or of integers.
            The message names files and tensors.
    """
    with reading(folder / "config.json", "correct it, or download it again"):
        expected = expected_shapes(config)
    found: dict[str, StoredWeight] = {}
    for weight in headers:
        name = _full_name(weight.key, expected)
        if name in found:
            raise ValueError(
                f"{weight.file}: found {weight.key}, which {found[name].file.name} has too; expected it once"
            )
        found[name] = weight
    rotary = {name: found.pop(name) for name in list(found) if name.endswith(ROTARY_FREQUENCIES)}
    check_names(folder, config, found)
    for name, weight in found.items():
        check_shape(weight.file, name, weight.shape, expected[name])
        if not weight.dtype.removeprefix("torch.").lower().startswith(("f", "bf")):
            raise ValueError(f"{weight.file}: {name} is of {weight.dtype}, expected a floating-point weight")
    for weight in rotary.values():
        _check_inverse_frequencies(config, weight)
    return found


def read_weights(stored: Mapping[str, StoredWeight], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read tensors, each file once; they are converted to `dtype` where one is given.

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
    """Tell whether the output layer is the embedding: by the config and, where the files hold both, by their values."""
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
    """The tensors of a file, which is checked here, once and for all that read it later."""
    check_readable(file)
    with reading(file, _cure(file)):
        if _is_archive(file):
            check_torch_file(file)
            tensors = _tensors_of(file, torch.load(file, map_location="meta", weights_only=True))
            found = [StoredWeight(file, key, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()]
        else:
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  a file is no dict
                found = [StoredWeight(file, key, tuple(p.get_shape()), p.get_dtype()) for key, p in parts.items()]
        # A tensor of an archive may be one number as often as its shape says.
        check_elements(file, sum(math.prod(weight.shape) for weight in found), file.stat().st_size)
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A function from a tensor's name in a file to the tensor."""
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
    """The contents of an archive; raises UnsafeFileError for something else than tensors by their names."""
    if not isinstance(found, dict):
        raise UnsafeFileError(f"{file}: found a {type(found).__name__}, expected tensors by their names")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UnsafeFileError(f"{file}: found a {kind} as {shortened(name)}, expected tensors by their names")
    return found


def _full_name(key: str, expected: Mapping[str, Any]) -> str:
    """The name in the causal language model: a decoder that was saved by itself has names without a prefix."""
    return DECODER_PREFIX + key if key not in expected and DECODER_PREFIX + key in expected else key


def _check_inverse_frequencies(config: Any, weight: StoredWeight) -> None:
    """Old checkpoints hold the rotary frequencies, which transformers computes from the config instead."""
    rotary = type(empty_model(config).base_model.rotary_emb)(config)
    found = read_weights({weight.key: weight}, torch.float32)[weight.key]
    # What is stored in 16 bits has lost up to 2**-8 of its value in bfloat16, and more of it where float16 underflows.
    if found.shape != rotary.inv_freq.shape or not torch.allclose(found, rotary.inv_freq, rtol=2**-7, atol=2**-24):
        raise ValueError(f"{weight.file}: {weight.key} holds other frequencies than the config's rope_parameters give")
