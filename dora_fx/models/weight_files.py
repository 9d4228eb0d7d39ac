"""The weight files of a Hugging Face directory: their headers, compared with the config, and their tensors.

transformers drops a tensor that its model has no place for, takes the later of two with one name, draws a missing one
at random, and follows other files of the directory to other weights. Here the files are read as they are, and whatever
is not the config's model is refused by name before the first weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.models.model_tensors import (
    EMBEDDING_WEIGHT,
    OUTPUT_WEIGHT,
    check_names,
    check_shape,
    empty_model,
    expected_shapes,
)
from dora_fx.models.reading import UnreadableFileError, check_readable, reading
from dora_fx.safe_files.torch_file import check_torch_file

# In the order in which transformers looks for them.
_SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_BASE_PREFIX = "model."
_DOWNLOAD = "the file is damaged or incomplete, download it again"


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


def stored_weights(folder: Path, config: Any) -> dict[str, StoredWeight]:
    """Find every tensor of a directory by its name in the config's model, and check that they are that model's.

    Only headers are read, and of old rotary frequencies the values, which the config must give too.

    Raises:
        ValueError: there are no weight files or two sets of them; one cannot be read; a tensor is missing, there twice,
            without a place in the model, of another shape, or of integers. The message names files and tensors.
    """
    with reading(folder / "config.json", "correct it, or download it again"):
        expected = expected_shapes(config)
    found: dict[str, StoredWeight] = {}
    for file in weight_files(folder):
        check_readable(file)
        for weight in _header(file):
            name = _full_name(weight.key, expected)
            if name in found:
                raise ValueError(f"{file}: found {weight.key}, which {found[name].file.name} has too; expected it once")
            found[name] = weight
    rotary = {name: found.pop(name) for name in list(found) if name.endswith("rotary_emb.inv_freq")}
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
        with reading(file, _DOWNLOAD), _opened(file) as get:
            tensors |= {name: get(stored[name].key).to(dtype) for name in names}
    return tensors


def is_tied(config: Any, stored: Mapping[str, StoredWeight]) -> bool:
    """Tell whether the output layer is the embedding: by the config and, where the files hold both, by their values."""
    if not config.tie_word_embeddings or EMBEDDING_WEIGHT not in stored or OUTPUT_WEIGHT not in stored:
        return bool(config.tie_word_embeddings)
    both = read_weights({name: stored[name] for name in (EMBEDDING_WEIGHT, OUTPUT_WEIGHT)})
    return torch.equal(both[EMBEDDING_WEIGHT], both[OUTPUT_WEIGHT])


def weight_files(folder: Path) -> list[Path]:
    """Find the files that hold the weights of a directory.

    Raises:
        ValueError: there are none, there are two sets of them, or an index names files elsewhere.
    """
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
    check_readable(index)
    with reading(index, _DOWNLOAD):
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UnreadableFileError(f"{index}: names the file {outside[0]!r}, expected files in its own folder")
    return [index.parent / name for name in names]


def _header(file: Path) -> Sequence[StoredWeight]:
    with reading(file, _DOWNLOAD):
        if file.suffix != ".safetensors":
            tensors = _load_archive(file, "meta").items()
            return [StoredWeight(file, key, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors]
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  a file is no dict
            return [StoredWeight(file, key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A function from a tensor's name in a file to the tensor."""
    if file.suffix != ".safetensors":
        yield _load_archive(file, "cpu").__getitem__
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        yield opened.get_tensor


def _load_archive(file: Path, device: str) -> dict[str, Tensor]:
    check_torch_file(file)
    return torch.load(file, map_location=device, weights_only=True)


def _full_name(key: str, expected: Mapping[str, Any]) -> str:
    """The name in the causal language model: a decoder that was saved by itself has names without a prefix."""
    return _BASE_PREFIX + key if key not in expected and _BASE_PREFIX + key in expected else key


def _check_inverse_frequencies(config: Any, weight: StoredWeight) -> None:
    """Old checkpoints hold the rotary frequencies, which transformers computes from the config instead."""
    rotary = type(empty_model(config).model.rotary_emb)(config)
    found = read_weights({weight.key: weight}, torch.float32)[weight.key]
    # What is stored in 16 bits has lost up to 2**-8 of its value in bfloat16, and more of it where float16 underflows.
    if found.shape != rotary.inv_freq.shape or not torch.allclose(found, rotary.inv_freq, rtol=2**-7, atol=2**-24):
        raise ValueError(f"{weight.file}: {weight.key} holds other frequencies than the config's rope_parameters give")
