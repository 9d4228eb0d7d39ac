"""Tiny GGUF files with the weights of tiny Hugging Face models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}


def write_gguf(
    path: Path,
    model: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    quantisations: Mapping[str, str] | None = None,
) -> Path:
    """Write a transformers model as a GGUF file of float32 tensors with a byte-level tokenizer.

    Args:
        path: of the file.
        model: a model of an architecture in `_ARCHITECTURES`, with 64 tokens.
        metadata: keys beside or instead of the model's own; None leaves one out.
        tensors: likewise, by their names in the file.
        quantisations: of tensors whose data is packed already, by gguf's names.
    """
    architecture = _ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (model_metadata(model.config, architecture) | dict(metadata or {})).items():
        _add_metadata(writer, key, value)
    _add_tokenizer(writer, metadata or {})
    for name, tensor in (gguf_tensors(model) | dict(tensors or {})).items():
        if tensor is not None:
            kind = (quantisations or {}).get(name)
            writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[kind] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_metadata(config: Any, architecture: str) -> dict[str, Any]:
    """The keys that describe the model's shape."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    return {f"{architecture}.{key}": value for key, value in values.items()}


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's tensors by their names in a GGUF file; rows of a llama's q and k are permuted."""
    config, found = model.config, {}
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        if path == "lm_head" and config.tie_word_embeddings:
            continue
        if path in _WHOLE_NAMES:
            found[f"{_WHOLE_NAMES[path]}.{kind}"] = tensor.float().numpy()
            continue
        _, _, layer, path = path.split(".", 3)
        if _ARCHITECTURES[config.model_type] == "llama" and path in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if path.endswith("q_proj") else config.num_key_value_heads
            tensor = _permuted(tensor, heads)
        found[f"blk.{layer}.{_LAYER_NAMES[path]}.{kind}"] = tensor.float().contiguous().numpy()
    return found


def _permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """From halves to pairs of rotary dimensions, as ggml's rotation of llamas has them."""
    return weight.view(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _add_metadata(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,-'"
    tokens = ["<e>", "<b>", "\u0120", "\u010a", "th", *letters]
    tokens += [f"<{index}>" for index in range(len(tokens), 64)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    if "tokenizer.ggml.tokens" not in metadata:
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(["t h"])
    for key, value in (("eos_token_id", 0), ("bos_token_id", 1)):
        if f"tokenizer.ggml.{key}" not in metadata:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
