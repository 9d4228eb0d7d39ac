"""Reads a GGUF file: its metadata, and its tensors under the names of transformers' model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_fx.files import check_gguf_file, check_readable, reading
from dora_fx.models.hf_architectures import HF_ARCHITECTURES, LINEAR_QKV
from dora_fx.models.model_tensors import check_names, check_shape, expected_shapes

TOKEN_EMBEDDING, ROPE_FREQS = "token_embd.weight", "rope_freqs.weight"
DOWNLOAD = "download it again, or convert it anew with llama.cpp"


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: of the file.
        metadata: its keys and values, without the tokenizer's long lists.
        tensors: gguf's records of the tensors by name; the data stays in the file until it is read.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape with rows first; GGUF has columns first."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: found no {name}, expected a whole model")
        return tuple(reversed(self.tensors[name].shape.tolist()))

    def values(self, name: str) -> np.ndarray:
        """Read a tensor as float32, and dequantise it if it is quantised."""
        from gguf import dequantize

        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.tensor_type)


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file and read its header and metadata.

    Raises:
        UnreadableFileError: the file is not a GGUF file, or is damaged.
        UnsafeFileError: its header states more than the file can hold.
    """
    from gguf import GGUFReader

    check_readable(path)
    with reading(path, DOWNLOAD):
        check_gguf_file(path)
        reader = GGUFReader(path)
        # Without the tokenizer's lists of tokens and merges, which take long to decode and which transformers reads
        # itself.
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        metadata |= {key: field.contents() for key, field in reader.fields.items() if key.endswith("_token_id")}
        return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def gguf_state_dict(opened: GGUFFile, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read the tensors of a GGUF file under the names and in the shapes of the config's transformers model.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape, or cannot be dequantised.
    """
    expected = expected_shapes(config)
    hf_names = _hf_names(config, expected)
    gguf_names = {hf_names.get(name, name): name for name in opened.tensors if name != ROPE_FREQS}
    check_names(opened.path, config, gguf_names, expected)
    tensors = {}
    for name, gguf_name in gguf_names.items():
        check_shape(opened.path, gguf_name, opened.shape(gguf_name), expected[name])
        with reading(opened.path, f"{gguf_name} may have a type of quantisation that gguf does not know; {DOWNLOAD}"):
            values = torch.from_numpy(np.array(opened.values(gguf_name), dtype=np.float32))
        tensors[name] = _rotary_halves(config, name, values).to(dtype)
    return tensors


def _hf_names(config: Any, expected: Iterable[str]) -> dict[str, str]:
    """Return names in the file -> names in the model."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    gguf = HF_ARCHITECTURES[config.model_type].gguf
    assert gguf is not None, f"gguf_config makes no config of model_type {config.model_type}"
    names = get_tensor_name_map(MODEL_ARCH[gguf.upper()], config.num_hidden_layers)
    parts = {name: name.rpartition(".") for name in expected}
    return {f"{names.get_name(path)}.{kind}": name for name, (path, _, kind) in parts.items()}


def _rotary_halves(config: Any, name: str, weight: Tensor) -> Tensor:
    """Reorder the rows of q and k from ggml's pairs of rotary dimensions to transformers' two halves."""
    hf = HF_ARCHITECTURES[config.model_type]
    if not hf.gguf_rotary_pairs:
        return weight
    query, key, _ = hf.linears[LINEAR_QKV]
    if name.endswith(f".{query}.weight"):
        num_heads = config.num_attention_heads
    elif name.endswith(f".{key}.weight"):
        num_heads = config.num_key_value_heads
    else:
        return weight
    return weight.view(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
