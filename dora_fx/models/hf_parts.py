"""Which Hugging Face linear layers a Megatron linear layer is made of, as rows of its weight.

    self_attention.linear_qkv    self_attn.q_proj, k_proj, v_proj: per query group [q ... q k v]
    self_attention.linear_proj   self_attn.o_proj
    mlp.linear_fc1               mlp.gate_proj, mlp.up_proj: [gate; up]
    mlp.linear_fc2               mlp.down_proj
    output_layer                 lm_head

The rows of a DoRA adapter's B and m are the weight's, and A serves all of them, so the same table splits and joins
weights, biases and adapters without arithmetic. Sizes are those of whole layers without padding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_fx.models.architecture import GPTArchitecture

HF_NAMES: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
OUTPUT_LAYER, LM_HEAD = "output_layer", "lm_head"

_LAYER_PATH = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class HeadShape:
    """How the rows of linear_qkv are grouped: queries of one group, and features of one head."""

    queries_per_group: int
    kv_channels: int

    @classmethod
    def of(cls, config: Any) -> HeadShape:
        """From a `GPTArchitecture` or a Megatron `TransformerConfig`."""
        return cls(config.num_attention_heads // config.num_query_groups, config.kv_channels)


def hf_paths(path: str) -> tuple[str, ...]:
    """Paths of the Hugging Face layers in a Megatron layer; none where it has no counterpart.

    Args:
        path: of the Megatron layer, with its layer's number in the whole model.
    """
    if path == OUTPUT_LAYER:
        return (LM_HEAD,)
    match = _LAYER_PATH.fullmatch(path)
    return tuple(f"model.layers.{match[1]}.{name}" for name in HF_NAMES.get(match[2], ())) if match else ()


def check_size(path: str, found: tuple[int, int], architecture: GPTArchitecture) -> None:
    """Raise ValueError unless a model has the Megatron layer `path`, with so many rows and columns."""
    match = _LAYER_PATH.fullmatch(path)
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    hidden, head = architecture.hidden_size, architecture.kv_channels
    sizes = {
        "self_attention.linear_qkv": ((heads + 2 * groups) * head, hidden),
        "self_attention.linear_proj": (hidden, heads * head),
        "mlp.linear_fc1": (2 * architecture.ffn_hidden_size, hidden),
        "mlp.linear_fc2": (hidden, architecture.ffn_hidden_size),
        OUTPUT_LAYER: (architecture.vocab_size, hidden),
    }
    expected = sizes.get(match[2] if match else path)
    if expected is None:
        raise ValueError(f"{path}: found no Hugging Face layer that it stands for, expected one of {', '.join(sizes)}")
    if match and int(match[1]) >= architecture.num_layers:
        raise ValueError(f"{path}: found an adapter of it, expected one of the {architecture.num_layers} layers")
    if found != expected:
        raise ValueError(f"{path}: found an adapter for a weight of shape {found}, the base's has {expected}")


def hf_rows(path: str, out_features: int, heads: HeadShape) -> dict[str, Tensor]:
    """Path of each Hugging Face layer -> its rows among the `out_features` rows of the Megatron layer.

    Raises:
        ValueError: the layer has no counterpart, or its rows are not those of such a layer.
    """
    names, rows = hf_paths(path), torch.arange(out_features)
    if not names:
        known = ", ".join([*HF_NAMES, OUTPUT_LAYER])
        raise ValueError(f"{path}: found no Hugging Face layer that it stands for, expected one of {known}")
    if len(names) == 1:
        return {names[0]: rows}
    if len(names) == 2:
        if out_features % 2:
            raise ValueError(f"{path}: found {out_features} rows, expected an even number, gate's and up's")
        return dict(zip(names, rows.chunk(2), strict=True))
    group = (heads.queries_per_group + 2) * heads.kv_channels
    if out_features % group:
        raise ValueError(
            f"{path}: found {out_features} rows, expected a multiple of {group}, the rows of a query group"
        )
    sizes = [heads.queries_per_group * heads.kv_channels, heads.kv_channels, heads.kv_channels]
    parts = rows.view(-1, group).split(sizes, dim=1)
    return {name: part.flatten() for name, part in zip(names, parts, strict=True)}
