"""Translates a GGUF file's metadata to a transformers config; keys of the model with an unknown effect are refused.

transformers' own reader ignores keys that its table lacks (`rope.scaling.*`, `rope_freqs.weight`, the head size of most
models) and uses its classes' defaults for keys that a file lacks. The names and defaults here are llama.cpp's, from its
GGUF documentation, `llama-model.cpp` and `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dora_fx.files import reading
from dora_fx.models.architecture import LLAMA3_CONSTANTS, UnsupportedModelError
from dora_fx.models.gguf_tensors import DOWNLOAD, ROPE_FREQS, TOKEN_EMBEDDING, GGUFFile
from dora_fx.models.hf_architectures import GGUF_ARCHITECTURES

_DEFAULT_ROPE_BASE = 10000.0
# Keys that are read below, or that do not change what the model computes.
_READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
# Keys that change what the model computes unless they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}


def gguf_config(opened: GGUFFile) -> Any:
    """Build the transformers config of a GGUF file's model.

    Raises:
        UnsupportedModelError: the architecture or a key is not supported; the message names the key and its value.
        ValueError: a key that the model needs is missing or is not a number.
    """
    from transformers import AutoConfig

    with reading(opened.path, DOWNLOAD):
        architecture = opened.metadata["general.architecture"]
        if architecture not in GGUF_ARCHITECTURES:
            _refuse(opened, "general.architecture", architecture, f"one of {', '.join(GGUF_ARCHITECTURES)}")
        _check_whole_model(opened)
        values = _Values(opened, architecture)
        _check_keys(opened, architecture)
        model_type = GGUF_ARCHITECTURES[architecture].model_type
        return AutoConfig.for_model(model_type, **_shape(values), **_tokens(opened.metadata))


class _Values:
    """The numbers under one architecture's keys."""

    def __init__(self, opened: GGUFFile, architecture: str) -> None:
        self.opened = opened
        self.prefix = architecture

    def number(self, name: str, default: Any = None) -> Any:
        """Return a number; raise ValueError if it is missing without a default, or is a list with one per layer."""
        key = f"{self.prefix}.{name}"
        value = self.opened.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "no such key" if value is None else repr(value)
            raise UnsupportedModelError(f"{self.opened.path}: {key}: found {found}, expected one number for all layers")
        return value

    def same(self, name: str, expected: Any, meaning: str) -> None:
        """Raise UnsupportedModelError unless a key is absent or has the expected value."""
        found = self.number(name, expected)
        if found != expected:
            _refuse(self.opened, f"{self.prefix}.{name}", found, f"{expected}, {meaning}")


def _shape(values: _Values) -> dict[str, Any]:
    heads, hidden = values.number("attention.head_count"), values.number("embedding_length")
    head_dim = values.number("attention.key_length", values.number("rope.dimension_count", hidden // heads))
    values.same("attention.value_length", head_dim, "the length of a key")
    values.same("rope.dimension_count", head_dim, "the length of a key: all of a head is rotated")
    vocab_size = values.opened.shape(TOKEN_EMBEDDING)[0]
    values.same("vocab_size", vocab_size, f"the rows of {TOKEN_EMBEDDING}")
    return dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=values.number("feed_forward_length"),
        num_hidden_layers=values.number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=values.number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=values.number("context_length"),
        rms_norm_eps=values.number("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope_parameters(values, head_dim),
        tie_word_embeddings="output.weight" not in values.opened.tensors,
    )


def _rope_parameters(values: _Values, head_dim: int) -> dict[str, Any]:
    base = values.number("rope.freq_base", _DEFAULT_ROPE_BASE)
    # In llama.cpp a factor without a type is linear, and a factor of 0 is none.
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 0.0)) or 1.0
    key = f"{values.prefix}.rope.scaling.type"
    kind = values.opened.metadata.get(key, "linear")
    if kind not in ("none", "linear"):
        _refuse(values.opened, key, kind, "none or linear")
    is_linear = kind == "linear" and factor != 1.0
    llama3_factor = _llama3_factor(values.opened, base, head_dim)
    if llama3_factor is not None:
        if is_linear:
            _refuse(values.opened, key, f"{kind} by {factor}", f"none beside {ROPE_FREQS}")
        return dict(rope_type="llama3", rope_theta=base, factor=llama3_factor, **LLAMA3_CONSTANTS)
    if is_linear:
        return dict(rope_type="linear", rope_theta=base, factor=factor)
    return dict(rope_type="default", rope_theta=base)


def _llama3_factor(opened: GGUFFile, base: float, head_dim: int) -> float | None:
    """Return the factor of Llama 3's rotary scaling, of which a GGUF file holds a divisor per frequency."""
    if ROPE_FREQS not in opened.tensors:
        return None
    divisors = opened.values(ROPE_FREQS).astype(np.float64)
    if divisors.shape == (head_dim // 2,):
        # The lowest frequencies are divided by the factor itself, and the highest by one.
        factor = float(divisors.max())
        if np.all(divisors == 1.0):
            return None
        if np.allclose(divisors, llama3_divisors(base, head_dim, factor), rtol=1e-5, atol=0.0):
            return factor
    constants = ", ".join(f"{name} {value:g}" for name, value in LLAMA3_CONSTANTS.items())
    raise UnsupportedModelError(
        f"{opened.path}: found other divisors of the {head_dim // 2} rotary frequencies in {ROPE_FREQS}, expected "
        f"those of Llama 3's scaling with {constants}"
    )


def llama3_divisors(base: float, head_dim: int, factor: float) -> np.ndarray:
    """Compute the divisors of Llama 3's rotary frequencies, `[head_dim / 2]`, as `convert_hf_to_gguf.py` does."""
    low, high, original = LLAMA3_CONSTANTS.values()
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's special tokens; generation ends at the end of a text, of a turn or of a message."""
    bos, eos, eot, eom, pad = (
        metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")
    )
    ends = [token for token in dict.fromkeys((eos, eot, eom)) if token is not None]
    return dict(bos_token_id=bos, eos_token_id=ends if len(ends) > 1 else eos, pad_token_id=pad)


def _check_whole_model(opened: GGUFFile) -> None:
    kind, parts = opened.metadata.get("general.type", "model"), opened.metadata.get("split.count", 0)
    if kind != "model":
        _refuse(opened, "general.type", kind, "model")
    if parts > 1:
        _refuse(opened, "split.count", parts, "one file; join the parts with: llama-gguf-split --merge")


def _check_keys(opened: GGUFFile, architecture: str) -> None:
    for key, value in opened.metadata.items():
        prefix, _, name = key.partition(".")
        if prefix != architecture or name in _READ or value in _NEUTRAL.get(name, ()):
            continue
        neutral = " or ".join(map(repr, _NEUTRAL.get(name, ()))) or "no such key, since its effect is unknown"
        _refuse(opened, key, value, neutral)


def _refuse(opened: GGUFFile, key: str, found: object, expected: str) -> None:
    raise UnsupportedModelError(f"{opened.path}: {key} is {found!r}, which is not supported; expected {expected}")
