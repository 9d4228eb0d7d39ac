"""Finds the architecture of a base by the name of a published shape, or in a Hugging Face config or a GGUF file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

from dora_fx.models import HF_ARCHITECTURES, GPTArchitecture, architecture_of, load_hf_config


class _Shape(NamedTuple):
    """Sizes as published in the model's config.json."""

    model_type: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    context: int
    tied: bool = False


_SHAPES = {
    "llama3-8b": _Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192),
    "llama3-70b": _Shape("llama", 80, 8192, 28672, 64, 8, 128, 128256, 8192),
    "llama3.1-8b": _Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "llama3.1-70b": _Shape("llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072),
    "llama3.1-405b": _Shape("llama", 126, 16384, 53248, 128, 8, 128, 128256, 131072),
    "llama3.2-1b": _Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, True),
    "llama3.2-3b": _Shape("llama", 28, 3072, 8192, 24, 8, 128, 128256, 131072, True),
    "mistral-7b": _Shape("mistral", 32, 4096, 14336, 32, 8, 128, 32768, 32768),
    "qwen2.5-0.5b": _Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768, True),
    "qwen2.5-7b": _Shape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 131072),
    "qwen2.5-32b": _Shape("qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 131072),
    "qwen2.5-72b": _Shape("qwen2", 80, 8192, 29568, 64, 8, 128, 152064, 131072),
    "qwen3-8b": _Shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960),
    "qwen3-32b": _Shape("qwen3", 64, 5120, 25600, 64, 8, 128, 151936, 40960),
    "smollm2-135m": _Shape("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, True),
    "smollm2-360m": _Shape("llama", 32, 960, 2560, 15, 5, 64, 49152, 8192, True),
    "smollm2-1.7b": _Shape("llama", 24, 2048, 8192, 32, 32, 64, 49152, 8192, True),
}

# As `dora-fx finetune` calls it.
_SHAPES["smollm2"] = _SHAPES["smollm2-135m"]

NAMED_SHAPES = tuple(_SHAPES)


def architecture_named(base: str | Path | GPTArchitecture | Any) -> GPTArchitecture:
    """Return the architecture of a base.

    Args:
        base: a name of `NAMED_SHAPES`; a Hugging Face folder, its config.json, or a GGUF file, whose weights are not
            read; a transformers config; or an architecture.

    Raises:
        ValueError: there is no such name and no such file, or the file is no config.json.
        FileNotFoundError, UnsafeFileError, UnsupportedModelError: as from `load_hf_config`.
    """
    if isinstance(base, GPTArchitecture):
        return base
    if not isinstance(base, (str, Path)):
        return architecture_of(base)
    if str(base) in _SHAPES:
        return _architecture(_SHAPES[str(base)])
    path = Path(base)
    if not path.exists():
        raise ValueError(f"base: found {str(base)!r}, which is neither a file nor a name; expected {_expected(base)}")
    if path.suffix == ".json":
        if path.name != "config.json":
            raise ValueError(f"base: found {path}, expected a config.json, its folder, or a GGUF file")
        path = path.parent
    return architecture_of(load_hf_config(path))


def _expected(base: str | Path) -> str:
    near = difflib.get_close_matches(str(base).lower(), NAMED_SHAPES, n=3, cutoff=0.5) or NAMED_SHAPES
    return f"a Hugging Face folder, a GGUF file, or a name such as {', '.join(near)}"


def _architecture(shape: _Shape) -> GPTArchitecture:
    return GPTArchitecture(
        hf=HF_ARCHITECTURES[shape.model_type],
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head,
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.context,
        layernorm_epsilon=1e-5,
        attention_dropout=0.0,
        tied_embeddings=shape.tied,
        # Neither positions nor epsilons change what a layer costs.
        rotary_base=10000.0,
    )
