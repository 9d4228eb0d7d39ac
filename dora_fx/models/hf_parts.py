"""Splits the rows of a Megatron linear layer into the rows of the Hugging Face layers that it combines.

    linear_qkv     blocks query, key and value, interleaved: per query group [q ... q k v]
    linear_fc1     blocks gate and up: [gate; up], also in an expert
    others         one block

`hf_architectures.py` says which Hugging Face layers have one block and which have several. B and m of a DoRA adapter
have the rows of the weight, and all rows share A, so the same indices split and join weights, biases and adapters
without arithmetic. Sizes are those of whole layers without padding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_fx.megatron import expert_number_maybe
from dora_fx.models.architecture import GPTArchitecture
from dora_fx.models.hf_architectures import (
    EXPERT_FC1,
    EXPERT_FC2,
    LAYERS,
    LINEAR_FC1,
    LINEAR_FC2,
    LINEAR_PROJ,
    LINEAR_QKV,
    LM_HEAD,
    OUTPUT_LAYER,
    HFArchitecture,
    is_fc1,
    numberless,
)

_LAYER_PATH = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class HFParts:
    """Maps a Megatron model's linear layers to Hugging Face layers.

    Attributes:
        hf: the architecture, which has the names.
        queries_per_group, kv_channels: grouping of linear_qkv's rows: queries per group and features per head.
        num_query_groups: including groups that are padding.
        ffn_hidden_size: rows of gate, and of up, of the MLP or of each expert.
        num_experts: in each layer; 0 for an MLP.
    """

    hf: HFArchitecture
    queries_per_group: int
    kv_channels: int
    num_query_groups: int
    ffn_hidden_size: int
    num_experts: int

    @classmethod
    def of(cls, hf: HFArchitecture, config: Any) -> HFParts:
        """Take the sizes from a `GPTArchitecture` or a Megatron `TransformerConfig`."""
        groups = config.num_query_groups or config.num_attention_heads
        if isinstance(config, GPTArchitecture):
            ffn, num_experts = config.ffn_hidden_size, config.num_experts
        else:
            num_experts = getattr(config, "num_moe_experts", None) or 0
            ffn = config.moe_ffn_hidden_size if num_experts else config.ffn_hidden_size
        return cls(hf, config.num_attention_heads // groups, config.kv_channels, groups, ffn, num_experts)

    def paths(self, path: str) -> tuple[str, ...]:
        """Return the paths of the Hugging Face layers in a Megatron layer; empty if it has no counterpart.

        Args:
            path: of the Megatron layer, with its layer's and its expert's number in the whole model.
        """
        if path == OUTPUT_LAYER:
            return (LM_HEAD,)
        match = _LAYER_PATH.fullmatch(path)
        return tuple(f"{LAYERS}.{match[1]}.{name}" for name in self.hf.names_of(match[2])) if match else ()

    def rows(self, path: str, out_features: int) -> dict[str, Tensor]:
        """Return path of each Hugging Face layer -> its row indices among the Megatron layer's `out_features` rows.

        Raises:
            ValueError: the layer has no counterpart, or its rows are not those of such a layer.
        """
        paths = self.paths(path)
        if not paths:
            known = ", ".join([*(linear.format("*") for linear in self.hf.linears), OUTPUT_LAYER])
            raise ValueError(f"{path}: found no Hugging Face layer that it stands for, expected one of {known}")
        return dict(zip(paths, self.row_parts(path, out_features), strict=True))

    def row_parts(self, path: str, out_features: int) -> tuple[Tensor, ...]:
        """Return the row indices of `rows` without the paths; `path` may be a name within a layer.

        Raises:
            ValueError: the rows are not those of such a layer.
        """
        blocks = self._blocks(path, out_features)
        # A single Hugging Face layer, such as Phi-3's qkv_proj, has all blocks one after another.
        num_parts = len(self.hf.linears.get(_within_layer(path), (LM_HEAD,)))
        return blocks if num_parts == len(blocks) else (torch.cat(blocks),)

    def has_bias(self, path: str) -> bool:
        """Return whether the Hugging Face layers of a Megatron layer have biases."""
        return self.hf.qkv_bias and _within_layer(path) == LINEAR_QKV

    def _blocks(self, path: str, out_features: int) -> tuple[Tensor, ...]:
        linear, rows = _within_layer(path), torch.arange(out_features)
        if is_fc1(linear):
            if out_features != 2 * self.ffn_hidden_size:
                raise ValueError(
                    f"{path}: found {out_features} rows, expected {2 * self.ffn_hidden_size}, twice ffn_hidden_size "
                    "for gate and up"
                )
            return rows.chunk(2)
        if linear != LINEAR_QKV:
            return (rows,)
        group = (self.queries_per_group + 2) * self.kv_channels
        if out_features % group or out_features > group * self.num_query_groups:
            raise ValueError(
                f"{path}: found {out_features} rows, expected {group} of each query group, of which there are at most "
                f"{self.num_query_groups}"
            )
        sizes = [self.queries_per_group * self.kv_channels, self.kv_channels, self.kv_channels]
        return tuple(part.flatten() for part in rows.view(-1, group).split(sizes, dim=1))


def check_size(path: str, found: tuple[int, int], architecture: GPTArchitecture) -> None:
    """Raise ValueError unless a model has the Megatron layer `path` with this number of rows and columns."""
    match = _LAYER_PATH.fullmatch(path)
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    hidden, head = architecture.hidden_size, architecture.kv_channels
    sizes = {
        LINEAR_QKV: ((heads + 2 * groups) * head, hidden),
        LINEAR_PROJ: (hidden, heads * head),
        (EXPERT_FC1 if architecture.experts else LINEAR_FC1): (2 * architecture.ffn_hidden_size, hidden),
        (EXPERT_FC2 if architecture.experts else LINEAR_FC2): (hidden, architecture.ffn_hidden_size),
        OUTPUT_LAYER: (architecture.vocab_size, hidden),
    }
    expected = sizes.get(_within_layer(path))
    if expected is None:
        known = ", ".join(name.format("*") for name in sizes)
        raise ValueError(f"{path}: found no Hugging Face layer that it stands for, expected one of {known}")
    if match and int(match[1]) >= architecture.num_layers:
        raise ValueError(f"{path}: found an adapter of it, expected one of the {architecture.num_layers} layers")
    number = expert_number_maybe(path)
    if number is not None and number >= architecture.num_experts:
        raise ValueError(f"{path}: found an adapter of it, expected one of the {architecture.num_experts} experts")
    if found != expected:
        raise ValueError(f"{path}: found an adapter for a weight of shape {found}, the base's has {expected}")


def _within_layer(path: str) -> str:
    """Return the part of a path within its layer, without an expert's number; the whole path if it is in no layer."""
    match = _LAYER_PATH.fullmatch(path)
    return numberless(match[2] if match else path)
